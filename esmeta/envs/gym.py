"""Gymnasium environments as one batched environment: P x B simulators in lockstep, no processes.

The rule at the end of an episode is ours, as vector environments have had three: the step that
ends an episode inside a trial resets that simulator at once, shows the first observation of the
next episode, and keeps the last one of the old episode for :meth:`GymEnv.final_obs`.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections import deque
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from esmeta.envs.simulators import Pool, World, interface, pool
from esmeta.errors import EnvFailure, warn
from esmeta.rng import Rng
from esmeta.sharing import HostedState, MadeAgain, check_newest, one_at_a_time
from esmeta.tasks import SPLITS
from esmeta.types import Discrete, Tasks, TimeStep

_SEEDS = 2**31
_REMEMBERED = 10_000
"""Steps of a trial after which the beginning of an episode is too long ago to be played again."""


class GymEnv(MadeAgain):
    """P x B simulators of one Gymnasium environment, each running the episodes of one trial.

    Episode e of a trial is reset with a seed from (its task, the trial's randomness, e), so that it
    is the same with any batch mates. Simulators are shared with all environments of the same kind,
    and go back to them when their trial is over. Trials that are over cost nothing. The simulators
    cannot be copied: this is a :class:`esmeta.types.Hosted`.

    Where a simulator fails, a new one plays the episode again up to there, and the trial goes on as
    if nothing had been. If the new one fails too, or shows something else, an
    :class:`esmeta.errors.EnvFailure` gives up all trials.

    Args:
        name: id in Gymnasium's registry.
        kwargs: arguments for ``gymnasium.make``; each simulator gets a copy.
        episodes: per trial.
        limit: steps per episode; then it is truncated.
        steps: of a trial, where episodes begin anew for as long as it lasts; its last episode is
            truncated. 0: a trial is over when its ``episodes`` are.
        task_key: under this name each reset is given the number of the task as an option, and
            under ``"split"`` the split that it is of, for environments with tasks; empty: none.
        most_worlds: how many simulators of this kind may be open at a time, of all environments.
        device: where tensors are put.
    """

    def __init__(
        self,
        name: str,
        kwargs: Mapping[str, Any],
        *,
        episodes: int,
        limit: int,
        steps: int = 0,
        task_key: str = "",
        most_worlds: int = 256,
        device: torch.device | str = "cpu",
    ) -> None:
        text = json.dumps(dict(kwargs), sort_keys=True)
        found = interface(name, text)
        self._pool, self._most = pool(name, text), most_worlds
        self._name, self._task_key = name, task_key
        self._episodes, self._limit, self._length = episodes, limit, steps
        self._obs_size, self._action = found.obs_size, found.action
        self._device = device
        self._worlds: list[World | None] = []
        weakref.finalize(self, _give_back, self._pool, self._worlds)
        self.forget()

    def forget(self) -> None:
        """See :class:`esmeta.sharing.MadeAgain`; the pool knows what is another process's."""
        self._worlds.clear()
        self._state = HostedState(0, 0)

    @property
    def most_worlds(self) -> int:
        """How many trials can be begun at once: simulators that no other environment uses."""
        held = sum(world is not None for world in self._worlds)
        return max(0, self._most - self._pool.used + held)

    @one_at_a_time
    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[HostedState, TimeStep]:
        """Start one trial per task and member; the trials before them are given up."""
        shape = (population, tasks.index.shape[1])
        count = shape[0] * shape[1]
        self._give_up()
        self._worlds += self._pool.take(count, self._most)
        self._shape = shape
        self._number = _rows(tasks.data["seed"].expand(shape), 2)
        told = tasks.data.get("split")
        self._split = None if told is None else _rows(told.expand(shape), 2)
        self._rng, self._tasks = rng.fold("dynamics"), tasks
        self._seeds = self._draw_seeds(self._episodes)
        self._obs = np.zeros((count, self._obs_size), dtype=np.float32)
        self._final = np.zeros_like(self._obs)
        self._episode = np.zeros(count, dtype=np.int64)
        self._clock = np.zeros(count, dtype=np.int64)
        self._over = np.zeros(count, dtype=bool)
        self._steps = np.zeros(count, dtype=np.int64)
        self._failures = np.zeros(count, dtype=np.int64)
        self._returns = np.zeros((count, self._episodes), dtype=np.float64)
        self._actions: deque[np.ndarray] = deque(maxlen=_REMEMBERED)
        try:
            for k in range(count):
                self._begin(k)
        except BaseException:
            self._give_up()
            raise
        self._state = HostedState(self._state.trials + 1, 0)
        none = np.zeros(count, dtype=np.float32)
        no = np.zeros(count, dtype=bool)
        action = np.zeros((count, self._action.size), dtype=np.float32)
        return self._state, self._time_step(action, none, no, no, ~no, ~no)

    def _draw_seeds(self, count: int) -> np.ndarray:
        """Seeds of the first ``count`` episodes of each trial, ``[P * B, count]``."""
        draws = self._rng.integers(self._tasks.index, count, _SEEDS)
        seeds = (draws + self._tasks.data["seed"].unsqueeze(-1)) % _SEEDS
        return _rows(seeds.expand(*self._shape, -1), 2)

    def _begin(self, k: int) -> None:
        """Reset simulator ``k`` for the episode that its trial has come to."""
        if self._episode[k] >= self._seeds.shape[1]:  # the first seeds of a longer draw are these
            self._seeds = self._draw_seeds(2 * self._seeds.shape[1])
        try:
            self._obs[k] = self._reset_world(k)
        except EnvFailure as failure:
            self._renew(k)
            try:
                self._obs[k] = self._reset_world(k)
            except EnvFailure as error:
                self._fail(k, error)
            self._tell(k, failure)
        self._clock[k] = 0

    def _reset_world(self, k: int) -> np.ndarray:
        world = self._worlds[k]
        assert world is not None, "of a trial that is over"
        return world.reset(int(self._seeds[k, self._episode[k]]), self._options(k))

    def _options(self, k: int) -> dict[str, Any] | None:
        """What ``reset`` is told of the task of trial ``k``."""
        if not self._task_key:
            return None
        split = {} if self._split is None else {"split": SPLITS[self._split[k]]}
        return {self._task_key: int(self._number[k]), **split}

    @one_at_a_time
    def step(self, state: HostedState, action: Tensor) -> tuple[HostedState, TimeStep]:
        """Step the simulators of all trials that go on, one after the other.

        Discrete actions count from 0. Real ones are clipped to -1 .. 1 and scaled to the bounds of
        the environment; where it has none they are passed as they are.
        """
        self._check(state)
        given = _rows(action, 2).copy()
        if not np.isfinite(given[~self._over]).all():
            raise FloatingPointError(
                f"the policy's actions for {self._name} are not finite (weights exploded)"
            )
        count = len(self._over)
        reward = np.zeros(count, dtype=np.float32)
        terminated, truncated = np.zeros((2, count), dtype=bool)
        try:
            for k in np.flatnonzero(~self._over).tolist():
                reward[k], terminated[k], truncated[k] = self._advance(k, given[k])
        except BaseException:
            self._give_up()
            raise
        ended = terminated | truncated
        self._over |= ended & self._last()
        self._actions.append(given)
        for k in np.flatnonzero(ended & self._over).tolist():
            self._release(k)
        self._state = HostedState(state.trials, state.step + 1)
        if isinstance(self._action, Discrete):
            given = np.eye(self._action.n, dtype=np.float32)[given]
        new_episode = ended | self._over
        step = self._time_step(given, reward, terminated, truncated, new_episode, self._over)
        return self._state, step

    def _advance(self, k: int, action: np.ndarray) -> tuple[float, bool, bool]:
        """One step of simulator ``k``: reward, terminated, truncated."""
        world = self._worlds[k]
        assert world is not None, "of a trial that is over"
        try:
            seen, reward, terminated, truncated = world.step(action)
        except EnvFailure as failure:
            seen, reward, terminated, truncated = self._again(k, action, failure)
        self._obs[k] = self._final[k] = seen
        self._clock[k] += 1
        self._steps[k] += 1
        if not self._length:
            self._returns[k, self._episode[k]] += reward
        late = self._clock[k] >= self._limit or self._steps[k] == self._length
        truncated = not terminated and (truncated or late)
        if terminated or truncated:
            self._failures[k] += terminated
            self._episode[k] += 1
            if not self._last()[k]:
                self._begin(k)
        return reward, terminated, truncated

    def _again(
        self, k: int, action: np.ndarray, failure: EnvFailure
    ) -> tuple[np.ndarray, float, bool, bool]:
        """The step that failed, by another simulator that has come to it in the same way."""
        first = len(self._actions) - int(self._clock[k])
        if first < 0:
            self._fail(k, failure, "whose beginning is too long ago to play it again")
        world = self._renew(k)
        try:
            seen = self._reset_world(k)
            for given in itertools.islice(self._actions, first, None):
                seen, *_ = world.step(given[k])
            if np.array_equal(seen, self._obs[k]):
                after = world.step(action)
                self._tell(k, failure)
                return after
        except EnvFailure as error:
            self._fail(k, error)
        self._fail(k, failure, "which was not the same when it was played again")

    def _tell(self, k: int, failure: EnvFailure) -> None:
        """Say what was mended; of a failure that comes again the error tells."""
        warn(f"{failure} ({self._where(k)}); a new simulator played it again")

    def _renew(self, k: int) -> World:
        """Another simulator in place of one that failed."""
        self._release(k, drop=True)
        self._worlds[k] = world = self._pool.take(1, self._most, new=True)[0]
        return world

    def _fail(self, k: int, failure: EnvFailure, why: str = "also when played again") -> NoReturn:
        self._release(k, drop=True)
        raise EnvFailure(f"{failure} ({self._where(k)}, {why})") from failure.__cause__

    def _where(self, k: int) -> str:
        seed = self._seeds[k, self._episode[k]]
        return f"in step {self._clock[k]} of the episode with seed {seed}"

    def _release(self, k: int, *, drop: bool = False) -> None:
        """Let the simulator of trial ``k`` go, for good where it is to be dropped."""
        world, self._worlds[k] = self._worlds[k], None
        if world is not None:
            (self._pool.drop if drop else self._pool.give)(world)

    def _give_up(self) -> None:
        """Give all simulators back; the trials cannot go on."""
        self._state = HostedState(self._state.trials, -1)
        _give_back(self._pool, self._worlds)

    def _last(self) -> np.ndarray:
        """Whether an episode that has ended was the last one of its trial, bool ``[P * B]``."""
        if self._length:
            return self._steps >= self._length
        return self._episode >= self._episodes

    @one_at_a_time
    def metrics(self, state: HostedState) -> dict[str, Tensor]:
        """``length`` (steps), ``episodes`` done, ``terminated`` (share of them), ``return_k``.

        All are float32 ``[P, B]``; ``return_k`` of each episode where a trial has a number of them,
        NaN for those that did not begin.
        """
        self._check(state)
        done = self._episode
        share = np.where(done > 0, self._failures / np.maximum(done, 1), np.nan)
        scores = {"length": self._steps, "episodes": done, "terminated": share}
        if self._episodes > 1 and not self._length:
            begun = np.arange(self._episodes) <= done[:, None]
            returns = np.where(begun, self._returns, np.nan)
            scores |= {f"return_{k + 1}": returns[:, k] for k in range(self._episodes)}
        return {name: self._place(values.astype(np.float32)) for name, values in scores.items()}

    @one_at_a_time
    def final_obs(self, state: HostedState) -> Tensor:
        """What the last step of each trial led to, before any reset, float32 ``[P, B, obs]``."""
        self._check(state)
        return self._place(self._final)

    @one_at_a_time
    def close(self) -> None:
        """Close all simulators that are not used elsewhere; a later reset makes new ones."""
        self._give_up()
        self._pool.close()

    def _check(self, state: HostedState) -> None:
        check_newest(state, self._state, f"the simulators of {self._name}")

    def _place(self, values: np.ndarray) -> Tensor:
        # A copy, as the arrays go on to change.
        values = values.reshape(*self._shape, *values.shape[1:])
        return torch.from_numpy(values.copy()).to(self._device)

    def _time_step(self, action: np.ndarray, *rest: np.ndarray) -> TimeStep:
        return TimeStep(*(self._place(leaf) for leaf in (self._obs, action, *rest)))


def _give_back(pool: Pool, worlds: list[World | None]) -> None:
    """Give simulators back; the list is empty then."""
    while worlds:
        world = worlds.pop()
        if world is not None:
            pool.give(world)


def _rows(values: Tensor, axes: int) -> np.ndarray:
    """A numpy array with the first ``axes`` axes, P and B, made one."""
    return values.detach().cpu().numpy().reshape(-1, *values.shape[axes:])
