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
from torch import Tensor

from esmeta.errors import UserError, finite_positive, non_negative, one_of
from esmeta.optimizers import _ascent
from esmeta.optimizers._generation import Scores
from esmeta.optimizers._population import Draws
from esmeta.optimizers._shaping import SHAPINGS, Shaping
from esmeta.optimizers._sliced import Arrays, SearchState, SlicedOptimizer
from esmeta.options import options_class


@options_class
class Optimizer(SlicedOptimizer):
    """PGPE. Options besides those of :class:`SlicedOptimizer`.

    Attributes:
        learning_rate: step size of the centre.
        stdev_learning_rate: step size of the standard deviations.
        stdev_max_change: largest relative change of a standard deviation per generation.
        optimizer: of the centre: ``adam``, ``clipup`` or ``sgd``.
        weight_decay: pull of the centre towards zero, added to its gradient.
        shaping: ``centered``, ``nes``, ``zscore`` or ``raw``.
    """

    learning_rate: float = 0.02
    stdev_learning_rate: float = 0.1
    stdev_max_change: float = 0.2
    optimizer: _ascent.Kind = "adam"
    weight_decay: float = 0.0
    shaping: Shaping = "centered"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_positive("learning_rate", self.learning_rate, example=0.02)
        non_negative("stdev_learning_rate", self.stdev_learning_rate, example=0.1)
        finite_positive("stdev_max_change", self.stdev_max_change, example=0.2)
        non_negative("weight_decay", self.weight_decay)
        if self.stdev_max_change >= 1:
            raise UserError(
                f"stdev_max_change = {self.stdev_max_change!r}: must be below 1 (a standard "
                "deviation may not reach zero in one generation); write for example 0.2"
            )
        one_of("optimizer", self.optimizer, _ascent.KINDS)
        one_of("shaping", self.shaping, SHAPINGS)

    def _first(self, size: int, unit: np.ndarray) -> Arrays:
        return {"sigma": self.sigma * unit, **_ascent.zeros(self.optimizer, size)}

    def _spread(self, state: SearchState) -> np.ndarray:
        return state.arrays["sigma"]

    def _shaped(self, fitness: Tensor) -> Tensor:
        return self._weighed(fitness, self.shaping)

    def _update(
        self, state: SearchState, shaped: np.ndarray, scores: Scores, draws: Draws
    ) -> tuple[np.ndarray, Arrays]:
        # The sigma gradient needs utilities without a bias.
        shaped = shaped - math.fsum(shaped.tolist()) / len(shaped)
        plus, minus, pairs = shaped[0::2], shaped[1::2], len(shaped) // 2
        odd, even = (plus - minus) / 2, (plus + minus) / 2
        first, second = draws.sums(odd, even)
        sigma, theta = state.arrays["sigma"], state.theta.astype(np.float64)
        # In units of search, as the pull is: follow()'s step is multiplied by the unit again.
        gradient = sigma / state.unit * first / pairs
        if self.weight_decay:
            gradient = gradient - self.weight_decay * (theta / state.unit)
        step, moments = _ascent.follow(self.optimizer, state.arrays, gradient)
        change = sigma * (second - math.fsum(even.tolist())) / pairs * self.stdev_learning_rate
        most = self.stdev_max_change * sigma
        wider = sigma + np.clip(change, -most, most)
        return theta + self.learning_rate * state.unit * step, {"sigma": wider, **moments}
