"""What the CPU kernel compiles: run as a script it writes machine code, without importing torch.

    python _cpu_code.py FILE n S ALPHA LINEAR

One function for one size: with n and S as constants all loops have known lengths. It takes
addresses and sizes (see ``_function``), allocates nothing and needs no run-time library, so that
who calls it does not load the compiler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import carray, cfunc, njit, types

NAME = "esmeta_plastic"
LANES = 8
"""Rows of matrices are padded to a multiple of this many columns."""
TRIALS = 4
"""Trials that are run together."""

_F = np.float32
_ZERO, _ONE = _F(0), _F(1)
# tanh(x) = x P(x^2) / Q(x^2) on |x| <= 9.02, where it rounds to 1: a fit of our own, relative error
# 2.1e-8, in float32 arithmetic 3.0e-7.
_LIMIT = _F(9.02)
_P1, _P2, _P3 = _F(0.1337971985340118), _F(0.003494035685434937), _F(2.058343306998722e-05)
_P4 = _F(1.331889531996922e-08)
_Q1, _Q2, _Q3 = _F(0.4671303629875183), _F(0.02587108127772808), _F(0.000328309164615348)
_Q4 = _F(7.761969982311712e-07)


def _function(neurons: int, depth: int, alpha: bool, linear: bool) -> Callable[..., None]:
    """Run blocks ``low`` to ``high`` of four trials each; arguments as in ``_cpu.run``.

    Sizes: ``starts`` is the second axis of ``start`` (0: no resets), ``keep`` 1 stores what a
    gradient needs. ``scratch`` [2 (S + 4) + 3, 4, m] and ``gains`` [S + 4, m]: zeros to work in.
    """
    n, m, rounds = neurons, -(-neurons // LANES) * LANES, depth
    room = rounds + 4  # the write takes rounds in groups; what is there beyond S stays 0

    def run(
        first_, x_, start_, mask_, alpha_, kappa_, composite_, write_, y_, last_, reads_, kept_,
        scratch_, gains_, steps, population, batch, starts, keep, every, low, high,
    ):  # fmt: skip
        weights, shared = (population, batch, n, m), (population, n, m)
        first, last = carray(first_, weights), carray(last_, weights)
        activity = (steps, population, batch, n)
        x, y = carray(x_, activity), carray(y_, activity)
        start = carray(start_, (population, starts, n, m))
        mask = carray(mask_, (steps, population, batch))
        alpha_t, write = carray(alpha_, shared), carray(write_, shared)
        kappa = carray(kappa_, (population, rounds, rounds + 1))
        composite = carray(composite_, (population, rounds + 1, rounds + 1))
        reads = carray(reads_, (steps, rounds, population, batch, n))
        kept = carray(kept_, (steps, population, batch, n, m))
        scratch = carray(scratch_, (2 * room + 3, TRIALS, m))
        gains = carray(gains_, (room, m))
        post, pre = scratch[:room], scratch[room : 2 * room] if linear else scratch[:room]
        z, query, heard = scratch[2 * room], scratch[2 * room + 1], scratch[2 * room + 2]
        groups = (batch + TRIALS - 1) // TRIALS
        for block in range(low, high):
            p, b0 = block // groups, block % groups * TRIALS
            there = min(TRIALS, batch - b0)
            for step in range(steps):
                fresh = step == 0  # fast weights are still read from ``first``
                now = first if fresh else last
                if keep and step % every == 0:
                    for b in range(b0, b0 + there):
                        _copy(n, m, now[p, b], kept[step // every, p, b])
                if starts and _any(mask[step, p], b0, there):
                    _restart(n, m, mask[step, p], start[p], now[p], last[p], b0, there)
                    now, fresh = last, False
                for t in range(TRIALS):
                    # A block that is not full computes its last trial again.
                    for j in range(n):
                        post[0, t, j] = x[step, p, b0 + min(t, there - 1), j]
                alpha_p, row = alpha_t[p if alpha else 0], composite[p, rounds]
                _rounds(
                    n, m, rounds, alpha, linear, now[p], b0, there, kappa[p], composite[p],
                    alpha_p, write[p], post, pre, z, query, heard, reads[step * keep], p, keep,
                )  # fmt: skip
                for t in range(there):
                    old, new = now[p, b0 + t], last[p, b0 + t]
                    _finish(n, m, rounds, row, post, t, gains, y[step, p, b0 + t])
                    if fresh:
                        _write(n, m, rounds, row[0], pre, gains, t, alpha_p, old, new)
                    else:
                        # The compiler must see that it is one matrix, or it goes one by one.
                        _write(n, m, rounds, row[0], pre, gains, t, alpha_p, new, new)

    return run


@njit(inline="always")
def _tanh(x):
    x = min(max(x, -_LIMIT), _LIMIT)
    q = x * x
    above = (((_P4 * q + _P3) * q + _P2) * q + _P1) * q + _ONE
    below = (((_Q4 * q + _Q3) * q + _Q2) * q + _Q1) * q + _ONE
    return min(max(x * above / below, -_ONE), _ONE)


@njit(inline="always")
def _any(mask, b0, there):
    hit = False
    for b in range(b0, b0 + there):
        hit |= mask[b] != 0
    return hit


@njit(inline="always")
def _copy(n, m, source, target):
    for i in range(n):
        for j in range(m):
            target[i, j] = source[i, j]


@njit(inline="always")
def _restart(n, m, mask, start, now, last, b0, there):
    """Put the fast weights of a block into ``last``, started afresh where the mask is set."""
    for b in range(b0, b0 + there):
        if mask[b]:
            _copy(n, m, start[min(b, len(start) - 1)], last[b])
        else:
            _copy(n, m, now[b], last[b])


@njit(inline="always")
def _rounds(
    n, m, rounds, alpha, linear, now, b0, there, kappa, composite,
    alpha_t, write, post, pre, z, query, heard, reads, p, keep,
):  # fmt: skip
    """The S reads of one step of a block, from V_0 to V_S."""
    for s in range(1, rounds + 1):
        if linear:
            _product(n, m, post[s - 1], write, pre[s - 1])
        for t in range(TRIALS):
            _read(n, m, post[s - 1, t], now[b0 + min(t, there - 1)], z[t])
        if s > 1 and alpha:
            _correct(n, m, s, composite[s - 1], alpha_t, pre, post, z, query, heard)
        elif s > 1:
            _correct_alike(n, m, s, composite[s - 1], pre, post, z)
        _mix(m, s, kappa[s - 1], post, z)
        if keep:
            for t in range(there):
                for j in range(n):
                    reads[s - 1, p, b0 + t, j] = z[t, j]


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
    for t in range(TRIALS):
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
        for t in range(TRIALS):
            e = rows[t, i]
            for j in range(m):
                out[t, j] += e * w[i, j]


@njit(inline="always")
def _correct(n, m, s, row, alpha_t, pre, post, z, query, heard):
    """``z = b_{s-1} z + sum_j c_{s-1,j} V_j * alpha (U_j * V_{s-1})``."""
    for t in range(TRIALS):
        for j in range(m):
            z[t, j] *= row[0]
    for before in range(s - 1):
        for t in range(TRIALS):
            for j in range(m):
                query[t, j] = pre[before, t, j] * post[s - 1, t, j]
        _product(n, m, query, alpha_t, heard)
        c = row[1 + before]
        for t in range(TRIALS):
            for j in range(m):
                z[t, j] += c * post[before, t, j] * heard[t, j]


@njit(inline="always")
def _correct_alike(n, m, s, row, pre, post, z):
    """The same without alpha: one number instead of a product."""
    for t in range(TRIALS):
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
    for t in range(TRIALS):
        for j in range(m):
            z[t, j] = _tanh(z[t, j])
        for j in range(m):
            post[s, t, j] = kappa[s] * z[t, j]
        for before in range(s):
            for j in range(m):
                post[s, t, j] += kappa[before] * post[before, t, j]


@njit(inline="always")
def _finish(n, m, rounds, row, post, t, gains, y):
    """Hand out V_S of one trial and clear it, and take ``c_{S,l} V_l`` for all rounds."""
    for j in range(n):
        y[j] = post[rounds, t, j]
        post[rounds, t, j] = _ZERO
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


def signature() -> Any:
    """Types of the arguments of ``_function``: 14 arrays, 8 numbers."""
    number = types.CPointer(types.float32)
    pointers = [number] * 3 + [types.CPointer(types.uint8)] + [number] * 10
    return types.void(*pointers, *[types.int64] * 8)


def machine_code(neurons: int, depth: int, alpha: bool, linear: bool) -> bytes:
    """An object file for this machine that defines ``NAME``."""
    options = {"fastmath": {"contract"}, "error_model": "numpy"}
    compiled = cfunc(signature(), **options)(_function(neurons, depth, alpha, linear))
    # Under the wrapper for C callers, which needs the interpreter, lies the function itself.
    module = llvm.parse_assembly(compiled.inspect_llvm())
    inner = module.get_function(compiled.native_name.removeprefix("cfunc."))
    inner.name = NAME
    for function in module.functions:
        if not function.is_declaration and function.name != NAME:
            function.linkage = llvm.Linkage.internal
    for variable in module.global_variables:
        if not variable.is_declaration:
            variable.linkage = llvm.Linkage.internal
    machine = target_machine()
    cleaner = llvm.create_new_module_pass_manager()
    cleaner.add_global_dead_code_eliminate_pass()
    cleaner.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    return machine.emit_object(module)


def target_machine() -> llvm.TargetMachine:
    """This machine's own processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="default",
    )


if __name__ == "__main__":
    path, n, S, *flags = sys.argv[1:]
    with open(path, "wb") as file:
        file.write(machine_code(int(n), int(S), *(flag == "1" for flag in flags)))
