"""Fitness shaping: from fitness to utilities, safe against ties, failures and flat generations.

Centred ranks: Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement
Learning", 2017, https://arxiv.org/abs/1703.03864. NES utilities: Wierstra et al., "Natural
Evolution Strategies", JMLR 15, 2014, https://jmlr.org/papers/v15/wierstra14a.html.

What differs: tied members share the average of their utilities (so a success rate of 1 in 100 does
not rank the 99 failures among themselves); members that failed (NaN or infinite fitness) tie below
all others; and a generation without information gives exact zeros, so nothing moves. Sums use
``math.fsum`` and logarithms ``math.log``, so that the bits do not depend on a CPU's vector width.
"""

from __future__ import annotations

import contextlib
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError, one_of

Shaping = Literal["centered", "nes", "zscore", "raw"]
SHAPINGS: tuple[Shaping, ...] = ("centered", "nes", "zscore", "raw")
Failed = Literal["worst", "drop_pair", "raise"]
FAILED: tuple[Failed, ...] = ("worst", "drop_pair", "raise")


def tail_share(aggregate: str) -> float:
    """Share of a member's worst trials that counts: 1 for ``mean``, 0 for ``worst``.

    ``cvar:a`` has 0 < a < 1. Anything else is refused.
    """
    if aggregate in ("mean", "worst"):
        return float(aggregate == "mean")
    kind, _, number = aggregate.partition(":")
    with contextlib.suppress(ValueError):
        if kind == "cvar" and 0 < float(number) < 1:
            return float(number)
    raise UserError(
        f"aggregate = {aggregate!r}: must be 'mean', 'worst' or 'cvar:a' with 0 < a < 1; write "
        "for example aggregate = 'cvar:0.25'"
    )


def aggregated(returns: Tensor, aggregate: str) -> Tensor:
    """Fitness float64 ``[N]`` of members with returns float64 ``[N, K]`` on K tasks.

    ``mean``; ``worst``: the smallest return; ``cvar:a`` (conditional value at risk, Rockafellar &
    Uryasev, 2000): the mean of the ``ceil(a K)`` smallest. A member with a return that is not
    finite has failed and gets NaN.
    """
    share = tail_share(aggregate)
    table = returns.detach().cpu().numpy().astype(np.float64)
    trials = table.shape[1]
    count = trials if share == 1 else max(1, math.ceil(share * trials - 1e-9))
    if count < trials:
        table = np.sort(table, axis=1)
    # Column by column: a vectorised sum over the trials may add in another order on another CPU.
    # An overflow, or +inf - inf, is a failed member and no news.
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.zeros(len(table))
        for trial in range(count):
            total += table[:, trial]
    fitness = np.where(np.isfinite(returns.numpy()).all(axis=1), total / count, np.nan)
    return torch.from_numpy(np.where(np.isfinite(fitness), fitness, np.nan))


def weighed(fitness: Tensor, kind: str, *, drop_pairs: bool) -> Tensor:
    """:func:`utilities`, or with ``drop_pairs`` those of the mirrored pairs without a failure.

    A dropped pair (members 2k and 2k + 1) has utility 0 and is left out of the ranking.
    """
    if not drop_pairs:
        return utilities(fitness, kind)
    whole = torch.isfinite(fitness).reshape(-1, 2).all(dim=1).repeat_interleave(2)
    weights = torch.zeros(len(fitness), dtype=torch.float64, device="cpu")
    if whole.any():
        weights[whole] = utilities(fitness[whole], kind)
    return weights


