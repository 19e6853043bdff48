"""Which code runs a call: the single place where a faster kernel is chosen."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from esmeta.kernels._recurrence import advance, constants, fold
from esmeta.kernels._scan import CheckpointedScan, Plan, run
from esmeta.kernels._shapes import VARIANTS, Rule, as_rule, check_state


def plastic_step(
    W: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    kappa: Tensor,
    beta: Tensor,
    *,
    write: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """One environment step of S rounds, exactly, without building intermediate matrices.

    ``W^(S) = b_S W + alpha * sum_{j<S} c_{S,j} V_j U_j^T`` with coefficients that depend on beta
    alone. Arguments and results as ``plastic_reference``; differentiable by plain automatic
    differentiation. W^(S) is a transposed view, in which the next step is fastest.

    Source: MetODS, Algorithm 1; the shortcut is an identity, not an approximation.
    """
    rule = as_rule(alpha, kappa, beta, write)
    check_state(rule, W, v)
    y, w_t, _ = advance(constants(fold(rule)), W.mT.contiguous(), v.contiguous())
    return y, w_t.mT


def plastic_scan(
    W: Tensor,
    x: Tensor,
    alpha: Tensor | None,
    kappa: Tensor,
    beta: Tensor,
    *,
    W0: Tensor | None = None,
    new_trial: Tensor | None = None,
    write: tuple[Tensor, ...] = (),
    store_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """T plastic steps in a row, bit for bit a loop of ``plastic_step``.

    ``(y_t, W_{t+1}) = plastic_step(W0 where new_trial_t else W_t, x_t)``.

    Args:
        W: fast weights before the first step ``[P, B, n, n]``.
        x: embedded inputs ``[T, P, B, n]``, T >= 1.
        alpha: as in ``plastic_reference``, like kappa, beta and write.
        kappa: ``[P, S, S+1]``.
        beta: ``[P, S, S+1]``.
        W0: fast weights at the start of a trial, ``[P, n, n]`` or ``[P, B, n, n]``.
        new_trial: bool ``[T, P, B]``; where set, W becomes W0 before that step.
        write: the pre-synaptic factor.
        store_every: steps between the matrices kept for the backward pass; ceil(sqrt(T)) if None.

    Returns:
        y ``[T, P, B, n]``, the v^(S) of each step, and W after the last step ``[P, B, n, n]``
        (a transposed view).

    Differentiable once in every float input, by a hand-written adjoint that keeps
    ``T S n + (T / store_every) n^2`` numbers per trial.

    Source: MetODS, Algorithm 1 and supplement 9.2, whose printed recursion lacks the Jacobian of
    the step; here it is complete.
    """
    rule = as_rule(alpha, kappa, beta, write)
    plan, start = _check_sequence(rule, W, x, W0, new_trial, store_every)
    floats = (W, x, start, *rule[:3], *rule.write)
    folded = fold(rule)
    w_t = W.mT.contiguous()
    start_t = None if start is None else start.mT.contiguous()
    x = x.contiguous()
    if torch.is_grad_enabled() and any(f is not None and f.requires_grad for f in floats):
        arguments = (folded.kappa, folded.composite, folded.alpha_t, *folded.write)
        y, w_t = CheckpointedScan.apply(plan, w_t, x, start_t, *arguments)
    else:
        with torch.no_grad():
            y, w_t, _, _ = run(constants(folded), plan, w_t, x, start_t)
    return y, w_t.mT


def explain(
    device: torch.device | str,
    neurons: int,
    depth: int,
    requires_grad: bool = False,
    variant: str = "base",
) -> str:
    """Say in one line which code runs steps and scans of this kind, and why."""
    known = (*VARIANTS.values(), "no-alpha")
    if variant not in known:
        raise ValueError(f"variant is {variant!r}, but it must be one of {', '.join(known)}")
    if requires_grad:
        backward = "scans go back by the hand-written checkpointed adjoint, steps by autograd"
    else:
        backward = "no gradient is asked for, so nothing is kept"
    return (
        f"torch shortcut on {torch.device(device)} (n={neurons}, S={depth}, {variant}): the only "
        f"fast implementation, on every device; {backward}"
    )


def _check_sequence(
    rule: Rule,
    W: Tensor,
    x: Tensor,
    W0: Tensor | None,
    new_trial: Tensor | None,
    store_every: int | None,
) -> tuple[Plan, Tensor | None]:
    if x.dim() != 4 or len(x) == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, but [T, P, B, n] with T >= 1 is needed; for one step "
            "pass x[None]"
        )
    check_state(rule, W, x[0], "x[t]")
    steps = x.shape[0]
    every = isqrt(steps - 1) + 1 if store_every is None else store_every
    if every < 1:
        raise ValueError(f"store_every is {every}, but it must be 1..T (or None for sqrt(T))")
    resets = [False] * steps
    if new_trial is not None:
        if new_trial.dtype != torch.bool or new_trial.shape != x.shape[:3]:
            raise ValueError(
                f"new_trial is {new_trial.dtype} {tuple(new_trial.shape)}, but bool [T, P, B] = "
                f"{tuple(x.shape[:3])} is needed"
            )
        resets = new_trial.flatten(1).any(1).tolist()
    if W0 is None and any(resets):
        raise ValueError(
            "new_trial is set somewhere but W0 is None: pass the fast weights that a trial starts "
            "from as W0, [P, n, n] or [P, B, n, n]"
        )
    if W0 is None or new_trial is None:
        return Plan(every, None, resets), None
    start = W0.unsqueeze(1) if W0.dim() == 3 else W0
    if start.shape not in (W.shape, (W.shape[0], 1, *W.shape[2:])):
        raise ValueError(
            f"W0 has shape {tuple(W0.shape)}, but [P, n, n] or [P, B, n, n] is needed to go with "
            f"W of shape {tuple(W.shape)}"
        )
    return Plan(every, new_trial[..., None, None], resets), start
