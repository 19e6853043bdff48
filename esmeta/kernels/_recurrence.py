"""One plastic step without intermediate matrices, in operations whose bits ignore the batch.

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
from torch.nn.functional import pad

from esmeta.kernels._shapes import Rule
from esmeta.modes import followed

# Below 16 rows, and below 400 multiplications, CPU libraries switch to other code, whose sums run
# in another order; so do the last rows in float64, if their number is not a multiple of 4. Padding
# keeps a trial's bits independent of how many trials are beside it.
_SAME_CODE_ROWS = 16
_ROW_TILE = 4
_SAME_CODE_PRODUCTS = 400


class Folded(NamedTuple):
    """Parameters in the layout of the recurrence.

    Shapes: ``kappa`` ``[P, S, S+1]``; ``composite`` ``[P, S+1, S+1]``, row s = (b_s, c_{s,0}, ..,
    c_{s,S-1}); ``alpha_t`` ``[P, n, n]`` transposed, or None; ``write`` matrices transposed
    ``[P, n, n]``, biases ``[P, 1, n]``.
    """

    kappa: Tensor
    composite: Tensor
    alpha_t: Tensor | None
    write: tuple[Tensor, ...]


class Constants(NamedTuple):
    """What does not change during a rollout, as views that broadcast without further work.

    Shapes: ``kappa[s-1][l]`` and ``decay[s]`` = b_s, s < S: ``[P, 1, 1]``; ``decay_out`` = b_S
    ``[P, 1, 1, 1]``; ``gain`` = c_S ``[P, 1, S, 1]``; ``correction[s][j]`` = c_{s,j} alpha^T
    ``[P, n, n]`` (c_{s,j} ``[P, 1, 1]`` without alpha); ``alpha_t`` ``[P, 1, n, n]`` or None;
    ``write`` as in ``Folded``.
    """

    kappa: tuple[tuple[Tensor, ...], ...]
    decay: tuple[Tensor, ...]
    decay_out: Tensor
    gain: Tensor
    correction: tuple[tuple[Tensor, ...], ...]
    alpha_t: Tensor | None
    write: tuple[Tensor, ...]


def fold(rule: Rule) -> Folded:
    """Bring checked parameters into the layout of the recurrence (differentiable)."""
    alpha_t = None if rule.alpha is None else rule.alpha.mT.contiguous()
    write = tuple(
        tensor.mT.contiguous() if tensor.dim() == 3 else tensor.unsqueeze(1)
        for tensor in rule.write
    )
    return Folded(rule.kappa, _composite(rule.beta), alpha_t, write)


def constants(folded: Folded) -> Constants:
    """Unpack folded parameters into broadcastable views."""
    depth = folded.kappa.shape[1]
    kappa_rows = folded.kappa[..., None, None].unbind(1)
    rows = [row.unbind(1) for row in folded.composite[..., None, None].unbind(1)]
    return Constants(
        kappa=tuple(row.unbind(1)[: s + 2] for s, row in enumerate(kappa_rows)),
        decay=tuple(row[0] for row in rows[:-1]),
        decay_out=rows[depth][0].unsqueeze(-1),
        gain=folded.composite[:, None, depth, 1:, None],
        correction=tuple(
            tuple(c if folded.alpha_t is None else c * folded.alpha_t for c in row[1 : s + 1])
            for s, row in enumerate(rows[:-1])
        ),
        alpha_t=None if folded.alpha_t is None else folded.alpha_t.unsqueeze(1),
        write=folded.write,
    )


def advance(k: Constants, w_t: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One step on transposed contiguous fast weights ``w_t`` ``[P, B, n, n]`` and contiguous v.

    Returns v^(S), the new ``w_t`` and the S values of tanh.
    """
    population, batch, neurons = v.shape
    depth = len(k.kappa)
    flat = w_t.view(population * batch, neurons, neurons)
    posts, pres, reads = [v], [presynaptic(k.write, v)], []
    for s in range(1, depth + 1):
        last = posts[-1]
        z = _read(flat, last)
        if s > 1:
            z = torch.addcmul(_corrections(k, posts, pres), k.decay[s - 1], z)
        reads.append(torch.tanh(z))
        posts.append(mix(k.kappa[s - 1], posts, reads[-1]))
        if s < depth:
            pres.append(presynaptic(k.write, posts[-1]))
    y = posts.pop()
    stacked = torch.stack(posts, 2)
    change = outer(torch.stack(pres, 2) if k.write else stacked, k.gain * stacked)
    if torch.is_grad_enabled() or followed():
        change = change if k.alpha_t is None else change * k.alpha_t
        return y, torch.addcmul(change, k.decay_out, w_t), reads
    if k.alpha_t is not None:
        change.mul_(k.alpha_t)
    return y, change.addcmul_(k.decay_out, w_t), reads


def mix(kappa: tuple[Tensor, ...], posts: list[Tensor], read: Tensor) -> Tensor:
    """v^(s) ``[P, R, n]`` from v^(0..s-1) and tanh, given row s of kappa."""
    total = kappa[0] * posts[0]
    for coefficient, post in zip(kappa[1:-1], posts[1:], strict=True):
        total = torch.addcmul(total, coefficient, post)
    return torch.addcmul(total, kappa[-1], read)


def presynaptic(write: tuple[Tensor, ...], v: Tensor) -> Tensor:
    """U(v) for rows v ``[P, R, n]``."""
    if not write:
        return v
    if len(write) == 1:
        return product(v, write[0])
    hidden = torch.tanh(product(v, write[0]) + write[1])
    return product(hidden, write[2]) + write[3]


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows ``[P, R, n]`` times matrices ``[P, n, n]``, each row's bits independent of the others.

    ``matrix`` must be contiguous.
    """
    count, neurons = rows.shape[1:]
    least = max(_SAME_CODE_ROWS, -(-_SAME_CODE_PRODUCTS // (neurons * neurons)), count)
    least += -least % _ROW_TILE
    if count == least:
        return torch.bmm(rows, matrix)
    return torch.bmm(pad(rows, (0, 0, 0, least - count)), matrix)[:, :count]


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Sum over S of outer products of rows ``[P, B, S, n]``, as ``[P, B, n, n]``."""
    population, batch, depth, neurons = left.shape
    shape = (population * batch, depth, neurons)
    result = torch.bmm(left.reshape(shape).mT, right.reshape(shape))
    return result.view(population, batch, neurons, neurons)


def _composite(beta: Tensor) -> Tensor:
    depth = beta.shape[1]
    unit = torch.eye(depth + 1, dtype=beta.dtype, device=beta.device)
    rows = [unit[:1].expand(beta.shape[0], -1)]
    for s in range(1, depth + 1):
        entries = beta[:, s - 1, : s + 1].split(1, dim=1)
        row = entries[s] * unit[s]
        for coefficient, previous in zip(entries[:-1], rows, strict=True):
            row = torch.addcmul(row, coefficient, previous)
        rows.append(row)
    return torch.stack(rows, 1)


def _read(flat: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(v.view(-1, 1, v.shape[-1]), flat).view(v.shape)


def _corrections(k: Constants, posts: list[Tensor], pres: list[Tensor]) -> Tensor:
    last = posts[-1]
    total = None
    for j, matrix in enumerate(k.correction[len(posts) - 1]):
        query = pres[j] * last
        if k.alpha_t is None:
            response = matrix * query.sum(-1, keepdim=True)
        else:
            response = product(query, matrix)
        total = posts[j] * response if total is None else torch.addcmul(total, posts[j], response)
    assert total is not None, f"no write before round {len(posts)}"
    return total
