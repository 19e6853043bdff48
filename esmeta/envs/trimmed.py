"""Batches that were filled up for their policy, of which only what is asked for is simulated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esmeta.rng import Rng
from esmeta.types import BatchedEnv, Tasks, TimeStep


class TrimmedEnv:
    """Simulates the first ``members`` x ``trials`` of ``env``; the others are copies of the last.

    For batches ``[P, B]`` whose further members and trials repeat the last one of these: what
    those do is the same, so that they are shown the same.
    """

    def __init__(self, env: BatchedEnv, members: int, trials: int) -> None:
        self._env, self._members, self._trials = env, members, trials

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[Any, TimeStep]:
        """Start the trials that are simulated; time steps are ``[population, B, ...]``."""
        self._shape = (population, tasks.index.shape[1])
        data = {name: self._cut(leaf) for name, leaf in tasks.data.items()}
        members = min(self._members, population)
        state, ts = self._env.reset(Tasks(self._cut(tasks.index), data), rng, members)
        return state, self._filled(ts)

    def step(self, state: Any, action: Tensor) -> tuple[Any, TimeStep]:
        """One step of the trials that are simulated."""
        state, ts = self._env.step(state, self._cut(action))
        return state, self._filled(ts)

    def metrics(self, state: Any) -> dict[str, Tensor]:
        """The environment's own, ``[population, B]``."""
        return {name: self._fill(leaf) for name, leaf in self._env.metrics(state).items()}

    def _cut(self, leaf: Tensor) -> Tensor:
        return leaf[: self._members, : self._trials]

    def _filled(self, ts: TimeStep) -> TimeStep:
        return TimeStep(*map(self._fill, ts))

    def _fill(self, leaf: Tensor) -> Tensor:
        if leaf.shape[:2] == self._shape:
            return leaf
        rows, columns = (
            torch.arange(wanted, device=leaf.device).clamp(max=found - 1)
            for wanted, found in zip(self._shape, leaf.shape, strict=False)
        )
        return leaf[rows][:, columns]
