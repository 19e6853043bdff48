"""CMA-ES, full or separable (EvoTorch's port of pycma).

Hansen, "The CMA evolution strategy: a tutorial", 2016, https://arxiv.org/abs/1604.00772;
separable: Ros & Hansen, PPSN 2008, https://doi.org/10.1007/978-3-540-87700-4_30. What differs
from EvoTorch: see :mod:`_evotorch`; tied members share the average of their weights; the full
matrix is updated by one matrix product instead of a tensor ``[popsize, D, D]``; more than 1500
parameters are refused without ``separable``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.optimizers._evotorch import (
    MAX_FULL_SIZE,
    EvoTorchOptimizer,
    Searcher,
    Tensors,
    check_full_size,
)
from esmeta.optimizers._shaping import rank_weighted, utilities
from esmeta.options import options_class

if TYPE_CHECKING:
    from esmeta.optimizers._evotorch_problem import PopulationProblem

_ATTRIBUTES = {
    "center": "m",
    "sigma": "sigma",
    "covariance": "C",
    "factor": "A",
    "path_sigma": "p_sigma",
    "path_covariance": "p_c",
}


class _Searcher(Searcher):
    def __init__(self, search: Any) -> None:
        self.search = search
        # EvoTorch starts its paths as the number 0.0; a state is tensors only.
        search.p_sigma = torch.zeros_like(search.m)
        search.p_c = torch.zeros_like(search.m)
        self.drawn: tuple[Tensor, Tensor] | None = None

    def load(self, tensors: Tensors) -> None:
        """See :class:`Searcher`."""
        for name, attribute in _ATTRIBUTES.items():
            setattr(self.search, attribute, tensors[name])
        self.search._steps_count = int(tensors["updates"])

    def dump(self) -> Tensors:
        """See :class:`Searcher`; every update makes new tensors, so none is copied."""
        tensors = {name: getattr(self.search, key) for name, key in _ATTRIBUTES.items()}
        count = torch.tensor(self.search._steps_count, dtype=torch.int64, device="cpu")
        return tensors | {"updates": count}

    def sample(self, problem: PopulationProblem) -> None:
        """See :class:`Searcher`."""
        # As EvoTorch's sample_distribution, which advances the global generator by one draw.
        search = self.search
        shape = search.popsize, len(search.m)
        zs = torch.empty(shape, dtype=torch.float32, device="cpu")
        zs.normal_(generator=problem.generator)
        ys = search.A * zs if search.separable else (search.A @ zs.T).T
        self.drawn = zs, ys
        search.population.set_values(search.m + search.sigma * ys)
        problem.evaluate(search.population)

    def update(self, fitness: Tensor) -> bool:
        """See :class:`Searcher`; the order of calls is that of EvoTorch's ``_step``."""
        if not utilities(fitness, "centered").any():
            return False
        from evotorch.algorithms.cmaes import _h_sig

        search = self.search
        assert self.drawn is not None
        zs, ys = self.drawn
        weights = search.weights.double()
        # Recombination has the positive weights only; a tie across the border averages the two
        # parts apart, where EvoTorch's topk would pick some of the tied members.
        parents = rank_weighted(fitness, weights.clamp(min=0).tolist()).to(zs.dtype)
        local, shaped = parents @ zs, parents @ ys
        search.m = search.m + search.c_m * search.sigma * shaped
        search.update_p_sigma(local)
        search.update_sigma()
        h_sig = _h_sig(search.p_sigma, search.c_sigma, search._steps_count)
        search.update_p_c(shaped, h_sig)
        ranked = rank_weighted(fitness, weights.tolist()).to(zs.dtype)
        if search.separable:
            search.update_C(zs, ys, ranked, h_sig)
        else:
            _update_full(search, zs, ys, ranked, h_sig)
        if (search._steps_count + 1) % search.decompose_C_freq == 0:
            search.decompose_C()
        search._steps_count += 1
        return True

    def sigma(self) -> float:
        """See :class:`Searcher`."""
        variance = self.search.C if self.search.separable else self.search.C.diagonal()
        return (self.search.sigma * variance.mean().sqrt()).item()


def _update_full(search: Any, zs: Tensor, ys: Tensor, weights: Tensor, h_sig: Tensor) -> None:
    """EvoTorch's ``update_C`` for a full matrix, in O(D^2) memory."""
    norms = torch.linalg.vector_norm(zs, dim=1) ** 2
    scaled = torch.where(weights > 0, weights, zs.shape[1] * weights / norms)
    rank_one = search.c_1 * (1 - (1 - h_sig**2) * search.c_c * (2 - search.c_c))
    path = (search.c_1 / (rank_one + 1e-23)) ** 0.5 * search.p_c
    rank_mu = ys.T @ (scaled.unsqueeze(1) * ys) - search.weights.sum() * search.C
    search.C = search.C + rank_one * (torch.outer(path, path) - search.C) + search.c_mu * rank_mu


@options_class
class Optimizer(EvoTorchOptimizer):
    """CMA-ES; all learning rates follow from popsize and D.

    Attributes:
        popsize: members per generation, even.
        sigma: initial standard deviation of every coordinate.
        separable: adapt a diagonal only; ``auto``: for more than 1500 parameters.
    """

    separable: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.separable, bool) and self.separable != "auto":
            raise UserError(
                f'separable = {self.separable!r}: must be true, false or "auto"; write for '
                'example separable = "auto"'
            )

    def _searcher(self, problem: PopulationProblem, center: Tensor) -> Searcher:
        from evotorch.algorithms import CMAES

        separable = self.separable
        if separable is False:
            check_full_size(len(center), "cmaes", 'write optimizer.separable = true or "auto"')
        if separable == "auto":
            separable = len(center) > MAX_FULL_SIZE
        # EvoTorch annotates with numbers.Real, which no type checker accepts a float for.
        sigma: Any = self.sigma
        search = CMAES(
            problem,
            stdev_init=sigma,
            popsize=self.popsize,
            center_init=center,
            separable=bool(separable),
        )
        return _Searcher(search)
