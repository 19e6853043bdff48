"""What the kernels share: products of four rows with a matrix, and tanh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from writer import Piece, Writer, pieces, tiles

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


def product(
    w: Writer,
    on: Machine,
    rows: list[Any],
    matrix: Any,
    shape: Shape,
    take: Callable[[int, int, Any], None],
) -> None:
    """Hand ``take`` row, column and value of all vectors of ``rows @ matrix``."""
    for tile in tiles(
        pieces(shape.columns, on.lanes), max(1, (on.registers - 8) // (2 * len(rows)))
    ):
        for t, values in enumerate(sums(w, rows, [matrix], shape, tile)):
            for (offset, _), value in zip(tile, values, strict=True):
                take(t, offset, value)


def sums(
    w: Writer,
    rows: list[Any],
    matrices: list[Any],
    shape: Shape,
    tile: Sequence[Piece],
    far: bool = False,
) -> list[list[Any]]:
    """``rows[t] @ matrices[t]`` on a tile of columns; a single matrix is that of all rows.

    Even and odd rows of the matrix are summed apart, so that no addition waits for the last one.
    ``far``: ask for the matrix before it is needed.
    """
    count = len(rows) * len(tile)

    def two_rows(pair: Any, partial: list[Any]) -> list[Any]:
        result = []
        for odd in range(2):
            i = w.add(w.mul(pair, 2), odd)
            result += one_row(i, partial[odd * count : (odd + 1) * count])
        return result

    def one_row(i: Any, partial: list[Any]) -> list[Any]:
        start = w.mul(i, shape.columns)
        if far:
            for matrix in matrices:
                for at, _ in tile:
                    w.prefetch(matrix, w.add(start, at, _AHEAD))
        loaded = [[w.load(x, w.add(start, o), width) for o, width in tile] for x in matrices]
        result = []
        for t, row in enumerate(rows):
            for k, (_, width) in enumerate(tile):
                values = loaded[t if len(loaded) > 1 else 0][k]
                total = partial[t * len(tile) + k]
                result.append(w.fma(w.copies(row, i, width), values, total))
        return result

    zeros = [w.zero(width) for _ in rows for _, width in tile]
    totals = w.fold(shape.rows // 2, zeros * 2, two_rows, 2)
    even, odd = totals[:count], totals[count:]
    if shape.rows % 2:
        even = one_row(shape.rows - 1, even)
    totals = [w.b.fadd(a, b) for a, b in zip(even, odd, strict=True)]
    return [totals[t * len(tile) : (t + 1) * len(tile)] for t in range(len(rows))]


def tanh(w: Writer, constants: Any, x: Any) -> Any:
    """By the rational function whose factors are the ``constants`` of ``_cpu``."""
    width = x.type.count
    numbers = [w.copies(constants, k, width) for k in range(13)]
    low, high, least, *factors = numbers
    x = _within(w, x, low, high)
    q = w.b.fmul(x, x)
    above, *rest = factors[:5]
    for factor in rest:
        above = w.fma(above, q, factor)
    below, *rest = factors[5:]
    for factor in rest:
        below = w.fma(below, q, factor)
    return _within(w, w.b.fdiv(w.b.fmul(x, above), below), least, factors[-1])


def _within(w: Writer, x: Any, low: Any, high: Any) -> Any:
    """Cut x to low..high; NaN stays NaN."""
    b = w.b
    x = b.select(b.fcmp_ordered("<", x, low), low, x)
    return b.select(b.fcmp_ordered(">", x, high), high, x)
