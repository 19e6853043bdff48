"""PGPE: policy gradients with parameter-based exploration, symmetric sampling (EvoTorch's).

Sehnke et al., "Parameter-exploring policy gradients", Neural Networks 23, 2010,
https://doi.org/10.1016/j.neunet.2009.12.004; ClipUp: Toklu et al., PPSN 2020,
https://arxiv.org/abs/2008.02387. What differs from EvoTorch: see :mod:`_evotorch`; Adam is the
default, because ClipUp's fixed step length needs a learning rate of its own (about 0.15).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from esmeta.errors import UserError, finite_positive, non_negative, one_of
from esmeta.optimizers._evotorch import EvoTorchOptimizer, GaussianSearcher, Searcher
from esmeta.optimizers._shaping import SHAPINGS, Shaping
from esmeta.options import options_class

if TYPE_CHECKING:
    from esmeta.optimizers._evotorch_problem import PopulationProblem


@options_class
class Optimizer(EvoTorchOptimizer):
    """PGPE.

    Attributes:
        popsize: members per generation, even.
        sigma: initial standard deviation of every coordinate.
        learning_rate: step size of the centre.
        stdev_learning_rate: step size of the standard deviations.
        stdev_max_change: largest relative change of a standard deviation per generation.
        optimizer: of the centre: ``adam``, ``clipup`` or ``sgd``.
        shaping: ``centered``, ``nes``, ``zscore`` or ``raw``.
    """

    mirrored: ClassVar[bool] = True

    learning_rate: float = 0.02
    stdev_learning_rate: float = 0.1
    stdev_max_change: float = 0.2
    optimizer: Literal["adam", "clipup", "sgd"] = "adam"
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
        one_of("optimizer", self.optimizer, ("adam", "clipup", "sgd"))
        one_of("shaping", self.shaping, SHAPINGS)

    def _searcher(self, problem: PopulationProblem, center: Tensor) -> Searcher:
        from evotorch.algorithms import PGPE

        from esmeta.optimizers._evotorch_problem import GuardedClipUp, PlainAdam

        ascent: Any = self.optimizer
        if ascent != "sgd":
            kind = GuardedClipUp if ascent == "clipup" else PlainAdam
            ascent = kind(
                solution_length=len(center), dtype=center.dtype, stepsize=self.learning_rate
            )
        search = PGPE(
            problem,
            popsize=self.popsize,
            center_learning_rate=self.learning_rate,
            stdev_learning_rate=self.stdev_learning_rate,
            stdev_init=self.sigma,
            stdev_max_change=self.stdev_max_change,
            optimizer=ascent,
            center_init=center,
        )
        return GaussianSearcher(search, self.shaping)