def utilities(fitness: Tensor, kind: str) -> Tensor:
    """Utilities of the members of one generation; larger is better.

    * ``centered``: ranks spread evenly over [-0.5, 0.5];
    * ``nes``: ``max(0, ln(N/2 + 1) - ln k) / sum - 1/N`` for the k-th best of N (sum zero);
    * ``zscore``: ``(f - mean) / std`` with the population's std;
    * ``raw``: the fitness itself.

    Failed members count as one tie below the worst for the rank transforms, and as the worst
    finite fitness for ``zscore`` and ``raw``.

    Args:
        fitness: float64 ``[N]``, may hold NaN and infinities.
        kind: one of :data:`SHAPINGS`.

    Returns:
        float64 ``[N]``; exact zeros where all are equal or all failed.
    """
    one_of("shaping", kind, SHAPINGS)
    values = fitness.detach().cpu().numpy().astype(np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return torch.zeros(len(values), dtype=torch.float64, device="cpu")
    if kind in ("centered", "nes"):
        shaped = _by_rank(np.where(finite, values, -np.inf), kind)
    else:
        shaped = np.where(finite, values, values[finite].min())
        if (shaped == shaped[0]).all():
            shaped = np.zeros_like(shaped)
        elif kind == "zscore":
            shaped = _standardised(shaped)
    return torch.from_numpy(shaped)


def _by_rank(values: np.ndarray, kind: str) -> np.ndarray:
    levels, level_of, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(levels) == 1:
        return np.zeros(len(values))
    weights = averaged_over_ties(_rank_weights(len(values), kind), counts)
    return weights[level_of.reshape(-1)]


def _rank_weights(count: int, kind: str) -> list[float]:
    """Utilities by rank, worst first."""
    if kind == "centered":
        return [k / (count - 1) - 0.5 for k in range(count)]
    top = math.log(count / 2 + 1)
    weights = [max(0.0, top - math.log(k)) for k in range(count, 0, -1)]
    total = math.fsum(weights)
    return [weight / total - 1 / count for weight in weights]


def averaged_over_ties(weights: list[float], counts: np.ndarray) -> np.ndarray:
    """Mean weight of each run of ``counts[i]`` neighbours in ``weights``, one float64 per run."""
    ends = np.cumsum(counts)
    return np.array(
        [
            math.fsum(weights[end - count : end]) / int(count)
            for end, count in zip(ends, counts, strict=True)
        ]
    )


def differences(fitness: Tensor, kind: str) -> Tensor:
    """Half the difference of each mirrored pair, with both signs: float64 ``[N]``.

    Pairs in which a member failed (NaN or infinite fitness) have weight 0. ``zscore`` divides by
    the root mean square of the others' differences, ``raw`` by nothing. All zero where no pair
    says anything.
    """
    values = fitness.numpy().reshape(-1, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        change = values[:, 0] - values[:, 1]
    whole = np.isfinite(change)
    change = np.where(whole, change, 0.0)
    if kind == "zscore" and change.any():
        change = _scaled_down(change)
        change = change / math.sqrt(math.fsum((change * change).tolist()) / int(whole.sum()))
    return torch.from_numpy(np.stack([change / 2, -change / 2], axis=1).reshape(-1))


def rank_weighted(fitness: Tensor, weights: list[float]) -> Tensor:
    """Give ``weights`` (best first) to the members by rank, averaged over ties, float64 ``[N]``.

    For searches that select by rank (CEM's parents, CMA-ES): the average over all ways to break
    the ties, where a sort would pick one of them by memory order.
    """
    values = fitness.detach().cpu().numpy().astype(np.float64)
    values = np.where(np.isfinite(values), values, -np.inf)
    _, level_of, counts = np.unique(values, return_inverse=True, return_counts=True)
    return torch.from_numpy(averaged_over_ties(weights[::-1], counts)[level_of.reshape(-1)])


def _standardised(values: np.ndarray) -> np.ndarray:
    values = _scaled_down(values)
    centred = values - math.fsum(values) / len(values)
    std = math.sqrt(math.fsum(centred * centred) / len(values))
    return centred / std if std > 0 else np.zeros_like(values)


def _scaled_down(values: np.ndarray) -> np.ndarray:
    # Scaling by a power of two is exact and keeps squares of huge returns finite.
    return np.ldexp(values, -math.frexp(float(np.abs(values).max()))[1])
