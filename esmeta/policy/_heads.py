"""Read-outs: action distributions and the value."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esmeta.types import Continuous, Discrete, PolicyOut

_LOG_2PI = math.log(2.0 * math.pi)


def noise_width(action: Discrete | Continuous) -> int:
    """Random numbers that one action costs."""
    return 1 if isinstance(action, Discrete) else action.size


def sample(out: PolicyOut, noise: Tensor) -> Tensor:
    """Draw actions by inversion, so that the same noise gives the same action on any device.

    ``noise`` is uniform [0, 1) ``[P, B, 1]`` for logits and standard normal ``[P, B, A]`` for
    Gaussians (a leading 1 broadcasts over members). Returns int64 ``[P, B]`` or float
    ``[P, B, A]``.
    """
    if out.logits is not None:
        # Actions first: a softmax over the last of many short rows is several times slower.
        cumulative = torch.softmax(out.logits.movedim(-1, 0).contiguous(), dim=0).cumsum(dim=0)
        return (noise.squeeze(-1) >= cumulative[:-1]).sum(dim=0)
    assert out.mean is not None and out.std is not None
    return out.mean + out.std * noise


def mode(out: PolicyOut) -> Tensor:
    """The most likely action."""
    if out.logits is not None:
        return out.logits.argmax(dim=-1)
    assert out.mean is not None
    return out.mean


def log_prob(out: PolicyOut, action: Tensor) -> Tensor:
    """Log-probability (density) of unclipped actions, ``[(T,) P, B]``."""
    if out.logits is not None:
        logp = torch.log_softmax(out.logits, dim=-1)
        return logp.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    assert out.mean is not None and out.std is not None
    z = (action - out.mean) / out.std
    return (-0.5 * (z * z + _LOG_2PI) - torch.log(out.std)).sum(dim=-1)


def entropy(out: PolicyOut) -> Tensor:
    """Entropy in nats, ``[(T,) P, B]``; constant where the standard deviation is fixed."""
    if out.logits is not None:
        logp = torch.log_softmax(out.logits, dim=-1)
        return -(logp.exp() * logp).sum(dim=-1)
    assert out.std is not None and out.mean is not None
    per_dimension = torch.log(out.std) + 0.5 * (1.0 + _LOG_2PI)
    return per_dimension.expand(out.mean.shape).sum(dim=-1)
