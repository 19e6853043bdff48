"""The plastic recurrence on a CPU in float32: one compiled function for steps and scans.

Four trials are run together through all their steps, so that their fast weights stay in the cache
and every product with a matrix that they share (alpha, the write's A) is loaded once for four.
Rows of matrices are padded to a multiple of eight columns: no loop has a remainder, and what lies
in the padding never reaches a real neuron. Every trial is computed by the same instructions in the
same order wherever it stands in the batch, so bits depend neither on the batch nor on the threads.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.kernels import _cpu_build

# As in what is compiled, _cpu_code.
_LANES = 8
_TRIALS = 4
# Fewer multiply-adds than this are not worth handing to another thread.
_THREAD_WORK = 500_000


class Rule(NamedTuple):
    """Parameters as the compiled function takes them, float32 and contiguous.

    Shapes, m = n rounded up to a multiple of eight: ``alpha`` and ``write`` (A) transposed
    ``[P, n, m]``, or None where the variant has none; ``kappa`` ``[P, S, S+1]``; ``composite``
    ``[P, S+1, S+1]``.
    """

    alpha: Tensor | None
    kappa: Tensor
    composite: Tensor
    write: Tensor | None


class Result(NamedTuple):
    """``y`` ``[T, P, B, n]``, transposed fast weights ``[P, B, n, n]``, and what a gradient needs.

    ``reads`` ``[T, S, P, B, n]`` are the values of tanh, ``checkpoints`` ``[K, P, B, n, n]`` every
    k-th fast weights before their reset; both are None unless asked for.
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
    matrix = alpha if linear is None else linear
    if matrix is not None:
        # What is missing is compiled here rather than in the middle of a timed rollout.
        _cpu_build.function(matrix.shape[1], kappa.shape[1], alpha is not None, bool(write))
    return Rule(alpha, _plain(kappa), _plain(composite), linear)


def run(
    k: Rule,
    w_t: Tensor,
    x: Tensor,
    start_t: Tensor | None = None,
    reset: Tensor | None = None,
    every: int = 0,
) -> Result:
    """T steps from transposed fast weights ``w_t`` ``[P, B, n, n]`` over x ``[T, P, B, n]``.

    ``start_t`` ``[P, 1 or B, n, n]``, transposed, replaces the fast weights before step t of the
    trials where ``reset`` (bool ``[T, P, B]``) is set. ``every`` > 0 keeps what a gradient needs,
    with fast weights at every that many steps. Threads: ``torch.get_num_threads()``.
    """
    steps, population, batch, neurons = x.shape
    depth = k.kappa.shape[1]
    x, first = _plain(x), _padded(w_t)
    y, last = torch.empty_like(x), torch.empty_like(first)
    reads = checkpoints = None
    if every:
        reads = x.new_empty(steps, depth, population, batch, neurons)
        checkpoints = first.new_empty(-(-steps // every), *first.shape)
    start = None if start_t is None or reset is None else _padded(start_t)
    mask = None if start is None or reset is None else _plain(reset)
    # Without alpha the write is times one, by the same code.
    alpha = first.new_ones(1, *first.shape[2:]) if k.alpha is None else k.alpha
    arrays = (first, x, start, mask, alpha, k.kappa, k.composite, k.write)
    addresses = [_address(t) for t in (*arrays, y, last, reads, checkpoints)]
    sizes = (
        steps,
        population,
        batch,
        0 if start is None else start.shape[1],
        int(every > 0),
        max(every, 1),
    )
    call = _cpu_build.function(neurons, depth, k.alpha is not None, k.write is not None)
    columns = first.shape[-1]

    def part(low: int, high: int) -> None:
        scratch, gains = _SPACE.of(depth, columns)
        call(*addresses, scratch.data_ptr(), gains.data_ptr(), *sizes, low, high)

    blocks = population * -(-batch // _TRIALS)
    work = steps * population * batch * neurons**2 * (2 * depth + 2)
    threads = min(torch.get_num_threads(), blocks, max(1, work // _THREAD_WORK))
    _in_threads(part, blocks, threads)
    if checkpoints is not None:
        checkpoints = checkpoints[..., :neurons]
    return Result(y, last[..., :neurons], reads, checkpoints)


class _Space(threading.local):
    """Work space of a thread by (S, m); the function leaves zeros where it counts on them."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, depth: int, columns: int) -> tuple[Tensor, Tensor]:
        if (depth, columns) not in self.made:
            room = depth + 4
            scratch = torch.zeros(2 * room + 3, _TRIALS, columns)
            self.made[depth, columns] = (scratch, torch.zeros(room, columns))
        return self.made[depth, columns]


_SPACE = _Space()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous()


def _padded(matrix: Tensor) -> Tensor:
    """``[..., n, n]`` as a contiguous ``[..., n, m]``; without a copy if it was cut from one."""
    matrix = matrix.detach()
    neurons = matrix.shape[-1]
    columns = -(-neurons // _LANES) * _LANES
    shape = (*matrix.shape[:-1], columns)
    strides = _strides(shape)
    offset = matrix.storage_offset()
    stored = matrix.untyped_storage().nbytes() // matrix.element_size()
    if matrix.stride() == strides and stored - offset >= strides[0] * shape[0]:
        return matrix.as_strided(shape, strides)
    padded = matrix.new_zeros(shape)
    padded[..., :neurons] = matrix
    return padded


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="esmeta-plastic")


def _in_threads(call: Callable[[int, int], None], count: int, threads: int) -> None:
    if threads <= 1:
        call(0, count)
        return
    cuts = [count * i // threads for i in range(threads + 1)]
    for done in _pool(threads).map(call, cuts[:-1], cuts[1:]):
        assert done is None
