"""The plastic recurrence on a GPU: one program per trial, its fast weights on the chip (Triton).

Importing this module imports triton. A row vector of n neurons is a tensor of N = 2^k >= n numbers,
a matrix ``[N, N]``, what lies beyond n is 0; rounds are rows of a tensor ``[SP, N]``, SP = 2^k > S.
All sums run over whole rows or columns in an order that depends on N alone, so that results are the
same bits from run to run and for any batch.
"""

# Tensors of this language are annotated neither here nor, rightly, in triton itself.
# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false
# ruff: noqa: ANN001, ANN201, ANN202

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # The rational function of _cpu_run, whose comment says how it was fitted.
    x = tl.minimum(tl.maximum(x, -9.02), 9.02)
    q = x * x
    above = ((1.331889531996922e-08 * q + 2.058343306998722e-05) * q + 0.003494035685434937) * q
    above = (above + 0.1337971985340118) * q + 1.0
    below = ((7.761969982311712e-07 * q + 0.000328309164615348) * q + 0.02587108127772808) * q
    below = (below + 0.4671303629875183) * q + 1.0
    return tl.minimum(tl.maximum(x * above / below, -1.0), 1.0)


@triton.jit
def _factor(v, write, at, inside, RULE: tl.constexpr):
    # U(v): one branch for every write rule but base; write points to the tensors of U, transposed.
    if RULE == "linear":
        v = tl.sum(v[:, None] * tl.load(write + at, inside, 0.0), 0)
    return v


@triton.jit
def _factor_back(pre, write, at, inside, RULE: tl.constexpr):
    # dJ/dv from dJ/dU.
    if RULE == "linear":
        pre = tl.sum(tl.load(write + at, inside, 0.0) * pre[None, :], 1)
    return pre


@triton.jit
def _row(table, rounds, s):
    # Row s of [SP, N].
    return tl.sum(tl.where(rounds[:, None] == s, table, 0.0), 0)


@triton.jit
def _change(posts, pres, rounds, final, S: tl.constexpr, N: tl.constexpr):
    # sum_l U_l (c_l V_l)^T, the write before alpha; final points to b_S, c_{S,0}, ..
    total = tl.zeros([N, N], tl.float32)
    for s in range(S):
        right = tl.load(final + 1 + s) * _row(posts, rounds, s)
        total += _row(pres, rounds, s)[:, None] * right[None, :]
    return total


@triton.jit
def _corrected(
    z, v, posts, pres, rounds, row, alpha, at, inside, s: tl.constexpr, ALPHA: tl.constexpr
):  # fmt: skip
    # What the writes of this step add to a read; row points to b_{s-1}, c_{s-1,0}, ..
    for j in tl.static_range(s - 1):
        query = _row(pres, rounds, j) * v
        if ALPHA:
            a = tl.load(alpha + at, inside, 0.0)
            heard = tl.sum(query[:, None] * a, 0)
        else:
            heard = tl.sum(query, 0)
        z += tl.load(row + 1 + j) * _row(posts, rounds, j) * heard
    return z


