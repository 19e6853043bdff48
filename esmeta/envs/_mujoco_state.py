"""What :mod:`esmeta.envs.mujoco` keeps of P x B trials, and what it asks of a simulator."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from esmeta.envs.bodies import Data, Definition, Snapshot

HUGE = 1e10  # mjMAXVAL: MuJoCo calls positions and velocities beyond it unstable


class State(NamedTuple):
    """P x B trials, where physics takes place; leaves ``[P, B, ...]`` unless said otherwise.

    ``rows`` ``[.., S]`` are MuJoCo's states and ``place`` where the body was, as physics has them,
    ``time`` int64 the steps of the present episode, ``episode`` int64 its number, ``elapsed`` int64
    the steps of the trial (0 where its length is a number of episodes), ``over`` bool whether it
    has ended, ``unstable`` int64 how often MuJoCo lost it, ``success`` bool whether it was where it
    should be, ``paid`` and ``spent`` float64 ``[.., K]`` the sums of reward and of steps in each
    phase, ``starts`` float64 ``[Q, B, episodes, nq + nv]``, ``data`` and ``changes`` the tasks'
    ``[Q, B, ...]``. In trials of so many steps ``starts`` are without their noise, which
    ``address`` int64 ``[Q, B]`` and the episode's number tell; ``noise`` ``[.., n, nq + nv]`` is
    that of the n episodes from the last multiple of n on (else n = 0). ``earned`` float64
    ``[.., E]`` are the returns of the E episodes of a trial that has several, else E = 0.
    """

    rows: Tensor
    place: Tensor
    time: Tensor
    episode: Tensor
    elapsed: Tensor
    over: Tensor
    unstable: Tensor
    success: Tensor
    paid: Tensor
    spent: Tensor
    starts: Tensor
    address: Tensor
    noise: Tensor
    data: Data
    changes: Data
    earned: Tensor


class Going:
    """Trials that go on where others are over; what follows is made when asked for, and once."""

    def __init__(self, over: Tensor) -> None:
        self.mask = ~over
        """Which, bool ``[P, B]``."""

    @functools.cached_property
    def worlds(self) -> Tensor:
        """The same, ``[N]``."""
        return self.mask.flatten()

    @functools.cached_property
    def numbers(self) -> np.ndarray:
        """Their numbers among all N; on a GPU this waits."""
        return np.flatnonzero(self.worlds.numpy())

    @functools.cached_property
    def factor(self) -> Tensor:
        """1 for each, 0 for the others, float64 ``[P, B, 1]``."""
        return self.mask.double().unsqueeze(-1)

    @functools.cached_property
    def none(self) -> Tensor:
        """False everywhere, bool ``[P, B]``."""
        return torch.zeros_like(self.mask)


class Seen(NamedTuple):
    """What is known of a state that was returned last, so that it need not be asked again.

    ``over`` and ``time`` are that state's own tensors. ``going`` are the trials that go on, None
    if all do. ``common`` is the step that all of these are at; None if they differ, and wherever
    asking would be waiting for a GPU.
    """

    over: Tensor
    time: Tensor
    going: Going | None
    common: int | None


def phase_table(definition: Definition, horizon: int) -> np.ndarray:
    """1 where step t of an episode is in a phase, float64 ``[horizon + 1, K]``."""
    table = np.zeros((horizon + 1, len(definition.phases)))
    for phase, (first, last) in enumerate(definition.phases.values()):
        table[first : last + 1, phase] = 1.0
    return table


class Worlds(Protocol):
    """N worlds of one model. Time, positions and velocities come first in the rows of state."""

    changes: Data | None
    """The tasks' data that :meth:`vary` was last given, for the caller to remember."""

    def load(self, rows: Tensor) -> None:
        """Put the worlds into the states ``rows [P, B, S]``."""
        ...

    def saved(self, shape: torch.Size) -> Tensor:
        """A copy of their states, ``[P, B, S]``."""
        ...

    def step(self, control: Tensor, going: Going | None) -> Tensor | None:
        """One control step with ``control [P, B, nu]`` of the worlds of ``going`` (None: all).

        The others keep their states. Returns bool ``[N]``: worlds that are lost, by an error, NaN
        or huge numbers; None where none is.
        """
        ...

    def derive(self, chosen: Tensor) -> None:
        """Compute what follows from the states of the worlds marked in ``chosen [N]``."""
        ...

    def restart(self, starts: Tensor, chosen: Tensor) -> None:
        """Put the worlds marked in ``chosen [N]`` at ``starts [N, nq + nv]``."""
        ...

    def snapshot(self, shape: torch.Size) -> Snapshot:
        """Views ``[P, B, ...]`` of what the simulator holds."""
        ...

    def vary(self, changes: Mapping[str, np.ndarray]) -> None:
        """Models of their own; see :func:`esmeta.envs.mujoco_model.world_fields`."""
        ...

    def check(self) -> None:
        """Raise where results are wrong because the simulator ran out of room."""
        ...


def views_of(
    qpos: Tensor, qvel: Tensor, outputs: Mapping[str, Tensor], shape: torch.Size
) -> Snapshot:
    """Leaves ``[N, ...]`` seen as ``[P, B, ...]``; those that are not there are empty."""
    empty = qpos.new_empty(len(qpos), 0)
    derived = (outputs.get(name, empty) for name in Snapshot._fields[2:])
    return Snapshot(*(leaf.unflatten(0, shape) for leaf in (qpos, qvel, *derived)))
