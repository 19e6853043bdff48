"""What agents earned over their lives, episode by episode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.learners._experience import Experience


class Episodes(NamedTuple):
    """Finished episodes of one agent: the step each ended with, its return and its length."""

    end: Tensor
    returns: Tensor
    length: Tensor


class Diary:
    """Keeps rewards and ends of P agents, window by window."""

    def __init__(self) -> None:
        self._reward: list[Tensor] = []
        self._ended: list[Tensor] = []

    def add(self, new: Experience) -> None:
        """The next window ``[P, T]``."""
        self._reward.append(new.reward.double())
        self._ended.append(new.ended)

    @property
    def reward(self) -> Tensor:
        """All rewards so far, float64 ``[P, T]``."""
        return torch.cat(self._reward, dim=1)

    def episodes(self) -> list[Episodes]:
        """The finished episodes of each agent in order."""
        reward, ended = self.reward, torch.cat(self._ended, dim=1)
        total = torch.nn.functional.pad(reward.cumsum(dim=1), (1, 0))
        found = []
        for row, ends in zip(total, ended, strict=True):
            end = torch.nonzero(ends).flatten() + 1
            start = torch.cat([torch.zeros_like(end[:1]), end[:-1]])
            found.append(Episodes(end, row[end] - row[start], end - start))
        return found

    def curve(self, parts: int) -> Tensor:
        """Mean return of the episodes that ended in each part of the life, ``[P, parts]``.

        NaN where an agent finished none there.
        """
        steps = self.reward.shape[1]
        rows = []
        for episodes in self.episodes():
            part = ((episodes.end - 1) * parts) // steps
            chosen = [episodes.returns[part == k] for k in range(parts)]
            rows.append(
                torch.stack([c.mean() if len(c) else c.new_tensor(torch.nan) for c in chosen])
            )
        return torch.stack(rows)
