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


class _Rows(NamedTuple):
    """Activations of a segment ``[P, R, n]``, or of one step ``[P, B, n]``, by round.

    ``slopes`` K_s and ``responses[s-1][j]`` c_{s-1,j} alpha (U_j * V_{s-1}); ``gates`` (mlp) the
    derivative of its tanh; ``posts_stack`` and ``pres_stack`` ``[P, R, S, n]``, in a step flattened
    to ``[P B, S, n]``; ``decayed`` is ``posts_stack`` times b_s; ``change`` ``[P, R, n, n]`` the
    write before alpha.
    """

    posts: list[Tensor]
    pres: list[Tensor]
    gates: list[Tensor]
    slopes: list[Tensor]
    responses: list[list[Tensor]]
    posts_stack: Tensor
    pres_stack: Tensor
    decayed: Tensor
    change: Tensor


class _Adjoints(NamedTuple):
    """Gradients of one step by round, for the parameter gradients of its segment.

    ``post`` g_s, ``drive`` z_s, ``pull`` W^T z_s, ``pre`` dU_j; ``written`` D U_j ``[P, B, S, n]``.
    """

    post: list[Tensor]
    drive: list[Tensor]
    pull: list[Tensor]
    pre: list[Tensor]
    written: Tensor


class Sweep:
    """Backward sweep over segments: carries dJ/dW and sums the gradients of the parameters."""

    def __init__(self, folded: Folded, start_t: Tensor | None, grad_w: Tensor) -> None:
        """Begin behind the last step with ``grad_w`` ``[P, B, n, n]`` transposed."""
        self.k = constants(folded)
        self.folded = folded
        self.start_t = start_t
        self.grad_w = grad_w
        self.start = torch.zeros_like(grad_w)
        self._alpha_rows = torch.zeros_like(grad_w)
        self._decay_rows = torch.zeros_like(grad_w)
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
    ) -> list[Tensor]:
        """Go back through one segment; return dJ/dx of its steps, last step first.

        Shapes: x and ``grad_y`` ``[k, P, B, n]``, ``reads[s-1]`` ``[P, k B, n]``, ``w_t``
        ``[P, B, n, n]`` before the first reset, ``masks[i]`` ``[P, B, 1, 1]``.
        """
        rows, hidden, queries = _rebuild(self.k, x, reads)
        steps = _split(rows, x.shape[2])
        weights = self._weights(steps, w_t, masks)
        trace: list[_Adjoints] = []
        grad_x: list[Tensor] = []
        for i in reversed(range(len(steps))):
            self._alpha_rows.addcmul_(self.grad_w, steps[i].change)
            self._decay_rows.addcmul_(self.grad_w, weights[i])
            adjoints, v_grad, self.grad_w = _step_back(
                self.k, steps[i], weights[i], self.grad_w, grad_y[i]
            )
            trace.append(adjoints)
            grad_x.append(v_grad)
            mask = masks[i]
            if mask is not None:
                self.start.add_(self.grad_w.masked_fill(~mask, 0))
                self.grad_w = self.grad_w.masked_fill(mask, 0)
        self._reduce(rows, reads, trace[::-1], queries)
        if self._write:
            self._reduce_write(rows, hidden, trace[::-1])
        return grad_x

    def parameter_gradients(self) -> tuple[Tensor | None, ...]:
        """Gradients of kappa, composite, alpha_t and the write tensors."""
        self._composite[:, -1, 0] += self._decay_rows.sum((1, 2, 3))
        alpha = None if self._alpha is None else self._alpha + self._alpha_rows.sum(1)
        return self._kappa, self._composite, alpha, *self._write

    def _weights(self, steps: list[_Rows], w_t: Tensor, masks: list[Tensor | None]) -> list[Tensor]:
        weights = []
        for step, mask in zip(steps, masks, strict=True):
            if mask is not None and self.start_t is not None:
                w_t = torch.where(mask, self.start_t, w_t)
            weights.append(w_t)
            if len(weights) < len(steps):
                alpha_t = self.k.alpha_t
                change = step.change.clone() if alpha_t is None else step.change * alpha_t
                w_t = change.addcmul_(self.k.decay_out, w_t)
        return weights

    def _reduce(
        self, rows: _Rows, reads: list[Tensor], trace: list[_Adjoints], queries: list[list[Tensor]]
    ) -> None:
        depth = len(reads)
        post = _gather([a.post for a in trace])
        drive = _gather([a.drive for a in trace])
        pull = _gather([a.pull for a in trace])
        posts = torch.stack(rows.posts, 1).flatten(2)
        self._kappa[:, :, :depth] += torch.bmm(post.flatten(2), posts.mT).tril()
        own = (post * torch.stack(reads, 1)).sum((2, 3))
        self._kappa.diagonal(1, 1, 2).add_(own)
        self._composite[:, :depth, 0] += (pull.flatten(2) * posts).sum(2)
        written = torch.cat([a.written for a in trace], 1)
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

    def _reduce_write(self, rows: _Rows, hidden: list[Tensor], trace: list[_Adjoints]) -> None:
        pre = _gather([a.pre for a in trace]).flatten(1, 2)
        posts = torch.cat(rows.posts, 1)
        if not hidden:
            self._write[0] += torch.bmm(posts.mT, pre)
            return
        self._write[2] += torch.bmm(torch.cat(hidden, 1).mT, pre)
        self._write[3] += pre.sum(1, keepdim=True)
        inner = torch.bmm(pre, self.folded.write[2].mT) * torch.cat(rows.gates, 1)
        self._write[0] += torch.bmm(posts.mT, inner)
        self._write[1] += inner.sum(1, keepdim=True)


