"""The write rules as instructions: the pre-synaptic factor U of v and its adjoint.

One more rule is one more entry in ``WRITES``, and ``"cpu"`` in its entry in ``esmeta/kernels``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kernel import Machine, Shape, Take, product
from writer import Place, Writer


class Write(NamedTuple):
    """A factor U with tensors of its own, which lie side by side for every member.

    ``numbers``: how many there are, for matrices of a shape. ``factor`` and ``back`` get writer,
    machine, rows, the tensors, the shape of a matrix, and who takes the values: U of rows of v
    (matrices transposed and padded), dJ/dv of rows of dJ/dU (matrices as they are).
    """

    numbers: Callable[[Shape], int]
    factor: Callable[[Writer, Machine, list[Place], Place, Shape, Take], None]
    back: Callable[[Writer, Machine, list[Place], Place, Shape, Take], None]


WRITES: dict[str, Write | None] = {
    "base": None,
    "no-alpha": None,
    "linear": Write(lambda shape: shape.size, product, product),
}
"""U(v) = v where there is none, else A v."""
