"""A task whose environment writes down what it was started with and what was done to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta.rng import Rng
from esmeta.types import Continuous, Reference, Spec, Tasks, TimeStep


class State(NamedTuple):
    time: Tensor
    """One clock for all trials, as Harlow's: without axes."""
    start: Tensor
    over: Tensor


@dataclass(frozen=True)
class Probe:
    """Every trial starts at a number of its own address, and pays actions, that number, the time.

    A trial ends with an action above ``bar``, else at the horizon. ``own`` gives trials an address
    for their start in the tasks' data, as bodies have it.
    """

    horizon: int = 6
    bar: float = math.inf
    own: bool = False
    starts: list[Tensor] = field(default_factory=list, compare=False)
    """Where the trials of every reset began ``[Q, B]``."""
    actions: list[Tensor] = field(default_factory=list, compare=False)

    @property
    def spec(self) -> Spec:
        return Spec(2, Continuous(1), self.horizon)

    @property
    def reference(self) -> Reference:
        return Reference(0.0, 1.0, "nothing")

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        index = (torch.arange(batch) if isinstance(batch, int) else batch).reshape(1, -1)
        data = {"start": rng.fold("start", split).bits(index, 1).squeeze(-1)} if self.own else {}
        return Tasks(index, data)

    def make_env(self, device: Any) -> ProbeEnv:
        return ProbeEnv(self)

    def began(self, run: Callable[[], object]) -> set[float]:
        """The starts of all trials that ``run`` begins."""
        self.starts.clear()
        run()
        return {float(number) for starts in self.starts for number in starts.flatten()}


class ProbeEnv:
    def __init__(self, task: Probe) -> None:
        self._task = task

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        address = tasks.data.get("start", tasks.index)
        start = rng.fold("dynamics").uniform(address, 1).squeeze(-1)
        self._task.starts.append(start)
        start = start.expand(population, -1).float().contiguous()
        no, zero = torch.zeros_like(start, dtype=torch.bool), torch.zeros_like(start)
        state = State(torch.zeros((), dtype=torch.int64), start, no)
        yes = ~no
        return state, TimeStep(self._obs(state), zero[..., None], zero, no, no, yes, yes)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        self._task.actions.append(action)
        time, along = state.time + 1, action[..., 0]
        paid = (along + state.start + 0.01 * time).masked_fill(state.over, 0.0)
        terminated = (along > self._task.bar) & ~state.over
        truncated = (time >= self._task.horizon) & ~terminated & ~state.over
        over = state.over | terminated | truncated
        later = State(time, state.start, over)
        return later, TimeStep(self._obs(later), action, paid, terminated, truncated, over, over)

    def _obs(self, state: State) -> Tensor:
        return torch.stack([state.start, state.time.float().expand_as(state.start)], dim=-1)

    def metrics(self, state: State) -> dict[str, Tensor]:
        return {}
