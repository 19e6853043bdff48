"""The recurrence as users call it, and the single place that chooses which code runs."""

from __future__ import annotations

import copyreg
import functools
import importlib.util
from math import isqrt
from typing import cast

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.kernels import _adjoint
from esmeta.kernels._recurrence import constants, run
from esmeta.kernels._rule import (
    Code,
    Plan,
    Rule,
    check_kinds,
    check_name,
    check_state,
    checked,
    folded,
    with_names,
)
from esmeta.kernels._scan import steps
from esmeta.kernels._writes import WRITES
from esmeta.modes import followed

_MOST_ON_GPU = 256
LOOKS = ("cpu",)
"""Devices where it is cheap to see which steps begin a trial; elsewhere every step may."""
_STEP = Plan(1, None, [False])
_STEP_IN_PLACE = _STEP._replace(in_place=True)


def prepare(
    alpha: Tensor | None,
    kappa: Tensor,
    beta: Tensor,
    write: tuple[Tensor, ...] = (),
    *,
    variant: str | None = None,
) -> Rule:
    """Compute, once per rollout, everything in the plastic step that time does not change.

    Arguments as in ``plastic_reference``. Differentiable in every tensor, unless called inside
    ``torch.no_grad``. The result is stale as soon as a parameter changes.
    """
    given = checked(alpha, kappa, beta, write, variant)
    return _ready(given.name, *folded(given))


def _ready(name: str, *tensors: Tensor | None) -> Rule:
    constant = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    code = _code(Rule.of(name, constant, cast(Code, None)))
    # Without a graph, some would bring their history, and some not: half a gradient.
    return Rule.of(name, tensors if torch.is_grad_enabled() else constant, code)


# Code holds addresses, which are not copied.
copyreg.pickle(Rule, lambda rule: (_ready, (rule.name, *rule.tensors)))


