"""A replay: the newest steps of P agents, drawn from as snippets, which are trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from esmeta.agent import heads
from esmeta.rl.losses import Data
from esmeta.rng import Rng
from esmeta.rollout import Trajectory
from esmeta.types import Discrete, Spec, TimeStep

Over = Literal["episodes", "steps"]
"""What snippets are drawn over: a uniform episode and a uniform place in it, or uniform steps."""

OVERS = get_args(Over)


class Episodes(NamedTuple):
    """The whole episodes of P agents, by the numbers of their first and last steps.

    ``first`` and ``last`` int64 ``[P, capacity]``: episode j stands in column ``j % capacity``.
    Those from ``oldest`` to ``added - 1``, int64 ``[P]``, lie in the replay. Written in place.
    """

    first: Tensor
    last: Tensor
    oldest: Tensor
    added: Tensor

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
            gone = (self.oldest < self.added) & (begun < kept)
            if not bool(gone.any()):
                break
            self.oldest.add_(gone)
        over = over & (first >= kept)
        who, step = over.nonzero(as_tuple=True)
        place = self.added.unsqueeze(1) + over.long().cumsum(dim=1) - 1
        column = place[who, step] % capacity
        self.first[who, column] = first[who, step]
        self.last[who, column] = number[step]
        self.added.add_(over.sum(dim=1))

    def drawn(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """First and last steps of the episodes at ``share [P, n]`` of their list (0 to 1)."""
        there = (self.added - self.oldest).unsqueeze(1)
        column = (self.oldest.unsqueeze(1) + (share * there).long()) % self.first.shape[1]
        return self.first.gather(1, column), self.last.gather(1, column)


class Replay(NamedTuple):
    """The newest ``capacity`` steps of each agent, leaves ``[P, capacity + 1, ...]``.

    Step k lies in row ``k % (capacity + 1)``; the row behind the newest step holds what was seen
    after it. ``action`` as it was taken; ``ended`` marks the last step of an episode and
    ``terminated`` those of them whose future is worth nothing. Where an episode ended otherwise
    (a time limit) the next row may belong to the next episode. ``time`` int64 are the steps since
    the episode began. ``added`` is how many steps ever were, the same for all agents;
    :meth:`add` writes in place. ``episodes`` are those of which all steps are there.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    ended: Tensor
    time: Tensor
    added: int
    episodes: Episodes

    @classmethod
    def empty(cls, agents: int, capacity: int, spec: Spec, device: torch.device | str) -> Replay:
        """No step yet."""
        rows = torch.zeros(agents, capacity + 1, dtype=torch.float32, device=device)
        whole = rows.long()
        action = whole if isinstance(spec.action, Discrete) else _wide(rows, spec.action.size)
        leaves = _wide(rows, spec.obs_size), action, rows, whole > 0, whole > 0, whole
        obs, action, reward, terminated, ended, time = (leaf.clone() for leaf in leaves)
        episodes = Episodes.none(agents, capacity, device)
        return cls(obs, action, reward, terminated, ended, time, 0, episodes)

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """All that lies in rows."""
        return self[:6]

    @property
    def capacity(self) -> int:
        """Steps that it holds at most."""
        return self.reward.shape[1] - 1

    @property
    def size(self) -> int:
        """Steps that are there."""
        return min(self.added, self.capacity)

    def kept(self) -> list[Tensor]:
        """All of :attr:`rows` that is filled, oldest first, and the row behind: to be stored."""
        return [leaf[:, self._row(self.added - self.size, self.added + 1)] for leaf in self.rows]

    def filled(self, kept: Sequence[Tensor], count: int) -> Replay:
        """An empty replay with the rows :meth:`kept` of one that had ``count`` steps added."""
        replay = self._replace(added=count)
        place = replay._row(count - replay.size, count + 1)
        for leaf, rows in zip(self.rows, kept, strict=True):
            leaf[:, place] = rows
        number = torch.arange(count - replay.size, count, device=self.time.device)
        time, ended, terminated = (leaf[:, :-1] for leaf in (kept[5], kept[4], kept[3]))
        over = ended & (terminated | (time > 0))
        self.episodes.add(over, number - time, number, count - replay.size)
        return replay

    def _row(self, first: int, last: int) -> Tensor:
        """Where the steps from ``first`` to before ``last`` lie."""
        return torch.arange(first, last, device=self.time.device) % (self.capacity + 1)

    def add(self, new: Trajectory) -> Replay:
        """With T steps more (B = 1), over the oldest; the first may be the first of a trial."""
        length, total = len(new.action), self.added + len(new.action)
        self._cut(new.ts.new_trial[0, :, 0])
        ended, terminated = (leaf[..., 0].T for leaf in (new.ended, new.terminated))
        place = torch.arange(length, device=ended.device)
        since = torch.zeros_like(self.time[:, 0])
        if self.added:
            newest = self._row(self.added - 1, self.added)
            since = torch.where(self.ended[:, newest], 0, self.time[:, newest] + 1).squeeze(1)
        # The step after the last end so far; before the first one, as many steps ago as `since`.
        began = torch.where(ended, place + 1, -1).cummax(dim=1).values
        began = torch.cat([-since.unsqueeze(1), began[:, :-1]], dim=1)
        began = torch.where(began < 0, -since.unsqueeze(1), began)
        time = place - began
        rows = self._row(self.added, total)
        steps = new.action, new.reward, terminated, ended, time
        for leaf, values in zip(self.rows[1:], steps, strict=True):
            leaf[:, rows] = values if values.ndim == 2 else values[:, :, 0].transpose(0, 1)
        self.obs[:, self._row(self.added, total + 1)] = new.ts.obs[:, :, 0].transpose(0, 1)
        # Where an episode ends: steps behind the end of a trial are marked as ended, but are none.
        over = ended & (terminated | (time > 0))
        kept = total - self.capacity
        self.episodes.add(over, self.added + began, self.added + place, kept)
        return self._replace(added=total)

    def _cut(self, where: Tensor) -> None:
        """What comes next does not follow from the newest step of agents ``where [P]``."""
        if self.added and bool(where.any()):
            number = torch.tensor([self.added - 1], dtype=torch.int64, device=self.time.device)
            rows = self._row(self.added - 1, self.added)
            time, cut = self.time[:, rows], ~self.ended[:, rows] & where.unsqueeze(1)
            self.ended[:, rows] |= cut
            kept = self.added - self.capacity
            self.episodes.add(cut & (time > 0), number - time, number, kept)

    def draw(
        self, rng: Rng, index: Tensor, count: int, length: int, spec: Spec, over: Over = "steps"
    ) -> Data:
        """Random snippets of each agent: ``count`` trials of ``length`` steps.

        Agents draw at their own addresses ``index [P]``. Over ``episodes``: one of those that are
        whole, each as likely, and a place in it from where the snippet ends with it at the latest
        (from the first step of a shorter one). Over ``steps``: any step but the newest
        ``length - 1``, each as likely; so it is for all agents of which no episode is whole yet.
        Memory begins anew with a snippet, whose first step shows what led to it, except where an
        episode begins.
        """
        oldest = self.added - self.size
        share = rng.uniform(index, count)
        first = oldest + (share * (self.size - length + 1)).long()
        if over == "episodes":
            begun, last = self.episodes.drawn(rng.fold("episode").uniform(index, count))
            within = begun + (share * (last - begun + 2 - length).clamp_min(1)).long()
            some = self.episodes.added > self.episodes.oldest
            first = torch.where(some.unsqueeze(1), within, first)
        place = torch.arange(-1, length + 1, device=index.device) + first.unsqueeze(-1)
        rows = place % (self.capacity + 1)  # of the step before the oldest all but obs is there
        agent = torch.arange(len(index), device=index.device)[:, None, None]
        obs = self.obs[agent, rows[..., 1:]]
        action, reward = (leaf[agent, rows[..., :-1]] for leaf in (self.action, self.reward))
        terminated, ended, time = (leaf[agent, rows[..., 1:-1]] for leaf in self.rows[3:])
        inside = ended.long().cumsum(dim=-1) - ended.long() == 0
        snippets = _snippets(obs, action, reward, terminated, ended, time[..., :1] == 0, spec)
        constants = {"inside": inside.flatten(1, 2), "time": time.flatten(1, 2)}
        return Data(snippets, constants, length)


