"""The plastic recurrence on a CPU in float32: one compiled function for steps and scans.

Four trials are run together through all their steps, so that their fast weights stay in the cache
and every product with a matrix that they share (alpha, the write's A) is loaded once for four.
Rows of matrices are padded to a multiple of eight columns: no loop has a remainder, and what lies
in the padding never reaches a real neuron. Every trial is computed by the same instructions in the
same order wherever it stands in the batch, so bits depend neither on the batch nor on the threads.

Compiled by numba on first use, once per (n, S, variant), and kept in its cache on disk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

_LANES = 8
_TRIALS = 4
# Fewer multiply-adds than this are not worth handing to another thread.
_THREAD_WORK = 500_000

_F = np.float32
_ZERO, _ONE = _F(0), _F(1)
# tanh(x) = x P(x^2) / Q(x^2) on |x| <= 9.02, where it rounds to 1: a fit of our own, relative error
# 2.1e-8, in float32 arithmetic 3.0e-7.
_LIMIT = _F(9.02)
_P1, _P2, _P3 = _F(0.1337971985340118), _F(0.003494035685434937), _F(2.058343306998722e-05)
_P4 = _F(1.331889531996922e-08)
_Q1, _Q2, _Q3 = _F(0.4671303629875183), _F(0.02587108127772808), _F(0.000328309164615348)
_Q4 = _F(7.761969982311712e-07)


class Rule(NamedTuple):
    """Parameters as the compiled function takes them, float32 and contiguous.

    Shapes, m = n rounded up to a multiple of eight: ``alpha`` and ``write`` (A) transposed
    ``[P, n, m]``, without entries where the variant has none; ``kappa`` ``[P, S, S+1]``;
    ``composite`` ``[P, S+1, S+1]``.
    """

    alpha: np.ndarray
    kappa: np.ndarray
    composite: np.ndarray
    write: np.ndarray


class Result(NamedTuple):
    """``y`` ``[T, P, B, n]``, transposed fast weights ``[P, B, n, n]``, and what a gradient needs.

    ``reads`` ``[T, S, P, B, n]`` are the values of tanh, ``checkpoints`` ``[K, P, B, n, n]`` every
    k-th fast weights before their reset; both are empty unless asked for.
    """

    y: Tensor
    w_t: Tensor
    reads: Tensor
    checkpoints: Tensor


def rule(
    alpha_t: Tensor | None, kappa: Tensor, composite: Tensor, write: tuple[Tensor, ...]
) -> Rule:
    """Pad parameters; ``alpha_t`` and ``write`` (nothing, or A) are transposed ``[P, n, n]``."""
    alpha, linear = (
        _NOTHING if matrix is None else _padded(matrix).numpy()
        for matrix in (alpha_t, write[0] if write else None)
    )
    return Rule(alpha, _array(kappa), _array(composite), linear)


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
    first = _padded(w_t)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = torch.empty_like(first)
    kept = steps if every else 0
    reads = x.new_empty(kept, depth, population, batch, neurons)
    checkpoints = first.new_empty(-(-kept // every) if every else 0, *first.shape)
    start = _NO_START if start_t is None else _padded(start_t).numpy()
    mask = _NO_MASK if reset is None or start_t is None else _array(reset)
    scan = _compiled(neurons, depth, len(k.alpha) > 0, len(k.write) > 0)
    # Without alpha the write is times one, by the same code.
    alpha = k.alpha if len(k.alpha) else np.ones((1, *first.shape[2:]), np.float32)
    arrays = (first.numpy(), _array(x), start, mask, alpha, k.kappa, k.composite, k.write)
    results = (y.numpy(), last.numpy(), reads.numpy(), checkpoints.numpy(), max(every, 1))
    blocks = population * -(-batch // _TRIALS)
    work = steps * population * batch * neurons**2 * (2 * depth + 2)
    _in_threads(
        lambda low, high: scan(*arrays, *results, low, high),
        blocks,
        min(torch.get_num_threads(), blocks, max(1, work // _THREAD_WORK)),
    )
    return Result(y, last[..., :neurons], reads, checkpoints[..., :neurons])


_NOTHING = np.empty((0, 0, 0), np.float32)
_NO_START = np.empty((0, 0, 0, 0), np.float32)
_NO_MASK = np.empty((0, 0, 0), np.bool_)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


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


@functools.cache
def _compiled(neurons: int, depth: int, alpha: bool, linear: bool) -> Callable[..., None]:
    """The function for one size: with n and S as constants all loops have known lengths."""
    n, m, rounds = neurons, -(-neurons // _LANES) * _LANES, depth

    @njit(cache=True, fastmath={"contract"}, nogil=True, error_model="numpy")
    def scan(
        first, x, start, mask, alpha_t, kappa, composite, write,
        y, last, reads, kept, every, low, high,
    ):  # fmt: skip
        steps, batch = x.shape[0], x.shape[2]
        groups = (batch + _TRIALS - 1) // _TRIALS
        # Room for whole groups of rounds in the write; what is there beyond S stays 0.
        post = np.zeros((rounds + 4, _TRIALS, m), np.float32)
        pre = np.zeros((rounds + 4, _TRIALS, m), np.float32) if linear else post
        gains = np.zeros((rounds + 4, m), np.float32)
        z = np.zeros((_TRIALS, m), np.float32)
        query = np.zeros((_TRIALS, m), np.float32)
        heard = np.zeros((_TRIALS, m), np.float32)
        for block in range(low, high):
            p, b0 = block // groups, block % groups * _TRIALS
            there = min(_TRIALS, batch - b0)
            for step in range(steps):
                fresh = step == 0  # fast weights are still read from ``first``
                now = first if fresh else last
                if reads.shape[0] > 0 and step % every == 0:
                    kept[step // every, p, b0 : b0 + there] = now[p, b0 : b0 + there]
                if mask.shape[0] > 0 and _any(mask[step, p, b0 : b0 + there]):
                    _restart(mask[step, p], start[p], now, last, p, b0, there)
                    now, fresh = last, False
                for t in range(_TRIALS):
                    # A block that is not full computes its last trial again.
                    for j in range(n):
                        post[0, t, j] = x[step, p, b0 + min(t, there - 1), j]
                for s in range(1, rounds + 1):
                    if linear:
                        _product(n, m, post[s - 1], write[p], pre[s - 1])
                    for t in range(_TRIALS):
                        _read(n, m, post[s - 1, t], now[p, b0 + min(t, there - 1)], z[t])
                    row = composite[p, s - 1]
                    if s > 1 and alpha:
                        _correct(n, m, s, row, alpha_t[p], pre, post, z, query, heard)
                    elif s > 1:
                        _correct_alike(n, m, s, row, pre, post, z)
                    _mix(m, s, kappa[p, s - 1], post, z)
                    if reads.shape[0] > 0:
                        for t in range(there):
                            for j in range(n):
                                reads[step, s - 1, p, b0 + t, j] = z[t, j]
                row = composite[p, rounds]
                for t in range(there):
                    old, new = now[p, b0 + t], last[p, b0 + t]
                    for j in range(n):
                        y[step, p, b0 + t, j] = post[rounds, t, j]
                        post[rounds, t, j] = _ZERO  # the write below takes rounds in groups
                    _gain(m, rounds, row, post, t, gains)
                    shared = alpha_t[p if alpha else 0]
                    if fresh:
                        _write(n, m, rounds, row[0], pre, gains, t, shared, old, new)
                    else:
                        # The compiler must see that it is one matrix, or it goes one by one.
                        _write(n, m, rounds, row[0], pre, gains, t, shared, new, new)

    return scan


@njit(inline="always")
def _tanh(x):
    x = min(max(x, -_LIMIT), _LIMIT)
    q = x * x
    above = (((_P4 * q + _P3) * q + _P2) * q + _P1) * q + _ONE
    below = (((_Q4 * q + _Q3) * q + _Q2) * q + _Q1) * q + _ONE
    return min(max(x * above / below, -_ONE), _ONE)


@njit(inline="always")
def _any(mask):
    for hit in mask:
        if hit:
            return True
    return False


@njit(inline="always")
def _restart(mask, start, now, last, p, b0, there):
    """Put the fast weights of a block into ``last``, started afresh where the mask is set."""
    for b in range(b0, b0 + there):
        source = start[min(b, len(start) - 1)] if mask[b] else now[p, b]
        for i in range(source.shape[0]):
            for j in range(source.shape[1]):
                last[p, b, i, j] = source[i, j]


@njit(inline="always")
def _read(n, m, rows, w, out):
    """``out[m] = rows[n] @ w[n, m]``, eight rows of w at a time."""
    for j in range(m):
        out[j] = _ZERO
    for g in range(n // 8):
        i = 8 * g
        a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        e, f, g_, h = rows[i + 4], rows[i + 5], rows[i + 6], rows[i + 7]
        for j in range(m):
            half = out[j] + a * w[i, j] + b * w[i + 1, j] + c * w[i + 2, j] + d * w[i + 3, j]
            half = half + e * w[i + 4, j] + f * w[i + 5, j] + g_ * w[i + 6, j]
            out[j] = half + h * w[i + 7, j]
    if n % 8 >= 4:
        i = n // 8 * 8
        a, b, c, d = rows[i], rows[i + 1], rows[i + 2], rows[i + 3]
        for j in range(m):
            out[j] = out[j] + a * w[i, j] + b * w[i + 1, j] + c * w[i + 2, j] + d * w[i + 3, j]
    for i in range(n // 4 * 4, n):
        a = rows[i]
        for j in range(m):
            out[j] += a * w[i, j]


@njit(inline="always")
def _product(n, m, rows, w, out):
    """``out[4, m] = rows[4, n] @ w[n, m]``: each element of w is loaded once for four trials."""
    for t in range(_TRIALS):
        for j in range(m):
            out[t, j] = _ZERO
    for g in range(n // 4):
        i = 4 * g
        r00, r01, r02, r03 = rows[0, i], rows[0, i + 1], rows[0, i + 2], rows[0, i + 3]
        r10, r11, r12, r13 = rows[1, i], rows[1, i + 1], rows[1, i + 2], rows[1, i + 3]
        r20, r21, r22, r23 = rows[2, i], rows[2, i + 1], rows[2, i + 2], rows[2, i + 3]
        r30, r31, r32, r33 = rows[3, i], rows[3, i + 1], rows[3, i + 2], rows[3, i + 3]
        for j in range(m):
            a, b, c, d = w[i, j], w[i + 1, j], w[i + 2, j], w[i + 3, j]
            out[0, j] = out[0, j] + r00 * a + r01 * b + r02 * c + r03 * d
            out[1, j] = out[1, j] + r10 * a + r11 * b + r12 * c + r13 * d
            out[2, j] = out[2, j] + r20 * a + r21 * b + r22 * c + r23 * d
            out[3, j] = out[3, j] + r30 * a + r31 * b + r32 * c + r33 * d
    for i in range(n // 4 * 4, n):
        for t in range(_TRIALS):
            e = rows[t, i]
            for j in range(m):
                out[t, j] += e * w[i, j]


@njit(inline="always")
def _correct(n, m, s, row, alpha_t, pre, post, z, query, heard):
    """``z = b_{s-1} z + sum_j c_{s-1,j} V_j * alpha (U_j * V_{s-1})``."""
    for t in range(_TRIALS):
        for j in range(m):
            z[t, j] *= row[0]
    for before in range(s - 1):
        for t in range(_TRIALS):
            for j in range(m):
                query[t, j] = pre[before, t, j] * post[s - 1, t, j]
        _product(n, m, query, alpha_t, heard)
        c = row[1 + before]
        for t in range(_TRIALS):
            for j in range(m):
                z[t, j] += c * post[before, t, j] * heard[t, j]


@njit(inline="always")
def _correct_alike(n, m, s, row, pre, post, z):
    """The same without alpha: one number instead of a product."""
    for t in range(_TRIALS):
        for j in range(m):
            z[t, j] *= row[0]
        for before in range(s - 1):
            total = _ZERO
            for i in range(n):
                total += pre[before, t, i] * post[s - 1, t, i]
            total *= row[1 + before]
            for j in range(m):
                z[t, j] += total * post[before, t, j]


@njit(inline="always")
def _mix(m, s, kappa, post, z):
    """``z = tanh(z)`` and ``V_s = kappa_s z + sum_{l<s} kappa_l V_l``."""
    for t in range(_TRIALS):
        for j in range(m):
            z[t, j] = _tanh(z[t, j])
        for j in range(m):
            post[s, t, j] = kappa[s] * z[t, j]
        for before in range(s):
            for j in range(m):
                post[s, t, j] += kappa[before] * post[before, t, j]


@njit(inline="always")
def _gain(m, rounds, row, post, t, gains):
    """``c_{S,l} V_l`` of one trial for all rounds."""
    for before in range(rounds):
        for j in range(m):
            gains[before, j] = row[1 + before] * post[before, t, j]


@njit(inline="always")
def _write_two(n, m, first, fade, pre, gains, t, alpha_t, old, new):
    """``new = fade old + alpha * sum_l U_l gains_l^T`` over two rounds; ``new`` may be ``old``."""
    for i in range(n):
        a, b = pre[first, t, i], pre[first + 1, t, i]
        for j in range(m):
            written = a * gains[first, j] + b * gains[first + 1, j]
            new[i, j] = fade * old[i, j] + alpha_t[i, j] * written


@njit(inline="always")
def _write_four(n, m, first, fade, pre, gains, t, alpha_t, old, new):
    """The same over four rounds."""
    for i in range(n):
        a, b = pre[first, t, i], pre[first + 1, t, i]
        c, d = pre[first + 2, t, i], pre[first + 3, t, i]
        for j in range(m):
            written = a * gains[first, j] + b * gains[first + 1, j]
            written = written + c * gains[first + 2, j] + d * gains[first + 3, j]
            new[i, j] = fade * old[i, j] + alpha_t[i, j] * written


@njit(inline="always")
def _write(n, m, rounds, fade, pre, gains, t, alpha_t, old, new):
    """``new = b_S old + alpha * sum_l U_l (c_l V_l)^T``; ``new`` may be ``old``."""
    if rounds <= 2:
        _write_two(n, m, 0, fade, pre, gains, t, alpha_t, old, new)
    else:
        _write_four(n, m, 0, fade, pre, gains, t, alpha_t, old, new)
        for g in range(1, (rounds + 3) // 4):
            _write_four(n, m, 4 * g, _ONE, pre, gains, t, alpha_t, new, new)
