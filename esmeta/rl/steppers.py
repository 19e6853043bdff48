"""Steps along gradients, on flat vectors ``[P, D]``: one row per member, agent or task.

Nothing is changed in place, and everything is elementwise over rows: one row's numbers do not
depend on the others. (Evolution steps in float64 numpy, :mod:`esmeta.evolution.ascent`.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Adam(NamedTuple):
    """Moments ``[P, D]`` and the steps done, int64 ``[P]``."""

    first: Tensor
    second: Tensor
    updates: Tensor

    @classmethod
    def zeros(cls, flat: Tensor) -> Adam:
        """Those of parameters ``flat [P, D]`` that have yet to move."""
        updates = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
        return cls(torch.zeros_like(flat), torch.zeros_like(flat), updates)

    def step(
        self,
        gradient: Tensor,
        rate: float,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
    ) -> tuple[Tensor, Adam]:
        """What to take away from the parameters, and the moments after it.

        Kingma & Ba 2015, algorithm 1. Products and sums are operations of their own: fused ones
        round differently in the last few elements of a tensor, and a row's bits would depend on
        where it lies.
        """
        updates = self.updates + 1
        done = updates.double().unsqueeze(1)
        # float64, so that the correction of late updates is not lost.
        correct1, correct2 = 1.0 - beta1**done, (1.0 - beta2**done).sqrt()
        first = (self.first * beta1).add_(gradient * (1.0 - beta1))
        second = (self.second * beta2).add_((gradient * gradient).mul_(1.0 - beta2))
        denominator = second.sqrt().div_(correct2.to(gradient.dtype)).add_(eps)
        move = (first / correct1.to(gradient.dtype)).div_(denominator)
        return move.mul_(rate), Adam(first, second, updates)


def shortened(gradient: Tensor, limit: float) -> Tensor:
    """Gradients ``[P, D]`` whose norm, of each row by itself, is at most ``limit`` (0: any)."""
    if limit <= 0:
        return gradient
    return gradient * (limit / (gradient.norm(dim=1) + 1e-6)).clamp_max(1.0).unsqueeze(1)