def _rebuild(
    k: Constants, x: Tensor, reads: list[Tensor]
) -> tuple[_Rows, list[Tensor], list[list[Tensor]]]:
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
    rows = _Rows(
        posts,
        pres,
        [1 - h * h for h in hidden],
        [row[-1] * (1 - h * h) for row, h in zip(k.kappa, reads, strict=True)],
        responses,
        posts_stack,
        pres_stack,
        posts_stack * torch.stack(k.decay, 2),
        outer(pres_stack, k.gain * posts_stack),
    )
    return rows, hidden, queries


def _split(rows: _Rows, batch: int) -> list[_Rows]:
    def by_step(tensors: list[Tensor]) -> list[list[Tensor]]:
        if not tensors:
            return [[] for _ in range(count)]
        pieces = [tensor.split(batch, 1) for tensor in tensors]
        return [list(step) for step in zip(*pieces, strict=True)]

    count = rows.change.shape[1] // batch
    posts, pres, gates, slopes = (by_step(tensors) for tensors in rows[:4])
    responses = [by_step(row) for row in rows.responses]
    posts_stack, pres_stack, decayed = (
        stack.unflatten(1, (count, batch)).transpose(0, 1).flatten(1, 2).unbind(0)
        for stack in (rows.posts_stack, rows.pres_stack, rows.decayed)
    )
    change = rows.change.split(batch, 1)
    return [
        _Rows(
            posts[i],
            pres[i],
            gates[i],
            slopes[i],
            [row[i] for row in responses],
            posts_stack[i],
            pres_stack[i],
            decayed[i],
            change[i],
        )
        for i in range(count)
    ]


def _step_back(
    k: Constants, rows: _Rows, w_t: Tensor, grad_w: Tensor, grad_y: Tensor
) -> tuple[_Adjoints, Tensor, Tensor]:
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
    return _Adjoints(post[1:], drive, pull, pre[:depth], written), post[0], before


def _spread_back(k: Constants, correction: Tensor, error: Tensor) -> Tensor:
    if k.alpha_t is None:
        return correction * error.sum(-1, keepdim=True)
    return torch.bmm(error, correction.mT)


def _write_back(k: Constants, rows: _Rows, pre: Tensor, j: int) -> Tensor:
    if len(k.write) == 1:
        return torch.bmm(pre, k.write[0].mT)
    return torch.bmm(torch.bmm(pre, k.write[2].mT) * rows.gates[j], k.write[0].mT)


def _gather(by_step: list[list[Tensor]]) -> Tensor:
    # [P, S, R, n] from lists by step and round.
    return torch.stack([torch.cat(rounds, 1) for rounds in zip(*by_step, strict=True)], 1)
