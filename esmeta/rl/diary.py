"""What agents earned over their lives, episode by episode."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.rollout import Trajectory


class Diary:
    """Keeps rewards and ends of P agents, window by window."""

    def __init__(self) -> None:
        self._reward: list[Tensor] = []
        self._ended: list[Tensor] = []

    def add(self, new: Trajectory, agents: int | None = None) -> None:
        """The next window, B = 1, of the first so many agents (default: all)."""
        self._reward.append(new.reward[:, :agents, 0].T.double())
        self._ended.append(new.ended[:, :agents, 0].T)

    @property
    def reward(self) -> Tensor:
        """All rewards so far, float64 ``[P, T]``."""
        return torch.cat(self._reward, dim=1)

    def episodes(self) -> list[tuple[Tensor, Tensor]]:
        """Of each agent's finished episodes in order: the steps by which they ended; returns."""
        reward, ended = self.reward, torch.cat(self._ended, dim=1)
        total = torch.nn.functional.pad(reward.cumsum(dim=1), (1, 0))
        found = []
        for row, ends in zip(total, ended, strict=True):
            end = torch.nonzero(ends).flatten() + 1
            start = torch.cat([torch.zeros_like(end[:1]), end[:-1]])
            found.append((end, row[end] - row[start]))
        return found

    def curve(self, parts: int) -> Tensor:
        """Mean return of the episodes that ended in each part of the life, ``[P, parts]``.

        NaN where an agent finished none there.
        """
        steps = self.reward.shape[1]
        rows = []
        for end, returns in self.episodes():
            part = ((end - 1) * parts) // steps
            chosen = [returns[part == k] for k in range(parts)]
            rows.append(
                torch.stack([c.mean() if len(c) else c.new_tensor(torch.nan) for c in chosen])
            )
        return torch.stack(rows)


class Scores(NamedTuple):
    """Returns of training episodes, exploration included; float64 ``[P]`` unless said otherwise.

    ``earned`` in the present episode; ``recent [P, K]`` of the last K episodes, newest first, NaN
    where there are fewer; ``first`` of the first one; ``total`` of all ``episodes`` (int64).
    """

    earned: Tensor
    recent: Tensor
    first: Tensor
    total: Tensor
    episodes: Tensor

    @classmethod
    def none(cls, agents: int, keep: int, device: torch.device | str) -> Scores:
        """No episode yet."""
        zeros = torch.zeros(agents, dtype=torch.float64, device=device)
        undefined = torch.full((agents, keep), torch.nan, dtype=torch.float64, device=device)
        return cls(zeros, undefined, undefined[:, 0], zeros, zeros.long())

    def then(self, new: Trajectory) -> Scores:
        """After one more window too, B = 1.

        What an episode had earned that a new trial cut is no return, and not the next one's.
        """
        earned, recent, first, total, episodes = self
        earned = torch.where(new.ts.new_trial[0, :, 0], 0.0, earned)
        reward, ended, terminated = (
            leaf[..., 0] for leaf in (new.reward, new.ended, new.terminated)
        )
        for t in range(len(reward)):
            earned = earned + reward[t].double()
            over = ended[t]
            if t > 0:  # Steps behind the end of a trial are marked as ended, but are no episodes.
                over = over & (terminated[t] | ~ended[t - 1])
            shifted = torch.cat([earned.unsqueeze(1), recent[:, :-1]], dim=1)
            recent = torch.where(over.unsqueeze(1), shifted, recent)
            first = torch.where(over & (episodes == 0), earned, first)
            total = total + torch.where(over, earned, 0.0)
            earned = torch.where(over, 0.0, earned)
            episodes = episodes + over.long()
        return Scores(earned, recent, first, total, episodes)
