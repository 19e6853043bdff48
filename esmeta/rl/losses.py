"""Losses by the step, one definition each, and their means.

All take and give tensors of any leading axes; what is held constant in them (advantages, targets,
what the policy was) is made before. A loss of P agents is a mean over the steps of each, ``[P]``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

ValueTarget = Literal["gae", "reward_to_go"]
"""What V learns: advantages plus V, or the discounted rewards to the end of the episode."""


def policy_gradient(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """``-log pi(a) A`` (Williams 1992)."""
    return -(log_prob * advantage)


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """``-min(r A, clip(r, 1 - clip, 1 + clip) A)``, r = pi / pi_old.

    Schulman et al. 2017 (PPO), https://arxiv.org/abs/1707.06347, eq. 7.
    """
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def value_error(value: Tensor, target: Tensor) -> Tensor:
    """``(V - target)^2``."""
    return (value - target).square()


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """``r - 1 - log r``, whose mean over actions of pi_old is KL(pi_old || pi); never negative."""
    return torch.exp(log_ratio) - 1.0 - log_ratio


def outside(log_ratio: Tensor, clip: float) -> Tensor:
    """Whether PPO's clip holds the ratio, bool."""
    return (torch.exp(log_ratio) - 1.0).abs() > clip


def standardised(x: Tensor) -> Tensor:
    """Zero mean and unit deviation over the steps of each agent, ``[P, M]``."""
    mean = x.mean(dim=1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=1, keepdim=True).sqrt() + 1e-8)


def excess(mean: Tensor, beyond: float = 1.0) -> Tensor:
    """Squared excess of ``mean [..., A]`` over ``beyond`` in size, summed over actions."""
    return (mean.abs() - beyond).relu().square().sum(dim=-1)
