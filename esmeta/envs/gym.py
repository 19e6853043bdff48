"""Gymnasium environments as one batched environment: P x B simulators in lockstep, no processes.

The rule at the end of an episode is ours, as vector environments have had three: the step that
ends an episode inside a trial resets that simulator at once, shows the first observation of the
next episode, and keeps the last one of the old episode for :meth:`GymEnv.final_obs`.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from esmeta.errors import UserError, nearest
from esmeta.rng import Rng
from esmeta.types import Continuous, Discrete, Tasks, TimeStep

_EXTRAS = {"box2d": "box2d", "mujoco": "mujoco", "ale_py": "atari", "ale-py": "atari"}
_SEEDS = 2**31


@dataclass(frozen=True)
class Interface:
    """What a registered environment takes and gives.

    ``limit``: its registered steps per episode, ``threshold``: the return of an episode at which
    its makers count it as solved; None where they do not say.
    """

    obs_size: int
    action: Discrete | Continuous
    limit: int | None
    threshold: float | None


class State(NamedTuple):
    """Names the trials that a :class:`GymEnv` runs and their step; the simulators hold the rest."""

    trials: int
    step: int


@functools.cache
def interface(name: str, kwargs: str) -> Interface:
    """Make the environment ``name`` once to look at it; ``kwargs`` as JSON.

    A ``UserError`` says what is wrong with the name, the arguments, the installation or a space.
    """
    world = make_world(name, json.loads(kwargs))
    try:
        _, size = _reader(name, world.observation_space)
        _, action = _actor(name, world.action_space)
        assert world.spec is not None, "made by its id"
        spec = gymnasium.spec(world.spec.id)  # before the time limit was taken off
        return Interface(size, action, spec.max_episode_steps, spec.reward_threshold)
    finally:
        world.close()


def make_world(name: str, kwargs: Mapping[str, Any]) -> gymnasium.Env:
    """One simulator without Gymnasium's time limit: the horizon of the task takes its place."""
    try:
        # That there is a newer version is said once per simulator otherwise.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gymnasium.make(name, disable_env_checker=True, max_episode_steps=-1, **kwargs)
    except gymnasium.error.DependencyNotInstalled as error:
        extra = next((ours for word, ours in _EXTRAS.items() if word in str(error).lower()), "")
        cure = f"pip install 'esmeta[{extra}]'" if extra else "see its documentation"
        raise UserError(f"id = {name!r}: {error}; {cure}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise UserError(
            f"id = {name!r}: Gymnasium has no such environment{nearest(name, gymnasium.registry)}; "
            "write a registered id, or 'package.module:Name-v0' where importing the module "
            "registers it"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"id = {name!r}: {str(error).rstrip('.')}; install it, or put it on PYTHONPATH"
        ) from error
    except (TypeError, gymnasium.error.Error) as error:
        raise UserError(
            f"id = {name!r} cannot be made with kwargs = {dict(kwargs)!r}: {error}"
        ) from error


def _reader(name: str, space: spaces.Space) -> tuple[Callable[[Any], np.ndarray], int]:
    """From an observation to a flat row of numbers, and how many."""
    if isinstance(space, spaces.Box):
        return lambda seen: np.asarray(seen).reshape(-1), int(np.prod(space.shape))
    try:
        return lambda seen: np.asarray(spaces.flatten(space, seen)), spaces.flatdim(space)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"id = {name!r}: observations {space} have no fixed number of values; wrap the "
            "environment to give a Box, or Discrete, MultiBinary, MultiDiscrete, Dict or Tuple"
        ) from error


