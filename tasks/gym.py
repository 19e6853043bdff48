"""Any environment that is registered with Gymnasium, by its id.

Gymnasium: Towers et al. 2024, https://arxiv.org/abs/2407.17032. An environment of its own becomes
a task for meta-learning by drawing what differs between tasks from ``options[task_key]`` in its
``reset``: all episodes of a trial are given the same number there, and ``options["split"]`` says
whether it is one of ``"train"``, ``"validation"`` or ``"test"``.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import field, replace
from typing import Any

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs.gym import GymEnv
from esmeta.envs.simulators import Interface, interface
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import SPLITS, check_int, check_split, episode_steps, task_numbers
from esmeta.types import Discrete, Reference, Spec, Tasks

# Random play is measured until it is known to 2 % or so many steps were taken.
_MEASURED_STEPS = 20_000
_MEASURED_TRIALS = 8
_PRECISION = 0.02


@options_class
class Task:
    """A Gymnasium environment. Observation: its own, flattened; discrete parts one-hot.

    Discrete actions count from 0; a Box is scaled to -1 .. 1, and actions beyond are clipped.
    Every episode is reset with a seed of its own.

    Args:
        id: in Gymnasium's registry; ``"package.module:Name-v0"`` imports the module first.
        kwargs: arguments for ``gymnasium.make``, e.g. ``{"continuous": True}``.
        horizon: steps per trial, shared evenly by its episodes, each of which is truncated at its
            share; 0 takes the registered limit of an episode.
        episodes: per trial. The trial is over when all have ended, early or not.
        episode_steps: steps of an episode at most in trials that last exactly ``horizon`` steps:
            episodes begin anew for as long. For agents that learn within a trial; 0: as above.
        task_key: name of the option of ``reset`` that gets the number of the task, beside the
            option ``"split"``; empty: tasks are nothing but seeds.
        most_worlds: simulators that may be open at a time in a process; populations and held-out
            trials are evaluated in batches of as many, with the same scores.
    """

    id: str = "CartPole-v1"
    kwargs: dict[str, Any] = field(default_factory=dict)
    horizon: int = 0
    episodes: int = 1
    episode_steps: int = 0
    task_key: str = ""
    most_worlds: int = 256

    def __post_init__(self) -> None:
        if not isinstance(self.kwargs, dict):
            raise errors.UserError(
                f"kwargs is {self.kwargs!r}; it must be a table: write kwargs = {{continuous=true}}"
            )
        try:
            json.dumps(self.kwargs)
        except TypeError as error:
            raise errors.UserError(
                f"kwargs is {self.kwargs!r}: {error}; numbers, text, lists and tables can be kept "
                "in a file: register an environment of your own for more"
            ) from error
        check_int("episodes", self.episodes, 1, 1000)
        check_int("horizon", self.horizon, 0, 10_000_000)
        check_int("most_worlds", self.most_worlds, 2, 1_000_000)
        check_int("episode_steps", self.episode_steps, 0, 1_000_000)
        if self.task_key == "split":
            raise errors.UserError(
                "task_key is 'split', the option that says which split a task is of: write for "
                "example task_key='task'"
            )
        if self.episode_steps:
            self._check_trial()
        elif self.horizon:
            episode_steps(self.horizon, self.episodes)
        if self._interface.limit is None and not self.horizon:
            raise errors.UserError(
                f"horizon is 0, but {self.id} has no registered limit of steps: write horizon=1000"
            )

    def _check_trial(self) -> None:
        """Refuse trials of fixed length without a length, or with a number of episodes."""
        if not self.horizon:
            raise errors.UserError(
                f"horizon is 0 with episode_steps={self.episode_steps}: such trials last as long "
                f"as horizon says: write for example horizon={100 * self.episode_steps}"
            )
        if self.episodes != 1:
            raise errors.UserError(
                f"episodes is {self.episodes} with episode_steps={self.episode_steps}: episodes "
                "begin anew until the trial is over, however many: write episodes=1 (or "
                "episode_steps=0)"
            )

    @property
    def _interface(self) -> Interface:
        return interface(self.id, json.dumps(self.kwargs, sort_keys=True))

    @property
    def _limit(self) -> int:
        """Steps per episode."""
        whole = self.horizon // self.episodes or int(self._interface.limit or 0)
        return min(self.episode_steps or whole, whole)

    @property
    def spec(self) -> Spec:
        """Sizes as the environment says; of fixed trials, as few episodes as there can be."""
        found = self._interface
        if self.episode_steps:
            few = -(-self.horizon // self._limit)
            return Spec(found.obs_size, found.action, self.horizon, few)
        return Spec(found.obs_size, found.action, self._limit * self.episodes, self.episodes)

    def single(self, steps: int) -> Task:
        """The same tasks in trials of one episode of at most ``steps`` steps.

        Trials that have a number of episodes stay as they are.
        """
        return replace(self, horizon=steps, episode_steps=0) if self.episode_steps else self

    @property
    def reference(self) -> Reference:
        """Random: measured when first asked for. Best: the registered threshold; NaN if none.

        Of fixed trials both are those of one episode times as few as there can be.
        """
        if self.episode_steps:
            one = self.single(self._limit).reference
            few = self.spec.episodes_per_trial
            note = f"{one.note}; {few} times those of an episode"
            return Reference(one.random * few, one.best * few, note)
        return _reference(json.dumps(vars(self), sort_keys=True))

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``seed`` int64 ``[1, B]``, the number given to ``reset``.

        Seeds of the splits are different streams of 31 bits. With ``task_key`` also ``split`` int64
        ``[1, B]``, its place in :data:`esmeta.tasks.SPLITS`.
        """
        check_split(split)
        index = task_numbers(batch)
        seed = rng.fold("gym", split).integers(index, 1, 2**31).squeeze(-1)
        if not self.task_key:
            return Tasks(index, {"seed": seed})
        return Tasks(index, {"seed": seed, "split": torch.full_like(seed, SPLITS.index(split))})

    def make_env(self, device: torch.device | str) -> GymEnv:
        """Simulators in this process, tensors on ``device``."""
        return GymEnv(
            self.id,
            self.kwargs,
            episodes=self.episodes,
            limit=self._limit,
            steps=self.horizon if self.episode_steps else 0,
            task_key=self.task_key,
            most_worlds=self.most_worlds,
            device=device,
        )


