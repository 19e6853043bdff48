"""EvoTorch's Problem over a split population. Imports evotorch, so import this module lazily."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

if not {"numba", "evotorch"} & sys.modules.keys():
    # With numba in reach EvoTorch compiles what no search here uses: 150 MB on every rank.
    sys.modules["numba"] = None  # type: ignore[assignment]
    try:
        import evotorch  # noqa: F401
    finally:
        del sys.modules["numba"]
from evotorch import Problem, Solution, SolutionBatch
from evotorch.optimizers import ClipUp
from torch import Tensor

from esmeta.evaluator import PopulationEvaluator
from esmeta.optimizers._generation import (
    Scores,
    Scoring,
    Stopwatch,
    gather_scores,
    score_members,
)
from esmeta.sharing import Turn
from esmeta.tree import ravel
from esmeta.types import Comm, Fitness

Score = Callable[[Tensor, int | Tensor], Fitness]
"""Members float32 ``[P, D]`` and the step whose tasks they get (or int64 ``[P]``), to fitness."""


@dataclass(frozen=True)
class TrainingTasks:
    """Scores members on training tasks, and draws first members. A class, so that it pickles."""

    evaluator: PopulationEvaluator
    seed: int

    def score(self, values: Tensor, step: int | Tensor) -> Fitness:
        """Members float32 ``[P, D]`` on the tasks of ``step`` (int64 ``[P]``: of each its own)."""
        trials = self.evaluator.trials
        first = torch.as_tensor(step, dtype=torch.int64, device="cpu").unsqueeze(-1) * trials
        index = first + torch.arange(trials, device="cpu")
        return self.evaluator(values, seed=self.seed, split="train", index=index)

    def draw(self, start: int, count: int) -> Tensor:
        """``count`` members as the policy draws them, float32 ``[count, D]``."""
        return ravel(self.evaluator.policy.init(seed=start, population=count))


class PopulationProblem(Problem):
    """Maximise the mean return; every rank scores a contiguous part of each batch.

    Every evaluated batch counts as one ``generation``: its members share their tasks, and the next
    batch gets fresh ones. Members that failed are reported below the worst finite one, because
    EvoTorch ranks NaN as the best. The communicator is left out of pickles and copies; without it
    every rank evaluates whole batches, with the same results.

    Attributes:
        comm: the ranks, or None.
        sharing: the number of neighbours that share tasks of their own; 0: all share the same.
        scores: of the last batch.
        interactions: environment steps so far, of all members on all ranks.
        episodes: trials so far.
    """

    def __init__(
        self,
        score: Score,
        size: int,
        *,
        seed: int,
        comm: Comm | None = None,
        draw: Callable[[int, int], Tensor] | None = None,
        free: bool = False,
    ) -> None:
        """Without ``free`` an :class:`EvoTorchOptimizer` drives the search.

        With it anybody does: the best and the worst solution are kept, as EvoTorch's searchers
        report them, and ranks whose searches have drifted apart raise.
        """
        super().__init__(
            "max",
            solution_length=size,
            initial_bounds=(-1.0, 1.0),
            dtype=torch.float32,
            eval_dtype=torch.float64,
            # Without a seed of its own a Problem draws from the global generator, and ranks that
            # replicate a search drift apart without an error.
            seed=seed,
            store_solution_stats=free,
        )
        self._score = score
        self._size = size
        self._draw = draw
        self._free = free
        self._lowest = math.inf
        self.comm = comm
        self._turn = Turn()
        self.generation = 0
        self.watch = Stopwatch()
        self.scoring = Scoring()
        self.sharing = 0
        self.scores: Scores | None = None
        self.interactions = 0
        self.episodes = 0

    def bind(self, score: Score, generation: int, comm: Comm, watch: Stopwatch) -> None:
        """Score the next batch as ``generation``, over the ranks of ``comm``."""
        self._score, self.generation, self.comm, self.watch = score, generation, comm, watch

    def unbind(self) -> None:
        """Let go of the ranks, which may not outlive the step."""
        self.comm = None

    @property
    def _nonserialized_attribs(self) -> list[str]:
        return [*super()._nonserialized_attribs, "comm"]

    @property
    def status(self) -> dict[str, Any]:
        """EvoTorch's, with the counters that its ``num_interactions`` and loggers read."""
        # Counts over all ranks: with its own count a rank would draw more batches than the others.
        return {
            **super().status,
            "total_interaction_count": self.interactions,
            "total_episode_count": self.episodes,
        }

    def generate_values(self, num_solutions: int) -> Tensor:
        """Initial solutions, float32 ``[num_solutions, D]``."""
        # EvoTorch's own advances the global generator by one draw, to find out whether it runs
        # under vmap.
        values = torch.empty(num_solutions, self._size, dtype=torch.float32, device="cpu")
        self._fill(values)
        return values

    def _fill(self, values: Tensor) -> None:
        if self._draw is None:
            super()._fill(values)
        else:
            start = int(torch.randint(2**31, (), generator=self.generator, device="cpu"))
            values.copy_(self._draw(start, len(values)))

    def evaluate(self, x: SolutionBatch | Solution) -> None:
        """Score a batch, on the next tasks; refuses to while another thread has one scored."""
        with self._turn.or_refuse(
            "this problem is evaluating a batch of another thread; every batch has the next tasks, "
            "so that results would depend on who comes first: make one problem for each thread, "
            "which may share an evaluator"
        ):
            super().evaluate(x)

    def _evaluate_batch(self, batch: SolutionBatch) -> None:
        values = values_of(batch)
        if self._free and self.comm is not None:
            check_same(values, self.generation, self.comm)
        rank, ranks = (self.comm.rank, self.comm.size) if self.comm else (0, 1)
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
        table = gather_scores(rows, list(owned), self.comm, self.watch)
        self.scores = scores = self.scoring.scores(*table, self.generation)
        self.generation += 1
        self.interactions += scores.env_steps
        self.episodes += scores.returns.numel()
        batch.set_evals(below_worst(scores.fitness, self._lowest).unsqueeze(1))
        finite = scores.fitness[torch.isfinite(scores.fitness)].tolist()
        self._lowest = min([self._lowest, *finite])


