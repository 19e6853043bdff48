"""What all evolution strategies share: popsize, timing, and the scores of a split generation."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import EnvFailure, UserError
from esmeta.optimizers._shaping import Failed, aggregated
from esmeta.types import Comm, Fitness, Metrics

MAX_RAISED = 0.1
"""Share of a generation whose evaluation may raise an exception."""

NOT_A_MEMBERS_FAULT = (UserError, TimeoutError, MemoryError)
"""Exceptions that say nothing about a member, and end the run; but see :class:`EnvFailure`."""

_RAISED, _ENV_FAILED = -1.0, -2.0  # instead of the steps of a member


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

    ``returns`` float64 ``[N, K]`` on K tasks, NaN throughout for members whose evaluation raised;
    ``fitness`` float64 ``[N]``, NaN where a member failed; ``env_steps`` counts all members;
    ``raised`` counts the members whose evaluation raised.
    """

    returns: Tensor
    fitness: Tensor
    env_steps: int
    raised: int

    def metrics(self) -> Metrics:
        """Statistics over the members that did not fail (NaN where all did)."""
        finite = self.fitness[torch.isfinite(self.fitness)].tolist()
        return {
            "popsize": float(len(self.fitness)),
            "fitness_mean": math.fsum(finite) / len(finite) if finite else math.nan,
            "fitness_max": max(finite, default=math.nan),
            "fitness_min": min(finite, default=math.nan),
            "nan_members": float(len(self.fitness) - len(finite)),
            "env_steps": float(self.env_steps),
        }


@dataclass(frozen=True)
class Scoring:
    """How members are scored, whatever search they come from.

    Attributes:
        aggregate: fitness of a member from its returns: ``mean``, ``worst`` or ``cvar:a``.
        failed: what a member without a finite fitness does: see :func:`check_scoring`.
    """

    aggregate: str = "mean"
    failed: Failed = "worst"

    def scores(self, returns: Tensor, env_steps: int, raised: int, generation: int) -> Scores:
        """Scores of a whole generation; raises for failures that the options do not allow."""
        fitness = aggregated(returns, self.aggregate)
        bad = torch.nonzero(~torch.isfinite(fitness)).flatten().tolist()
        if raised > MAX_RAISED * len(fitness):
            raise RuntimeError(
                f"generation {generation}: the evaluation of {raised} of {len(fitness)} members "
                "raised an exception (the first of each rank is shown above); above "
                f"{MAX_RAISED:.0%} this is taken for a mistake in the task or the policy"
            )
        if bad and self.failed == "raise":
            raise FloatingPointError(
                f"generation {generation}: member {bad[0]} has returns {returns[bad[0]].tolist()} "
                f"({len(bad)} members failed); write optimizer.failed = 'worst' to go on without"
            )
        return Scores(returns, fitness, env_steps, raised)


def score_members(
    score: Callable[[Tensor, Tensor], Fitness],
    members: Tensor,
    numbers: np.ndarray,
    generation: int,
) -> Tensor:
    """Rows of K returns and all environment steps, float64 ``[P, K + 1]``; who raises is marked.

    If the evaluation of all members together raises, each is evaluated alone, and those that
    raise again get NaN returns and -1 steps (-2 where an environment failed). The first traceback
    is shown on stderr. If all of them raise, so does this.

    Args:
        score: members and their rows in ``members`` to fitness.
        members: float32 ``[P, D]``.
        numbers: of the members in their generation, for messages.
        generation: for messages.
    """
    everyone = torch.arange(len(members), device="cpu")
    try:
        return _rows(score(members, everyone))
    # Whatever a task or a simulator raises: a run of days is not to end by one bad member.
    except Exception as error:
        _check_fault(error)
        first, text = error, traceback.format_exc()
    rows: list[Tensor | float] = []
    for row in everyone.split(1):
        try:
            rows.append(_rows(score(members[row], row)))
        except Exception as error:
            _check_fault(error)
            rows.append(_ENV_FAILED if isinstance(error, EnvFailure) else _RAISED)
    good = [row for row in rows if isinstance(row, Tensor)]
    if not good:
        raise first
    bad = [int(n) for n, row in zip(numbers, rows, strict=True) if not isinstance(row, Tensor)]
    print(
        f"esmeta: warning: generation {generation}: the evaluation of members {bad} raised:\n"
        f"{text}",
        file=sys.stderr,
        flush=True,
    )

    def failed(mark: float) -> Tensor:
        row = torch.full_like(good[0], math.nan)
        row[:, -1] = mark
        return row

    return torch.cat([row if isinstance(row, Tensor) else failed(row) for row in rows])


def _check_fault(error: Exception) -> None:
    """Raise an exception that is no member's fault again; let go of what the frames of others hold.

    Those hold simulators, which members that are run again need.
    """
    if isinstance(error, NOT_A_MEMBERS_FAULT) and not isinstance(error, EnvFailure):
        raise error
    traceback.clear_frames(error.__traceback__)


def gather_scores(
    rows: Tensor | None,
    owned: list[np.ndarray],
    comm: Comm | None,
    watch: Stopwatch,
) -> tuple[Tensor, int, int]:
    """Returns ``[N, K]``, environment steps and raised members of a split population.

    Args:
        rows: of this rank's members, see :func:`score_members`; None where it owns none.
        owned: for every rank, the numbers of its members, together 0..N-1.
        comm: the ranks; None for a single process.
        watch: takes the time spent waiting for other ranks.
    """
    if comm is not None:
        begin = watch.now()
        counts = [len(members) for members in owned]
        if min(counts) == 0:
            # A rank without members cannot know the number of trials; rank 0 always has some.
            own = 0 if rows is None else rows.shape[1]
            width = int(comm.bcast(torch.tensor([own], dtype=torch.int64, device="cpu")).item())
            if rows is None:
                rows = torch.empty(0, width, dtype=torch.float64, device="cpu")
        assert rows is not None
        rows = comm.gather_rows(rows, counts)
        watch.wait_s += watch.now() - begin
    assert rows is not None
    table = np.empty(tuple(rows.shape))
    table[np.concatenate(owned)] = rows.numpy()
    steps = table[:, -1]
    failed = int((steps == _ENV_FAILED).sum())
    if failed > MAX_RAISED * len(steps):
        raise UserError(
            f"the environments of {failed} of {len(steps)} members failed, also when they were run "
            f"again (the first traceback of each rank is shown above); more than {MAX_RAISED:.0%} "
            "is taken for a mistake in the environment: repair it"
        )
    return (
        torch.from_numpy(table[:, :-1].copy()),
        int(steps[steps > 0].sum()),
        int((steps < 0).sum()),
    )


def _rows(fitness: Fitness) -> Tensor:
    # Step counts are exact in float64 up to 2^53, so one collective carries both.
    steps = fitness.steps.detach().cpu().sum(dim=1, keepdim=True).double()
    return torch.cat([fitness.returns.detach().cpu().double(), steps], dim=1).contiguous()
