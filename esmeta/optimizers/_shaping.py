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

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import one_of

Shaping = Literal["centered", "nes", "zscore", "raw"]
SHAPINGS: tuple[Shaping, ...] = ("centered", "nes", "zscore", "raw")


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
        return torch.zeros(len(values), dtype=torch.float64)
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
    # Scaling by a power of two first is exact and keeps squares of huge returns finite.
    values = np.ldexp(values, -math.frexp(float(np.abs(values).max()))[1])
    centred = values - math.fsum(values) / len(values)
    std = math.sqrt(math.fsum(centred * centred) / len(values))
    return centred / std if std > 0 else np.zeros_like(values)
