"""A population split over ranks: who draws what, scores of all, exact sums of what was drawn.

A *direction* is a noise vector. Mirrored searches make two members of each, ``centre +- spread *
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

import numpy as np
import torch

from esmeta.optimizers._generation import (
    Scores,
    Scoring,
    Stopwatch,
    gather_scores,
    score_members,
)
from esmeta.optimizers._noise import Noise
from esmeta.rng import Rng
from esmeta.types import Comm, Fitness, Objective

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
class Plan:
    """How one generation is made.

    Attributes:
        popsize: members, even.
        noise: of the directions.
        mirrored: two members per direction.
        per_pair: tasks are shared by mirrored pairs (or single members) instead of by all.
        interactions: more members are added, ``popsize`` at a time, until the generation has taken
            so many environment steps; 0 for one round.
        popsize_max: members at most; 0 for no limit.
    """

    popsize: int
    noise: Noise
    mirrored: bool = True
    per_pair: bool = False
    interactions: int = 0
    popsize_max: int = 0

    @property
    def members(self) -> int:
        """Members per direction."""
        return 2 if self.mirrored else 1

    def blocks(self, rank: int, ranks: int, round_: int) -> list[np.ndarray]:
        """The numbers of the directions of one rank, block by block; the last may be smaller."""
        count, width = self.popsize // self.members, BLOCK // self.members
        first = round_ * count
        return [
            np.arange(first + low, first + min(low + width, count))
            for low in range(rank * width, count, ranks * width)
        ]

    def members_of(self, directions: np.ndarray) -> np.ndarray:
        """The numbers of the members made of the given directions."""
        grid = directions[:, None] * self.members + np.arange(self.members)
        return grid.reshape(-1)


@dataclass(frozen=True)
class Sample:
    """This rank's directions of one generation.

    ``kept`` float32 ``[rows, width]`` (see :class:`Noise`); ``numbers`` int64 ``[rows]``;
    ``blocks`` are ranges of rows.
    """

    kept: np.ndarray
    numbers: np.ndarray
    blocks: list[range]


def sample_and_score(
    plan: Plan,
    scoring: Scoring,
    center: np.ndarray,
    spread: np.ndarray,
    generation: int,
    objective: Objective,
    comm: Comm,
    rng: Rng,
    watch: Stopwatch,
) -> tuple[Draws, Scores]:
    """Draw and score one generation.

    Args:
        plan: what to draw.
        scoring: how returns become fitness.
        center: float32 ``[D]``.
        spread: standard deviation per coordinate, float64 ``[D]``.
        generation: the address of the noise and of the tasks.
        objective: scores members.
        comm: the ranks.
        rng: the address of the noise.
        watch: takes the time spent on evaluation and on waiting.
    """
    kept, numbers, blocks, tables = [], [], [], []
    everyones: list[list[np.ndarray]] = [[] for _ in range(comm.size)]
    steps = raised = round_ = rows = 0
    while True:
        dealt = [plan.blocks(rank, comm.size, round_) for rank in range(comm.size)]
        own = dealt[comm.rank]
        mine = np.concatenate(own) if own else np.empty(0, dtype=np.int64)
        drawn, scored = _evaluate(plan, center, spread, generation, mine, objective, rng, watch)
        first = round_ * plan.popsize
        members = [plan.members_of(np.concatenate(b)) - first if b else _NONE for b in dealt]
        table, taken, failed = gather_scores(scored, members, comm, watch)
        for rank, theirs in enumerate(dealt):
            everyones[rank].extend(theirs)
        for block in own:
            blocks.append(range(rows, rows + len(block)))
            rows += len(block)
        kept.append(drawn)
        numbers.append(mine)
        tables.append(table)
        steps, raised, round_ = steps + taken, raised + failed, round_ + 1
        most = plan.popsize_max or math.inf
        if steps >= plan.interactions or (round_ + 1) * plan.popsize > most or taken == 0:
            break
    sample = Sample(_joined(kept), np.concatenate(numbers), blocks)
    owned = [np.concatenate(theirs) if theirs else _NONE for theirs in everyones]
    draws = Draws(sample, plan.noise, owned, comm, watch)
    return draws, scoring.scores(torch.cat(tables), steps, raised, generation)


_NONE = np.empty(0, dtype=np.int64)

# Numbers of tasks kept apart for a generation that may grow.
_MANY = 1 << 20


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    # A copy of the noise would double a rank's memory.
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _evaluate(
    plan: Plan,
    center: np.ndarray,
    spread: np.ndarray,
    generation: int,
    numbers: np.ndarray,
    objective: Objective,
    rng: Rng,
    watch: Stopwatch,
) -> tuple[np.ndarray, torch.Tensor | None]:
    """What was drawn of the given directions, and the rows of scores of their members."""
    kept = np.empty((len(numbers), plan.noise.width), dtype=np.float32)
    if not len(numbers):
        return kept, None
    # On a GPU the next noise is drawn while the members of the last one are evaluated there; on a
    # CPU both would share one core.
    ahead = getattr(objective, "device", torch.device("cpu")).type != "cpu"
    floats = _GPU_GROUP_FLOATS if ahead else _GROUP_FLOATS
    size = max(BLOCK // plan.members, floats // (plan.members * len(center)))
    groups = [slice(low, min(low + size, len(numbers))) for low in range(0, len(numbers), size)]
    spread = spread.astype(np.float32)
    scored = []
    for rows in _draws(plan.noise, rng, generation, numbers, groups, kept, ahead):
        step = spread * plan.noise.expand(kept[rows])
        members = mirrored(center, step) if plan.mirrored else _moved(center, step)
        owners = plan.members_of(numbers[rows])

        def score(part: torch.Tensor, which: torch.Tensor, owners: np.ndarray = owners) -> Fitness:
            if not plan.per_pair:
                return objective.fitness(part, generation)
            # Every direction has tasks of its own, which its mirrored members share.
            stride = _MANY if plan.interactions else plan.popsize // plan.members
            step = torch.from_numpy(owners // plan.members)[which] + generation * stride
            return objective.fitness(part, step)

        begin = watch.now()
        scored.append(score_members(score, members, owners, generation))
        watch.evaluate_s += watch.now() - begin
    return kept, torch.cat(scored)


def _draws(
    noise: Noise,
    rng: Rng,
    generation: int,
    numbers: np.ndarray,
    groups: list[slice],
    kept: np.ndarray,
    ahead: bool,
) -> Iterator[slice]:
    """Draw one group of directions after the other into ``kept``, ``ahead`` or on demand."""

    def draw(rows: slice) -> slice:
        noise.draw(rng, generation, numbers[rows], out=kept[rows])
        return rows

    if not ahead:
        yield from map(draw, groups)
        return
    with ThreadPoolExecutor(1) as pool:
        yield from pool.map(draw, groups)


def mirrored(center: np.ndarray, step: np.ndarray) -> torch.Tensor:
    """``center + step`` and ``center - step`` in turn, float32 ``[2 rows, D]``."""
    members = np.empty((2 * len(step), len(center)), dtype=np.float32)
    np.add(center, step, out=members[0::2])
    np.subtract(center, step, out=members[1::2])
    return torch.from_numpy(members)


def _moved(center: np.ndarray, step: np.ndarray) -> torch.Tensor:
    step += center
    return torch.from_numpy(step)


@dataclass(frozen=True)
class Draws:
    """One generation's directions as seen by an update: sums over all of them, on every rank."""

    sample: Sample
    noise: Noise
    owned: list[np.ndarray]
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
        total = torch.from_numpy(partial_sums(self.sample, self.noise, scaled))
        begin = self.watch.now()
        exact = self.comm.sum_exact(total).numpy().astype(np.float64)
        self.watch.wait_s += self.watch.now() - begin
        sums = [np.ldexp(t, e - _FIXED_POINT) for t, e in zip(exact, exponents, strict=True)]
        return sums[0], sums[1] if second is not None else np.zeros_like(sums[0])

    def square_norms(self) -> np.ndarray:
        """``|z|^2`` of all directions by number, float64."""
        own = np.array([np.square(row, dtype=np.float64).sum() for row in self._rows()])
        begin = self.watch.now()
        counts = [len(numbers) for numbers in self.owned]
        norms = self.comm.gather_rows(torch.from_numpy(own.reshape(-1, 1)), counts)
        self.watch.wait_s += self.watch.now() - begin
        table = np.empty(len(norms))
        table[np.concatenate(self.owned)] = norms[:, 0].numpy()
        return table

    def _rows(self) -> Iterator[np.ndarray]:
        for row in range(len(self.sample.kept)):
            yield self.noise.expand(self.sample.kept[row : row + 1])[0]


def partial_sums(sample: Sample, noise: Noise, weights: list[np.ndarray]) -> np.ndarray:
    """One rank's part of the sums of ``weights[p] z^(p + 1)``, int64 ``[1 or 2, D]``.

    ``weights`` are one or two float64 arrays by number of direction, magnitudes below 1.
    """
    total = np.zeros((len(weights), noise.size), dtype=np.int64)
    value = np.empty((len(weights), noise.size))
    term = np.empty(noise.size)
    for block in sample.blocks:
        value[:] = 0.0
        for row in block:
            direction = noise.expand(sample.kept[row : row + 1])[0]
            number = sample.numbers[row]
            for k, weight in enumerate(weights):
                if not weight[number]:
                    continue
                if k:
                    np.multiply(direction, direction, out=term, dtype=np.float64)
                    term *= weight[number]
                else:
                    np.multiply(direction, weight[number], out=term, dtype=np.float64)
                value[k] += term
        total += np.rint(np.ldexp(value, _FIXED_POINT)).astype(np.int64)
    return total
