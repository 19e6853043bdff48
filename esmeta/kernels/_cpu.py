"""The plastic recurrence on a CPU in float32: one compiled function for steps and scans.

Four trials are run together through all their steps, so that their fast weights stay in the cache
and every product with a matrix that they share (alpha, the write's A) is loaded once for four.
Rows of matrices are padded to whole vector registers (LANES): no loop has a remainder, no load
crosses a line of the cache, and what lies in the padding, which may be anything, never reaches a
real neuron. Every trial is computed by the same instructions in the same order wherever it stands
in the batch, so bits depend neither on the batch nor on the threads.
"""

from __future__ import annotations

import functools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from esmeta.kernels import _cpu_build
from esmeta.kernels._adjoint import Adjoints, Carried, Segment, sweep
from esmeta.kernels._cpu_run import CONSTANTS, LANES, TOGETHER, address, blank, plain, run_blocks
from esmeta.kernels._rule import Code, Kept, Plan, Rule
from esmeta.kernels._segments import pack


def code(rule: Rule) -> Code:
    """The compiled code with these parameters."""
    alpha = None if rule.alpha_t is None else _padded(rule.alpha_t)
    write = _block(rule.write, _strides((rule.neurons,) * 2)[0]) if rule.write else None
    held = (alpha, plain(rule.kappa), plain(rule.composite), write)
    if rule.neurons:
        # What is missing is compiled here rather than in the middle of a timed rollout.
        _function("plastic", rule, rule.neurons)
    forward = _Forward(rule, held, tuple(map(address, held)))
    return Code(forward, functools.partial(sweep, back))


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
        y, last = torch.empty_like(x), first if plan.in_place else _room(x, first.shape)
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
        if reads is None or checkpoints is None:
            return y, last, Kept()
        return y, last, Kept(checkpoints.unbind(0), reads.flatten(0, 1).unbind(0))


def back(segment: Segment, carried: Carried) -> tuple[Adjoints, Carried]:
    """Go back through a segment, as ``_adjoint.back``."""
    rule, packed = segment.rule, pack(segment)
    alpha_t = None if rule.alpha_t is None else plain(rule.alpha_t)
    alpha = None if alpha_t is None else plain(alpha_t.mT)
    steps, population, batch, neurons = packed.grad_y.shape
    write = _block(tuple(t.mT for t in rule.write), neurons) if rule.write else None
    *read, grad_y, weights, outs = packed
    table = array("q", map(address, read))
    parameters = (alpha_t, alpha, plain(rule.kappa), plain(rule.composite), write)
    table.extend(map(address, (*parameters, grad_y, weights, *carried, *outs)))
    table.extend((steps, population, batch, packed.starts))
    work = steps * population * batch * neurons**2 * (4 * rule.depth + 2)
    run_blocks(_function("backward", rule, neurons), table, population * batch, work)
    return outs, carried


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
