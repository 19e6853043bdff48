"""Read-outs: distributions of actions, one definition of each of their quantities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from esmeta.types import Continuous, Discrete, Params, PolicyOut

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_MIN_STD = 1e-3


@dataclass(frozen=True)
class Distribution:
    """How the numbers of a policy's last layer become a distribution of actions.

    Attributes:
        action: of the task. Discrete actions have logits, and nothing below matters.
        std: of a Gaussian: ``fixed`` at ``first``, ``learned`` (a leaf ``leaf``, its logarithm),
            or given by the ``state``.
        first: standard deviation at first.
        leaf: name of the learned one.
        limited: the mean is the middle of the action's range plus its half times a tanh, and
            ``first`` is in units of that half.
    """

    action: Discrete | Continuous
    std: Literal["fixed", "learned", "state"] = "fixed"
    first: float = 0.1
    leaf: str = "head.log_std"
    limited: bool = False

    @property
    def gaussian(self) -> bool:
        """Whether actions are continuous."""
        return isinstance(self.action, Continuous)

    @property
    def width(self) -> int:
        """Numbers that the last layer must say."""
        return self.action.size * (2 if self.std == "state" and self.gaussian else 1)

    @property
    def statistics(self) -> int:
        """Numbers that :func:`statistics` has per action."""
        return self.action.size * (2 if self.gaussian else 1)

    def init(self) -> Params:
        """The logarithm of a learned standard deviation, ``[A]``."""
        if not (self.gaussian and self.std == "learned"):
            return {}
        first, shape = math.log(self.first), (self.action.size,)
        return {self.leaf: torch.full(shape, first, dtype=torch.float32, device="cpu")}

    def spread(self, params: Params) -> Tensor | None:
        """Standard deviations ``[P or 1, 1, A or 1]``; None where there are none, or states say."""
        if self.leaf in params:
            return torch.exp(params[self.leaf]).clamp_min(_MIN_STD).unsqueeze(1)
        if not self.gaussian or self.std == "state":
            return None
        first = self.first * (half_range(self.action) if self.limited else 1.0)
        return next(iter(params.values())).new_full((1, 1, 1), first)

    def of(self, raw: Tensor, spread: Tensor | None, value: Tensor | None) -> PolicyOut:
        """The distribution that the last layer's ``raw [(T,) P, B, width]`` stands for."""
        if not self.gaussian:
            return PolicyOut(raw, None, None, value)
        if spread is None:
            mean, log_std = raw.chunk(2, dim=-1)
            return PolicyOut(None, self.mean(mean), torch.exp(log_std).clamp_min(_MIN_STD), value)
        one = spread.shape[-1] == 1  # fixed: one number for all
        std = spread.expand(*raw.shape[:-1], 1) if one else spread
        return PolicyOut(None, self.mean(raw), std, value)

    def mean(self, raw: Tensor) -> Tensor:
        """The mean action ``[..., A]``."""
        if not self.limited:
            return raw
        return middle(self.action) + half_range(self.action) * torch.tanh(raw)


def middle(action: Discrete | Continuous) -> float:
    """The middle of the range of continuous actions."""
    assert isinstance(action, Continuous)
    return (action.high + action.low) / 2


def half_range(action: Discrete | Continuous) -> float:
    """Half of the range of continuous actions: their limit, where it is symmetric."""
    assert isinstance(action, Continuous)
    return (action.high - action.low) / 2


def encode(action: Tensor, spec: Discrete | Continuous, dtype: torch.dtype) -> Tensor:
    """Actions as a network reads them, ``[..., A]``: one-hot, or the vectors."""
    if isinstance(spec, Discrete):
        return torch.nn.functional.one_hot(action, spec.n).to(dtype)
    return action


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
    """Log-probability (density) of unclipped actions, without the last axis of the heads."""
    if out.logits is not None:
        logp = torch.log_softmax(out.logits, dim=-1)
        return logp.gather(-1, action.unsqueeze(-1)).squeeze(-1)
    assert out.mean is not None and out.std is not None
    z = (action - out.mean) / out.std
    return (-0.5 * z * z - torch.log(out.std) - _HALF_LOG_2PI).sum(dim=-1)


def entropy(out: PolicyOut) -> Tensor:
    """Entropy in nats; constant where the standard deviation is fixed."""
    if out.logits is not None:
        logp = torch.log_softmax(out.logits, dim=-1)
        return -(logp.exp() * logp).sum(dim=-1)
    assert out.std is not None and out.mean is not None
    per_dimension = torch.log(out.std) + (0.5 + _HALF_LOG_2PI)
    return per_dimension.expand(out.mean.shape).sum(dim=-1)


def kl(old: PolicyOut, new: PolicyOut) -> Tensor:
    """KL(old || new) in nats."""
    if old.logits is not None and new.logits is not None:
        before = torch.log_softmax(old.logits, dim=-1)
        return (before.exp() * (before - torch.log_softmax(new.logits, dim=-1))).sum(dim=-1)
    assert old.mean is not None and old.std is not None
    assert new.mean is not None and new.std is not None
    ratio = (old.std / new.std).square()
    shift = ((old.mean - new.mean) / new.std).square()
    return 0.5 * (ratio + shift - 1.0 - torch.log(ratio)).sum(dim=-1)


def statistics(out: PolicyOut) -> Tensor:
    """What a learned loss is told of a policy: mean and log-std, or probabilities."""
    if out.logits is not None:
        return torch.softmax(out.logits, dim=-1)
    assert out.mean is not None and out.std is not None
    return torch.cat([out.mean, torch.log(out.std).expand_as(out.mean)], dim=-1)
