"""SNES: separable natural evolution strategies (EvoTorch's).

Schaul, Glasmachers & Schmidhuber, "High dimensions and heavy tails for natural evolution
strategies", GECCO 2011, https://doi.org/10.1145/2001576.2001692. What differs from EvoTorch: see
:mod:`esmeta.evolution.replicated`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.evolution.replicated import Replicated, Sampled, Tensors
from esmeta.evolution.search import Rule
from esmeta.optimizers.snes import Options
from esmeta.options import options_class


@options_class
class Optimizer(Options, Replicated):
    """SNES."""

    def rule(self) -> Rule:
        """EvoTorch's SNES."""
        return self.diagonal(self.shaping, self._update)

    def _update(self, tensors: Tensors, sampled: Sampled, utilities: Tensor) -> Tensors:
        weights = utilities.float()
        if self.shaping != "nes":
            weights = weights / weights.abs().sum()
        center, sigma = tensors["center"], tensors["sigma"]
        noise, weights = sampled.members - center, weights[:, None]
        growth = (weights * ((noise / sigma) ** 2 - 1)).sum(0)
        return {
            "center": center + (weights * noise).sum(0),
            "sigma": sigma * torch.exp(0.5 * (self.rate(len(center)) * growth)),
        }
