"""A population split over ranks: who draws what, scores of all, exact sums of what was drawn.

A *direction* is a noise vector. Mirrored searches make two members of each, ``theta +- spread *
direction``; others make one. Directions are dealt out to ranks in blocks, round-robin; a rank
draws, evaluates and sums only its own. Sums of a block are accumulated in float64 in the order of
its directions and rounded once to 64-bit fixed point, so that their total over ranks is exact and
does not depend on how many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from esmeta.evolution.noise import Noise
from esmeta.evolution.scores import Scores, Stopwatch, gather, score_members
from esmeta.evolution.state import Arrays, SearchState
from esmeta.rng import Rng
from esmeta.types import Comm, Metrics, Objective

BLOCK = 16
"""Members per block: the unit that is dealt out to ranks, and summed before rounding."""

# |weight| < 1 after scaling and direction^2 < 50, so a block stays below 2^10; 2^36 leaves room for
# 2^17 blocks in an int64.
_FIXED_POINT = 36

# Members are made for so many numbers at a time: they live beside the noise they are made from.
# 16 MB are taken again and again from the heap; larger arrays are new pages every time.
_GROUP_FLOATS = 1 << 22
_GPU_GROUP_FLOATS = 1 << 24


@dataclass(frozen=True)
class Population:
    """Who draws what: ``popsize`` members of one or (``mirrored``) two per direction."""

    popsize: int
    mirrored: bool
    noise: Noise

    @property
    def per_direction(self) -> int:
        """Members per direction."""
        return 2 if self.mirrored else 1

    @property
    def directions(self) -> int:
        """Directions per round."""
        return self.popsize // self.per_direction

    def deal(self, ranks: int, round_: int = 0) -> list[list[np.ndarray]]:
        """Numbers of directions, int64, for every rank block by block; the last may be smaller."""
        count, width = self.directions, BLOCK // self.per_direction
        blocks = [np.arange(low, min(low + width, count)) for low in range(0, count, width)]
        return [[block + round_ * count for block in blocks[rank::ranks]] for rank in range(ranks)]

    def members_of(self, directions: np.ndarray) -> np.ndarray:
        """The numbers of the members made of the given directions."""
        grid = directions[:, None] * self.per_direction + np.arange(self.per_direction)
        return grid.reshape(-1)

    def members(self, theta: np.ndarray, step: np.ndarray) -> Tensor:
        """Members float32 ``[rows * per_direction, D]``; ``step [rows, D]`` may be written to."""
        if not self.mirrored:
            step += theta
            return torch.from_numpy(step)
        members = np.empty((2 * len(step), len(theta)), dtype=np.float32)
        np.add(theta, step, out=members[0::2])
        np.subtract(theta, step, out=members[1::2])
        return torch.from_numpy(members)


class Stage(NamedTuple):
    """A generation about to be drawn and scored: around what, by whom, among which ranks."""

    population: Population
    state: SearchState
    objective: Objective
    comm: Comm
    rng: Rng
    watch: Stopwatch


class Generation(NamedTuple):
    """A generation that was drawn and scored.

    ``drawn`` is what an update is made of: :class:`Draws`, unless the evaluation says otherwise.
    ``scale`` (float64 ``[N]``, or 1) is a factor of the utilities; ``keep`` (arrays) and ``lives``
    are for the next state.
    """

    drawn: Any
    scores: Scores
    scale: np.ndarray | float = 1.0
    keep: Arrays = {}
    lives: Any = None
    metrics: Metrics = {}


class Evaluation(Protocol):
    """How a generation is drawn and scored: by whole evaluations, in windows, or on every rank."""

    def check(self, objective: Objective) -> None:
        """Refuse an objective that cannot be evaluated so."""
        ...

    def generation(self, stage: Stage, spread: np.ndarray) -> Generation:
        """Draw members around theta with ``spread`` float64 ``[D]``, and score them."""
        ...


def joined(blocks: list[np.ndarray]) -> np.ndarray:
    """The numbers in all ``blocks``, int64."""
    return np.concatenate([np.empty(0, dtype=np.int64), *blocks])


def score_on_tasks(stage: Stage, members: Tensor, numbers: np.ndarray, stride: int) -> Tensor:
    """Rows of ``members [P, D]`` on the tasks of this generation, which has ``stride`` of them.

    Every direction has tasks of its own, which its mirrored members share; with 0, all share one.
    """
    number = stage.state.generation
    tasks: int | Tensor = number
    if stride:
        tasks = torch.from_numpy(numbers // stage.population.per_direction) + number * stride
    with stage.watch.on("evaluate_s"):
        return score_members(
            lambda rows: stage.objective.fitness(
                members[rows], tasks[rows] if isinstance(tasks, Tensor) else tasks
            ),
            numbers,
            number,
        )


def draw_in_parts(stage: Stage, numbers: np.ndarray, kept: np.ndarray) -> Iterator[slice]:
    """Draw some directions after the other into ``kept``: as many as members fit into memory.

    On a GPU the next noise is drawn while the members of the last one are evaluated there; on a CPU
    both would share one core.
    """
    population, number = stage.population, stage.state.generation
    ahead = getattr(stage.objective, "device", torch.device("cpu")).type != "cpu"
    floats = (_GPU_GROUP_FLOATS if ahead else _GROUP_FLOATS) // population.noise.size
    size = max(BLOCK, floats) // population.per_direction

    def draw(low: int) -> slice:
        rows = slice(low, min(low + size, len(numbers)))
        population.noise.draw(stage.rng, number, numbers[rows], out=kept[rows])
        return rows

    if not ahead:
        yield from map(draw, range(0, len(numbers), size))
        return
    with ThreadPoolExecutor(1) as pool:
        yield from pool.map(draw, range(0, len(numbers), size))


@dataclass(frozen=True)
class Draws:
    """One generation's directions as seen by an update: sums over all of them, on every rank.

    ``kept`` float32 ``[rows, width]`` (see :class:`Noise`) are those of this rank; ``blocks`` the
    numbers of all directions by rank and block, whose order is that of the rows.
    """

    noise: Noise
    kept: np.ndarray
    blocks: list[list[np.ndarray]]
    comm: Comm
    watch: Stopwatch

    def sums(
        self, first: np.ndarray, second: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """``sum_i first_i z_i`` and ``sum_i second_i z_i^2`` over the directions z of all ranks.

        The same bits on any number of ranks. ``first`` and ``second`` are float64 by number of
        direction; the sums are float64 ``[D]``; without ``second`` its sum is zero.
        """
        weights = [first] if second is None else [first, second]
        # Scaling by a power of two is exact: it keeps raw fitness inside the fixed point's range
        # and spends the range on small weights.
        exponents = [math.frexp(float(np.abs(w).max()))[1] for w in weights]
        scaled = [np.ldexp(w, -e) for w, e in zip(weights, exponents, strict=True)]
        total = torch.from_numpy(self._partial_sums(scaled))
        with self.watch.on("wait_s"):
            exact = self.comm.sum_exact(total).numpy().astype(np.float64)
        sums = [np.ldexp(t, e - _FIXED_POINT) for t, e in zip(exact, exponents, strict=True)]
        return sums[0], sums[1] if second is not None else np.zeros_like(sums[0])

    def square_norms(self) -> np.ndarray:
        """``|z|^2`` of all directions by number, float64."""
        rows = range(len(self.kept))
        own = np.array([np.square(self._row(row), dtype=np.float64).sum() for row in rows])
        owned = [joined(blocks) for blocks in self.blocks]
        return gather(torch.from_numpy(own.reshape(-1, 1)), owned, self.comm, self.watch)[:, 0]

    def _row(self, row: int) -> np.ndarray:
        return self.noise.expand(self.kept[row : row + 1])[0]

    def _partial_sums(self, weights: list[np.ndarray]) -> np.ndarray:
        """This rank's part of the sums of ``weights[p] z^(p + 1)``, int64 ``[1 or 2, D]``.

        ``weights`` are one or two float64 arrays by number of direction, magnitudes below 1.
        """
        size, rows = self.noise.size, iter(range(len(self.kept)))
        total = np.zeros((len(weights), size), dtype=np.int64)
        value, term = np.empty((len(weights), size)), np.empty(size)
        for block in self.blocks[self.comm.rank]:
            value[:] = 0.0
            for number in block:
                direction = self._row(next(rows))
                for k, weight in enumerate(weights):
                    if not weight[number]:
                        continue
                    factor = direction if k else weight[number]
                    np.multiply(direction, factor, out=term, dtype=np.float64)
                    if k:
                        term *= weight[number]
                    value[k] += term
            total += np.rint(np.ldexp(value, _FIXED_POINT)).astype(np.int64)
        return total
