"""XNES: exponential natural evolution strategies with a full covariance matrix (EvoTorch's).

Glasmachers et al., "Exponential natural evolution strategies", GECCO 2010,
https://doi.org/10.1145/1830483.1830557. What differs from EvoTorch: see
:mod:`esmeta.evolution.replicated`; the matrix gradient is one matrix product instead of a tensor
``[popsize, D, D]`` (2.3 GB for 256 members and 1500 parameters), and more than 1500 parameters are
refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esmeta.evolution.replicated import Replicated, Sampled, Tensors, check_full_size
from esmeta.evolution.search import Rule
from esmeta.optimizers.snes import Options
from esmeta.options import options_class


@options_class
class Optimizer(Options, Replicated):
    """XNES."""

    def rule(self) -> Rule:
        """EvoTorch's XNES; ``sigma [D, D]`` is a root of the covariance matrix."""
        return self.replicated(self._first, _sample, self.shaping, self._update, _mean_sigma)

    def _first(self, center: Tensor) -> Tensors:
        cure = 'write optimizer.name = "snes" (its diagonal version)'
        check_full_size(len(center), "xnes", cure)
        sigma = torch.diag(torch.full_like(center, self.sigma))
        return {"sigma": sigma, "sigma_inv": torch.inverse(sigma)}

    def _update(self, tensors: Tensors, sampled: Sampled, utilities: Tensor) -> Tensors:
        weights = (utilities - utilities.mean()).float()
        center, sigma, inverse = tensors["center"], tensors["sigma"], tensors["sigma_inv"]
        local = (inverse @ (sampled.members - center).T).T
        # In local coordinates: sum w s, and sum w (s s^T - I).
        eye = torch.eye(len(center), dtype=center.dtype, device="cpu")
        matrix = local.T @ (weights[:, None] * local) - weights.sum() * eye
        size = len(center)
        rate = self.learning_rate or 0.6 * (3 + math.log(size)) / (size * math.sqrt(size))
        change = rate * matrix
        return {
            "center": center + torch.mv(sigma, weights @ local),
            "sigma": sigma @ torch.matrix_exp(0.5 * change),
            "sigma_inv": torch.matrix_exp(-0.5 * change) @ inverse,
        }


def _sample(tensors: Tensors, directions: Tensor) -> Tensor:
    return tensors["center"] + (tensors["sigma"] @ directions.T).T


def _mean_sigma(tensors: Tensors) -> Tensor:
    sigma = tensors["sigma"]
    return torch.linalg.matrix_norm(sigma) / len(sigma) ** 0.5