@triton.jit
def forward(
    first, x, start, mask, alpha, kappa, composite, write, y, last, reads, kept,
    steps, trials, batch, starts, every,
    KEEP: tl.constexpr, RESETS: tl.constexpr, ALPHA: tl.constexpr, OWN: tl.constexpr,
    RULE: tl.constexpr, SIZE: tl.constexpr,
    n: tl.constexpr, S: tl.constexpr, N: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """All steps of one trial; arguments as in ``_cpu.run``, ``trials`` = P B, nothing padded."""
    trial = tl.program_id(0).to(tl.int64)
    p = trial // batch
    i = tl.arange(0, N)
    rounds = tl.arange(0, SP)
    real = i < n
    inside = real[:, None] & real[None, :]
    at = i[:, None] * n + i[None, :]
    kappa += p * S * (S + 1)
    composite += p * (S + 1) * (S + 1)
    final = composite + S * (S + 1)
    w = tl.load(first + trial * n * n + at, inside, 0.0)
    for step in range(steps):
        here = step * trials + trial
        if KEEP:
            if (step > 0) & (step % every == 0):
                tl.store(kept + ((step // every - 1) * trials + trial) * n * n + at, w, inside)
        if RESETS:
            if tl.load(mask + here) != 0:
                own = p * starts + tl.minimum(trial % batch, starts - 1)
                w = tl.load(start + own * n * n + at, inside, 0.0)
        v = tl.load(x + here * n + i, real, 0.0)
        posts = tl.where(rounds[:, None] == 0, v[None, :], 0.0)
        pres = posts
        for s in tl.static_range(1, S + 1):
            if OWN:
                u = _factor(v, write + p * SIZE, at, inside, RULE)
                pres = tl.where(rounds[:, None] == s - 1, u[None, :], pres)
            else:
                pres = posts
            row = composite + (s - 1) * (S + 1)
            z = tl.sum(v[:, None] * w, 0) * tl.load(row)
            z = _corrected(z, v, posts, pres, rounds, row, alpha + p * n * n, at, inside, s, ALPHA)
            read = _tanh(z)
            if KEEP:
                tl.store(reads + ((step * S + s - 1) * trials + trial) * n + i, read, real)
            row = kappa + (s - 1) * (S + 1)
            mixed = tl.load(row + rounds, rounds < s, 0.0)
            v = tl.sum(mixed[:, None] * posts, 0) + tl.load(row + s) * read
            if s < S:
                posts = tl.where(rounds[:, None] == s, v[None, :], posts)
        tl.store(y + here * n + i, v, real)
        change = _change(posts, pres, rounds, final, S, N)
        if ALPHA:
            change *= tl.load(alpha + p * n * n + at, inside, 0.0)
        w = tl.load(final) * w + change
    tl.store(last + trial * n * n + at, w, inside)


@triton.jit
def _rebuild(
    posts, pres, first, start, mask, alpha, final, weights, trial, steps, trials, batch, starts,
    RESETS: tl.constexpr, ALPHA: tl.constexpr,
    n: tl.constexpr, S: tl.constexpr, N: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    # The fast weights before every step of a segment, by accumulation.
    p = trial // batch
    i = tl.arange(0, N)
    rounds = tl.arange(0, SP)
    inside = (i < n)[:, None] & (i < n)[None, :]
    rows = rounds[:, None] * n + i[None, :]
    known = (rounds < S)[:, None] & (i < n)[None, :]
    at = i[:, None] * n + i[None, :]
    w = tl.load(first + trial * n * n + at, inside, 0.0)
    for step in range(steps):
        here = step * trials + trial
        if RESETS:
            if tl.load(mask + here) != 0:
                own = p * starts + tl.minimum(trial % batch, starts - 1)
                w = tl.load(start + own * n * n + at, inside, 0.0)
        tl.store(weights + here * n * n + at, w, inside)
        if step < steps - 1:
            V = tl.load(posts + here * S * n + rows, known, 0.0)
            U = tl.load(pres + here * S * n + rows, known, 0.0)
            change = _change(V, U, rounds, final, S, N)
            if ALPHA:
                change *= tl.load(alpha + p * n * n + at, inside, 0.0)
            w = tl.load(final) * w + change


@triton.jit
def _through_write(
    U, V, D, final, rounds,
    OWN: tl.constexpr, S: tl.constexpr, N: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    # D U_l of all rounds, and the gradients of V_l and U_l by the write.
    written = tl.zeros([SP, N], tl.float32)
    heard = tl.zeros([SP, N], tl.float32)
    for s in range(S):
        one = tl.sum(_row(U, rounds, s)[:, None] * D, 0)
        written = tl.where(rounds[:, None] == s, one[None, :], written)
        one = tl.sum(D * _row(V, rounds, s)[None, :], 1)
        heard = tl.where(rounds[:, None] == s, one[None, :], heard)
    gains = tl.load(final + 1 + rounds, rounds < S, 0.0)[:, None]
    post, pre = gains * written, gains * heard
    if not OWN:
        # In the base rule U_j is V_j: one table takes both gradients.
        post += pre
    return written, post, pre


@triton.jit
def _through_corrections(
    z, last, post, pre, V, U, rounds, row, responses, alpha, s,
    ALPHA: tl.constexpr, OWN: tl.constexpr, n: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # What the corrections of round s pass back to earlier rounds, and to the last one.
    i = tl.arange(0, N)
    real = i < n
    extra = tl.zeros([N], tl.float32)
    for j in range(s - 1):
        error = z * _row(V, rounds, j)
        if ALPHA:
            inside = real[:, None] & real[None, :]
            a = tl.load(alpha + i[:, None] * n + i[None, :], inside, 0.0)
            error = tl.sum(a * error[None, :], 1)
        else:
            error = tl.where(real, tl.sum(error, 0), 0.0)
        error *= tl.load(row + 1 + j)
        own = z * tl.load(responses + j * n + i, real, 0.0)
        other = error * last
        extra += error * _row(U, rounds, j)
        if OWN:
            pre = tl.where(rounds[:, None] == j, pre + other[None, :], pre)
        else:
            own += other
        post = tl.where(rounds[:, None] == j, post + own[None, :], post)
    return post, pre, extra


@triton.jit
def _through_rounds(
    grad_y, grad_x, G, post, pre, V, U, w, kappa, composite, alpha, write,
    slopes, responses, post_out, drive_out, pull_out, here, rounds,
    ALPHA: tl.constexpr, OWN: tl.constexpr, RULE: tl.constexpr,
    n: tl.constexpr, S: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    # From g_S to g_0 and all that is handed out on the way; G gets what the reads pass to W.
    i = tl.arange(0, N)
    real = i < n
    inside = real[:, None] & real[None, :]
    at = i[:, None] * n + i[None, :]
    g = tl.load(grad_y + here * n + i, real, 0.0)
    G *= tl.load(composite + S * (S + 1))
    for done in range(S):
        s = S - done
        z = g * tl.load(slopes + (here * S + s - 1) * n + i, real, 0.0)
        line = (here * S + s - 1) * n + i
        tl.store(post_out + line, g, real)
        tl.store(drive_out + line, z, real)
        mixed = tl.load(kappa + (s - 1) * (S + 1) + rounds, rounds < s, 0.0)
        post += mixed[:, None] * g[None, :]
        row = composite + (s - 1) * (S + 1)
        last = _row(V, rounds, s - 1)
        place = responses + (here * (S * (S - 1) // 2) + (s - 1) * (s - 2) // 2) * n
        post, pre, extra = _through_corrections(
            z, last, post, pre, V, U, rounds, row, place, alpha, s,
            ALPHA, OWN, n, N,
        )  # fmt: skip
        pull = tl.sum(w * z[None, :], 1)
        tl.store(pull_out + line, pull, real)
        b = tl.load(row)
        g = _row(post, rounds, s - 1) + extra + b * pull
        if OWN:
            g += _factor_back(_row(pre, rounds, s - 1), write, at, inside, RULE)
        G += (b * last)[:, None] * z[None, :]
    tl.store(grad_x + here * n + i, g, real)
    return G, post, pre


@triton.jit
def backward(
    posts, pres, slopes, responses, first, start, mask, alpha, kappa, composite, write, grad_y,
    weights, grad_w, grad_start, grad_alpha, grad_decay,
    post_out, drive_out, pull_out, pre_out, written_out, grad_x,
    steps, trials, batch, starts,
    RESETS: tl.constexpr, ALPHA: tl.constexpr, OWN: tl.constexpr, RULE: tl.constexpr,
    SIZE: tl.constexpr, n: tl.constexpr, S: tl.constexpr, N: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """One segment of one trial, from its last step to its first (formulas: ``_adjoint``).

    Arguments as in ``_gpu._Packed`` and ``_adjoint.Carried``. The fast weights of the segment
    are accumulated again from ``first``, into ``weights``.
    """
    trial = tl.program_id(0).to(tl.int64)
    p = trial // batch
    i = tl.arange(0, N)
    rounds = tl.arange(0, SP)
    real = i < n
    inside = real[:, None] & real[None, :]
    rows = rounds[:, None] * n + i[None, :]
    known = (rounds < S)[:, None] & real[None, :]
    at = i[:, None] * n + i[None, :]
    kappa += p * S * (S + 1)
    composite += p * (S + 1) * (S + 1)
    final = composite + S * (S + 1)
    _rebuild(
        posts, pres, first, start, mask, alpha, final, weights,
        trial, steps, trials, batch, starts, RESETS, ALPHA, n, S, N, SP,
    )  # fmt: skip
    place = trial * n * n + at
    G = tl.load(grad_w + place, inside, 0.0)
    d_alpha = tl.load(grad_alpha + place, inside, 0.0)
    d_decay = tl.load(grad_decay + trial)
    for back in range(steps):
        step = steps - 1 - back
        here = step * trials + trial
        w = tl.load(weights + here * n * n + at, inside, 0.0)
        V = tl.load(posts + here * S * n + rows, known, 0.0)
        U = tl.load(pres + here * S * n + rows, known, 0.0)
        d_alpha += G * _change(V, U, rounds, final, S, N)
        d_decay += tl.sum(G * w)
        D = G
        if ALPHA:
            D = G * tl.load(alpha + p * n * n + at, inside, 0.0)
        written, post, pre = _through_write(U, V, D, final, rounds, OWN, S, N, SP)
        tl.store(written_out + here * S * n + rows, written, known)
        G, post, pre = _through_rounds(
            grad_y, grad_x, G, post, pre, V, U, w, kappa, composite, alpha + p * n * n,
            write + p * SIZE, slopes, responses, post_out, drive_out, pull_out, here, rounds,
            ALPHA, OWN, RULE, n, S, N,
        )  # fmt: skip
        tl.store(pre_out + here * S * n + rows, pre if OWN else post, known)
        if RESETS:
            if tl.load(mask + here) != 0:
                sums = tl.load(grad_start + place, inside, 0.0) + G
                tl.store(grad_start + place, sums, inside)
                G = tl.zeros([N, N], tl.float32)
    tl.store(grad_w + place, G, inside)
    tl.store(grad_alpha + place, d_alpha, inside)
    tl.store(grad_decay + trial, d_decay)
