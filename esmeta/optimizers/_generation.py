"""What all evolution strategies share: popsize, timing, and the scores of a split generation."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.types import Comm, Fitness, Metrics


def check_popsize(value: object) -> None:
    """Refuse all but even integers >= 2."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 2 or value % 2:
        raise UserError(
            f"popsize = {value!r}: must be an even integer >= 2 (members come in mirrored pairs, "
            "and one member alone cannot be ranked); write for example popsize = 256"
        )


@dataclass
class Stopwatch:
    """Seconds of one generation by what they were spent on."""

    start: float = field(default_factory=time.perf_counter)
    evaluate_s: float = 0.0
    wait_s: float = 0.0

    @staticmethod
    def now() -> float:
        """Seconds of the clock that all parts are measured with."""
        return time.perf_counter()

    def metrics(self) -> Metrics:
        """``search_s`` is what is left besides evaluation and waiting for other ranks."""
        total = self.now() - self.start
        return {
            "evaluate_s": self.evaluate_s,
            "wait_s": self.wait_s,
            "search_s": max(0.0, total - self.evaluate_s - self.wait_s),
        }


@dataclass(frozen=True)
class Scores:
    """One generation's results, the same on every rank.

    ``fitness`` float64 ``[N]`` is the mean return over trials (NaN or infinite where a member
    failed); ``env_steps`` counts all members.
    """

    fitness: Tensor
    env_steps: int

    def metrics(self) -> Metrics:
        """Statistics over the members that did not fail (NaN where all did)."""
        finite = self.fitness[torch.isfinite(self.fitness)].tolist()
        return {
            "fitness_mean": math.fsum(finite) / len(finite) if finite else math.nan,
            "fitness_max": max(finite, default=math.nan),
            "fitness_min": min(finite, default=math.nan),
            "nan_members": float(len(self.fitness) - len(finite)),
            "env_steps": float(self.env_steps),
        }


def gather_scores(
    fitness: Fitness | None, owned: list[np.ndarray], comm: Comm | None, watch: Stopwatch
) -> Scores:
    """Scores of the whole generation from each rank's part of it.

    Args:
        fitness: this rank's members, in the order of ``owned[rank]``; None where it owns none.
        owned: for every rank, the numbers of its members.
        comm: the ranks; None for a single process.
        watch: takes the time spent waiting for other ranks.
    """
    counts = [len(members) for members in owned]
    if comm is None:
        assert fitness is not None
        return _scores(_rows(fitness), owned)
    begin = watch.now()
    if min(counts) == 0:
        # A rank without members cannot know the number of trials; rank 0 always has some.
        trials = torch.tensor([0 if fitness is None else fitness.returns.shape[1]])
        width = 2 * int(comm.bcast(trials).item())
    else:
        assert fitness is not None
        width = 2 * fitness.returns.shape[1]
    local = torch.empty(0, width, dtype=torch.float64) if fitness is None else _rows(fitness)
    rows = comm.gather_rows(local, counts)
    watch.wait_s += watch.now() - begin
    return _scores(rows, owned)


def _rows(fitness: Fitness) -> Tensor:
    # Step counts are exact in float64 up to 2^53, so one collective carries both.
    steps = fitness.steps.detach().cpu().double()
    return torch.cat([fitness.returns.detach().cpu().double(), steps], dim=1).contiguous()


def _scores(rows: Tensor, owned: list[np.ndarray]) -> Scores:
    order = np.concatenate(owned)
    table = np.empty(tuple(rows.shape))
    table[order] = rows.numpy()
    trials = table.shape[1] // 2
    # Column by column: a vectorised sum over the trials may add in another order on another CPU.
    # An overflow, or +inf - inf, is a failed member and no news.
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.zeros(len(table))
        for trial in range(trials):
            total += table[:, trial]
    return Scores(torch.from_numpy(total / trials), int(table[:, trials:].sum()))
