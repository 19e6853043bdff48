"""Score a population of meta-parameters on a set of tasks, in batches on one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esmeta import errors
from esmeta import rollout as loop
from esmeta.capture import Captured
from esmeta.errors import UserError
from esmeta.options import plain
from esmeta.policy import Policy, unravel
from esmeta.policy import _heads as heads
from esmeta.rng import Rng
from esmeta.tasks import numbers_of
from esmeta.types import Fitness, Hosted, Params, Task, Tasks

# Members per batch: enough to hide the cost of calling an operation, few enough for the cache.
_CACHE_FLOATS = 800_000
_GPU_FLOATS = 1 << 30
_TRIAL_TILE = 8

_Scores = tuple[Tensor, Tensor, dict[str, Tensor]]


class PopulationEvaluator:
    """Fitness of members ``[P, ...]``: each runs ``trials`` trials, all on the same tasks.

    Same seed and same task numbers give the same bits, for any ``chunk``, any split of members or
    trials over calls or ranks, and whatever the global random generators hold: batches are padded
    to at least two members and a multiple of eight trials, and every random number is addressed by
    (seed, task number).

    Args:
        policy: what to run; see :func:`esmeta.make_policy`.
        task: the distribution of tasks; see :func:`esmeta.make_task`.
        trials: tasks per evaluation, the axis B.
        device: where to run, e.g. ``"cpu"`` or ``"cuda:0"``.
        chunk: members per batch; ``None`` chooses by the size of the policy.
        capture: whether rollouts are recorded as CUDA graphs and replayed, for tasks whose
            environment runs on the GPU.
    """

    def __init__(
        self,
        policy: Policy,
        task: Task,
        trials: int = 16,
        device: str | torch.device = "cpu",
        chunk: int | None = None,
        capture: bool = False,
    ) -> None:
        trials, chunk = plain(trials), plain(chunk)
        errors.positive_int("trials", trials, example=16)
        if chunk is not None and (type(chunk) is not int or chunk < 2):
            raise ValueError(
                f"chunk = {chunk!r}: must be at least 2 members (a batch of one rounds otherwise); "
                "leave it out to have it chosen"
            )
        if policy.spec != task.spec:
            raise ValueError(
                f"the policy was made for {policy.spec}, the task has {task.spec}; "
                "make it with make_policy(name, task.spec)"
            )
        self.policy = policy
        self.task = task
        self.trials = trials
        self.device = torch.device(device)
        self.chunk = chunk
        self.env = task.make_env(self.device)
        if capture and isinstance(self.env, Hosted):
            raise UserError(
                f"capture = true: worlds of {type(self.env).__name__} are not stepped on the GPU; "
                "write objective.capture = false"
            )
        self.captured = Captured(self.device) if capture else None

    @property
    def size(self) -> int:
        """D, the number of meta-parameters of one member."""
        return self.policy.size

    def _members_per_batch(self, batch: int) -> int:
        if self.chunk is not None:
            return self.chunk
        if isinstance(self.env, Hosted):
            return max(2, self.env.most_worlds // batch)
        limit = _CACHE_FLOATS if self.device.type == "cpu" else _GPU_FLOATS
        return max(2, limit // (batch * max(self.policy.config.neurons**2, 1)))

    def batches(self, population: int, batch: int) -> list[Tensor]:
        """The members of each batch of a population with ``batch`` trials, int64 rows.

        All batches have one size of at least two; the last rows of the last may repeat.
        """
        count = -(-population // self._members_per_batch(batch))
        # Batches of one size: a short last one would be filled up with copies.
        rows = max(2, -(-population // count))
        starts = range(0, population, rows)
        return [
            torch.arange(first, first + rows).clamp(max=population - 1).to(self.device)
            for first in starts
        ]

    def members(self, params: Params | Tensor) -> Params:
        """A tree or flat vectors ``[P, D]`` as a tree on this evaluator's device."""
        tree = unravel(params, self.policy) if isinstance(params, Tensor) else params
        return on_device(tree, self.device)

    def trial_set(self, index: Tensor, seed: int, split: str) -> tuple[Tasks, Rng]:
        """The tasks number ``index [B]`` (or ``[P, B]``) here, and the stream of their trials.

        Filled up with copies of the last one to a multiple of eight trials.
        """
        batch = index.shape[-1]
        padded = -(-batch // _TRIAL_TILE) * _TRIAL_TILE
        index = torch.cat([index, index[..., -1:].expand(*index.shape[:-1], padded - batch)], -1)
        index = index.reshape(-1, padded)
        tasks = self.place(self.task.sample(index.flatten(), split, Rng(seed).fold("tasks")))
        data = {
            name: leaf.reshape(*index.shape, *leaf.shape[2:]) for name, leaf in tasks.data.items()
        }
        tasks = Tasks(tasks.index.reshape(index.shape), data)
        return tasks, Rng(seed).fold("trials", split)

    @torch.no_grad()
    def __call__(
        self,
        params: Params | Tensor,
        seed: int = 0,
        split: str = "train",
        index: Tensor | Sequence[int] | np.ndarray | None = None,
        *,
        act: loop.Act = heads.sample,
        intervene: loop.Intervention | None = None,
    ) -> Fitness:
        """Score members.

        ``params`` is a tree with leaves ``[P, ...]`` or flat vectors ``[P, D]``; ``split`` is
        ``"train"`` or ``"test"``; ``index`` (int64 ``[B]``, or ``[P, B]`` for tasks of each
        member's own) names the tasks by number, default 0..trials-1; ``act`` chooses actions
        (sampled by default); ``intervene`` changes memory or inputs before each step, for lesion
        controls. Returns a :class:`Fitness` on the CPU.
        """
        tree = self.members(params)
        population = next(iter(tree.values())).shape[0]
        index = torch.arange(self.trials) if index is None else numbers_of(index)
        shared = index.ndim == 1
        if population == 0 or index.numel() == 0 or not (shared or len(index) == population):
            raise ValueError(
                f"there are {population} members and task numbers of shape {tuple(index.shape)}; "
                "pass at least one member, and index [B] or [P, B] with at least one number"
            )
        tasks, rng = self.trial_set(index, seed, split)
        parts = []
        for rows in self.batches(population, tasks.index.shape[1]):
            part = {name: leaf[rows] for name, leaf in tree.items()}
            mine = tasks if shared else _rows(tasks, rows)
            parts.append(self._score(part, mine, rng, act, intervene))
        return join(parts, population, index.shape[-1])

    def place(self, tasks: Tasks) -> Tasks:
        """The same tasks on this evaluator's device."""
        return place_tasks(tasks, self.device)

    def _score(
        self,
        params: Params,
        tasks: Tasks,
        rng: Rng,
        act: loop.Act,
        intervene: loop.Intervention | None,
    ) -> Fitness:
        begin = loop.start(self.policy, params, self.env, tasks, rng)
        if self.captured is None or act is not heads.sample or intervene is not None:
            scores = self._whole(begin, act=act, intervene=intervene)
        else:
            scores = self.captured("score", self._again, params, *begin[1:5])
        returns, steps, metrics = scores
        metrics = {name: leaf.double().cpu() for name, leaf in metrics.items()}
        return Fitness(returns.cpu(), steps.cpu(), metrics)

    def _again(self, params: Params, *first: Any) -> _Scores:
        return self._whole(loop.Start(self.policy.bind(params), *first), ask=False)

    def _whole(self, begin: loop.Start, **how: Any) -> _Scores:
        """Returns, steps and metrics of whole trials, each ``[P, B]``."""
        collector = loop.Returns(*begin.ts.reward.shape, device=self.device)
        end = loop.rollout(self.policy, self.env, begin, collector, **how)
        return collector.returns, collector.steps, self.env.metrics(end.env_state)


def on_device(leaves: Params, device: torch.device) -> Params:
    """The same leaves on ``device``."""
    return {name: leaf.to(device) for name, leaf in leaves.items()}


def place_tasks(tasks: Tasks, device: torch.device) -> Tasks:
    """The same tasks on ``device``."""
    return Tasks(tasks.index.to(device), on_device(tasks.data, device))


def _rows(tasks: Tasks, members: Tensor) -> Tasks:
    return Tasks(tasks.index[members], {name: leaf[members] for name, leaf in tasks.data.items()})


def join(parts: list[Fitness], population: int, batch: int) -> Fitness:
    """The scores of all batches as one, without what they were filled up with."""

    def cut(leaves: list[Tensor]) -> Tensor:
        return torch.cat(leaves)[:population, :batch]

    return Fitness(
        cut([part.returns for part in parts]),
        cut([part.steps for part in parts]),
        {name: cut([part.metrics[name] for part in parts]) for name in parts[0].metrics},
    )
