"""Dense layers with the axis P, and their initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

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


def init_mlp(name: str, sizes: Sequence[int], last_gain: float, rng: Rng) -> Params:
    """Orthogonal layers (gain sqrt 2, the last one ``last_gain``) with zero biases, without P."""
    params: Params = {}
    last = len(sizes) - 2
    for i, (rows, columns) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        gain = last_gain if i == last else math.sqrt(2.0)
        params[f"{name}.{i}.weight"] = orthogonal(rng.fold(name, i), rows, columns, gain)
        params[f"{name}.{i}.bias"] = torch.zeros(columns)
    return params


Layers = list[tuple[Tensor, Tensor, int]]


def bind_mlp(params: Params, name: str) -> Layers:
    """The layers of one network, ready to apply: weight, bias ``[P, 1, N]`` and true width N."""
    layers: Layers = []
    while f"{name}.{len(layers)}.weight" in params:
        weight = params[f"{name}.{len(layers)}.weight"]
        bias = params[f"{name}.{len(layers)}.bias"].unsqueeze(1)
        rows, columns = weight.shape[1:]
        short = max(8, -(-_MIN_PRODUCT // rows)) - columns
        if short > 0:
            weight, bias = pad(weight, (0, short)), pad(bias, (0, short))
        layers.append((weight, bias, columns))
    return layers


def apply_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x [P, M, K] @ weight [P, K, N] + bias [P, 1, N]``, a row's bits independent of M and P."""
    rows = x.shape[1]
    short = max(_MIN_ROWS - rows, -rows % _ROW_TILE)
    if short > 0:
        x = pad(x, (0, 0, 0, short))
        return torch.baddbmm(bias, x, weight)[:, :rows]
    return torch.baddbmm(bias, x, weight)


def apply_mlp(layers: Layers, x: Tensor, squash: bool = False) -> Tensor:
    """Apply a tanh network over the last axis of ``[(T,) P, B, K]``; ``squash``: a last tanh."""
    lead = x.shape[:-1]
    if x.ndim == 4:
        x = x.transpose(0, 1).reshape(x.shape[1], -1, x.shape[-1])
    for i, (weight, bias, width) in enumerate(layers):
        x = apply_linear(x, weight, bias)
        x = x if x.shape[-1] == width else x[..., :width]
        if i < len(layers) - 1 or squash:
            x = torch.tanh(x)
    if len(lead) == 3:
        x = x.reshape(lead[1], lead[0], lead[2], -1).transpose(0, 1)
    return x
