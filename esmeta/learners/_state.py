"""What agents carry between updates besides their networks: Adam's moments, input statistics.

Nothing is changed in place, and everything is elementwise over agents: one agent's numbers do not
depend on the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.types import Params


class Adam(NamedTuple):
    """By leaf: moments ``[P, ...]`` and the updates done, int64 ``[P]``."""

    first: Params
    second: Params
    updates: Params

    @classmethod
    def zeros(cls, params: Params) -> Adam:
        """The moments of fresh parameters."""
        zeros = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
        none = {
            name: torch.zeros(len(leaf), dtype=torch.int64, device=leaf.device)
            for name, leaf in params.items()
        }
        return cls(zeros, dict(zeros), none)


def _per_agent(numbers: Tensor, leaf: Tensor) -> Tensor:
    return numbers.to(leaf.dtype).reshape(-1, *[1] * (leaf.ndim - 1))


def adam_step(
    adam: Adam,
    params: Params,
    gradients: Params,
    rate: float,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[Params, Adam]:
    """One descent (Kingma & Ba 2015, algorithm 1) of the leaves that ``gradients`` names.

    Products and sums are operations of their own: fused ones round differently in the last few
    elements of a tensor, and an agent's bits would depend on where it lies.
    """
    params = dict(params)
    first, second, updates = dict(adam.first), dict(adam.second), dict(adam.updates)
    if not gradients:
        return params, adam
    done = torch.stack([updates[name] for name in gradients]) + 1
    # float64, so that the correction of late updates is not lost; of all leaves in one go.
    correct1 = (1.0 - beta1 ** done.double()).unbind()
    correct2 = (1.0 - beta2 ** done.double()).sqrt().unbind()
    for i, (name, gradient) in enumerate(gradients.items()):
        updates[name] = done[i]
        first[name] = (first[name] * beta1).add_(gradient * (1.0 - beta1))
        second[name] = (second[name] * beta2).add_((gradient * gradient).mul_(1.0 - beta2))
        denominator = second[name].sqrt().div_(_per_agent(correct2[i], gradient)).add_(eps)
        step = (first[name] / _per_agent(correct1[i], gradient)).div_(denominator)
        params[name] = params[name] - step.mul_(rate)
    return params, Adam(first, second, updates)


def clip_norm(gradients: Params, limit: float) -> Params:
    """Gradients whose global norm, of each agent by itself, is at most ``limit`` (0: no limit)."""
    if limit <= 0:
        return gradients
    squares = [g.reshape(len(g), -1).square().sum(dim=1) for g in gradients.values()]
    norm = torch.stack(squares).sum(dim=0).sqrt()
    factor = (limit / (norm + 1e-6)).clamp_max(1.0)
    return {name: g * _per_agent(factor, g) for name, g in gradients.items()}


class Statistics(NamedTuple):
    """Running moments of each agent's inputs: ``count [P, 1]``, ``total`` and ``squares [P, K]``.

    float64: sums of many steps lose nothing.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def fresh(cls, agents: int, size: int, device: torch.device | str) -> Statistics:
        """Nothing seen: a hundredth of a step with mean 0 and variance 1."""
        count = torch.full((agents, 1), 1e-2, dtype=torch.float64, device=device)
        total = torch.zeros(agents, size, dtype=torch.float64, device=device)
        return cls(count, total, total + 1e-2)

    def add(self, x: Tensor) -> Statistics:
        """With ``x [P, T, K]`` seen too."""
        x = x.double()
        return Statistics(
            self.count + x.shape[1], self.total + x.sum(dim=1), self.squares + (x * x).sum(dim=1)
        )

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (at least 0.1), float32 ``[P, K]``."""
        mean = self.total / self.count
        variance = (self.squares / self.count - mean * mean).clamp_min(1e-2)
        return mean.float(), variance.sqrt().float()