def _wide(rows: Tensor, size: int) -> Tensor:
    return rows.unsqueeze(-1).expand(-1, -1, size)


def _snippets(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    ended: Tensor,
    fresh: Tensor,
    spec: Spec,
) -> Trajectory:
    """Leaves ``[P, n, L, ...]`` as trials that begin with them.

    ``obs``, ``action`` and ``reward`` have one step more: what followed, or what went before, which
    is not shown where an episode is ``fresh [P, n, 1]``.
    """

    def after(first: Tensor | bool, leaf: Tensor) -> Tensor:
        first = torch.full_like(leaf[:, :, :1], first) if isinstance(first, bool) else first
        return torch.cat([first, leaf], dim=2)

    past = torch.cat([~fresh, torch.ones_like(ended)], dim=2)
    ts = TimeStep(
        obs,
        heads.encode(action, spec.action, obs.dtype) * past.unsqueeze(-1),
        reward * past,
        after(False, terminated),
        after(False, ended & ~terminated),
        after(fresh, ended),
        after(True, torch.zeros_like(ended)),
    )
    ts = TimeStep(*(leaf.movedim(2, 0) for leaf in ts))
    action, active = action[:, :, 1:].movedim(2, 0), torch.ones_like(ended).movedim(2, 0)
    return Trajectory({}, ts, action, active, None, {})
