"""CEM: the cross-entropy method with a diagonal Gaussian (EvoTorch's).

Rubinstein, "The cross-entropy method for combinatorial and continuous optimization", 1999,
https://doi.org/10.1023/A:1010091220143; Duan et al., 2016, https://arxiv.org/abs/1604.06778. What
differs from EvoTorch: see :mod:`esmeta.evolution.replicated`; members that tie at the border of the
parents are parents with equal fractional weight (the average over all ways to choose among them).
"""

from __future__ import annotations

import math

from torch import Tensor

from esmeta.errors import UserError, finite_positive
from esmeta.evolution.replicated import Replicated, Sampled, Tensors, held
from esmeta.evolution.search import Rule
from esmeta.evolution.shaping import rank_weighted
from esmeta.options import options_class


@options_class
class Optimizer(Replicated):
    """CEM. Options besides those of :class:`Replicated`.

    Attributes:
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
        if not (self.parenthood_ratio <= 1 and self._parents >= 2):
            raise UserError(
                f"parenthood_ratio = {self.parenthood_ratio!r}: must be at most 1 and make at "
                f"least 2 parents of {self.popsize} members (it makes {self._parents}); write for "
                "example 0.5 with popsize = 256"
            )
        for name in ("stdev_min", "stdev_max_change"):
            if getattr(self, name) is not None:
                finite_positive(name, getattr(self, name), example=0.01)

    @property
    def _parents(self) -> int:
        return math.floor(self.popsize * self.parenthood_ratio)

    def rule(self) -> Rule:
        """EvoTorch's CEM."""
        # Utilities only tell whether there is information.
        return self.diagonal("centered", self._update)

    def _update(self, tensors: Tensors, sampled: Sampled, utilities: Tensor) -> Tensors:
        members, parents, count = sampled.members, self._parents, self.popsize
        chosen = rank_weighted(sampled.fitness, [1.0] * parents + [0.0] * (count - parents))
        share = chosen.to(members.dtype)
        center, sigma = tensors["center"], tensors["sigma"]
        mean = share @ members / parents
        # Parents' standard deviations have n - 1, as EvoTorch's.
        stdev = (share @ (members - mean) ** 2 / (parents - 1)).sqrt()
        stdev = held(sigma, sigma + (stdev - sigma), self.stdev_min, self.stdev_max_change)
        return {"center": center + (mean - center), "sigma": stdev}