def step_prepared(
    rule: Rule, W: Tensor, v: Tensor, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """One plastic step, ``plastic_step`` with the result of ``prepare``.

    Args:
        rule: result of ``prepare``.
        W: fast weights ``[P, B, n, n]``.
        v: embedded input ``[P, B, n]``.
        in_place: whether W may be overwritten, for who needs it no more; the same bits with half
            the memory. Where a gradient is asked for, W is kept all the same.

    Returns:
        v^(S) ``[P, B, n]`` and W^(S) ``[P, B, n, n]``. W^(S) is a transposed view: the next step
        is fastest when it gets it as it is; call ``contiguous`` where a row-major matrix is needed.
    """
    kappa = rule.kappa
    fits = W.shape == (*v.shape, v.shape[-1]) and len(v) == len(kappa)
    fits = fits and rule.neurons in (0, v.shape[-1])
    kind = W.dtype == v.dtype == kappa.dtype and W.device == v.device == kappa.device
    if not (fits and kind):  # asked at every step, so quickly
        check_state(kappa, with_names(rule.alpha_t, rule.write), W, v)
    y, w_t = steps(rule, _STEP_IN_PLACE if in_place else _STEP, W.mT, v.unsqueeze(0))
    return y[0], w_t.mT


def scan_prepared(
    rule: Rule,
    W: Tensor,
    x: Tensor,
    *,
    W0: Tensor | None = None,
    new_trial: Tensor | None = None,
    store_every: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A sequence of steps, ``plastic_scan`` with the result of ``prepare``."""
    plan, start = _check_sequence(rule, W, x, W0, new_trial, store_every)
    y, w_t = steps(rule, plan, W.mT, x, None if start is None else start.mT)
    return y, w_t.mT


def plastic_step(
    W: Tensor,
    v: Tensor,
    alpha: Tensor | None,
    kappa: Tensor,
    beta: Tensor,
    *,
    write: tuple[Tensor, ...] = (),
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One environment step of S rounds, exactly, without building intermediate matrices.

    ``W^(S) = b_S W + alpha * sum_{j<S} c_{S,j} V_j U_j^T`` with coefficients that depend on beta
    alone. Arguments and results as ``plastic_reference``; differentiable as ``plastic_scan``.
    W^(S) is a transposed view, in which the next step is fastest.

    Source: MetODS, Algorithm 1; the shortcut is an identity, not an approximation.
    """
    return step_prepared(prepare(alpha, kappa, beta, write, variant=variant), W, v)


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
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """T plastic steps in a row, bit for bit a loop of ``plastic_step``.

    ``(y_t, W_{t+1}) = plastic_step(W0 where new_trial_t else W_t, x_t)``.

    Args:
        W: fast weights before the first step ``[P, B, n, n]``.
        x: embedded inputs ``[T, P, B, n]``, T >= 1.
        alpha: as in ``plastic_reference``, like kappa, beta, write and variant.
        kappa: ``[P, S, S+1]``.
        beta: ``[P, S, S+1]``.
        W0: fast weights at the start of a trial, ``[P, n, n]`` or ``[P, B, n, n]``.
        new_trial: bool ``[T, P, B]``; where set, W becomes W0 before that step.
        write: tensors of the pre-synaptic factor.
        store_every: steps between the matrices kept for the backward pass; ceil(sqrt(T)) if None.
        variant: name of the write rule.

    Returns:
        y ``[T, P, B, n]``, the v^(S) of each step, and W after the last step ``[P, B, n, n]``
        (a transposed view).

    Differentiable in every float input, by a hand-written adjoint that keeps
    ``T S n + (T / store_every) n^2`` numbers per trial. A gradient that is to be differentiated
    again (``create_graph=True``), forward-mode derivatives and the transforms of ``torch.func``
    are torch's own, over plain operations: they keep ``O(T S n^2)``.

    Source: MetODS, Algorithm 1 and supplement 9.2, whose printed recursion lacks the Jacobian of
    the step; here it is complete.
    """
    rule = prepare(alpha, kappa, beta, write, variant=variant)
    return scan_prepared(rule, W, x, W0=W0, new_trial=new_trial, store_every=store_every)


def _code(rule: Rule) -> Code:
    """What runs a rule whose tensors have no history."""
    device, dtype = rule.kappa.device, rule.kappa.dtype
    if followed() or _why_not_fused(device, dtype, rule.name, rule.neurons):
        back = _adjoint.backward
        if _back_is_fused(device, dtype, rule.name) and not followed():
            from esmeta.kernels._cpu import backward as back
        return Code(functools.partial(run, constants(rule)), back)
    # Imported here, because who never runs it need not pay for the compiler.
    if device.type == "cuda":
        from esmeta.kernels import _gpu

        return _gpu.code(rule)
    from esmeta.kernels import _cpu

    return _cpu.code(rule)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_fused(device: torch.device, dtype: torch.dtype, variant: str, neurons: int) -> str:
    """Why no fused kernel runs this; empty if one does."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no fused kernel for {device.type}"
    if dtype != torch.float32:
        return f"the fused kernels are for float32, not for {str(dtype).removeprefix('torch.')}"
    if device.type not in WRITES[variant].fused:
        return f"the fused kernels do not know the write variant {variant}"
    if device.type == "cuda" and neurons > _MOST_ON_GPU:
        return f"on a GPU the fused kernels hold at most n = {_MOST_ON_GPU}"
    if device.type == "cuda" and not _has_triton():
        return "the fused kernels need triton, which is not installed: pip install triton"
    return ""


def _back_is_fused(device: torch.device, dtype: torch.dtype, variant: str) -> bool:
    """Whether a fused kernel goes back through what torch operations have run."""
    return device.type in WRITES[variant].fused_back and dtype == torch.float32


def explain(
    device: torch.device | str,
    neurons: int,
    depth: int,
    requires_grad: bool = False,
    variant: str = "base",
    dtype: torch.dtype = torch.float32,
) -> str:
    """Say in one line which code runs steps and scans of this kind, and why."""
    check_name(variant)
    device = torch.device(device)
    why = _why_not_fused(device, dtype, variant, neurons)
    size = f"on {device} (n={neurons}, S={depth}, {variant}, {str(dtype).removeprefix('torch.')})"
    fused = "Triton kernel" if device.type == "cuda" else "compiled CPU kernel"
    code = f"torch operations {size}: {why}" if why else f"{fused} {size}"
    if not requires_grad:
        return f"{code}; no gradient is asked for, so nothing is kept"
    plain = why and not _back_is_fused(device, dtype, variant)
    sweep = "in torch operations" if plain else "fused"
    return f"{code}; gradients by the hand-written checkpointed adjoint, {sweep}"


def _check_sequence(
    rule: Rule,
    W: Tensor,
    x: Tensor,
    W0: Tensor | None,
    new_trial: Tensor | None,
    store_every: int | None,
) -> tuple[Plan, Tensor | None]:
    """Where and how a sequence starts afresh: the plan, and ``W0`` as ``[P, 1 or B, n, n]``."""
    if x.dim() != 4 or len(x) == 0:
        raise UserError(
            f"x has shape {tuple(x.shape)}, but [T, P, B, n] with T >= 1 is needed; for one step "
            "pass x[None]"
        )
    check_state(rule.kappa, with_names(rule.alpha_t, rule.write), W, x[0], "x[t]")
    steps = x.shape[0]
    every = isqrt(steps - 1) + 1 if store_every is None else store_every
    if every < 1:
        raise UserError(f"store_every is {every}, but it must be 1..T (or None for sqrt(T))")
    resets = [False] * steps
    if new_trial is not None:
        if new_trial.dtype != torch.bool or new_trial.shape != x.shape[:3]:
            raise UserError(
                f"new_trial is {new_trial.dtype} {tuple(new_trial.shape)}, but bool [T, P, B] = "
                f"{tuple(x.shape[:3])} is needed"
            )
        look = W0 is None or (new_trial.device.type in LOOKS and not followed())
        resets = new_trial.flatten(1).any(1).tolist() if look else [True] * steps
    if W0 is None and any(resets):
        raise UserError(
            "new_trial is set somewhere but W0 is None: pass the fast weights that a trial starts "
            "from as W0, [P, n, n] or [P, B, n, n]"
        )
    if W0 is None or new_trial is None:
        return Plan(every, None, resets), None
    check_kinds(W, {"W0": W0}, "W")
    if new_trial.device != W.device:
        raise UserError(
            f"new_trial is on {new_trial.device} and W on {W.device}: write new_trial.to(W.device)"
        )
    start = W0.unsqueeze(1) if W0.dim() == 3 else W0
    if start.shape not in (W.shape, (W.shape[0], 1, *W.shape[2:])):
        raise UserError(
            f"W0 has shape {tuple(W0.shape)}, but [P, n, n] or [P, B, n, n] is needed to go with "
            f"W of shape {tuple(W.shape)}"
        )
    return Plan(every, new_trial[..., None, None], resets), start
