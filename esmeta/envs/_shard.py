"""One rank's share of worlds, and the shared memory that all ranks of a machine meet in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esmeta.ranks.comm import MPIComm
from esmeta.rng import Rng
from esmeta.types import BatchedEnv, Discrete, Hosted, Spec, Task, Tasks, TimeStep

_WORLDS = 4096  # asked for at a time, where worlds are tensors


class Buffers:
    """Views of one window: what the worlds ``[P, B]`` are given and give back."""

    def __init__(self, memory: memoryview, spec: Spec, shape: tuple[int, int]) -> None:
        self._at, self._memory, self._shape = 0, memory, shape
        width = spec.action.size
        discrete = isinstance(spec.action, Discrete)
        self.action = self._take(np.int64) if discrete else self._take(np.float32, width)
        self.obs = self._take(np.float32, spec.obs_size)
        self.prev_action = self._take(np.float32, width)
        self.reward = self._take(np.float32)
        self.flags = [self._take(np.bool_) for _ in range(4)]

    @property
    def time_step(self) -> list[np.ndarray]:
        """Views of the leaves of a :class:`TimeStep`, in order."""
        return [self.obs, self.prev_action, self.reward, *self.flags]

    def _take(self, dtype: Any, *more: int) -> np.ndarray:
        shape = (*self._shape, *more)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        flat = np.frombuffer(self._memory[self._at : self._at + size], dtype=dtype)
        self._at += -(-size // 64) * 64
        return flat.reshape(shape)


def _bytes(spec: Spec, shape: tuple[int, int]) -> int:
    """Size of the window of :class:`Buffers`."""
    worlds = math.prod(shape)
    return 4 * worlds * (spec.obs_size + 3 * spec.action.size + 5) + 64 * 8


class Shard:
    """One rank's share of the worlds of one environment."""

    def __init__(self, comm: MPIComm, task: Task) -> None:
        self._comm, self._spec = comm, task.spec
        self._env: BatchedEnv = task.make_env("cpu")
        self._memory = memoryview(b"")
        self._sync: Callable[[], None] = lambda: None
        own = self._env.most_worlds if isinstance(self._env, Hosted) else _WORLDS
        self.most_worlds = _together(own, comm.size)
        """How many worlds all ranks together may be asked for at a time."""
        self.scores: dict[str, Tensor] = {}

    def share_out(self, shape: tuple[int, int]) -> None:
        """Divide ``[P, B]`` worlds among the ranks, which must all call this."""
        size = _bytes(self._spec, shape)
        if size > len(self._memory):
            # With room to spare, as windows last as long as the job.
            self._memory, self._sync = self._comm.shared_memory(2 * size)
        self.buffers = Buffers(self._memory, self._spec, shape)
        self.axis = 0 if shape[0] > shape[1] else 1
        ranks, self._shape = self._comm.size, shape
        # Rounded up: where there are fewer than ranks, the last ones have nothing to do.
        bounds = [-(-shape[self.axis] * r // ranks) for r in range(ranks + 1)]
        self.counts = [b - a for a, b in itertools.pairwise(bounds)]
        first, last = bounds[self._comm.rank], bounds[self._comm.rank + 1]
        self._mine = (slice(None),) * self.axis + (slice(first, last),)
        self._empty = first == last

    def reset(self, tasks: Tasks, key: int) -> None:
        """Begin the trials of this rank's worlds."""
        if self._empty:
            return

        def cut(leaf: Tensor) -> Tensor:
            alike = self.axis == 0 and leaf.shape[0] == 1
            return leaf if alike else leaf[self._mine].contiguous()

        data = {name: cut(leaf) for name, leaf in tasks.data.items()}
        population = self.buffers.reward[self._mine].shape[0]
        self._state, ts = self._env.reset(Tasks(cut(tasks.index), data), Rng(key), population)
        self._write(ts)

    def step(self) -> None:
        """Step this rank's worlds by the actions in the window."""
        if self._empty:
            return
        self._sync()
        action = torch.from_numpy(self.buffers.action[self._mine].copy())
        self._state, ts = self._env.step(self._state, action)
        self._write(ts)

    def _write(self, ts: TimeStep) -> None:
        for target, leaf in zip(self.buffers.time_step, ts, strict=True):
            target[self._mine] = leaf.numpy()
        self._sync()

    def score(self) -> None:
        """Compute the task's own scores of this rank's worlds."""
        self.scores = {} if self._empty else self._env.metrics(self._state)

    def close(self) -> None:
        """Close this rank's simulators."""
        if isinstance(self._env, Hosted):
            self._env.close()

    def gather_scores(self, names: list[str]) -> dict[str, Tensor]:
        """The scores of all ranks' worlds, ``[P, B]``; all ranks must call this."""
        other = self._shape[1 - self.axis]
        mine = torch.empty(0, other * len(names), dtype=torch.float64, device="cpu")
        if not self._empty:
            leaves = [self.scores[name].double().movedim(self.axis, 0) for name in names]
            mine = torch.cat(leaves, dim=1)
        rows = self._comm.gather_rows(mine, self.counts)
        whole = [part.movedim(0, self.axis).float() for part in rows.split(other, dim=1)]
        return dict(zip(names, whole, strict=True))

    def tell(self) -> TimeStep:
        """What all worlds gave back, as tensors of their own on the CPU."""
        self._sync()
        return TimeStep(*(torch.from_numpy(leaf.copy()) for leaf in self.buffers.time_step))


def _together(own: int, ranks: int) -> int:
    """The most worlds ``P * B`` that leave no rank with more than ``own``, in whatever shape.

    Only the longer axis is divided, in whole rows: of so many by ``short``, a rank that has room
    for ``own // short`` gets one too many where there is one row more than all have room for.
    """
    beyond = (max(short, ranks * (own // short) + 1) * short for short in range(1, own + 2))
    return min(beyond) - 1
