"""Which whole episodes lie in a replay: what snippets are drawn from."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Over = Literal["episodes", "steps"]
"""What snippets are drawn over: a uniform episode and a uniform place in it, or uniform steps."""

OVERS = get_args(Over)


class Episodes(NamedTuple):
    """The whole episodes of P agents, by the numbers of their first and last steps.

    ``first`` and ``last`` int64 ``[P, capacity]``: episode j stands in column ``j % capacity``.
    Those from ``oldest`` to ``count - 1``, int64 ``[P]``, lie in the replay. Written in place.
    """

    first: Tensor
    last: Tensor
    oldest: Tensor
    count: Tensor

    @classmethod
    def none(cls, agents: int, capacity: int, device: torch.device | str) -> Episodes:
        """No episode yet."""
        table = torch.zeros(2, agents, capacity, dtype=torch.int64, device=device)
        counts = torch.zeros(2, agents, dtype=torch.int64, device=device)
        return cls(*table, *counts)

    def add(self, over: Tensor, first: Tensor, number: Tensor, kept: int) -> None:
        """The episodes that end where ``over [P, T]``; those with steps before ``kept`` are gone.

        ``first`` int64 ``[P, T]`` is where the episode of a step began, ``number`` int64 ``[T]``
        the step's own number.
        """
        agent, capacity = torch.arange(len(first), device=first.device), self.first.shape[1]
        while kept > 0:
            begun = self.first[agent, self.oldest % capacity]
            gone = (self.oldest < self.count) & (begun < kept)
            if not bool(gone.any()):
                break
            self.oldest.add_(gone)
        over = over & (first >= kept)
        who, step = over.nonzero(as_tuple=True)
        place = self.count.unsqueeze(1) + over.long().cumsum(dim=1) - 1
        column = place[who, step] % capacity
        self.first[who, column] = first[who, step]
        self.last[who, column] = number[step]
        self.count.add_(over.sum(dim=1))

    def drawn(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """First and last steps of the episodes at ``share [P, n]`` of their list (0 to 1)."""
        there = (self.count - self.oldest).unsqueeze(1)
        column = (self.oldest.unsqueeze(1) + (share * there).long()) % self.first.shape[1]
        return self.first.gather(1, column), self.last.gather(1, column)
