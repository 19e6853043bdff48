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

import numpy as np

from esmeta.errors import UserError, finite_positive, non_negative, non_negative_int, one_of
from esmeta.evolution import ascent
from esmeta.evolution.noise import noise_rank
from esmeta.evolution.population import Generation
from esmeta.evolution.search import Rule, Sliced
from esmeta.evolution.shaping import SHAPINGS, Shaping
from esmeta.evolution.state import Arrays, SearchState
from esmeta.optimizers._schedule import scheduled
from esmeta.options import options_class


@options_class
class Optimizer(Sliced):
    """OpenAI-ES, with the options of every sliced search too.

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
    optimizer: ascent.Kind = "adam"
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
        one_of("shaping", self.shaping, SHAPINGS)
        finite_positive("learning_rate", self.learning_rate, example=0.02)
        one_of("optimizer", self.optimizer, ascent.KINDS)
        finite_positive("eps", self.eps, example=1e-8)
        for name in ("weight_decay", "sigma_min", "learning_rate_min"):
            non_negative(name, getattr(self, name))
        for name in ("beta1", "beta2", "sigma_decay", "learning_rate_decay"):
            value, decays = getattr(self, name), name.endswith("decay")
            non_negative(name, value, example=0.9)
            if value > 1 or value == (0 if decays else 1):
                raise UserError(
                    f"{name} = {value!r}: must be a number in {'(0, 1]' if decays else '[0, 1)'}; "
                    f"write for example {name} = {0.999 if decays else 0.9}"
                )
        non_negative_int("learning_rate_generations", self.learning_rate_generations, example=500)
        noise_rank(self.noise)

    def sigma_at(self, generation: int) -> float:
        """Standard deviation of the perturbations, in units of search."""
        return max(self.sigma_min, self.sigma * self.sigma_decay**generation)

    def rate_at(self, generation: int) -> float:
        """Learning rate."""
        low, length = self.learning_rate_min, self.learning_rate_generations
        rate = scheduled("linear", generation, length, self.learning_rate, low)
        return max(low, rate * self.learning_rate_decay**generation)

    def rule(self) -> Rule:
        """The equation of this module."""
        return self.sliced(
            first=lambda unit: ascent.zeros(self.optimizer, len(unit)),
            spread=lambda state: self.sigma_at(state.generation) * state.unit,
            shaping=self.shaping,
            update=self._update,
            noise=self.noise,
        )

    def _update(
        self, state: SearchState, utilities: np.ndarray, generation: Generation
    ) -> tuple[np.ndarray, Arrays]:
        total, _ = generation.drawn.sums(utilities[0::2] - utilities[1::2])
        gradient = total / (len(utilities) * self.sigma_at(state.generation))
        theta = state.theta.astype(np.float64)
        if self.weight_decay:
            gradient = gradient - self.weight_decay * (theta / state.unit)
        step, moments = ascent.follow(
            self.optimizer, state.arrays, gradient, beta1=self.beta1, beta2=self.beta2, eps=self.eps
        )
        return theta + self.rate_at(state.generation) * state.unit * step, moments