@functools.cache
def _reference(key: str) -> Reference:
    task = Task(**json.loads(key))
    env = task.make_env("cpu")
    returns = torch.empty(0, dtype=torch.float64, device="cpu")
    steps, error = 0, math.inf
    while steps < _MEASURED_STEPS and not 0 < error <= _PRECISION * abs(float(returns.mean())):
        index = len(returns) + torch.arange(_MEASURED_TRIALS, device="cpu")
        for part in index.split(max(1, env.most_worlds)):
            earned, taken = _random_play(task, env, part)
            returns, steps = torch.cat([returns, earned]), steps + taken
        error = float(returns.std()) / len(returns) ** 0.5
    threshold = interface(task.id, json.dumps(task.kwargs, sort_keys=True)).threshold
    best = math.nan if threshold is None else threshold * task.episodes
    return Reference(
        float(returns.mean()),
        best,
        f"random: measured over {len(returns)} trials (s.e. {error:.2g}); best: the return at "
        "which its makers count it as solved, if they say so",
    )


def _random_play(task: Task, env: GymEnv, index: Tensor) -> tuple[Tensor, int]:
    """Returns of training trials ``index [B]`` by random actions, float64 ``[B]``; their steps."""
    spec, rng = task.spec, Rng(0).fold("reference")
    state, ts = env.reset(task.sample(index, "train", rng), rng)
    total = torch.zeros(len(index), dtype=torch.float64, device="cpu")
    for t in range(spec.horizon):
        draw = rng.fold("action", t)
        if isinstance(spec.action, Discrete):
            action = draw.integers(index, 1, spec.action.n).squeeze(-1)
        else:
            action = 2.0 * draw.uniform(index, spec.action.size) - 1.0
        state, ts = env.step(state, action.unsqueeze(0))
        total += ts.reward[0]
        if bool(ts.new_trial.all()):
            break
    return total, int(env.metrics(state)["length"].sum())
