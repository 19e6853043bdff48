"""The plastic recurrence on a CPU in float32: a compiled function for steps and scans, one back.

Four trials are run together through all their steps (two on the way back), so that their fast
weights stay in the cache and every matrix that they share (alpha, the write's A) is loaded once.
Rows of matrices are padded to whole vector registers (LANES): no loop has a remainder, no load
crosses a line of the cache, and what lies in the padding, which may be anything, never reaches a
real neuron. Every trial is computed by the same instructions in the same order wherever it stands
in the batch, so bits depend neither on the batch nor on the threads.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from esmeta.kernels import _cpu_build
from esmeta.kernels._cpu_run import (
    CONSTANTS,
    LANES,
    TOGETHER,
    address,
    blank,
    plain,
    run_blocks,
    zeros,
)
from esmeta.kernels._rule import Code, Kept, Plan, Rule, Saved
from esmeta.kernels._writes import Tensors

# A backward pass takes so many trials together, and pads rows of matrices to so many columns, on
# all machines: _compiler/backward.py.
_TOGETHER_BACK, _WIDE = 2, 16


def code(rule: Rule) -> Code:
    """The compiled code with these parameters."""
    alpha = None if rule.alpha_t is None else _padded(rule.alpha_t)
    write = _block(rule.write, _strides((rule.neurons,) * 2)[0]) if rule.write else None
    held = (alpha, plain(rule.kappa), plain(rule.composite), write)
    if rule.neurons:
        # What is missing is compiled here rather than in the middle of a timed rollout.
        _function("plastic", rule, rule.neurons)
    forward = _Forward(rule, held, tuple(map(address, held)))
    return Code(forward, backward)


class _Forward(NamedTuple):
    """``_rule.Forward``; ``held`` are alpha, kappa, composite and U's tensors, padded."""

    rule: Rule
    held: tuple[Tensor | None, ...]
    addresses: tuple[int, ...]

    def __call__(
        self, plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        steps, population, batch, neurons = x.shape
        depth = self.rule.depth
        x, first = plain(x), _padded(w_t)
        y, last = blank(*x.shape), first if plan.in_place else _room(x, first.shape)
        reads = checkpoints = start = mask = None
        if keep:
            reads = blank(steps, depth, population, batch, neurons)
            checkpoints = _room(x, ((steps - 1) // plan.every, *first.shape))
        if start_t is not None and plan.mask is not None:
            start, mask = _padded(start_t), plain(plan.mask[..., 0, 0])
        table = array("q", map(address, (first, x, start, mask)))
        table.extend(self.addresses)
        table.extend(map(address, (y, last, reads, checkpoints, CONSTANTS)))
        starts = 0 if start is None else start.shape[1]
        table.extend((steps, population, batch, starts, int(keep), plan.every))
        work = steps * population * batch * neurons**2 * (2 * depth + 2)
        call = _function("plastic", self.rule, neurons)
        run_blocks(call, table, population * -(-batch // TOGETHER), work)
        return y, last, Kept(checkpoints, reads)


def backward(
    rule: Rule, plan: Plan, saved: Saved, grad_y: Tensor, grad_w: Tensor
) -> Sequence[Tensor | None]:
    """``Code.backward`` by one compiled function, which adds up the trials of a block."""
    w_t, x, start_t, kept = saved
    steps, population, batch, neurons = x.shape
    depth, every = rule.depth, min(plan.every, steps)
    groups, wide = -(-batch // _TOGETHER_BACK), -(-neurons // _WIDE) * _WIDE
    alpha = alpha_t = mask = start = factor = write = None
    grad_start = grad_alpha = grad_write = None
    if rule.alpha_t is not None:
        alpha_t, alpha = _widened(rule.alpha_t, wide), _widened(rule.alpha_t.mT, wide)
        grad_alpha = zeros(population, groups, neurons, wide)
    if rule.write:
        factor, write = (
            _block(rule.write, wide),
            _block(tuple(t if t.shape[1] == 1 else t.mT for t in rule.write), wide),
        )
        grad_write = zeros(population, groups, factor.shape[1])
    if start_t is not None and plan.mask is not None and any(plan.resets):
        start, mask = _padded(start_t), plain(plan.mask[..., 0, 0])
        grad_start = zeros(population, batch, neurons, wide)
    checkpoints = None if kept.checkpoints is None else _padded(kept.checkpoints)
    given = (plain(x), kept.reads, _padded(w_t), checkpoints, start, mask)
    parameters = (alpha_t, alpha, plain(rule.kappa), plain(rule.composite), factor, write)
    grad_x, grad_w, grad_y = blank(*x.shape), _widened(grad_w, wide), plain(grad_y)
    sums = zeros(population, groups, (depth + 1) * (2 * depth + 1), _WIDE)
    outs = (grad_y, grad_w, grad_start, grad_alpha, sums, grad_write, grad_x, CONSTANTS)
    table = array("q", map(address, (*given, *parameters, *outs)))
    table.extend((steps, population, batch, 0 if start is None else start.shape[1], every))
    room = every * _TOGETHER_BACK * wide * (neurons + (2 + min(2, len(rule.write))) * depth)
    work = steps * population * batch * neurons**2 * (6 * depth + 6)
    run_blocks(_function("backward", rule, neurons), table, population * groups, work, room)
    if start_t is not None:
        found = torch.zeros_like(start_t) if grad_start is None else grad_start[..., :neurons]
        grad_start = found.sum_to_size(start_t.shape)
    grad_kappa, grad_composite = sums.sum((1, 3)).split((depth * (depth + 1), (depth + 1) ** 2), 1)
    return (
        grad_w[..., :neurons],
        grad_x,
        grad_start,
        grad_kappa.view(rule.kappa.shape),
        grad_composite.view(rule.composite.shape),
        None if grad_alpha is None else grad_alpha.sum(1)[..., :neurons],
        *([] if grad_write is None else _parts(rule.write, grad_write.sum(1), wide)),
    )


def _widened(matrix: Tensor, width: int) -> Tensor:
    """A copy whose rows are padded with 0 to a width."""
    wide = zeros(*matrix.shape[:-1], width)
    wide[..., : matrix.shape[-1]] = matrix.detach()
    return wide


def _parts(tensors: Tensors, block: Tensor, width: int) -> list[Tensor]:
    """The inverse of :func:`_block`, for tensors of these shapes."""
    rows = [tensor[0].numel() // tensor.shape[-1] for tensor in tensors]
    parts = block.split([count * width for count in rows], 1)
    return [
        part.view(*like.shape[:-1], width)[..., : like.shape[-1]]
        for part, like in zip(parts, tensors, strict=True)
    ]


def _function(kind: str, rule: Rule, neurons: int) -> _cpu_build.Function:
    return _cpu_build.function(kind, neurons, rule.depth, int(rule.alpha_t is not None), rule.name)


def _block(tensors: tuple[Tensor, ...], width: int) -> Tensor:
    """Tensors side by side for every member, rows padded to a width: ``[P, numbers]``."""
    rows = [pad(t.detach(), (0, width - t.shape[-1])).flatten(1) for t in tensors]
    return plain(torch.cat(rows, 1))


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
