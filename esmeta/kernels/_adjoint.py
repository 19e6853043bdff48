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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.kernels._recurrence import (
    Constants,
    Folded,
    constants,
    mix,
    outer,
    presynaptic,
    product,
)


class Rows(NamedTuple):
    """Activations of a segment ``[P, R, n]``, or of one step ``[P, B, n]``, by round.

    ``slopes`` K_s and ``responses[s-1][j]`` c_{s-1,j} alpha (U_j * V_{s-1}); ``gates`` (mlp) the
    derivative of its tanh; ``posts_stack`` and ``pres_stack`` ``[P, R, S, n]``, in a step flattened
    to ``[P B, S, n]``; ``decayed`` is ``posts_stack`` times b_s.
    """

    posts: list[Tensor]
    pres: list[Tensor]
    gates: list[Tensor]
    slopes: list[Tensor]
    responses: list[list[Tensor]]
    posts_stack: Tensor
    pres_stack: Tensor
    decayed: Tensor


class Adjoints(NamedTuple):
    """Gradients of a segment by round ``[P, S, R, n]``, for the parameter gradients.

    ``post`` g_s, ``drive`` z_s, ``pull`` W^T z_s, s = 1..S, ``pre`` dU_j; ``written`` D U_j
    ``[P, R, S, n]``; ``x`` dJ/dx ``[k, P, B, n]`` of its k steps.
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


class Segment(NamedTuple):
    """What it takes to go back through k steps: see :meth:`Sweep.segment`."""

    folded: Folded
    k: Constants
    rows: Rows
    w_t: Tensor
    start_t: Tensor | None
    masks: list[Tensor | None]
    grad_y: Tensor


Back = Callable[[Segment, Carried], tuple[Adjoints, Carried]]
"""Goes back through a segment: :func:`back`, or a fused kernel."""


class Sweep:
    """Backward sweep over segments: carries dJ/dW and sums the gradients of the parameters."""

    def __init__(self, folded: Folded, start_t: Tensor | None, grad_w: Tensor, back: Back) -> None:
        """Begin behind the last step with ``grad_w`` ``[P, B, n, n]`` transposed."""
        self.back = back
        self.k = constants(folded)
        self.folded = folded
        self.start_t = start_t
        zeros = torch.zeros_like(grad_w)
        self.carried = Carried(grad_w, zeros, zeros.clone(), grad_w.new_zeros(grad_w.shape[:2]))
        self._kappa = torch.zeros_like(folded.kappa)
        self._composite = torch.zeros_like(folded.composite)
        self._alpha = None if folded.alpha_t is None else torch.zeros_like(folded.alpha_t)
        self._write = [torch.zeros_like(tensor) for tensor in folded.write]

    def segment(
        self,
        x: Tensor,
        reads: list[Tensor],
        w_t: Tensor,
        masks: list[Tensor | None],
        grad_y: Tensor,
    ) -> Tensor:
        """Go back through one segment; return dJ/dx of its steps.

        Shapes: x and ``grad_y`` ``[k, P, B, n]``, ``reads[s-1]`` ``[P, k B, n]``, ``w_t``
        ``[P, B, n, n]`` before the first reset, ``masks[i]`` ``[P, B, 1, 1]``.
        """
        rows, hidden, queries = _rebuild(self.k, x, reads)
        segment = Segment(self.folded, self.k, rows, w_t, self.start_t, masks, grad_y)
        adjoints, self.carried = self.back(segment, self.carried)
        self._reduce(rows, reads, adjoints, queries)
        if self._write:
            self._reduce_write(rows, hidden, adjoints)
        return adjoints.x

    def parameter_gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of kappa, composite, alpha_t and the write tensors."""
        self._composite[:, -1, 0] += self.carried.decay.sum(1)
        alpha = None if self._alpha is None else self._alpha + self.carried.alpha.sum(1)
        return self._kappa, self._composite, alpha, *self._write

    def _reduce(
        self, rows: Rows, reads: list[Tensor], adjoints: Adjoints, queries: list[list[Tensor]]
    ) -> None:
        depth = len(reads)
        post, drive, pull, written = adjoints.post, adjoints.drive, adjoints.pull, adjoints.written
        posts = torch.stack(rows.posts, 1).flatten(2)
        self._kappa[:, :, :depth] += torch.bmm(post.flatten(2), posts.mT).tril()
        own = (post * torch.stack(reads, 1)).sum((2, 3))
        self._kappa.diagonal(1, 1, 2).add_(own)
        self._composite[:, :depth, 0] += (pull.flatten(2) * posts).sum(2)
        self._composite[:, depth, 1:] += (written * rows.posts_stack).sum((1, 3))
        for s in range(2, depth + 1):
            for j, query in enumerate(queries[s - 1]):
                error = drive[:, s - 1] * rows.posts[j]
                coefficient = self.folded.composite[:, s - 1, 1 + j]
                if self.folded.alpha_t is None or self._alpha is None:
                    response = query.sum(-1, keepdim=True)
                else:
                    response = torch.bmm(query, self.folded.alpha_t)
                    self._alpha += coefficient[:, None, None] * torch.bmm(query.mT, error)
                self._composite[:, s - 1, 1 + j] += (error * response).sum((1, 2))

    def _reduce_write(self, rows: Rows, hidden: list[Tensor], adjoints: Adjoints) -> None:
        pre = adjoints.pre.flatten(1, 2)
        posts = torch.cat(rows.posts, 1)
        if not hidden:
            self._write[0] += torch.bmm(posts.mT, pre)
            return
        self._write[2] += torch.bmm(torch.cat(hidden, 1).mT, pre)
        self._write[3] += pre.sum(1, keepdim=True)
        inner = torch.bmm(pre, self.folded.write[2].mT) * torch.cat(rows.gates, 1)
        self._write[0] += torch.bmm(posts.mT, inner)
        self._write[1] += inner.sum(1, keepdim=True)