def _actor(
    name: str, space: spaces.Space
) -> tuple[Callable[[np.ndarray], Any], Discrete | Continuous]:
    """From one of our actions to one of the environment's, and what ours are."""
    if isinstance(space, spaces.Discrete):
        return lambda action: space.start + np.int64(action), Discrete(int(space.n))
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise UserError(
            f"id = {name!r}: actions {space} are not supported; they must be Discrete or a Box of "
            "real numbers: wrap the environment, for example with gymnasium.ActionWrapper"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = np.isfinite(low) & np.isfinite(high)
    # The middle first: for bounds of -h and h an action a is exactly h times a.
    middle = np.where(bounded, np.where(bounded, low, 0) / 2 + np.where(bounded, high, 0) / 2, 0)
    half = np.where(bounded, np.where(bounded, high, 0) - middle, 1.0)

    def act(action: np.ndarray) -> np.ndarray:
        scaled = middle + half * action.reshape(low.shape).astype(np.float64)
        return np.clip(scaled, low, high).astype(space.dtype)

    return act, Continuous(int(np.prod(space.shape)))


class GymEnv:
    """P x B simulators of one Gymnasium environment, each running the episodes of one trial.

    Episode e of a trial is reset with a seed from (its task, the trial's randomness, e), so that it
    is the same with any batch mates; simulators are used again for later trials. Trials that are
    over cost nothing. The simulators cannot be copied: this is a :class:`esmeta.types.Hosted`.

    Args:
        name: id in Gymnasium's registry.
        kwargs: arguments for ``gymnasium.make``.
        episodes: per trial.
        limit: steps per episode; then it is truncated.
        steps: of a trial, where episodes begin anew for as long as it lasts; its last episode is
            truncated. 0: a trial is over when its ``episodes`` are.
        task_key: under this name each reset is given the number of the task as an option, for
            environments with tasks; empty: none.
        most_worlds: how many simulators the evaluator should ask for at a time.
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
        found = interface(name, json.dumps(dict(kwargs), sort_keys=True))
        self.most_worlds = most_worlds
        self._make = functools.partial(make_world, name, dict(kwargs))
        self._name, self._task_key = name, task_key
        self._episodes, self._limit, self._length = episodes, limit, steps
        self._obs_size, self._action = found.obs_size, found.action
        self._device = device
        self._worlds: list[gymnasium.Env] = []
        self._state = State(0, 0)

    def _grow(self, count: int) -> None:
        while len(self._worlds) < count:
            self._worlds.append(self._make())
        self._read, _ = _reader(self._name, self._worlds[0].observation_space)
        self._act, _ = _actor(self._name, self._worlds[0].action_space)

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Start one trial per task and member; the trials before them are given up."""
        shape = (population, tasks.index.shape[1])
        count = shape[0] * shape[1]
        self._grow(count)
        self._shape = shape
        self._number = _rows(tasks.data["seed"].expand(shape), 2)
        self._draw = functools.partial(self._draw_seeds, rng.fold("dynamics"), tasks)
        self._seeds = self._draw(self._episodes)
        self._obs = np.zeros((count, self._obs_size), dtype=np.float32)
        self._final = np.zeros_like(self._obs)
        self._episode = np.zeros(count, dtype=np.int64)
        self._clock = np.zeros(count, dtype=np.int64)
        self._over = np.zeros(count, dtype=bool)
        self._steps = np.zeros(count, dtype=np.int64)
        self._failures = np.zeros(count, dtype=np.int64)
        self._returns = np.zeros((count, self._episodes), dtype=np.float64)
        for k in range(count):
            self._begin(k)
        self._state = State(self._state.trials + 1, 0)
        none = np.zeros(count, dtype=np.float32)
        no = np.zeros(count, dtype=bool)
        action = np.zeros((count, self._action.size), dtype=np.float32)
        return self._state, self._time_step(action, none, no, no, ~no, ~no)

    def _draw_seeds(self, rng: Rng, tasks: Tasks, count: int) -> np.ndarray:
        """Seeds of the first ``count`` episodes of each trial, ``[P * B, count]``."""
        draws = rng.integers(tasks.index, count, _SEEDS)
        seeds = (draws + tasks.data["seed"].unsqueeze(-1)) % _SEEDS
        return _rows(seeds.expand(*self._shape, -1), 2)

    def _begin(self, k: int) -> None:
        """Reset simulator ``k`` for the episode that its trial has come to."""
        options = {self._task_key: int(self._number[k])} if self._task_key else None
        if self._episode[k] >= self._seeds.shape[1]:  # the first seeds of a longer draw are these
            self._seeds = self._draw(2 * self._seeds.shape[1])
        seed = int(self._seeds[k, self._episode[k]])
        seen, _ = self._worlds[k].reset(seed=seed, options=options)
        self._obs[k] = self._read(seen)
        self._clock[k] = 0

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """Step the simulators of all trials that go on, one after the other.

        Discrete actions count from 0. Real ones are clipped to -1 .. 1 and scaled to the bounds of
        the environment; where it has none they are passed as they are.
        """
        self._check(state)
        given = _rows(action, 2)
        count = len(self._over)
        reward = np.zeros(count, dtype=np.float32)
        terminated, truncated = np.zeros((2, count), dtype=bool)
        for k in np.flatnonzero(~self._over).tolist():
            reward[k], terminated[k], truncated[k] = self._advance(k, given[k])
        ended = terminated | truncated
        self._over |= ended & self._last()
        self._state = State(state.trials, state.step + 1)
        if isinstance(self._action, Discrete):
            given = np.eye(self._action.n, dtype=np.float32)[given]
        new_episode = ended | self._over
        step = self._time_step(given, reward, terminated, truncated, new_episode, self._over)
        return self._state, step

    def _advance(self, k: int, action: np.ndarray) -> tuple[float, bool, bool]:
        """One step of simulator ``k``: reward, terminated, truncated."""
        seen, reward, terminated, truncated, _ = self._worlds[k].step(self._act(action))
        self._obs[k] = self._final[k] = self._read(seen)
        reward, terminated = float(reward), bool(terminated)
        if not (np.isfinite(reward) and np.isfinite(self._obs[k]).all()):
            raise FloatingPointError(
                f"{self._name}: reward {reward}, observation {self._obs[k]} in step "
                f"{self._clock[k]} of the episode with seed {self._seeds[k, self._episode[k]]}"
            )
        self._clock[k] += 1
        self._steps[k] += 1
        if not self._length:
            self._returns[k, self._episode[k]] += reward
        late = self._clock[k] >= self._limit or self._steps[k] == self._length
        truncated = not terminated and (bool(truncated) or late)
        if terminated or truncated:
            self._failures[k] += terminated
            self._episode[k] += 1
            if not self._last()[k]:
                self._begin(k)
        return reward, terminated, truncated

    def _last(self) -> np.ndarray:
        """Whether an episode that has ended was the last one of its trial, bool ``[P * B]``."""
        if self._length:
            return self._steps >= self._length
        return self._episode >= self._episodes

    def metrics(self, state: State) -> dict[str, Tensor]:
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

    def final_obs(self, state: State) -> Tensor:
        """What the last step of each trial led to, before any reset, float32 ``[P, B, obs]``."""
        self._check(state)
        return self._place(self._final)

    def close(self) -> None:
        """Close all simulators; a later reset makes new ones."""
        while self._worlds:
            self._worlds.pop().close()

    def _check(self, state: State) -> None:
        if state != self._state:
            raise RuntimeError(
                f"trials {state.trials} at step {state.step} were left: the simulators of "
                f"{self._name} now run trials {self._state.trials} at step {self._state.step} and "
                "cannot go back; finish trials before new ones begin, or make another environment"
            )

    def _place(self, values: np.ndarray) -> Tensor:
        # A copy, as the arrays go on to change.
        values = values.reshape(*self._shape, *values.shape[1:])
        return torch.from_numpy(values.copy()).to(self._device)

    def _time_step(self, action: np.ndarray, *rest: np.ndarray) -> TimeStep:
        return TimeStep(*(self._place(leaf) for leaf in (self._obs, action, *rest)))


def _rows(values: Tensor, axes: int) -> np.ndarray:
    """A numpy array with the first ``axes`` axes, P and B, made one."""
    return values.detach().cpu().numpy().reshape(-1, *values.shape[axes:])
