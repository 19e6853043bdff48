"""Gradient ascent in float64 numpy, elementwise only, so that every CPU computes the same bits.

Adam: Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980. ClipUp: Toklu et al., PPSN 2020,
https://arxiv.org/abs/2008.02387; what differs: a zero gradient coasts instead of dividing by zero.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

Kind = Literal["adam", "clipup", "sgd"]
KINDS: tuple[Kind, ...] = ("adam", "clipup", "sgd")

MOMENTUM = 0.9
"""Share of its velocity that ClipUp keeps."""

Moments = dict[str, np.ndarray]
"""What an ascent remembers, float64 ``[D]`` each; ``updates`` is a count, int64 ``[]``."""


def zeros(kind: Kind, size: int) -> Moments:
    """The moments before the first step."""
    if kind == "adam":
        zero = np.zeros(size)
        return {"adam_mean": zero, "adam_square": zero.copy(), "adam_updates": np.array(0)}
    return {"velocity": np.zeros(size)} if kind == "clipup" else {}


def adam(
    moments: Moments, gradient: np.ndarray, beta1: float, beta2: float, eps: float
) -> tuple[np.ndarray, Moments]:
    """Adam's step for learning rate 1, float64 ``[D]``, and the moments after it."""
    updates = int(moments["adam_updates"]) + 1
    mean = beta1 * moments["adam_mean"] + (1 - beta1) * gradient
    square = beta2 * moments["adam_square"] + (1 - beta2) * gradient * gradient
    # The two bias corrections as one factor each, computed once and not per coordinate.
    step = mean / (1 - beta1**updates) / (np.sqrt(square) / math.sqrt(1 - beta2**updates) + eps)
    return step, {"adam_mean": mean, "adam_square": square, "adam_updates": np.array(updates)}


def clipup(moments: Moments, gradient: np.ndarray) -> tuple[np.ndarray, Moments]:
    """ClipUp's step for learning rate 1: unit gradients, momentum 0.9, no longer than 2."""
    norm = exact_norm(gradient)
    velocity = MOMENTUM * moments["velocity"]
    if norm > 0:
        velocity = velocity + gradient / norm
    speed = exact_norm(velocity)
    if speed > 2:
        velocity = velocity * (2 / speed)
    return velocity, {"velocity": velocity}


def follow(
    kind: Kind,
    moments: Moments,
    gradient: np.ndarray,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> tuple[np.ndarray, Moments]:
    """The step of one kind of ascent for learning rate 1, and the moments after it."""
    if kind == "adam":
        return adam(moments, gradient, beta1, beta2, eps)
    return clipup(moments, gradient) if kind == "clipup" else (gradient, {})


def exact_norm(values: np.ndarray) -> float:
    """Euclidean norm with one rounding: a vectorised sum may add in another order elsewhere."""
    return math.sqrt(math.fsum((values * values).tolist()))