def back(segment: Segment, carried: Carried) -> tuple[Adjoints, Carried]:
    """Go back through a segment in torch operations."""
    _, k, rows, _, _, masks, grad_y = segment
    steps = _split(rows, grad_y.shape[2])
    change = outer(rows.pres_stack, k.gain * rows.posts_stack).split(grad_y.shape[2], 1)
    weights = _weights(segment, change)
    grad_w, start, alpha, decay = carried
    trace: list[_Step] = []
    for i in reversed(range(len(steps))):
        alpha = torch.addcmul(alpha, grad_w, change[i])
        decay = decay + (grad_w * weights[i]).sum((2, 3))
        step, grad_w = _step_back(k, steps[i], weights[i], grad_w, grad_y[i])
        trace.append(step)
        mask = masks[i]
        if mask is not None:
            start = start + grad_w.masked_fill(~mask, 0)
            grad_w = grad_w.masked_fill(mask, 0)
    trace.reverse()
    post, drive = _by_round([s.post for s in trace]), _by_round([s.drive for s in trace])
    pull, pre = _by_round([s.pull for s in trace]), _by_round([s.pre for s in trace])
    written = torch.cat([step.written for step in trace], 1)
    adjoints = Adjoints(post, drive, pull, pre, written, torch.stack([step.x for step in trace]))
    return adjoints, Carried(grad_w, start, alpha, decay)


def _weights(segment: Segment, changes: tuple[Tensor, ...]) -> list[Tensor]:
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


class _Step(NamedTuple):
    """As :class:`Adjoints`, of one step: lists by round ``[P, B, n]``."""

    post: list[Tensor]
    drive: list[Tensor]
    pull: list[Tensor]
    pre: list[Tensor]
    written: Tensor
    x: Tensor


