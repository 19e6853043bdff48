"""What the kernels share: the machine, products of rows with a matrix, tanh, and a common start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from llvmlite import ir
from writer import Index, Piece, Place, Truth, Vector, Whole, Writer, fma, pieces, tiles

TOGETHER = 4
"""Rows (trials) that are run together."""
# A matrix is fetched this far ahead if the first cache cannot hold it.
_AHEAD = 512


class Machine(NamedTuple):
    """Vector registers of a processor: float32 ``lanes`` of each, and how many there are.

    ``row``: the caller pads rows of matrices to a multiple of so many columns.
    """

    lanes: int
    registers: int
    row: int

    def padded(self, columns: int) -> int:
        """The columns that a row takes in memory."""
        return -(-columns // self.row) * self.row


class Shape(NamedTuple):
    """Of a matrix in memory: ``rows`` and, padded, ``columns``."""

    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


class Size(NamedTuple):
    """What a plastic kernel is compiled for: n, S, whether there is alpha, the write rule."""

    neurons: int
    depth: int
    alpha: bool
    rule: str


Take = Callable[[int, int, Vector], None]
"""Gets row, column and value of a vector of a product."""


class Block:
    """Some trials of a member: ``trials`` their numbers, ``there`` of them real, from ``first``."""

    def __init__(self, number: Whole, batch: Whole, together: int = TOGETHER) -> None:
        groups = (batch + (together - 1)) // together
        self.p, self.first = number // groups, number % groups * together
        self.there = (batch - self.first).at_most(together)
        start = self.p * batch + self.first
        # A block that is not full computes its last trial again.
        self.trials = [start + (self.there - 1).at_most(t) for t in range(together)]


class Kernel:
    """The plastic recurrence for one size: places, counters, and what forward and back share."""

    def __init__(
        self,
        function: ir.Function,
        size: Size,
        on: Machine,
        shape: Shape,
        names: tuple[Sequence[str], Sequence[str]],
    ) -> None:
        self.n, self.depth, self.alpha, self.rule = size
        self.on, self.shape, self.m = on, shape, shape.columns
        self.w = Writer(function, *names)
        self.at, self.size = self.w.at, self.w.size

    def coefficients(self, p: Whole) -> tuple[Place, Place, Place]:
        """kappa, composite and its last row b_S, c_{S,0}, .. of a member."""
        composite = self.at["composite"] + p * (self.depth + 1) ** 2
        kappa = self.at["kappa"] + p * (self.depth * (self.depth + 1))
        return kappa, composite, composite + self.depth * (self.depth + 1)

    def matrix(self, name: str | Place, index: Index) -> Place:
        """The place of a matrix among others."""
        base = self.at[name] if isinstance(name, str) else name
        return base + index * self.shape.size

    def copy(self, source: Place, target: Place) -> None:
        """Copy a matrix."""
        with self.w.loop(0, self.n) as i:
            (source + i * self.m).copy_to(target + i * self.m, self.m)

    def start(self, p: Whole, trial: Whole) -> Place:
        """The matrix that a trial of a member starts from."""
        starts = self.size["starts"]
        return self.matrix("start", p * starts + trial.at_most(starts - 1))

    def may_start(self) -> Truth:
        """Whether any step starts a trial."""
        return self.size["starts"].compare("!=", 0)


def product(
    w: Writer, on: Machine, rows: list[Place], matrix: Place, shape: Shape, take: Take
) -> None:
    """Hand ``take`` all vectors of ``rows @ matrix``."""
    most = max(1, (on.registers - 8) // (2 * len(rows)))
    for tile in tiles(pieces(shape.columns, on.lanes), most):
        for t, values in enumerate(sums(w, rows, [matrix], shape, tile)):
            for (offset, _), value in zip(tile, values, strict=True):
                take(t, offset, value)


def sums(
    w: Writer,
    rows: list[Place],
    matrices: list[Place],
    shape: Shape,
    tile: Sequence[Piece],
    far: bool = False,
) -> list[list[Vector]]:
    """``rows[t] @ matrices[t]`` on a tile of columns; a single matrix is that of all rows.

    Even and odd rows of the matrix are summed apart, so that no addition waits for the last one.
    ``far``: ask for the matrix before it is needed.
    """
    count = len(rows) * len(tile)

    def two_rows(pair: Index, partial: list[Vector]) -> list[Vector]:
        even = one_row(pair * 2, partial[:count])
        return even + one_row(pair * 2 + 1, partial[count:])

    def one_row(i: Index, partial: list[Vector]) -> list[Vector]:
        start = i * shape.columns
        if far:
            for matrix in matrices:
                for at, _ in tile:
                    matrix.prefetch(start + at + _AHEAD)
        loaded = [[x[start + at, width] for at, width in tile] for x in matrices]
        result = []
        for t, row in enumerate(rows):
            for k, (_, width) in enumerate(tile):
                values = loaded[t if len(loaded) > 1 else 0][k]
                result.append(fma(row.copies(i, width), values, partial[t * len(tile) + k]))
        return result

    zeros = [w.zero(width) for _ in rows for _, width in tile]
    totals = w.fold(shape.rows // 2, zeros * 2, two_rows, 2)
    even, odd = totals[:count], totals[count:]
    if shape.rows % 2:
        even = one_row(shape.rows - 1, even)
    totals = [a + b for a, b in zip(even, odd, strict=True)]
    return [totals[t * len(tile) : (t + 1) * len(tile)] for t in range(len(rows))]


def tanh(constants: Place, x: Vector) -> Vector:
    """By the rational function whose factors are the ``CONSTANTS`` of ``_cpu_run``."""
    low, high, least, *factors = (constants.copies(k, x.width) for k in range(13))
    x = x.within(low, high)
    q = x * x
    above, below = factors[0], factors[5]
    for k in range(1, 5):
        above = fma(above, q, factors[k])
    for k in range(6, 10):
        below = fma(below, q, factors[k])
    return (x * above / below).within(least, factors[-1])
