"""SNES: separable natural evolution strategies, sliced over ranks.

Schaul, Glasmachers & Schmidhuber, "High dimensions and heavy tails for natural evolution
strategies", GECCO 2011, https://doi.org/10.1145/2001576.2001692 (algorithm 1):

    mu    <- mu + sigma sum_i u_i z_i,      sigma <- sigma exp(lr / 2 sum_i u_i (z_i^2 - 1)),

as EvoTorch has it, which ``evotorch_snes`` runs as it is. What differs: each rank draws and sums
only its own members, exactly; see :mod:`openes` for ties, failures and flat generations.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from esmeta.errors import finite_positive, one_of
from esmeta.evolution.population import Generation
from esmeta.evolution.search import Rule, Search, Sliced
from esmeta.evolution.shaping import SHAPINGS, Shaping
from esmeta.evolution.state import Arrays, SearchState
from esmeta.options import options_class


@options_class
class Options(Search):
    """Options of natural evolution strategies, besides those of every search.

    The centre moves with learning rate 1.

    Attributes:
        learning_rate: of the log standard deviations, or of their matrix; none: 0.2 (3 + ln D) /
            sqrt(D), for ``xnes`` 0.6 (3 + ln D) / (D sqrt(D)).
        shaping: ``centered``, ``nes``, ``zscore`` or ``raw``; the step size is tuned for ``nes``.
    """

    learning_rate: float | None = None
    shaping: Shaping = "nes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None:
            finite_positive("learning_rate", self.learning_rate, example=0.1)
        one_of("shaping", self.shaping, SHAPINGS)

    def rate(self, size: int) -> float:
        """Of the log standard deviations of ``size`` coordinates."""
        return self.learning_rate or 0.2 * (3 + math.log(size)) / math.sqrt(size)


@options_class
class Optimizer(Options, Sliced):
    """SNES."""

    mirrored: ClassVar[bool] = False

    def rule(self) -> Rule:
        """The equations above."""
        return self.sliced(
            first=lambda unit: {"sigma": self.sigma * unit},
            spread=lambda state: state.arrays["sigma"],
            shaping=self.shaping,
            update=self._update,
        )

    def _update(
        self, state: SearchState, utilities: np.ndarray, generation: Generation
    ) -> tuple[np.ndarray, Arrays]:
        if self.shaping != "nes":
            utilities = utilities / math.fsum(np.abs(utilities).tolist())
        first, second = generation.drawn.sums(utilities, utilities)
        sigma, rate = state.arrays["sigma"], self.rate(len(state.theta))
        growth = exact_exp(0.5 * rate * (second - math.fsum(utilities.tolist())))
        return state.theta.astype(np.float64) + sigma * first, {"sigma": sigma * growth}


def exact_exp(x: np.ndarray) -> np.ndarray:
    """``exp`` to 1e-15 by IEEE operations only: numpy's differs between CPU types in the last bit.

    Ranks on different machines would then disagree. ``x`` float64, below 700 in magnitude.
    """
    k = np.rint(x * (1 / math.log(2)))
    # ln 2 in two parts, the first with trailing zero bits, so that k times it is exact.
    r = (x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10
    total = np.ones_like(x)
    for n in range(14, 0, -1):
        total = 1 + r / n * total
    return np.ldexp(total, k.astype(np.int64))