def check_same(values: Tensor, generation: int, comm: Comm) -> None:
    """Raise if the ranks are about to evaluate different solutions ``[P, D]``."""
    # Sums of the bits, row by row: a hash of all bytes would cost as much as a small search.
    bits = values.view(torch.int32).sum(dim=1, dtype=torch.int64)
    if not comm.same(hashlib.sha256(bits.numpy().tobytes()).digest()):
        raise RuntimeError(
            f"the ranks drew different solutions for evaluation {generation}: start the same "
            "searcher with the same options and seed on every rank; a searcher that draws from a "
            "global generator (EvoTorch's functional API, PyCMAES) cannot run on several ranks, "
            "and machines of different CPU types round differently (use esmeta's own optimizers)"
        )


def values_of(batch: SolutionBatch) -> Tensor:
    """The solutions of a batch, float32 ``[P, D]``, not copied and not marked as changed."""
    # Not batch.values: that is of a read-only type which evaluators cannot work with.
    values = batch.access_values(keep_evals=True)
    assert isinstance(values, Tensor)
    return values


def below_worst(fitness: Tensor, lowest: float = math.inf) -> Tensor:
    """Fitness with failed members below the worst finite one by the spread of the others (or 1).

    ``lowest`` is the worst of earlier batches: searchers with elites compare across batches.
    """
    finite = torch.isfinite(fitness)
    known = fitness[finite].tolist()
    spread = max(known) - min(known) if known else 0.0
    worst = min([lowest, *known])
    if worst == math.inf:
        return torch.zeros_like(fitness)
    # The next float down, where the spread is lost in rounding.
    failed = min(worst - (spread or 1.0), math.nextafter(worst, -math.inf))
    return torch.where(finite, fitness, max(failed, -torch.finfo(fitness.dtype).max))


class PlainAdam:
    """EvoTorch's Adam, bit for bit, without torch.optim: its first use imports 70 MB.

    ``mean`` and ``square`` ``[D]`` are its moments, ``updates`` a float32 scalar.
    """

    def __init__(self, *, solution_length: int, dtype: torch.dtype, stepsize: float) -> None:
        self.mean = torch.zeros(solution_length, dtype=dtype, device="cpu")
        self.square = torch.zeros(solution_length, dtype=dtype, device="cpu")
        self.updates = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        self._stepsize = stepsize

    @torch.no_grad()
    def ascent(self, globalg: Any, *, cloned_result: bool = True) -> Tensor:
        """The step to follow; see EvoTorch."""
        self.updates = self.updates + 1
        count = self.updates.item()
        self.mean = torch.lerp(self.mean, globalg, 1 - 0.9)
        self.square = (self.square * 0.999).addcmul_(globalg, globalg, value=1 - 0.999)
        size = self._stepsize / (1 - 0.9**count)
        spread = (self.square.sqrt() / (1 - 0.999**count) ** 0.5).add_(1e-8)
        return -torch.zeros_like(globalg).addcdiv_(self.mean, spread, value=-size)


class GuardedClipUp(ClipUp):
    """ClipUp that coasts on a zero gradient, where EvoTorch's divides zero by zero."""

    def ascent(self, globalg: Any, *, cloned_result: bool = True) -> Tensor:
        """The step to follow; see EvoTorch."""
        if torch.count_nonzero(globalg):
            return super().ascent(globalg, cloned_result=cloned_result)
        assert self._velocity is not None
        self._velocity = self._momentum * self._velocity
        return self._velocity.clone()
