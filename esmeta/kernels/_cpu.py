"""The plastic recurrence on a CPU in float32: one compiled function for steps and scans.

Four trials are run together through all their steps, so that their fast weights stay in the cache
and every product with a matrix that they share (alpha, the write's A) is loaded once for four.
Rows of matrices are padded to whole vector registers (LANES): no loop has a remainder, no load
crosses a line of the cache, and what lies in the padding, which may be anything, never reaches a
real neuron. Every trial is computed by the
same instructions in the same order wherever it stands in the batch, so bits depend neither on the
batch nor on the threads.
"""

from __future__ import annotations

import functools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.kernels import _cpu_build
from esmeta.kernels._adjoint import Adjoints, Carried, Segment
from esmeta.kernels._cpu_run import CONSTANTS, LANES, TOGETHER, address, blank, plain, run_blocks
from esmeta.kernels._segments import pack, unpack


class Rule(NamedTuple):
    """Parameters as the compiled function takes them, float32 and contiguous.

    ``matrices``, those that the variant has: alpha and then the write's A, transposed and padded
    ``[P, n, m]``, m = n rounded up to a multiple of LANES; ``kappa`` ``[P, S, S+1]``; ``composite``
    ``[P, S+1, S+1]``; ``addresses`` of alpha, kappa, composite and A, 0 for what is missing.
    """

    matrices: tuple[Tensor, ...]
    kappa: Tensor
    composite: Tensor
    addresses: tuple[int, int, int, int]


class Result(NamedTuple):
    """``y`` ``[T, P, B, n]``, transposed fast weights ``[P, B, n, n]``, and what a gradient needs.

    ``reads`` ``[T, S, P, B, n]`` are the values of tanh, ``checkpoints`` ``[K, P, B, n, n]`` every
    k-th fast weights before their reset, not those that came in; both are None
    unless asked for.
    """

    y: Tensor
    w_t: Tensor
    reads: Tensor | None
    checkpoints: Tensor | None


def rule(
    alpha_t: Tensor | None, kappa: Tensor, composite: Tensor, write: tuple[Tensor, ...]
) -> Rule:
    """Pad parameters; ``alpha_t`` and ``write`` (nothing, or A) are transposed ``[P, n, n]``."""
    alpha = None if alpha_t is None else _padded(alpha_t)
    linear = _padded(write[0]) if write else None
    kappa, composite = plain(kappa), plain(composite)
    matrices = tuple(matrix for matrix in (alpha, linear) if matrix is not None)
    if matrices:
        # What is missing is compiled here rather than in the middle of a timed rollout.
        size = matrices[0].shape[-1], kappa.shape[1]
        _cpu_build.function("plastic", *size, alpha is not None, linear is not None)
    addresses = address(alpha), address(kappa), address(composite), address(linear)
    return Rule(matrices, kappa, composite, addresses)


def run(
    k: Rule,
    w_t: Tensor,
    x: Tensor,
    start_t: Tensor | None = None,
    reset: Tensor | None = None,
    every: int = 0,
    in_place: bool = False,
) -> Result:
    """T steps from transposed fast weights ``w_t`` ``[P, B, n, n]`` over x ``[T, P, B, n]``.

    ``start_t`` ``[P, 1 or B, n, n]``, transposed, replaces the fast weights before step t of the
    trials where ``reset`` (bool ``[T, P, B]``) is set. ``every`` > 0 keeps what a gradient needs,
    with fast weights at every that many steps. ``in_place`` may overwrite ``w_t``. Threads:
    ``torch.get_num_threads()``.
    """
    steps, population, batch, neurons = x.shape
    depth = k.kappa.shape[1]
    x, first = plain(x), _padded(w_t)
    y, last = torch.empty_like(x), first if in_place else _room(x, first.shape)
    reads = checkpoints = None
    if every:
        reads = blank(steps, depth, population, batch, neurons)
        checkpoints = _room(x, ((steps - 1) // every, *first.shape))
    start = None if start_t is None or reset is None else _padded(start_t)
    mask = None if start is None or reset is None else plain(reset)
    inputs, outputs = (first, x, start, mask), (y, last, reads, checkpoints, CONSTANTS)
    starts = 0 if start is None else start.shape[1]
    alpha, *_, linear = k.addresses
    call = _cpu_build.function("plastic", neurons, depth, alpha != 0, linear != 0)
    table = array("q", map(address, inputs))
    table.extend(k.addresses)
    table.extend(map(address, outputs))
    table.extend((steps, population, batch, starts, int(every > 0), max(every, 1)))
    work = steps * population * batch * neurons**2 * (2 * depth + 2)
    run_blocks(call, table, population * -(-batch // TOGETHER), work)
    return Result(y, last, reads, checkpoints)


def _padded(matrix: Tensor) -> Tensor:
    """``[..., n, n]`` with rows that lie m apart; itself if it is like that, to its last row."""
    matrix, shape = matrix.detach(), matrix.shape
    strides = _strides(shape)
    if matrix.stride() == strides:
        stored = matrix.untyped_storage().nbytes() // matrix.element_size()
        if stored - matrix.storage_offset() >= strides[0] * shape[0]:
            return matrix
    padded = matrix.new_zeros(*shape[:-1], strides[-2])[..., : shape[-1]]
    return padded.copy_(matrix)


def _room(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """New ``[..., n, n]`` of that kind, for what the function fills."""
    return like.new_empty(*shape[:-1], _strides(shape)[-2])[..., : shape[-1]]


@functools.lru_cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1, -(-shape[-1] // LANES) * LANES]
    for size in reversed(shape[1:-1]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


def back(segment: Segment, carried: Carried) -> tuple[Adjoints, Carried]:
    """Go back through a segment, as ``_adjoint.back``."""
    folded, packed = segment.folded, pack(segment)
    alpha, linear = folded.alpha_t, folded.write[0] if folded.write else None
    alpha_t = None if alpha is None else plain(alpha)
    alpha = None if alpha is None else plain(alpha.mT)
    linear = None if linear is None else plain(linear.mT)
    kappa, composite = plain(folded.kappa), plain(folded.composite)
    steps, population, batch, neurons = packed.grad_y.shape
    depth = packed.posts.shape[2]
    read = (packed.posts, packed.pres, packed.slopes, packed.responses, packed.first)
    table = array("q", map(address, (*read, packed.start, packed.mask)))
    table.extend(map(address, (alpha_t, alpha, kappa, composite, linear, packed.grad_y)))
    table.extend(map(address, (packed.weights, *carried, *packed.outs, packed.grad_x)))
    table.extend((steps, population, batch, packed.starts))
    size = neurons, depth, alpha is not None, linear is not None
    work = steps * population * batch * neurons**2 * (4 * depth + 2)
    run_blocks(_cpu_build.function("backward", *size), table, population * batch, work)
    return unpack(packed), carried