def _rebuild(
    k: Constants, x: Tensor, reads: list[Tensor]
) -> tuple[Rows, list[Tensor], list[list[Tensor]]]:
    posts = [x.transpose(0, 1).flatten(1, 2)]
    for coefficients, read in zip(k.kappa[:-1], reads[:-1], strict=True):
        posts.append(mix(coefficients, posts, read))
    hidden: list[Tensor] = []
    if len(k.write) == 4:
        hidden = [torch.tanh(product(v, k.write[0]) + k.write[1]) for v in posts]
        pres = [product(h, k.write[2]) + k.write[3] for h in hidden]
    else:
        pres = [presynaptic(k.write, v) for v in posts]
    queries = [[pre * post for pre in pres[:s]] for s, post in enumerate(posts)]
    responses = [
        [
            c * q.sum(-1, keepdim=True) if k.alpha_t is None else product(q, c)
            for c, q in zip(k.correction[s], row, strict=True)
        ]
        for s, row in enumerate(queries)
    ]
    posts_stack = torch.stack(posts, 2)
    pres_stack = torch.stack(pres, 2) if k.write else posts_stack
    rows = Rows(
        posts,
        pres,
        [1 - h * h for h in hidden],
        [row[-1] * (1 - h * h) for row, h in zip(k.kappa, reads, strict=True)],
        responses,
        posts_stack,
        pres_stack,
        posts_stack * torch.stack(k.decay, 2),
    )
    return rows, hidden, queries


def _split(rows: Rows, batch: int) -> list[Rows]:
    def by_step(tensors: list[Tensor]) -> list[list[Tensor]]:
        if not tensors:
            return [[] for _ in range(count)]
        pieces = [tensor.split(batch, 1) for tensor in tensors]
        return [list(step) for step in zip(*pieces, strict=True)]

    count = rows.posts_stack.shape[1] // batch
    posts, pres, gates, slopes = (by_step(tensors) for tensors in rows[:4])
    responses = [by_step(row) for row in rows.responses]
    posts_stack, pres_stack, decayed = (
        stack.unflatten(1, (count, batch)).transpose(0, 1).flatten(1, 2).unbind(0)
        for stack in (rows.posts_stack, rows.pres_stack, rows.decayed)
    )
    return [
        Rows(
            posts[i],
            pres[i],
            gates[i],
            slopes[i],
            [row[i] for row in responses],
            posts_stack[i],
            pres_stack[i],
            decayed[i],
        )
        for i in range(count)
    ]


def _step_back(
    k: Constants, rows: Rows, w_t: Tensor, grad_w: Tensor, grad_y: Tensor
) -> tuple[_Step, Tensor]:
    rows_total, depth, neurons = rows.posts_stack.shape
    shape = (*grad_y.shape[:2], depth, neurons)
    flat = w_t.view(rows_total, neurons, neurons).mT
    change = (grad_w if k.alpha_t is None else grad_w * k.alpha_t).view(flat.shape)
    written = torch.bmm(rows.pres_stack, change).view(shape)
    heard = torch.bmm(rows.posts_stack, change.mT).view(shape)
    if k.write:
        post = list((k.gain * written).unbind(2))
        pre = list((k.gain * heard).unbind(2))
    else:
        # In the base rule U_j is V_j: one list takes both gradients.
        post = pre = list((k.gain * (written + heard)).unbind(2))
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
        if k.write:
            post[s - 1] = post[s - 1] + _write_back(k, rows, pre[s - 1], s - 1)
        drive.append(z)
        pull.append(pulled)
    drive.reverse()
    pull.reverse()
    driven = torch.stack(drive, 2).view(rows.posts_stack.shape)
    before = torch.bmm(rows.decayed.mT, driven).view(grad_w.shape).addcmul_(k.decay_out, grad_w)
    return _Step(post[1:], drive, pull, pre[:depth], written, post[0]), before


def _spread_back(k: Constants, correction: Tensor, error: Tensor) -> Tensor:
    if k.alpha_t is None:
        return correction * error.sum(-1, keepdim=True)
    return torch.bmm(error, correction.mT)


def _write_back(k: Constants, rows: Rows, pre: Tensor, j: int) -> Tensor:
    if len(k.write) == 1:
        return torch.bmm(pre, k.write[0].mT)
    return torch.bmm(torch.bmm(pre, k.write[2].mT) * rows.gates[j], k.write[0].mT)


def _by_round(by_step: list[list[Tensor]]) -> Tensor:
    # [P, S, R, n] from lists by step and round.
    return torch.stack([torch.cat(rounds, 1) for rounds in zip(*by_step, strict=True)], 1)
