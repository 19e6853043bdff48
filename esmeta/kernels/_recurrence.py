"""Plastic steps without intermediate matrices, in operations whose bits ignore the batch.

Every W^(s) is linear in the incoming W and in the writes so far, with coefficients that depend on
beta alone (Algorithm 1 of MetODS, unrolled). With V_j = v^(j), U_j = U(v^(j)), b_0 = 1::

    b_s     = sum_{l<s} beta[s,l] b_l
    c_{s,j} = sum_{j<l<s} beta[s,l] c_{l,j} + [j = s-1] beta[s,s]
    W^(s) v = b_s W v + sum_{j<s} c_{s,j} V_j * (alpha (U_j * v))
    W^(S)   = b_S W + alpha * sum_{j<S} c_{S,j} V_j U_j^T

Matrices are held transposed (row = pre-synaptic): a row vector times a matrix in this layout is the
fastest product that CPU libraries have for a batch of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.kernels._rule import Kept, Plan, Rule
from esmeta.kernels._writes import Tensors, Write, product
from esmeta.modes import exact, followed


class Constants(NamedTuple):
    """What does not change during a rollout, as views that broadcast without further work.

    Shapes: ``kappa[s-1][l]`` and ``decay[s]`` = b_s, s < S: ``[P, 1, 1]``; ``decay_out`` = b_S
    ``[P, 1, 1, 1]``; ``gain`` = c_S ``[P, 1, S, 1]``; ``correction[s][j]`` = c_{s,j} alpha^T
    ``[P, n, n]`` (c_{s,j} ``[P, 1, 1]`` without alpha); ``alpha_t`` ``[P, 1, n, n]`` or None;
    ``spec`` and ``write`` as in ``Rule``.
    """

    spec: Write
    kappa: tuple[Tensors, ...]
    decay: Tensors
    decay_out: Tensor
    gain: Tensor
    correction: tuple[Tensors, ...]
    alpha_t: Tensor | None
    write: Tensors


def constants(rule: Rule) -> Constants:
    """Unpack a rule into broadcastable views."""
    depth, alpha_t = rule.depth, rule.alpha_t
    kappa_rows = rule.kappa[..., None, None].unbind(1)
    rows = [row.unbind(1) for row in rule.composite[..., None, None].unbind(1)]
    return Constants(
        spec=rule.spec,
        kappa=tuple(row.unbind(1)[: s + 2] for s, row in enumerate(kappa_rows)),
        decay=tuple(row[0] for row in rows[:-1]),
        decay_out=rows[depth][0].unsqueeze(-1),
        gain=rule.composite[:, None, depth, 1:, None],
        correction=tuple(
            tuple(c if alpha_t is None else c * alpha_t for c in row[1 : s + 1])
            for s, row in enumerate(rows[:-1])
        ),
        alpha_t=None if alpha_t is None else alpha_t.unsqueeze(1),
        write=rule.write,
    )


@exact
def run(
    k: Constants, plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Kept]:
    """``_rule.Forward`` in torch operations."""
    w_t = w_t.contiguous()
    start_t = None if start_t is None else start_t.contiguous()
    outputs, checkpoints, reads = [], [], []
    for t, v in enumerate(x.contiguous().unbind(0)):
        if keep and t > 0 and t % plan.every == 0:
            checkpoints.append(w_t)
        if start_t is not None and plan.mask is not None and plan.resets[t]:
            w_t = torch.where(plan.mask[t], start_t, w_t)
        y, w_t, read = advance(k, w_t, v)
        outputs.append(y)
        reads += read if keep else []
    y = torch.stack(outputs)
    if not keep:
        return y, w_t, Kept()
    # A view of nothing where there is no checkpoint.
    kept = torch.stack(checkpoints) if checkpoints else w_t.new_empty(0, *w_t.shape)
    return y, w_t, Kept(kept, torch.stack(reads).unflatten(0, (len(x), -1)))


def advance(k: Constants, w_t: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One step on transposed contiguous fast weights ``w_t`` ``[P, B, n, n]`` and contiguous v.

    Returns v^(S), the new ``w_t`` and the S values of tanh.
    """
    population, batch, neurons = v.shape
    depth, factor = len(k.kappa), k.spec.factor
    flat = w_t.view(population * batch, neurons, neurons)
    posts, pres, reads = [v], [], []
    for s in range(1, depth + 1):
        last = posts[-1]
        pres.append(last if factor is None else factor(k.write, last)[0])
        z = torch.bmm(last.view(-1, 1, neurons), flat).view(v.shape)
        if s > 1:
            z = torch.addcmul(_corrections(k, posts, pres), k.decay[s - 1], z)
        reads.append(torch.tanh(z))
        posts.append(mix(k.kappa[s - 1], posts, reads[-1]))
    y = posts.pop()
    stacked = torch.stack(posts, 2)
    change = outer(stacked if factor is None else torch.stack(pres, 2), k.gain * stacked)
    if torch.is_grad_enabled() or followed():
        change = change if k.alpha_t is None else change * k.alpha_t
        return y, torch.addcmul(change, k.decay_out, w_t), reads
    if k.alpha_t is not None:
        change.mul_(k.alpha_t)
    return y, change.addcmul_(k.decay_out, w_t), reads


def mix(kappa: Tensors, posts: list[Tensor], read: Tensor) -> Tensor:
    """v^(s) ``[P, R, n]`` from v^(0..s-1) and tanh, given row s of kappa."""
    total = kappa[0] * posts[0]
    for coefficient, post in zip(kappa[1:-1], posts[1:], strict=True):
        total = torch.addcmul(total, coefficient, post)
    return torch.addcmul(total, kappa[-1], read)


def respond(k: Constants, s: int, j: int, query: Tensor) -> Tensor:
    """c_{s,j} alpha ``query``, what the j-th write adds to a read after s writes."""
    c = k.correction[s][j]
    return c * query.sum(-1, keepdim=True) if k.alpha_t is None else product(query, c)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over S of outer products of rows ``[P, B, S, n]``, as ``[P, B, n, n]``."""
    population, batch, depth, neurons = left.shape
    shape = (population * batch, depth, neurons)
    result = torch.bmm(left.reshape(shape).mT, right.reshape(shape))
    return result.view(population, batch, neurons, neurons)


def _corrections(k: Constants, posts: list[Tensor], pres: list[Tensor]) -> Tensor:
    last, s = posts[-1], len(posts) - 1
    total = posts[0] * respond(k, s, 0, pres[0] * last)
    for j in range(1, s):
        total = torch.addcmul(total, posts[j], respond(k, s, j, pres[j] * last))
    return total
