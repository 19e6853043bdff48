"""The write rules as instructions: the pre-synaptic factor U of v and its adjoint.

One more rule is one more entry in ``WRITES``, and ``"cpu"`` in its entry in ``esmeta/kernels``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kernel import Machine, Shape, Take, product, tanh
from writer import Place, Vector, Writer


class Given(NamedTuple):
    """What a rule works with: its tensors lie side by side, as do the rows of ``hidden``."""

    w: Writer
    on: Machine
    shape: Shape
    tensors: Place
    hidden: Place
    """Rows for what the adjoint needs; of rules that are ``deep`` alone."""

    def row(self, table: Place, t: int) -> Place:
        return table + t * self.shape.columns

    @property
    def second(self) -> Place:
        """The tensors behind a matrix and a vector."""
        return self.tensors + (self.shape.size + self.shape.columns)


class Write(NamedTuple):
    """A factor U with tensors of its own.

    ``numbers``: how many there are, for matrices of a shape. ``factor``: U of rows of v (matrices
    transposed and padded). ``back``: dJ/dv of rows of dJ/dU (matrices as they are); ``inner`` are
    rows for dJ/d of what goes into tanh.
    """

    numbers: Callable[[Shape], int]
    factor: Callable[[Given, list[Place], Take], None]
    back: Callable[[Given, list[Place], Place, Take], None]
    deep: bool = False


def _linear(given: Given, rows: list[Place], take: Take) -> None:
    product(given.w, given.on, rows, given.tensors, given.shape, take)


def _linear_back(given: Given, rows: list[Place], _: Place, take: Take) -> None:
    product(given.w, given.on, rows, given.tensors, given.shape, take)


def _mlp(given: Given, rows: list[Place], take: Take) -> None:
    w, shape, hidden = given.w, given.shape, given.hidden
    first, last = (place + shape.size for place in (given.tensors, given.second))

    def keep(t: int, at: int, value: Vector) -> None:
        given.row(hidden, t)[at] = value + first[at, value.width]

    product(w, given.on, rows, given.tensors, shape, keep)
    with w.loop(0, len(rows) * shape.columns // 16) as k:
        hidden[k * 16] = tanh(w.at["constants"], hidden[k * 16, 16])
    inner = [given.row(hidden, t) for t in range(len(rows))]

    def add(t: int, at: int, value: Vector) -> None:
        take(t, at, value + last[at, value.width])

    product(w, given.on, inner, given.second, shape, add)


def _mlp_back(given: Given, rows: list[Place], inner: Place, take: Take) -> None:
    def keep(t: int, at: int, value: Vector) -> None:
        h = given.row(given.hidden, t)[at, value.width]
        given.row(inner, t)[at] = value - value * h * h

    product(given.w, given.on, rows, given.second, given.shape, keep)
    passed = [given.row(inner, t) for t in range(len(rows))]
    product(given.w, given.on, passed, given.tensors, given.shape, take)


WRITES: dict[str, Write | None] = {
    "base": None,
    "no-alpha": None,
    "linear": Write(lambda shape: shape.size, _linear, _linear_back),
    "mlp": Write(lambda shape: 2 * (shape.size + shape.columns), _mlp, _mlp_back, deep=True),
}
"""U(v) = v where there is none, A v, and W2 tanh(W1 v + b1) + b2 (its backward alone is used)."""
