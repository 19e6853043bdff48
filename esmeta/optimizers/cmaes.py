"""CMA-ES, full or separable (EvoTorch's port of pycma).

Hansen, "The CMA evolution strategy: a tutorial", 2016, https://arxiv.org/abs/1604.00772, whose
names these are; separable: Ros & Hansen, PPSN 2008, https://doi.org/10.1007/978-3-540-87700-4_30.
What differs from EvoTorch: see :mod:`esmeta.evolution.replicated`; tied members share the average
of their weights; the full matrix is updated by one matrix product instead of a tensor ``[popsize,
D, D]``; more than 1500 parameters are refused without ``separable``.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.evolution.replicated import (
    MAX_FULL_SIZE,
    Replicated,
    Sampled,
    Tensors,
    check_full_size,
)
from esmeta.evolution.search import Rule
from esmeta.evolution.shaping import rank_weighted
from esmeta.options import options_class


class Rates(NamedTuple):
    """What follows from popsize and D: weights, best first, float32 ``[N]``; the rest ``[]``."""

    weights: Tensor
    mu_eff: Tensor
    c_sigma: Tensor
    d_sigma: Tensor
    c_c: Tensor
    c_1: Tensor
    c_mu: Tensor
    keep: int
    """Generations between two decompositions of the covariance."""


@functools.cache
def rates(popsize: int, d: int, separable: bool) -> Rates:
    """The tutorial's defaults with active weights, in float32 as EvoTorch has them."""
    ranks = torch.arange(1, popsize + 1, dtype=torch.float32, device="cpu")
    raw = math.log((popsize + 1) / 2) - torch.log(ranks)
    better, worse = raw[: popsize // 2], raw[popsize // 2 :]
    mu_eff, mu_eff_minus = (w.sum() ** 2 / (w**2).sum() for w in (better, worse))
    c_sigma = (mu_eff + 2.0) / (d + mu_eff + 3)
    d_sigma = 1 + 2 * (torch.sqrt((mu_eff - 1) / (d + 1)) - 1).clamp_min(0) + c_sigma
    if separable:
        c_c = (1 + (1 / d) + (mu_eff / d)) / (d**0.5 + (1 / d) + 2 * (mu_eff / d))
        c_1 = 1.0 / (d + 2.0 * math.sqrt(d) + mu_eff / d)
        c_mu = (0.25 + mu_eff + (1.0 / mu_eff) - 2) / (d + 4 * math.sqrt(d) + (mu_eff / 2.0))
    else:
        c_c = (4 + mu_eff / d) / (d + (4 + 2 * mu_eff / d))
        c_1 = min(1, popsize / 6) * 2 / ((d + 1.3) ** 2.0 + mu_eff)
        c_mu = 2 * ((0.25 + mu_eff - 2 + (1 / mu_eff)) / ((d + 2) ** 2.0 + mu_eff))
        c_mu = torch.min(1 - c_1, c_mu)
    alpha = min(1 + c_1 / c_mu, 1 + 2 * mu_eff_minus / (mu_eff + 2), (1 - c_mu - c_1) / (d * c_mu))
    weights = torch.cat([better / better.sum(), alpha * worse / worse.abs().sum()])
    keep = max(1, math.floor(1 / (10 * d * (c_1 + c_mu)).clamp_min(1e-8)))
    return Rates(weights, mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu, keep)


@options_class
class Optimizer(Replicated):
    """CMA-ES; all learning rates follow from popsize and D. Options besides :class:`Replicated`'s.

    Attributes:
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

    def rule(self) -> Rule:
        """EvoTorch's CMA-ES; ``covariance`` and its root ``factor`` are ``[D, D]`` or ``[D]``."""
        # Utilities only tell whether there is information.
        return self.replicated(self._first, _sample, "centered", _update, _mean_sigma)

    def _first(self, center: Tensor) -> Tensors:
        if self.separable is False:
            check_full_size(len(center), "cmaes", 'write optimizer.separable = true or "auto"')
        size = len(center)
        separable = size > MAX_FULL_SIZE if self.separable == "auto" else self.separable
        ones = torch.ones_like(center)
        covariance = ones if separable else torch.diag(ones)
        return {
            "sigma": torch.tensor(self.sigma, dtype=center.dtype, device="cpu"),
            "covariance": covariance,
            "factor": covariance.clone(),
            "path_sigma": torch.zeros_like(center),
            "path_covariance": torch.zeros_like(center),
            "updates": torch.tensor(0, dtype=torch.int64, device="cpu"),
        }


def _correlated(tensors: Tensors, zs: Tensor) -> Tensor:
    factor = tensors["factor"]
    return factor * zs if factor.ndim == 1 else (factor @ zs.T).T


def _sample(tensors: Tensors, zs: Tensor) -> Tensor:
    return tensors["center"] + tensors["sigma"] * _correlated(tensors, zs)


def _update(tensors: Tensors, sampled: Sampled, utilities: Tensor) -> Tensors:
    zs, fitness = sampled.directions, sampled.fitness
    ys = _correlated(tensors, zs)
    count, d = zs.shape
    separable, updates = tensors["covariance"].ndim == 1, int(tensors["updates"])
    r = rates(count, d, separable)
    # Recombination has the positive weights only; a tie across the border averages the two parts
    # apart, where EvoTorch's topk would pick some of the tied members.
    weights = r.weights.double()
    parents = rank_weighted(fitness, weights.clamp(min=0).tolist()).to(zs.dtype)
    ranked = rank_weighted(fitness, weights.tolist()).to(zs.dtype)
    local, moved = parents @ zs, parents @ ys
    sigma, c_sigma = tensors["sigma"], r.c_sigma
    center = tensors["center"] + sigma * moved
    onward = torch.sqrt(c_sigma * (2 - c_sigma) * r.mu_eff)
    path_sigma = (1 - c_sigma) * tensors["path_sigma"] + onward * local
    length = torch.norm(path_sigma)
    usual = math.sqrt(d) * (1 - (1 / (4 * d)) + 1 / (21 * d**2))
    sigma = sigma * torch.exp((c_sigma / r.d_sigma) * (length / usual - 1))
    # The rank-one update pauses while the step size grows fast.
    settled = length**2 / (1 - (1 - c_sigma) ** (2 * updates + 1))
    going = ((settled / d) - 1 < 1 + 4.0 / (d + 1)).to(zs.dtype)
    onward = torch.sqrt(r.c_c * (2 - r.c_c) * r.mu_eff)
    path = (1 - r.c_c) * tensors["path_covariance"] + going * onward * moved
    covariance, factor = _adapted(r, tensors["covariance"], path, zs, ys, ranked, going), None
    if (updates + 1) % r.keep == 0:
        factor = covariance.pow(0.5) if separable else torch.linalg.cholesky(covariance)
    return {
        "center": center,
        "sigma": sigma,
        "covariance": covariance,
        "factor": tensors["factor"] if factor is None else factor,
        "path_sigma": path_sigma,
        "path_covariance": path,
        "updates": tensors["updates"] + 1,
    }


def _adapted(
    r: Rates, old: Tensor, path: Tensor, zs: Tensor, ys: Tensor, ranked: Tensor, going: Tensor
) -> Tensor:
    """The covariance after its rank-one and rank-mu updates, in O(D^2) memory."""
    norms = torch.linalg.vector_norm(zs, dim=1) ** 2
    active = torch.where(ranked > 0, ranked, zs.shape[1] * ranked / norms)
    rank_one = r.c_1 * (1 - (1 - going**2) * r.c_c * (2 - r.c_c))
    if old.ndim == 1:
        rank_mu = r.c_mu * (active[:, None] * (ys**2 - old)).sum(0)
        return old + rank_one * (path**2 - old) + rank_mu
    scaled = (r.c_1 / (rank_one + 1e-23)) ** 0.5 * path
    rank_mu = ys.T @ (active[:, None] * ys) - r.weights.sum() * old
    return old + rank_one * (torch.outer(scaled, scaled) - old) + r.c_mu * rank_mu


def _mean_sigma(tensors: Tensors) -> Tensor:
    covariance = tensors["covariance"]
    variance = covariance if covariance.ndim == 1 else covariance.diagonal()
    return tensors["sigma"] * variance.mean().sqrt()
