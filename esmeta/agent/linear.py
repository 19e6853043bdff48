"""Dense layers with the axis P, and their initialisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from esmeta import kernels
from esmeta.modes import affine
from esmeta.rng import Rng
from esmeta.types import Params

# Below 400 multiply-adds torch's CPU bmm takes a path that rounds differently, and so do products
# with fewer than 16 rows, and in float64 the last rows if their number is not a multiple of 4.
# Padding to these keeps a row's bits independent of its batch.
_MIN_ROWS = 16
_ROW_TILE = 4
_MIN_PRODUCT = 25


def orthogonal(rng: Rng, rows: int, columns: int, gain: float) -> Tensor:
    """Random matrix ``[rows, columns]`` with orthonormal rows or columns, times ``gain``."""
    normal = torch.from_numpy(rng.numpy().standard_normal((max(rows, columns), min(rows, columns))))
    q, r = torch.linalg.qr(normal)
    q = q * torch.sign(torch.diagonal(r))
    return (gain * (q if rows >= columns else q.T)).to(torch.float32).contiguous()


class Mlp(NamedTuple):
    """A network ready to apply: weights ``[P, K, N]``, biases ``[P, 1, N]``, tanh between layers.

    ``squash``: tanh behind the last layer too. ``compiled`` is the same for the CPU in float32.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    squash: bool
    compiled: kernels.Network | None


def bind_mlp(params: Params, name: str, squash: bool = False) -> Mlp:
    """The layers of one network, ready to apply; none if there is no such network."""
    weights, biases = [], []
    while f"{name}.{len(weights)}.weight" in params:
        weights.append(params[f"{name}.{len(weights)}.weight"])
        biases.append(params[f"{name}.{len(biases)}.bias"])
    if weights and weights[0].device.type == "cpu" and weights[0].dtype == torch.float32:
        compiled = kernels.network(tuple(weights), tuple(biases), squash)
    else:
        compiled = None
    layers = tuple((w, b.unsqueeze(1)) for w, b in zip(weights, biases, strict=True))
    return Mlp(layers, squash, compiled)


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x [P, M, K] @ weight [P, K, N] + bias [P, 1, N]``, a row's bits independent of M and P."""
    rows = x.shape[1]
    short = max(_MIN_ROWS - rows, -rows % _ROW_TILE)
    if short > 0:
        x = pad(x, (0, 0, 0, short))
        return affine(bias, x, weight)[:, :rows]
    return affine(bias, x, weight)


def apply_mlp(mlp: Mlp, *parts: Tensor) -> Tensor:
    """Apply a network to parts of an input ``[P, M, K_i]``, K the sum of the K_i.

    A row's bits are independent of M and of how the input is parted.
    """
    if mlp.compiled is None:
        return _apply_layers(mlp, torch.cat(parts, -1))
    return kernels.dense(mlp.compiled, *parts)


def _apply_layers(mlp: Mlp, x: Tensor) -> Tensor:
    for i, (weight, bias) in enumerate(mlp.layers):
        rows, columns = weight.shape[1:]
        short = max(0, max(8, -(-_MIN_PRODUCT // rows)) - columns)
        x = apply_linear(x, pad(weight, (0, short)), pad(bias, (0, short)))[..., :columns]
        if i < len(mlp.layers) - 1 or mlp.squash:
            x = torch.tanh(x)
    return x
