"""The write rules of the plastic recurrence, by name: a step adds ``alpha * v U(v)^T`` to W.

Rules differ in the pre-synaptic factor U. One more rule is one more entry in ``WRITES``, with which
it runs everywhere in torch operations; fused code for it is one more entry in
``_compiler/writes.py`` (CPU), and one more branch in ``factor`` and ``factor_back`` of
``_triton_code.py`` (GPU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# Below 16 rows, and below 400 multiplications, CPU libraries switch to other code, whose sums run
# in another order; so do the last rows in float64, if their number is not a multiple of 4. Padding
# keeps a trial's bits independent of how many trials are beside it.
_SAME_CODE_ROWS = 16
_ROW_TILE = 4
_SAME_CODE_PRODUCTS = 400

Tensors = tuple[Tensor, ...]


class Write(NamedTuple):
    """A factor U of rows v ``[P, R, n]``, and its adjoint.

    The functions get U's tensors as :class:`esmeta.kernels.Rule` holds them, matrices transposed
    ``[P, n, n]`` and vectors ``[P, 1, n]``.
    """

    tensors: tuple[tuple[str, int], ...] = ()
    """Name and dimensions of each, as users give them: 3 is ``[P, n, n]``, 2 is ``[P, n]``."""
    factor: Callable[[Tensors, Tensor], tuple[Tensor, Tensor | None]] | None = None
    """U(v), and what its adjoint needs of it; without the function, U(v) = v."""
    back: Callable[[Tensors, Tensor | None, Tensor], Tensor] | None = None
    """dJ/dv from what was kept and dJ/dU."""
    gradients: Callable[[Tensors, Tensor, Tensor | None, Tensor], Tensors] | None = None
    """dJ/d of the tensors from v, what was kept and dJ/dU."""
    fused: tuple[str, ...] = ("cpu", "cuda")
    """Kinds of devices whose fused kernels know the rule."""
    fused_back: tuple[str, ...] = ()
    """Other kinds, whose kernels know its backward alone."""


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows ``[P, R, n]`` times matrices ``[P, n, n]``, each row's bits independent of the others.

    ``matrix`` must be contiguous.
    """
    count, neurons = rows.shape[1:]
    least = max(_SAME_CODE_ROWS, -(-_SAME_CODE_PRODUCTS // (neurons * neurons)), count)
    least += -least % _ROW_TILE
    if count == least:
        return torch.bmm(rows, matrix)
    return torch.bmm(pad(rows, (0, 0, 0, least - count)), matrix)[:, :count]


def _linear(write: Tensors, v: Tensor) -> tuple[Tensor, None]:
    return product(v, write[0]), None


def _linear_back(write: Tensors, _: Tensor | None, grad: Tensor) -> Tensor:
    return torch.bmm(grad, write[0].mT)


def _linear_gradients(write: Tensors, v: Tensor, _: Tensor | None, grad: Tensor) -> Tensors:
    return (torch.bmm(v.mT, grad),)


def _mlp(write: Tensors, v: Tensor) -> tuple[Tensor, Tensor]:
    hidden = torch.tanh(product(v, write[0]) + write[1])
    return product(hidden, write[2]) + write[3], hidden


def _mlp_inner(write: Tensors, hidden: Tensor | None, grad: Tensor) -> Tensor:
    assert hidden is not None, "the factor has kept its tanh"
    return torch.bmm(grad, write[2].mT) * (1 - hidden * hidden)


def _mlp_back(write: Tensors, hidden: Tensor | None, grad: Tensor) -> Tensor:
    return torch.bmm(_mlp_inner(write, hidden, grad), write[0].mT)


def _mlp_gradients(write: Tensors, v: Tensor, hidden: Tensor | None, grad: Tensor) -> Tensors:
    inner = _mlp_inner(write, hidden, grad)
    assert hidden is not None, "the factor has kept its tanh"
    sums = inner.sum(1, keepdim=True), grad.sum(1, keepdim=True)
    return torch.bmm(v.mT, inner), sums[0], torch.bmm(hidden.mT, grad), sums[1]


_MLP = (("W1", 3), ("b1", 2), ("W2", 3), ("b2", 2))
WRITES = {
    "base": Write(),
    "no-alpha": Write(),
    "linear": Write((("A", 3),), _linear, _linear_back, _linear_gradients),
    "mlp": Write(_MLP, _mlp, _mlp_back, _mlp_gradients, fused=(), fused_back=("cpu",)),
}
"""U(v) = v (``no-alpha``: with alpha = 1), A v, and W2 tanh(W1 v + b1) + b2."""
