"""XNES: exponential natural evolution strategies with a full covariance matrix (EvoTorch's).

Glasmachers et al., "Exponential natural evolution strategies", GECCO 2010,
https://doi.org/10.1145/1830483.1830557. What differs from EvoTorch: see :mod:`_evotorch`; the
matrix gradient is one matrix product instead of a tensor ``[popsize, D, D]`` (2.3 GB for 256
members and 1500 parameters), and more than 1500 parameters are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from esmeta.errors import finite_positive, one_of
from esmeta.optimizers._evotorch import (
    EvoTorchOptimizer,
    GaussianSearcher,
    Searcher,
    check_full_size,
)
from esmeta.optimizers._shaping import SHAPINGS, Shaping
from esmeta.options import options_class

if TYPE_CHECKING:
    from esmeta.optimizers._evotorch_problem import PopulationProblem


class _Searcher(GaussianSearcher):
    def gradients(self, samples: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Gradients of centre and matrix in local coordinates: sum w s, sum w (s s^T - I)."""
        distribution = self.search._distribution
        local = distribution.to_local_coordinates(samples)
        weights = (weights - weights.mean()).float()
        matrix = local.T @ (weights.unsqueeze(1) * local) - weights.sum() * distribution.eye
        return {"d": weights @ local, "M": matrix}


@options_class
class Optimizer(EvoTorchOptimizer):
    """XNES; the centre moves with learning rate 1.

    Attributes:
        popsize: members per generation, even.
        sigma: initial standard deviation of every coordinate.
        learning_rate: of the matrix; none: 0.6 (3 + ln D) / (D sqrt(D)).
        shaping: ``centered``, ``nes``, ``zscore`` or ``raw``; the step size is tuned for ``nes``.
    """

    learning_rate: float | None = None
    shaping: Shaping = "nes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None:
            finite_positive("learning_rate", self.learning_rate, example=0.1)
        one_of("shaping", self.shaping, SHAPINGS)

    def _searcher(self, problem: PopulationProblem, center: Tensor) -> Searcher:
        check_full_size(len(center), "xnes", 'write optimizer.name = "snes" (its diagonal version)')
        from evotorch.algorithms import XNES

        search = XNES(
            problem,
            stdev_init=self.sigma,
            popsize=self.popsize,
            stdev_learning_rate=self.learning_rate,
            scale_learning_rate=False,
            center_init=center,
        )
        return _Searcher(search, self.shaping)
