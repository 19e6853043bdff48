"""Scores of one generation: members that raise are run again alone, rows of all ranks are joined.

A *row* is what a member brought: its returns on K tasks and its environment steps, float64
``[K + 1]``, so that one collective carries both (steps are exact up to 2^53).
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import EnvFailure, UserError, out_of_memory
from esmeta.evolution.shaping import Failed, aggregated
from esmeta.types import Comm, Fitness, Metrics

MAX_RAISED = 0.1
"""Share of a generation whose evaluation may raise an exception."""

NOT_A_MEMBERS_FAULT = (UserError, TimeoutError)
"""Exceptions that say nothing about a member, and end the run; but see :class:`EnvFailure`."""

_RAISED, _ENV_FAILED = -1.0, -2.0  # instead of the steps of a member


class Stopwatch:
    """Seconds of one generation by what they were spent on."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.spent = {"evaluate_s": 0.0, "wait_s": 0.0}

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Add the time inside to ``evaluate_s``, or to ``wait_s`` (for other ranks)."""
        begin = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - begin

    def metrics(self) -> Metrics:
        """``search_s`` is what is left besides evaluation and waiting for other ranks."""
        left = time.perf_counter() - self.begin - sum(self.spent.values())
        return {**self.spent, "search_s": max(0.0, left)}


@dataclass(frozen=True)
class Scores:
    """One generation's results, the same on every rank.

    ``returns`` float64 ``[N, K]`` on K tasks, NaN throughout for members whose evaluation raised;
    ``fitness`` float64 ``[N]``, NaN where a member failed; ``env_steps`` counts all members.
    """

    returns: Tensor
    fitness: Tensor
    env_steps: int

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


def score_members(
    score: Callable[[slice], Fitness], numbers: np.ndarray, generation: int
) -> Tensor:
    """Rows of members, float64 ``[P, K + 1]``; who raises is marked.

    If the evaluation of all members together raises, each is evaluated alone, and those that
    raise again get NaN returns and -1 steps (-2 where an environment failed). The first traceback
    is shown on stderr. If all of them raise, so does this.

    Args:
        score: rows of members to their fitness.
        numbers: of the members in their generation, for messages.
        generation: for messages.
    """
    try:
        return _rows(score(slice(0, len(numbers))))
    # Whatever a task or a simulator raises: a run of days is not to end by one bad member.
    except Exception as error:
        _check_fault(error)
        first, text = error, traceback.format_exc()
    rows: list[Tensor | float] = []
    for row in range(len(numbers)):
        try:
            rows.append(_rows(score(slice(row, row + 1))))
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


def _rows(fitness: Fitness) -> Tensor:
    steps = fitness.steps.detach().cpu().sum(dim=1, keepdim=True).double()
    return torch.cat([fitness.returns.detach().cpu().double(), steps], dim=1).contiguous()


def _check_fault(error: Exception) -> None:
    """Raise an exception that is no member's fault again; let go of what the frames of others hold.

    Those hold simulators, which members that are run again need.
    """
    fault = isinstance(error, NOT_A_MEMBERS_FAULT) and not isinstance(error, EnvFailure)
    if fault or out_of_memory(error):
        raise error
    traceback.clear_frames(error.__traceback__)


def gather(
    rows: Tensor | None, owned: list[np.ndarray], comm: Comm | None, watch: Stopwatch
) -> np.ndarray:
    """Rows of all members of a split population in their order, float64 ``[N, K + 1]``.

    Args:
        rows: of this rank's members, see :func:`score_members`; None where it owns none.
        owned: for every rank, the numbers of its members, together 0..N-1.
        comm: the ranks; None for a single process.
        watch: takes the time spent waiting for other ranks.
    """
    if comm is not None:
        counts = [len(members) for members in owned]
        with watch.on("wait_s"):
            if min(counts) == 0:
                # A rank without members cannot know the number of trials; rank 0 always has some.
                own = 0 if rows is None else rows.shape[1]
                width = int(comm.bcast(torch.tensor([own], dtype=torch.int64, device="cpu")).item())
                if rows is None:
                    rows = torch.empty(0, width, dtype=torch.float64, device="cpu")
            assert rows is not None
            rows = comm.gather_rows(rows, counts)
    assert rows is not None
    table = np.empty(tuple(rows.shape))
    table[np.concatenate(owned)] = rows.numpy()
    return table


def steps_of(table: np.ndarray) -> int:
    """Environment steps of all members in ``table [N, K + 1]``."""
    steps = table[:, -1]
    return int(steps[steps > 0].sum())


def scores_of(table: np.ndarray, aggregate: str, failed: Failed, generation: int) -> Scores:
    """Scores of a generation's ``table [N, K + 1]``; raises for failures that are not allowed.

    ``aggregate`` makes fitness of returns; see :func:`esmeta.evolution.shaping.aggregated`.
    """
    marks, count = table[:, -1], len(table)
    lost, raised = int((marks == _ENV_FAILED).sum()), int((marks < 0).sum())
    if lost > MAX_RAISED * count:
        raise UserError(
            f"the environments of {lost} of {count} members failed, also when they were run "
            f"again (the first traceback of each rank is shown above); more than {MAX_RAISED:.0%} "
            "is taken for a mistake in the environment: repair it"
        )
    if raised > MAX_RAISED * count:
        raise RuntimeError(
            f"generation {generation}: the evaluation of {raised} of {count} members "
            "raised an exception (the first of each rank is shown above); above "
            f"{MAX_RAISED:.0%} this is taken for a mistake in the task or the policy"
        )
    returns = torch.from_numpy(table[:, :-1].copy())
    fitness = aggregated(returns, aggregate)
    bad = torch.nonzero(~torch.isfinite(fitness)).flatten().tolist()
    if bad and failed == "raise":
        raise FloatingPointError(
            f"generation {generation}: member {bad[0]} has returns {returns[bad[0]].tolist()} "
            f"({len(bad)} members failed); write optimizer.failed = 'worst' to go on without"
        )
    return Scores(returns, fitness, steps_of(table))
