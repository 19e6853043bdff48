"""Lives of EPG that can be left between two updates, stored and gone on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.learners._life import Life
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import State


class Part(NamedTuple):
    """One batch of agents: ``rows`` of all agents, their lives, and their last score ``[A]``."""

    rows: Tensor
    life: Life
    score: Tensor


@dataclass(frozen=True)
class EpgLives:
    """Lives number ``life`` of ``population`` members, after ``updates`` updates."""

    life: int
    updates: int
    population: int
    parts: tuple[Part, ...]


def _tensors(life: Life) -> list[Tensor]:
    """All that changes during a life."""
    return leaves_of((life.state, life.end.env_state, life.end.ts, life.end.active))


def leaves_of_part(part: Part) -> State:
    """Leaves ``[A, ...]`` of a batch: clocks, which all share, are repeated, tables left out."""
    agents = len(part.rows)
    t = torch.full((agents,), part.life.end.t, dtype=torch.int64, device="cpu")
    saved = {"t": t, "score": part.score}
    for number, leaf in enumerate(_tensors(part.life)):
        if leaf.ndim == 0:
            saved[f"leaf.{number}"] = leaf.expand(agents)
        elif leaf.shape[0] == agents:
            saved[f"leaf.{number}"] = leaf
    return saved


def restored(begun: Life, rows: Tensor, saved: State) -> Part:
    """A batch that has just begun, ``rows`` of all agents, as it was ``saved``."""
    leaves = _tensors(begun)
    for name, leaf in saved.items():
        if name.startswith("leaf."):
            number = int(name.partition(".")[2])
            leaves[number] = leaf.max() if leaves[number].ndim == 0 else leaf
    tree = (begun.state, begun.end.env_state, begun.end.ts, begun.end.active)
    state, env_state, ts, active = with_leaves(tree, leaves)
    end = begun.end._replace(env_state=env_state, ts=ts, active=active, t=int(saved["t"].max()))
    return Part(rows, begun._replace(state=state, end=end), saved["score"])
