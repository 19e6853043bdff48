"""PGPE with symmetric sampling, sliced over ranks.

Sehnke et al., "Parameter-exploring policy gradients", Neural Networks 23, 2010,
https://doi.org/10.1016/j.neunet.2009.12.004, in EvoTorch's form (Toklu et al., 2023,
https://arxiv.org/abs/2302.12600), which ``evotorch_pgpe`` runs as it is:

    mu    <- mu    + lr   * ascent(sum_k (u_k+ - u_k-)/2 sigma z_k / K)
    sigma <- sigma + lr_s * sum_k (u_k+ + u_k-)/2 sigma (z_k^2 - 1) / K,

over K mirrored pairs mu +- sigma z, with utilities u of mean zero. What differs: each rank draws
and sums only its own pairs, exactly; see :mod:`openes` for ties, failures and flat generations.
"""

from __future__ import annotations

import math

import numpy as np

from esmeta.errors import UserError, finite_positive, non_negative, one_of
from esmeta.evolution import ascent
from esmeta.evolution.population import Generation
from esmeta.evolution.search import Rule, Search, Sliced
from esmeta.evolution.shaping import SHAPINGS, Shaping
from esmeta.evolution.state import Arrays, SearchState
from esmeta.options import options_class


@options_class
class Options(Search):
    """Options of PGPE, which ``evotorch_pgpe`` has as well, besides those of every search.

    Attributes:
        learning_rate: step size of the centre.
        stdev_learning_rate: step size of the standard deviations.
        stdev_max_change: largest relative change of a standard deviation per generation.
        optimizer: of the centre: ``adam``, ``clipup`` or ``sgd``.
        shaping: ``centered``, ``nes``, ``zscore`` or ``raw``.
    """

    learning_rate: float = 0.02
    stdev_learning_rate: float = 0.1
    stdev_max_change: float = 0.2
    optimizer: ascent.Kind = "adam"
    shaping: Shaping = "centered"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_positive("learning_rate", self.learning_rate, example=0.02)
        non_negative("stdev_learning_rate", self.stdev_learning_rate, example=0.1)
        finite_positive("stdev_max_change", self.stdev_max_change, example=0.2)
        if self.stdev_max_change >= 1:
            raise UserError(
                f"stdev_max_change = {self.stdev_max_change!r}: must be below 1 (a standard "
                "deviation may not reach zero in one generation); write for example 0.2"
            )
        one_of("optimizer", self.optimizer, ascent.KINDS)
        one_of("shaping", self.shaping, SHAPINGS)


@options_class
class Optimizer(Options, Sliced):
    """PGPE.

    Attributes:
        weight_decay: pull of the centre towards zero, added to its gradient.
    """

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("weight_decay", self.weight_decay)

    def rule(self) -> Rule:
        """The equations above."""
        return self.sliced(
            first=lambda unit: {
                "sigma": self.sigma * unit,
                **ascent.zeros(self.optimizer, len(unit)),
            },
            spread=lambda state: state.arrays["sigma"],
            shaping=self.shaping,
            update=self._update,
        )

    def _update(
        self, state: SearchState, utilities: np.ndarray, generation: Generation
    ) -> tuple[np.ndarray, Arrays]:
        # The sigma gradient needs utilities without a bias.
        utilities = utilities - math.fsum(utilities.tolist()) / len(utilities)
        plus, minus, pairs = utilities[0::2], utilities[1::2], len(utilities) // 2
        odd, even = (plus - minus) / 2, (plus + minus) / 2
        first, second = generation.drawn.sums(odd, even)
        sigma, theta = state.arrays["sigma"], state.theta.astype(np.float64)
        # In units of search, as the pull is: follow()'s step is multiplied by the unit again.
        gradient = sigma / state.unit * first / pairs
        if self.weight_decay:
            gradient = gradient - self.weight_decay * (theta / state.unit)
        step, moments = ascent.follow(self.optimizer, state.arrays, gradient)
        change = sigma * (second - math.fsum(even.tolist())) / pairs * self.stdev_learning_rate
        most = self.stdev_max_change * sigma
        wider = sigma + np.clip(change, -most, most)
        return theta + self.learning_rate * state.unit * step, {"sigma": wider, **moments}
