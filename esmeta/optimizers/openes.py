"""OpenAI-ES, sliced: every rank draws, evaluates and sums only its own part of the population.

Salimans, Ho, Chen, Sidor & Sutskever, "Evolution Strategies as a Scalable Alternative to
Reinforcement Learning", 2017, https://arxiv.org/abs/1703.03864.

    g = 1 / (N sigma) * sum_i u_i eps_i,      theta <- theta + lr * Adam(g - weight_decay * theta)

over N members theta +- sigma eps in mirrored pairs, with utilities u. What differs: noise comes
from a counter (key, generation, pair) instead of a shared table; sums over ranks are exact, so
theta has the same bits for any number of ranks; ties share their utility, failed members rank
last, and a generation without information (all equal, or all failed) changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from esmeta.errors import finite_positive, non_negative, non_negative_int, one_of
from esmeta.optimizers import _ascent
from esmeta.optimizers._generation import Scores
from esmeta.optimizers._noise import Noise, noise_rank
from esmeta.optimizers._population import Draws
from esmeta.optimizers._shaping import SHAPINGS, Shaping
from esmeta.optimizers._sliced import Arrays, SearchState, SlicedOptimizer, in_range
from esmeta.options import options_class


@options_class
class Optimizer(SlicedOptimizer):
    """OpenAI-ES. Options besides those of :class:`SlicedOptimizer`.

    Attributes:
        learning_rate: step size of the ascent.
        optimizer: the ascent: ``adam``, ``clipup`` or ``sgd``.
        weight_decay: pull towards zero, subtracted from g (not decoupled), in units of search. The
            releases of OpenAI-ES and EPG do not divide the rest of g by sigma: their L2 factor is
            ``weight_decay * sigma`` here (EPG's 0.001 is 0.1 at sigma 0.01).
        beta1: decay of Adam's mean.
        beta2: decay of Adam's mean square.
        eps: Adam's denominator offset.
        shaping: ``centered``, ``nes``, ``zscore`` or ``raw``.
        sigma_decay: factor on sigma per generation.
        sigma_min: floor of sigma.
        learning_rate_decay: factor on the learning rate per generation.
        learning_rate_min: floor of the learning rate.
        learning_rate_generations: generations over which the learning rate falls in a straight
            line to ``learning_rate_min``; 0: only by its factor.
        noise: ``full``, or ``lowrank:r``: matrices are perturbed by matrices of rank r.
    """

    learning_rate: float = 0.02
    optimizer: _ascent.Kind = "adam"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    shaping: Shaping = "centered"
    sigma_decay: float = 1.0
    sigma_min: float = 0.0
    learning_rate_decay: float = 1.0
    learning_rate_min: float = 0.0
    learning_rate_generations: int = 0
    noise: str = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_positive("learning_rate", self.learning_rate, example=0.02)
        one_of("optimizer", self.optimizer, _ascent.KINDS)
        finite_positive("eps", self.eps, example=1e-8)
        for name in ("weight_decay", "sigma_min", "learning_rate_min"):
            non_negative(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            in_range(name, getattr(self, name), low_open=False, high_open=True, example=0.9)
        for name in ("sigma_decay", "learning_rate_decay"):
            in_range(name, getattr(self, name), low_open=True, high_open=False, example=0.999)
        non_negative_int("learning_rate_generations", self.learning_rate_generations, example=500)
        one_of("shaping", self.shaping, SHAPINGS)
        noise_rank(self.noise)

    def _noise(self, shapes: Mapping[str, tuple[int, ...]]) -> Noise:
        return Noise(shapes, noise_rank(self.noise))

    def _first(self, size: int, unit: np.ndarray) -> Arrays:
        return _ascent.zeros(self.optimizer, size)

    def _sigma(self, generation: int) -> float:
        return max(self.sigma_min, self.sigma * self.sigma_decay**generation)

    def _spread(self, state: SearchState) -> np.ndarray:
        return self._sigma(state.generation) * state.unit

    def _shaped(self, fitness: Tensor) -> Tensor:
        return self._weighed(fitness, self.shaping)

    def _update(
        self, state: SearchState, shaped: np.ndarray, scores: Scores, draws: Draws
    ) -> tuple[np.ndarray, Arrays]:
        total, _ = draws.sums(shaped[0::2] - shaped[1::2])
        return self._ascend(state, total / (len(shaped) * self._sigma(state.generation)))

    def _rate(self, generation: int) -> float:
        low, rate = self.learning_rate_min, self.learning_rate
        if self.learning_rate_generations:
            rate -= (rate - low) * min(1.0, generation / self.learning_rate_generations)
        return max(low, rate * self.learning_rate_decay**generation)

    def _ascend(self, state: SearchState, gradient: np.ndarray) -> tuple[np.ndarray, Arrays]:
        theta = state.theta.astype(np.float64)
        if self.weight_decay:
            gradient = gradient - self.weight_decay * (theta / state.unit)
        step, moments = _ascent.follow(
            self.optimizer, state.arrays, gradient, beta1=self.beta1, beta2=self.beta2, eps=self.eps
        )
        rate = self._rate(state.generation)
        return theta + rate * state.unit * step, moments
