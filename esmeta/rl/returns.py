"""Advantages over recorded trials."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    lambda_: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

    ``delta_t = r_t + gamma V'_t (1 - terminated_t) - V_t``,
    ``A_t = delta_t + gamma lambda (1 - terminated_t)(1 - truncated_t) A_{t+1}``.

    All arguments are ``[T, ...]``. ``next_value`` is V' of the observation that the transition led
    to, *before* any reset, so a ``truncated`` step bootstraps from it while ``terminated`` does
    not; both cut the sum. Inside a trial of several episodes pass flags that are set only where
    the *trial* ends: advantages then run across its episodes (RL2).
    """
    alive = (~terminated).to(reward.dtype)
    carry = alive * (~truncated).to(reward.dtype) * (gamma * lambda_)
    delta = reward + gamma * next_value * alive - value
    advantage = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in range(delta.shape[0] - 1, -1, -1):
        running = delta[t] + carry[t] * running
        advantage[t] = running
    return advantage
