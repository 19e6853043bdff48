"""EvoTorch's Problem over a split population. Imports evotorch, so import this module lazily."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from evotorch import Problem, SolutionBatch
from evotorch.optimizers import ClipUp
from torch import Tensor

from esmeta.optimizers._generation import (
    Scores,
    Scoring,
    Stopwatch,
    gather_scores,
    score_members,
)
from esmeta.types import Comm, Fitness

Score = Callable[[Tensor, int | Tensor], Fitness]
"""Members float32 ``[P, D]`` and the step whose tasks they get (or int64 ``[P]``), to fitness."""


class PopulationProblem(Problem):
    """Maximise the mean return; every rank scores a contiguous part of each batch.

    Every evaluated batch counts as one ``generation``: its members share their tasks, and the next
    batch gets fresh ones. Members that failed are reported below the worst finite one, because
    EvoTorch ranks NaN as the best. The communicator is left out of pickles and copies.
    ``sharing`` is the number of neighbours that share tasks of their own; 0: all share the same.
    """

    def __init__(
        self,
        score: Score,
        size: int,
        *,
        seed: int,
        comm: Comm | None = None,
        draw: Callable[[int, int], Tensor] | None = None,
    ) -> None:
        super().__init__(
            "max",
            solution_length=size,
            initial_bounds=(-1.0, 1.0),
            dtype=torch.float32,
            eval_dtype=torch.float64,
            # Without a seed of its own a Problem draws from the global generator, and ranks that
            # replicate a search drift apart without an error.
            seed=seed,
            # Keeping the luckiest evaluation ever is of no use, and NaN made this raise.
            store_solution_stats=False,
        )
        self._score = score
        self._size = size
        self._comm = comm
        self._draw = draw
        self.generation = 0
        self.watch = Stopwatch()
        self.scoring = Scoring()
        self.sharing = 0
        self.square_norms = torch.empty(0)
        self.scores: Scores | None = None

    def bind(self, score: Score, generation: int, comm: Comm, watch: Stopwatch) -> None:
        """Score the next batch as ``generation``, over the ranks of ``comm``."""
        self._score, self.generation, self._comm, self.watch = score, generation, comm, watch

    def unbind(self) -> None:
        """Let go of the ranks, which may not outlive the step."""
        self._comm = None

    @property
    def _nonserialized_attribs(self) -> list[str]:
        return [*super()._nonserialized_attribs, "_comm"]

    def generate_values(self, num_solutions: int) -> Tensor:
        """Initial solutions, float32 ``[num_solutions, D]``."""
        # EvoTorch's own advances the global generator by one draw, to find out whether it runs
        # under vmap.
        values = torch.empty(num_solutions, self._size, dtype=torch.float32)
        self._fill(values)
        return values

    def _fill(self, values: Tensor) -> None:
        if self._draw is None:
            super()._fill(values)
        else:
            start = int(torch.randint(2**31, (), generator=self.generator))
            values.copy_(self._draw(start, len(values)))

    def _evaluate_batch(self, batch: SolutionBatch) -> None:
        values = values_of(batch)
        rank, ranks = (self._comm.rank, self._comm.size) if self._comm else (0, 1)
        owned = np.array_split(np.arange(len(values)), ranks)
        mine = owned[rank]
        rows = None

        def score(members: Tensor, which: Tensor) -> Fitness:
            if not self.sharing:
                return self._score(members, self.generation)
            groups = len(values) // self.sharing
            step = torch.from_numpy(mine)[which] // self.sharing + self.generation * groups
            return self._score(members, step)

        if len(mine):
            begin = self.watch.now()
            members = values[mine[0] : mine[-1] + 1].clone()
            rows = score_members(score, members, mine, self.generation)
            self.watch.evaluate_s += self.watch.now() - begin
        table = gather_scores(rows, list(owned), self._comm, self.watch)
        self.scores = self.scoring.scores(*table, self.generation)
        self.square_norms = values.double().square().sum(dim=1)
        self.generation += 1
        batch.set_evals(below_worst(self.scores.fitness).unsqueeze(1))


def values_of(batch: SolutionBatch) -> Tensor:
    """The solutions of a batch, float32 ``[P, D]``, not copied and not marked as changed."""
    # Not batch.values: that is of a read-only type which evaluators cannot work with.
    values = batch.access_values(keep_evals=True)
    assert isinstance(values, Tensor)
    return values


def below_worst(fitness: Tensor) -> Tensor:
    """Fitness with failed members below the worst finite one by the spread of the others (or 1)."""
    finite = torch.isfinite(fitness)
    if not finite.any():
        return torch.zeros_like(fitness)
    worst, best = fitness[finite].min().item(), fitness[finite].max().item()
    # The next float down, where the spread is lost in rounding.
    failed = min(worst - ((best - worst) or 1.0), math.nextafter(worst, -math.inf))
    return torch.where(finite, fitness, max(failed, -torch.finfo(fitness.dtype).max))


class GuardedClipUp(ClipUp):
    """ClipUp that coasts on a zero gradient, where EvoTorch's divides zero by zero."""

    def ascent(self, globalg: Any, *, cloned_result: bool = True) -> Tensor:
        """The step to follow; see EvoTorch."""
        if torch.count_nonzero(globalg):
            return super().ascent(globalg, cloned_result=cloned_result)
        assert self._velocity is not None
        self._velocity = self._momentum * self._velocity
        return self._velocity.clone()
