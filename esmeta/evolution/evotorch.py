"""An esmeta task for EvoTorch's own searchers, loggers, hooks and restarts, alone or over ranks.

Toklu et al., "EvoTorch: Scalable Evolutionary Computation in Python", 2023,
https://arxiv.org/abs/2302.12600. Importing this module imports evotorch, which takes seconds.
"""

from __future__ import annotations

import hashlib
import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")
from evotorch import Problem, Solution, SolutionBatch

from esmeta.errors import non_negative_int
from esmeta.evaluator import PopulationEvaluator
from esmeta.evolution.scores import Scores, Stopwatch, gather, score_members, scores_of
from esmeta.options import plain
from esmeta.sharing import Turn
from esmeta.tree import ravel
from esmeta.types import Comm


def evotorch_problem(
    evaluator: PopulationEvaluator, comm: Comm | None = None, *, seed: int = 0
) -> Problem:
    """An ``evotorch.Problem`` for any EvoTorch searcher, single-process or over MPI ranks.

    Objective: the mean return over ``evaluator.trials`` trials, larger is better; solutions are
    float32 vectors of ``evaluator.size`` parameters, initially drawn by the policy's own init.
    Every evaluated batch is scored on fresh training tasks that its members share. Members with a
    NaN or infinite return are reported below the worst finite one.

    Its ``status`` counts environment steps and trials over all ranks (``total_interaction_count``,
    ``total_episode_count``), so ``num_interactions`` works on any number of them. ``best`` is the
    luckiest evaluation so far, on the tasks of its batch: score ``center`` on held-out tasks
    instead. A searcher pickles with its problem but without the ranks; after loading it, set
    ``searcher.problem.comm``.

    Args:
        evaluator: what scores members ``[P, D]``.
        comm: ranks that replicate the search, each evaluating its part of every batch, such as
            ``esmeta.ranks.comm.make_comm()``; all must run the same searcher with the same
            ``seed``, and raise if they drift apart. Loggers belong on rank 0 only.
        seed: of the tasks and of the problem's own random generator.
    """
    seed = plain(seed)
    non_negative_int("seed", seed)
    return PopulationProblem(evaluator, comm, seed)


class PopulationProblem(Problem):
    """Maximise the mean return; every rank scores a contiguous part of each batch.

    Every evaluated batch counts as one ``generation``: its members share their tasks, and the next
    batch gets fresh ones. The communicator is left out of pickles and copies; without it every rank
    evaluates whole batches, with the same results.

    Attributes:
        comm: the ranks, or None.
        generation: batches so far.
        scores: of the last batch.
        interactions: environment steps so far, of all members on all ranks.
        episodes: trials so far.
    """

    def __init__(self, evaluator: PopulationEvaluator, comm: Comm | None, seed: int) -> None:
        super().__init__(
            "max",
            solution_length=evaluator.size,
            initial_bounds=(-1.0, 1.0),
            dtype=torch.float32,
            eval_dtype=torch.float64,
            # Without a seed of its own a Problem draws from the global generator, and ranks that
            # replicate a search drift apart without an error.
            seed=seed,
        )
        self.comm = comm
        self.generation = 0
        self.scores: Scores | None = None
        self.interactions = 0
        self.episodes = 0
        self._evaluator, self._seed = evaluator, seed
        self._lowest = math.inf
        self._turn = Turn()

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
        start = int(torch.randint(2**31, (), generator=self.generator, device="cpu"))
        return ravel(self._evaluator.policy.init(seed=start, population=num_solutions))

    def _fill(self, values: Any) -> Any:
        values.copy_(self.generate_values(len(values)))

    def evaluate(self, x: SolutionBatch | Solution) -> None:
        """Score a batch, on the next tasks; refuses to while another thread has one scored."""
        with self._turn.or_refuse(
            "this problem is evaluating a batch of another thread; every batch has the next tasks, "
            "so that results would depend on who comes first: make one problem for each thread, "
            "which may share an evaluator"
        ):
            super().evaluate(x)

    def _evaluate_batch(self, batch: SolutionBatch) -> None:
        # Not batch.values: that is of a read-only type which evaluators cannot work with.
        values = batch.access_values(keep_evals=True)
        assert isinstance(values, Tensor)
        if self.comm is not None:
            check_same(values, self.generation, self.comm)
        rank, ranks = (self.comm.rank, self.comm.size) if self.comm else (0, 1)
        owned, rows = np.array_split(np.arange(len(values)), ranks), None
        if len(owned[rank]):
            members = values[owned[rank][0] : owned[rank][-1] + 1].clone()
            trials = self._evaluator.trials
            index = torch.arange(trials, device="cpu") + self.generation * trials
            rows = score_members(
                lambda rows: self._evaluator(
                    members[rows], seed=self._seed, split="train", index=index
                ),
                owned[rank],
                self.generation,
            )
        table = gather(rows, list(owned), self.comm, Stopwatch())
        self.scores = scores = scores_of(table, "mean", "worst", self.generation)
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


def below_worst(fitness: Tensor, lowest: float = math.inf) -> Tensor:
    """Fitness with failed members below the worst finite one by the spread of the others (or 1).

    EvoTorch ranks NaN as the best. ``lowest`` is the worst of earlier batches: searchers with
    elites compare across batches.
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
