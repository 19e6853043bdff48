"""PGPE: policy gradients with parameter-based exploration, symmetric sampling (EvoTorch's).

Sehnke et al., "Parameter-exploring policy gradients", Neural Networks 23, 2010,
https://doi.org/10.1016/j.neunet.2009.12.004; ClipUp: Toklu et al., PPSN 2020,
https://arxiv.org/abs/2008.02387. What differs from EvoTorch: see
:mod:`esmeta.evolution.replicated`; Adam is the default, because ClipUp's fixed step length needs a
learning rate of its own (about 0.15), and ClipUp coasts on a zero gradient, where EvoTorch's
divides zero by zero.
"""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from esmeta.evolution.replicated import Replicated, Sampled, Tensors, held
from esmeta.evolution.search import Rule
from esmeta.optimizers.pgpe import Options
from esmeta.options import options_class


@options_class
class Optimizer(Options, Replicated):
    """PGPE."""

    mirrored: ClassVar[bool] = True

    def rule(self) -> Rule:
        """EvoTorch's PGPE."""
        moments = functools.partial(zeros, self.optimizer)
        return self.diagonal(self.shaping, self._update, moments)

    def _update(self, tensors: Tensors, sampled: Sampled, utilities: Tensor) -> Tensors:
        weights = utilities.float()
        if self.shaping in ("nes", "raw"):
            weights = weights - weights.mean()
        center, sigma, pairs = tensors["center"], tensors["sigma"], len(weights) // 2
        noise, plus, minus = (
            sampled.members[0::2] - center,
            weights[0::2, None],
            weights[1::2, None],
        )
        odd, even = (plus - minus) / 2, (plus + minus) / 2
        gradient = (odd * noise).sum(0) / pairs
        wider = (even * ((noise**2 - sigma**2) / sigma)).sum(0) / pairs
        step, moments = ascent(self.optimizer, tensors, gradient, self.learning_rate)
        wider = held(sigma, sigma + self.stdev_learning_rate * wider, None, self.stdev_max_change)
        return {"center": center + step, "sigma": wider, **moments}


def zeros(kind: str, center: Tensor) -> Tensors:
    """What an ascent remembers before its first step: Adam's moments, ClipUp's velocity."""
    if kind == "adam":
        count = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        zero = torch.zeros_like(center)
        return {"adam_mean": zero, "adam_square": zero.clone(), "adam_updates": count}
    return {"velocity": torch.zeros_like(center)} if kind == "clipup" else {}


def ascent(kind: str, moments: Tensors, gradient: Tensor, rate: float) -> tuple[Tensor, Tensors]:
    """The step of EvoTorch's Adam, ClipUp or SGD, bit for bit, and the moments after it."""
    if kind == "adam":
        updates = moments["adam_updates"] + 1
        count = updates.item()
        mean = torch.lerp(moments["adam_mean"], gradient, 1 - 0.9)
        square = (moments["adam_square"] * 0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        spread = (square.sqrt() / (1 - 0.999**count) ** 0.5).add_(1e-8)
        step = -torch.zeros_like(gradient).addcdiv_(mean, spread, value=-rate / (1 - 0.9**count))
        return step, {"adam_mean": mean, "adam_square": square, "adam_updates": updates}
    if kind == "sgd":
        return rate * gradient, {}
    velocity = 0.9 * moments["velocity"]
    if torch.count_nonzero(gradient):
        velocity = velocity + gradient / torch.norm(gradient) * rate
        speed = torch.norm(velocity)
        if speed > 2 * rate:
            velocity = velocity * (2 * rate / speed)
    return velocity, {"velocity": velocity}
