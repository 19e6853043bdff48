"""The plastic step as Algorithm 1 of MetODS spells it: the oracle of all other implementations."""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.kernels._rule import check_state, checked, in_rows, with_names
from esmeta.kernels._writes import WRITES
from esmeta.modes import exact


@exact
def plastic_reference(
    W: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    kappa: Tensor,
    beta: Tensor,
    *,
    write: tuple[Tensor, ...] = (),
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Run S rounds of read and write, building every intermediate matrix.

    With v^(0) = v and W^(0) = W, for s = 1..S::

        v^(s) = sum_{l<s} kappa[s,l] v^(l) + kappa[s,s] tanh(W^(s-1) v^(s-1))
        W^(s) = sum_{l<s} beta[s,l] W^(l)  + beta[s,s] alpha * (v^(s-1) U(v^(s-1))^T)

    Args:
        W: fast weights ``[P, B, n, n]``, row = post-synaptic, column = pre-synaptic.
        v: embedded input ``[P, B, n]``.
        alpha: plasticity ``[P, n, n]`` (``[n, n]`` when P = 1), or None for a constant 1.
        kappa: ``[P, S, S+1]`` (``[S, S+1]`` when P = 1), entry ``[.., s-1, l]``; l > s is ignored.
        beta: as ``kappa``.
        write: tensors of the pre-synaptic factor U. ``()``: U(v) = v; ``(A,)`` with A
            ``[P, n, n]``: U(v) = A v; ``(W1, b1, W2, b2)`` with matrices ``[P, n, n]`` and biases
            ``[P, n]``: U(v) = W2 tanh(W1 v + b1) + b2.
        variant: name of the write rule (``base``, ``no-alpha``, ``linear``, ``mlp``); without it,
            the first with as many tensors as ``write`` has.

    Returns:
        ``v^(S)`` ``[P, B, n]`` and ``W^(S)`` ``[P, B, n, n]``.

    Source: MetODS, Algorithm 1. Its equation 6 lets the sum over W^(l) run to l = s, which would
    make W^(s) implicit; the algorithm stops at s-1, and so does this.
    """
    given = checked(alpha, kappa, beta, write, variant)
    check_state(given.kappa, with_names(given.alpha, given.write), W, v)
    tensors, factor = in_rows(given.write), WRITES[given.name].factor
    kappa_5d, beta_5d = given.kappa[..., None, None], given.beta[..., None, None]
    activations, weights = [v], [W]
    for s in range(1, kappa_5d.shape[1] + 1):
        post, matrix = activations[-1], weights[-1]
        read = torch.tanh(torch.einsum("pbij,pbj->pbi", matrix, post))
        pre = post if factor is None else factor(tensors, post)[0]
        hebb = torch.einsum("pbi,pbj->pbij", post, pre)
        if given.alpha is not None:
            hebb = given.alpha.unsqueeze(1) * hebb
        v_s = kappa_5d[:, s - 1, s] * read
        W_s = beta_5d[:, s - 1, s].unsqueeze(-1) * hebb
        for k in range(s):
            v_s = v_s + kappa_5d[:, s - 1, k] * activations[k]
            W_s = W_s + beta_5d[:, s - 1, k].unsqueeze(-1) * weights[k]
        activations.append(v_s)
        weights.append(W_s)
    return activations[-1], weights[-1]
