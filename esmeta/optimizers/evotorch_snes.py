"""SNES: separable natural evolution strategies (EvoTorch's).

Schaul, Glasmachers & Schmidhuber, "High dimensions and heavy tails for natural evolution
strategies", GECCO 2011, https://doi.org/10.1145/2001576.2001692. What differs from EvoTorch: see
:mod:`_evotorch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from esmeta.errors import finite_positive, one_of
from esmeta.optimizers._evotorch import EvoTorchOptimizer, GaussianSearcher, Searcher
from esmeta.optimizers._shaping import SHAPINGS, Shaping
from esmeta.options import options_class

if TYPE_CHECKING:
    from esmeta.optimizers._evotorch_problem import PopulationProblem


@options_class
class Optimizer(EvoTorchOptimizer):
    """SNES; the centre moves with learning rate 1.

    Attributes:
        popsize: members per generation, even.
        sigma: initial standard deviation of every coordinate.
        learning_rate: of the log standard deviations; none: 0.2 (3 + ln D) / sqrt(D).
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
        from evotorch.algorithms import SNES

        search = SNES(
            problem,
            stdev_init=self.sigma,
            popsize=self.popsize,
            stdev_learning_rate=self.learning_rate,
            scale_learning_rate=False,
            center_init=center,
        )
        return GaussianSearcher(search, self.shaping)
