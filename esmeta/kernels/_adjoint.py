"""The adjoint of the plastic recurrence, by explicit formulas (MetODS supplement 9.2, corrected).

With G = dJ/dW' behind a step, D = alpha * G, g_s = dJ/dv^(s), K_s = kappa[s,s] (1 - tanh^2) and
<- for "add to", first for the write, then for the rounds s = S..1, with f = c_{s-1,j} alpha^T
(z_s * V_j)::

    g_j     <- c_{S,j} D U_j                              all j < S
    dU_j    <- c_{S,j} D^T V_j                            all j < S
    z_s      = K_s * g_s
    g_l     <- kappa[s,l] g_s                             all l < s
    g_j     <- c_{s-1,j} z_s * alpha (U_j * V_{s-1})      all j < s-1
    dU_j    <- f * V_{s-1}                                all j < s-1
    g_{s-1} <- f * U_j                                    all j < s-1
    g_{s-1} <- b_{s-1} W^T z_s
    dJ/dW    = b_S G + sum_s b_{s-1} z_s V_{s-1}^T

The printed recursion of the supplement drops the Jacobian of the step; this one has it. Matrices
are transposed as in ``_recurrence``. A segment's tensors have rows R = steps times B, time
outermost, so that sums over time of small products are taken for a segment at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.kernels._recurrence import Constants, constants, mix, outer, respond
from esmeta.kernels._rule import Plan, Rule, Saved
from esmeta.tree import leaves_of, with_leaves


class Rows(NamedTuple):
    """Activations of a segment ``[P, R, n]``, or of one step ``[P, B, n]``, by round.

    ``kept`` by U for its adjoint; ``slopes`` K_s and ``responses[s-1][j]`` c_{s-1,j} alpha
    (U_j * V_{s-1}); ``posts_stack`` and ``pres_stack`` ``[P, R, S, n]``; ``decayed`` is
    ``posts_stack`` times b_s.
    """

    posts: list[Tensor]
    pres: list[Tensor]
    kept: list[Tensor | None]
    slopes: list[Tensor]
    responses: list[list[Tensor]]
    posts_stack: Tensor
    pres_stack: Tensor
    decayed: Tensor


class Segment(NamedTuple):
    """k steps to go back through.

    ``w_t`` ``[P, B, n, n]`` are the fast weights before the first reset, ``masks[i]``
    ``[P, B, 1, 1]``, ``grad_y`` ``[k, P, B, n]``.
    """

    rule: Rule
    k: Constants
    rows: Rows
    w_t: Tensor
    start_t: Tensor | None
    masks: list[Tensor | None]
    grad_y: Tensor


class Adjoints(NamedTuple):
    """Gradients of a segment, for the parameter gradients: ``[k, P B, S, n]``, but ``x``.

    ``post`` g_s, ``drive`` z_s, ``pull`` W^T z_s, s = 1..S, ``pre`` dU_j, ``written`` D U_j;
    ``x`` is dJ/dx ``[k, P, B, n]``.
    """

    post: Tensor
    drive: Tensor
    pull: Tensor
    pre: Tensor
    written: Tensor
    x: Tensor


class Carried(NamedTuple):
    """What goes from a segment to the one before it, which may overwrite it.

    Transposed and contiguous ``[P, B, n, n]``: ``w`` dJ/dW, and sums over the steps behind:
    ``start`` dJ/dW0 and ``alpha``, G times the write before alpha. ``decay`` ``[P, B]`` is the sum
    of G * W.
    """

    w: Tensor
    start: Tensor
    alpha: Tensor
    decay: Tensor


Back = Callable[[Segment, Carried], tuple[Adjoints, Carried]]
"""Goes back through a segment: :func:`back`, or a fused kernel."""


def sweep(
    back: Back, rule: Rule, plan: Plan, saved: Saved, grad_y: Tensor, grad_w: Tensor
) -> Sequence[Tensor | None]:
    """``Code.backward`` by segments, from the last to the first."""
    w_t, x, start_t, (checkpoints, kept) = saved
    assert checkpoints is not None and kept is not None, "a forward pass that keeps gives both"
    every, depth, k = plan.every, rule.depth, constants(rule)
    grad_w = grad_w.clone(memory_format=torch.contiguous_format)  # ``back`` may overwrite it
    zeros = torch.zeros_like(grad_w)
    carried = Carried(grad_w, zeros, zeros.clone(), grad_w.new_zeros(grad_w.shape[:2]))
    totals = [None if tensor is None else torch.zeros_like(tensor) for tensor in rule.tensors]
    grad_x: list[Tensor] = []
    for number, first in reversed(list(enumerate((w_t, *checkpoints)))):
        low, high = number * every, min((number + 1) * every, len(x))
        steps = range(low, high)
        masks = [plan.mask[t] if plan.mask is not None and plan.resets[t] else None for t in steps]
        reads = [kept[low:high, s].transpose(0, 1).flatten(1, 2) for s in range(depth)]
        rows, queries = _rebuild(k, x[low:high], reads)
        segment = Segment(rule, k, rows, first, start_t, masks, grad_y[low:high])
        adjoints, carried = back(segment, carried)
        _reduce(rule, Rule.of(rule.name, totals, rule.code), rows, reads, queries, adjoints)
        grad_x.append(adjoints.x)
    _, composite, alpha, *_ = totals
    assert composite is not None
    composite[:, -1, 0] += carried.decay.sum(1)
    if alpha is not None:
        alpha += carried.alpha.sum(1)
    start = None if start_t is None else carried.start.sum_to_size(start_t.shape)
    return carried.w, torch.cat(grad_x[::-1]), start, *totals


def _rebuild(k: Constants, x: Tensor, reads: list[Tensor]) -> tuple[Rows, list[list[Tensor]]]:
    """What a segment computed, from x ``[k, P, B, n]`` and tanh by round ``[P, R, n]``."""
    posts = [x.transpose(0, 1).flatten(1, 2)]
    for coefficients, read in zip(k.kappa[:-1], reads[:-1], strict=True):
        posts.append(mix(coefficients, posts, read))
    factor = k.spec.factor
    pairs = [(v, None) if factor is None else factor(k.write, v) for v in posts]
    pres = [pre for pre, _ in pairs]
    queries = [[pre * post for pre in pres[:s]] for s, post in enumerate(posts)]
    posts_stack = torch.stack(posts, 2)
    return Rows(
        posts,
        pres,
        [kept for _, kept in pairs],
        [row[-1] * (1 - h * h) for row, h in zip(k.kappa, reads, strict=True)],
        [[respond(k, s, j, q) for j, q in enumerate(row)] for s, row in enumerate(queries)],
        posts_stack,
        posts_stack if factor is None else torch.stack(pres, 2),
        posts_stack * torch.stack(k.decay, 2),
    ), queries


def _reduce(
    rule: Rule, totals: Rule, rows: Rows, reads: list[Tensor], queries: list[list[Tensor]],
    adjoints: Adjoints,
) -> None:  # fmt: skip
    """Add a segment's share to the gradients of the rule's tensors, ``totals``."""
    depth, batch = len(reads), adjoints.x.shape[2]
    post, drive, pull, pre, written = (
        # [P, S, R, n]
        t.unflatten(1, (-1, batch)).permute(1, 3, 0, 2, 4).flatten(2, 3)
        for t in adjoints[:-1]
    )
    posts = torch.stack(rows.posts, 1).flatten(2)
    totals.kappa[:, :, :depth] += torch.bmm(post.flatten(2), posts.mT).tril()
    own = (post * torch.stack(reads, 1)).sum((2, 3))
    totals.kappa.diagonal(1, 1, 2).add_(own)
    totals.composite[:, :depth, 0] += (pull.flatten(2) * posts).sum(2)
    written = written.transpose(1, 2)
    totals.composite[:, depth, 1:] += (written * rows.posts_stack).sum((1, 3))
    for s in range(2, depth + 1):
        for j, query in enumerate(queries[s - 1]):
            error = drive[:, s - 1] * rows.posts[j]
            coefficient = rule.composite[:, s - 1, 1 + j]
            if rule.alpha_t is None or totals.alpha_t is None:
                response = query.sum(-1, keepdim=True)
            else:
                response = torch.bmm(query, rule.alpha_t)
                totals.alpha_t.add_(coefficient[:, None, None] * torch.bmm(query.mT, error))
            totals.composite[:, s - 1, 1 + j] += (error * response).sum((1, 2))
    if rule.spec.gradients is not None:
        kept = [h for h in rows.kept if h is not None]
        together = torch.cat(kept, 1) if kept else None
        grads = rule.spec.gradients(
            rule.write, torch.cat(rows.posts, 1), together, pre.flatten(1, 2)
        )
        for total, grad in zip(totals.write, grads, strict=True):
            total += grad


def back(segment: Segment, carried: Carried) -> tuple[Adjoints, Carried]:
    """Go back through a segment in torch operations."""
    k, rows, batch = segment.k, segment.rows, segment.grad_y.shape[2]
    parts = zip(*(leaf.split(batch, 1) for leaf in leaves_of(rows)), strict=True)
    steps = [with_leaves(rows, part) for part in parts]
    change = outer(rows.pres_stack, k.gain * rows.posts_stack).split(batch, 1)
    weights = _weights(segment, change)
    grad_w, start, alpha, decay = carried
    trace: list[_Step] = []
    for i in reversed(range(len(steps))):
        alpha = torch.addcmul(alpha, grad_w, change[i])
        decay = decay + (grad_w * weights[i]).sum((2, 3))
        step, grad_w = _step_back(k, steps[i], weights[i], grad_w, segment.grad_y[i])
        trace.append(step)
        mask = segment.masks[i]
        if mask is not None:
            start = start + grad_w.masked_fill(~mask, 0)
            grad_w = grad_w.masked_fill(mask, 0)
    *rounds, x = zip(*reversed(trace), strict=True)
    adjoints = Adjoints._make((*map(_by_step, rounds), torch.stack(x)))
    return adjoints, Carried(grad_w, start, alpha, decay)


class _Step(NamedTuple):
    """:class:`Adjoints` of one step, by round ``[P, B, n]``; ``written`` is ``[P, B, S, n]``."""

    post: list[Tensor]
    drive: list[Tensor]
    pull: list[Tensor]
    pre: list[Tensor]
    written: list[Tensor]
    x: Tensor


def _by_step(steps: Sequence[list[Tensor]]) -> Tensor:
    # [k, P B, S, n]
    stacked = torch.stack([table for step in steps for table in step])
    if stacked.dim() == 4:
        stacked = stacked.unflatten(0, (len(steps), -1)).permute(0, 2, 3, 1, 4)
    return stacked.flatten(1, 2)


backward = functools.partial(sweep, back)
"""``Code.backward`` in torch operations."""


def _weights(segment: Segment, changes: Sequence[Tensor]) -> list[Tensor]:
    """The fast weights before every step, behind its reset."""
    k, w_t = segment.k, segment.w_t
    weights = []
    for change, mask in zip(changes, segment.masks, strict=True):
        if mask is not None and segment.start_t is not None:
            w_t = torch.where(mask, segment.start_t, w_t)
        weights.append(w_t)
        if len(weights) < len(changes):
            written = change.clone() if k.alpha_t is None else change * k.alpha_t
            w_t = written.addcmul_(k.decay_out, w_t)
    return weights


def _step_back(
    k: Constants, rows: Rows, w_t: Tensor, grad_w: Tensor, grad_y: Tensor
) -> tuple[_Step, Tensor]:
    """Through one step: what it hands out, and dJ/dW."""
    shape = rows.posts_stack.shape
    depth, neurons = shape[2:]
    stacks = (rows.pres_stack, rows.posts_stack, rows.decayed)
    pres, posts, decayed = (stack.reshape(-1, depth, neurons) for stack in stacks)
    flat = w_t.view(-1, neurons, neurons).mT
    change = (grad_w if k.alpha_t is None else grad_w * k.alpha_t).view(flat.shape)
    written = torch.bmm(pres, change).view(shape)
    heard = torch.bmm(posts, change.mT).view(shape)
    if k.spec.factor is None:
        # U_j is V_j: one list takes both gradients.
        post = pre = list((k.gain * (written + heard)).unbind(2))
    else:
        post, pre = (list((k.gain * part).unbind(2)) for part in (written, heard))
    post.append(grad_y)
    drive, pull = [], []
    for s in range(depth, 0, -1):
        z = post[s] * rows.slopes[s - 1]
        for j, coefficient in enumerate(k.kappa[s - 1][:-1]):
            post[j] = torch.addcmul(post[j], coefficient, post[s])
        for j, response in enumerate(rows.responses[s - 1]):
            error = _spread_back(k, k.correction[s - 1][j], z * rows.posts[j])
            post[j] = torch.addcmul(post[j], z, response)
            pre[j] = torch.addcmul(pre[j], error, rows.posts[s - 1])
            post[s - 1] = torch.addcmul(post[s - 1], error, rows.pres[j])
        pulled = torch.bmm(z.view(-1, 1, neurons), flat).view(z.shape)
        post[s - 1] = torch.addcmul(post[s - 1], k.decay[s - 1], pulled)
        if k.spec.back is not None:
            post[s - 1] = post[s - 1] + k.spec.back(k.write, rows.kept[s - 1], pre[s - 1])
        drive.append(z)
        pull.append(pulled)
    drive.reverse()
    driven = torch.stack(drive, 2).view(posts.shape)
    before = torch.bmm(decayed.mT, driven).view(grad_w.shape).addcmul_(k.decay_out, grad_w)
    return _Step(post[1:], drive, pull[::-1], pre[:depth], [written], post[0]), before


def _spread_back(k: Constants, correction: Tensor, error: Tensor) -> Tensor:
    if k.alpha_t is None:
        return correction * error.sum(-1, keepdim=True)
    return torch.bmm(error, correction.mT)
