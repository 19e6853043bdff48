"""CEM: the cross-entropy method with a diagonal Gaussian (EvoTorch's).

Rubinstein, "The cross-entropy method for combinatorial and continuous optimization", 1999,
https://doi.org/10.1023/A:1010091220143; Duan et al., 2016, https://arxiv.org/abs/1604.06778. What
differs from EvoTorch: see :mod:`_evotorch`; members that tie at the border of the parents are
parents with equal fractional weight (the average over all ways to choose among them).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from esmeta.errors import UserError, finite_positive
from esmeta.optimizers._evotorch import EvoTorchOptimizer, GaussianSearcher, Searcher
from esmeta.optimizers._shaping import rank_weighted, utilities
from esmeta.options import options_class

if TYPE_CHECKING:
    from esmeta.optimizers._evotorch_problem import PopulationProblem


class _Searcher(GaussianSearcher):
    def __init__(self, search: Any, parents: int) -> None:
        super().__init__(search, "raw")
        self.parents = parents

    def update(self, fitness: Tensor) -> bool:
        """See :class:`Searcher`; only the order of the fitness counts."""
        if not utilities(fitness, "centered").any():
            return False
        count = len(fitness)
        chosen = rank_weighted(fitness, [1.0] * self.parents + [0.0] * (count - self.parents))
        self.apply(chosen)
        return True

    def gradients(self, samples: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """From here to the parents' mean and standard deviation (n - 1, as EvoTorch)."""
        share = weights.to(samples.dtype)
        mean = share @ samples / self.parents
        variance = share @ (samples - mean) ** 2 / (self.parents - 1)
        distribution = self.search._distribution
        return {"mu": mean - distribution.mu, "sigma": variance.sqrt() - distribution.sigma}


@options_class
class Optimizer(EvoTorchOptimizer):
    """CEM.

    Attributes:
        popsize: members per generation, even.
        sigma: initial standard deviation of every coordinate.
        parenthood_ratio: fraction of the members that become parents.
        stdev_min: floor of the standard deviations; none: no floor.
        stdev_max_change: largest relative change of a standard deviation per generation; none:
            no limit.
    """

    parenthood_ratio: float = 0.5
    stdev_min: float | None = None
    stdev_max_change: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        finite_positive("parenthood_ratio", self.parenthood_ratio, example=0.5)
        parents = math.floor(self.popsize * self.parenthood_ratio)
        if not (self.parenthood_ratio <= 1 and parents >= 2):
            raise UserError(
                f"parenthood_ratio = {self.parenthood_ratio!r}: must be at most 1 and make at "
                f"least 2 parents of {self.popsize} members (it makes {parents}); write for "
                "example 0.5 with popsize = 256"
            )
        for name in ("stdev_min", "stdev_max_change"):
            if getattr(self, name) is not None:
                finite_positive(name, getattr(self, name), example=0.01)

    def _searcher(self, problem: PopulationProblem, center: Tensor) -> Searcher:
        from evotorch.algorithms import CEM

        search = CEM(
            problem,
            popsize=self.popsize,
            parenthood_ratio=self.parenthood_ratio,
            stdev_init=self.sigma,
            stdev_min=self.stdev_min,
            stdev_max_change=self.stdev_max_change,
            center_init=center,
        )
        return _Searcher(search, math.floor(self.popsize * self.parenthood_ratio))
