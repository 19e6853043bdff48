"""Adam ascent in float64 numpy: elementwise operations only, so every CPU computes the same bits.

Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, https://arxiv.org/abs/1412.6980.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Adam:
    """Moments after ``updates`` steps; ``mean`` and ``square`` float64 ``[D]``."""

    mean: np.ndarray
    square: np.ndarray
    updates: int = 0

    @classmethod
    def zeros(cls, size: int) -> Adam:
        """No step taken yet."""
        return cls(np.zeros(size), np.zeros(size))

    def ascend(
        self, gradient: np.ndarray, beta1: float, beta2: float, eps: float
    ) -> tuple[np.ndarray, Adam]:
        """The step for learning rate 1, float64 ``[D]``, and the moments after it."""
        updates = self.updates + 1
        mean = beta1 * self.mean + (1 - beta1) * gradient
        square = beta2 * self.square + (1 - beta2) * gradient * gradient
        # The two bias corrections as one factor each, computed once and not per coordinate.
        step = mean / (1 - beta1**updates) / (np.sqrt(square) / math.sqrt(1 - beta2**updates) + eps)
        return step, Adam(mean, square, updates)
