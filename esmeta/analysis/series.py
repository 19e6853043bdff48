"""What runs logged, as curves: one run, the mean over seeds, and values at equal budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TRAINING = ("return_mean", "fitness_mean")
"""Training return of gradient runs, and the population's mean return in evolution."""


@dataclass(frozen=True)
class Series:
    """A curve: ``x``, ``y`` and the standard error of ``y`` (NaN if unknown), float64 ``[N]``."""

    x: np.ndarray
    y: np.ndarray
    se: np.ndarray

    def __len__(self) -> int:
        return len(self.x)

    def at(self, x: float) -> tuple[float, float]:
        """Value and standard error at ``x``, linear between the points; NaN without any."""
        if not len(self):
            return math.nan, math.nan
        return float(np.interp(x, self.x, self.y)), float(np.interp(x, self.x, self.se))


def from_rows(rows: Sequence[dict[str, Any]], metric: str, x: str) -> Series:
    """The lines of one run's metrics in which ``metric`` is a number."""
    kept = [r for r in rows if r.get(metric) is not None and r.get(x) is not None]
    name = "validation_se" if metric == "validation_return" else ""
    errors = [math.nan if r.get(name) is None else r[name] for r in kept]
    columns = ([r[x] for r in kept], [r[metric] for r in kept], errors)
    return Series(*(np.array(column, dtype=np.float64) for column in columns))


def over_seeds(curves: Sequence[Series]) -> Series:
    """Mean and standard error over curves, on the range of x that all of them cover.

    One curve is returned as it is, with its own standard error (over trials). Between the points
    of a curve its values are linear.
    """
    curves = [curve for curve in curves if len(curve)]
    if len(curves) == 1:
        return curves[0]
    if not curves:
        nothing = np.zeros(0)
        return Series(nothing, nothing, nothing)
    low = max(curve.x[0] for curve in curves)
    high = min(curve.x[-1] for curve in curves)
    points = np.unique(np.concatenate([curve.x for curve in curves] + [np.array([low, high])]))
    grid = points[(points >= low) & (points <= high)]
    values = np.stack([np.interp(grid, curve.x, curve.y) for curve in curves])
    se = values.std(axis=0, ddof=1) / math.sqrt(len(curves))
    return Series(grid, values.mean(axis=0), se)


def common_end(curves: Sequence[Series]) -> float:
    """The largest x that all curves reach; NaN without curves."""
    return min((float(curve.x[-1]) for curve in curves if len(curve)), default=math.nan)


def thinned(curve: Series, points: int = 300) -> Series:
    """At most ``points`` points, each the mean of a block: a noisy curve that can be read."""
    if len(curve) <= points:
        return curve
    blocks = np.array_split(np.arange(len(curve)), points)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.array([values[block].mean() for block in blocks])

    return Series(mean(curve.x), mean(curve.y), mean(curve.se))
