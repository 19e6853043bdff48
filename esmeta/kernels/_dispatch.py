"""Which code runs a call: the single place where a faster kernel is chosen."""

from __future__ import annotations

import functools
import importlib.util
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.kernels._adjoint import back
from esmeta.kernels._recurrence import Folded, constants, fold
from esmeta.kernels._scan import CheckpointedScan, Code, Forward, Kept, Plan, run
from esmeta.kernels._shapes import VARIANTS, Rule, as_rule, check_kinds, check_state
from esmeta.modes import followed

_MOST_ON_GPU = 256
LOOKS = ("cpu",)
"""Devices where it is cheap to see which steps begin a trial; elsewhere every step may."""
_STEP = Plan(1, None, [False])
_STEP_IN_PLACE = _STEP._replace(in_place=True)


class Prepared(NamedTuple):
    """Parameters ready for many steps: ``folded`` for gradients, ``code`` to compute with."""

    folded: Folded
    code: Code

    def __reduce__(self) -> tuple[Any, ...]:
        return _ready, (self.folded,)  # the code holds addresses, which are not copied


def prepare(
    alpha: Tensor | None, kappa: Tensor, beta: Tensor, write: tuple[Tensor, ...] = ()
) -> Prepared:
    """Compute, once per rollout, everything in the plastic step that time does not change.

    Shapes as in ``plastic_reference``. Differentiable in every argument. The result is stale as
    soon as a parameter changes.
    """
    return _prepare(as_rule(alpha, kappa, beta, write))


def step_prepared(
    prepared: Prepared, W: Tensor, v: Tensor, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """One plastic step, ``plastic_step`` with the result of ``prepare``.

    Differentiable as ``plastic_scan``; by parameters only if ``prepare`` was not called inside
    ``torch.no_grad``.

    Args:
        prepared: result of ``prepare``.
        W: fast weights ``[P, B, n, n]``.
        v: embedded input ``[P, B, n]``.
        in_place: whether W may be overwritten, for who needs it no more; the same bits with half
            the memory. Where a gradient is asked for, W is kept all the same.

    Returns:
        v^(S) ``[P, B, n]`` and W^(S) ``[P, B, n, n]``. W^(S) is a transposed view: the next step
        is fastest when it gets it as it is; call ``contiguous`` where a row-major matrix is needed.
    """
    plan = _STEP_IN_PLACE if in_place else _STEP
    kappa, alpha_t = prepared.folded.kappa, prepared.folded.alpha_t
    fits = W.shape == (*v.shape, v.shape[-1]) and len(v) == len(kappa)
    if not (fits and (alpha_t is None or alpha_t.shape[-1] == v.shape[-1])):
        raise UserError(
            f"W has shape {tuple(W.shape)} and v {tuple(v.shape)}, but [P, B, n, n] and [P, B, n] "
            f"with the P = {len(kappa)} and n of what was prepared are needed"
        )
    if not (W.dtype == v.dtype == kappa.dtype and W.device == v.device == kappa.device):
        check_kinds(kappa, {"W": W, "v": v})
    y, w_t = _steps(prepared, plan, W.mT, v.unsqueeze(0), None)
    return y[0], w_t.mT


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
    alone. Arguments and results as ``plastic_reference``; differentiable as ``plastic_scan``.
    W^(S) is a transposed view, in which the next step is fastest.

    Source: MetODS, Algorithm 1; the shortcut is an identity, not an approximation.
    """
    rule = as_rule(alpha, kappa, beta, write)
    check_state(rule, W, v)
    return step_prepared(_prepare(rule), W, v)


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

    Differentiable in every float input, by a hand-written adjoint that keeps
    ``T S n + (T / store_every) n^2`` numbers per trial. A gradient that is to be differentiated
    again (``create_graph=True``), forward-mode derivatives and the transforms of ``torch.func``
    are torch's own, over plain operations: they keep ``O(T S n^2)``.

    Source: MetODS, Algorithm 1 and supplement 9.2, whose printed recursion lacks the Jacobian of
    the step; here it is complete.
    """
    rule = as_rule(alpha, kappa, beta, write)
    plan, start = _check_sequence(rule, W, x, W0, new_trial, store_every)
    start_t = None if start is None else start.mT
    y, w_t = _steps(_prepare(rule), plan, W.mT, x, start_t)
    return y, w_t.mT


def _prepare(rule: Rule) -> Prepared:
    return _ready(fold(rule))


def _ready(folded: Folded) -> Prepared:
    if not torch.is_grad_enabled():
        # Else some would bring their history, and some not: a gradient that is only half there.
        folded = _without_graph(folded)
    return Prepared(folded, _code(_without_graph(folded)))


def _without_graph(folded: Folded) -> Folded:
    kappa, composite, alpha_t, write = folded
    return Folded(
        kappa.detach(),
        composite.detach(),
        None if alpha_t is None else alpha_t.detach(),
        tuple(tensor.detach() for tensor in write),
    )


def _code(folded: Folded) -> Code:
    variant = VARIANTS[len(folded.write)]
    device, dtype = folded.kappa.device, folded.kappa.dtype
    neurons = next((m.shape[-1] for m in (folded.alpha_t, *folded.write) if m is not None), 1)
    if followed() or _why_not_fused(device, dtype, variant, neurons):
        return Code(functools.partial(run, constants(folded)), back)
    # Imported here, because who never runs it need not pay for the compiler.
    if device.type == "cuda":
        from esmeta.kernels import _gpu

        return Code(_gpu.forward(folded), _gpu.back)
    from esmeta.kernels import _cpu

    return Code(_forward_on_cpu(folded), _cpu.back)


def _forward_on_cpu(folded: Folded) -> Forward:
    from esmeta.kernels import _cpu

    rule = _cpu.rule(folded.alpha_t, folded.kappa, folded.composite, folded.write)

    def forward(
        plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        reset = None if plan.mask is None else plan.mask[..., 0, 0]
        every, in_place = (plan.every, False) if keep else (0, plan.in_place)
        result = _cpu.run(rule, w_t, x, start_t, reset, every, in_place)
        if result.reads is None or result.checkpoints is None:
            return result.y, result.w_t, Kept((), ())
        reads = result.reads.flatten(0, 1).unbind(0)
        return result.y, result.w_t, Kept(result.checkpoints.unbind(0), reads)

    return forward


def _steps(
    prepared: Prepared, plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Steps from transposed fast weights, through the adjoint where a gradient is asked for."""
    w_t, x = w_t.resolve_neg(), x.resolve_neg()
    start_t = None if start_t is None else start_t.resolve_neg()
    folded = prepared.folded
    if followed():
        return run(constants(folded), plan, w_t, x, start_t, False)[:2]
    if not torch.is_grad_enabled():
        if plan.in_place:
            # For what has kept W for a gradient of its own: it is told that W is no more.
            torch.autograd.graph.increment_version(w_t)
        return prepared.code.forward(plan, w_t, x, start_t, False)[:2]
    arguments = (folded.kappa, folded.composite, folded.alpha_t, *folded.write)
    if any(f is not None and f.requires_grad for f in (w_t, x, start_t, *arguments)):
        return CheckpointedScan.apply(prepared.code, plan, w_t, x, start_t, *arguments)
    with torch.no_grad():
        return _steps(prepared, plan, w_t, x, start_t)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_fused(device: torch.device, dtype: torch.dtype, variant: str, neurons: int) -> str:
    """Why no fused kernel runs this; empty if one does."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no fused kernel for {device.type}"
    if dtype != torch.float32:
        return f"the fused kernels are for float32, not for {str(dtype).removeprefix('torch.')}"
    if variant == "mlp":
        return "the fused kernels do not know the write variant mlp"
    if device.type == "cuda" and neurons > _MOST_ON_GPU:
        return f"on a GPU the fused kernels hold at most n = {_MOST_ON_GPU}"
    if device.type == "cuda" and not _has_triton():
        return "the fused kernels need triton, which is not installed: pip install triton"
    return ""


def explain(
    device: torch.device | str,
    neurons: int,
    depth: int,
    requires_grad: bool = False,
    variant: str = "base",
    dtype: torch.dtype = torch.float32,
) -> str:
    """Say in one line which code runs steps and scans of this kind, and why."""
    known = (*VARIANTS.values(), "no-alpha")
    if variant not in known:
        raise ValueError(f"variant is {variant!r}, but it must be one of {', '.join(known)}")
    device = torch.device(device)
    why = _why_not_fused(device, dtype, variant, neurons)
    size = f"on {device} (n={neurons}, S={depth}, {variant}, {str(dtype).removeprefix('torch.')})"
    fused = "Triton kernel" if device.type == "cuda" else "compiled CPU kernel"
    code = f"torch operations {size}: {why}" if why else f"{fused} {size}"
    if not requires_grad:
        return f"{code}; no gradient is asked for, so nothing is kept"
    sweep = "in torch operations" if why else "fused"
    return f"{code}; gradients by the hand-written checkpointed adjoint, {sweep}"


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
        look = W0 is None or (new_trial.device.type in LOOKS and not followed())
        resets = new_trial.flatten(1).any(1).tolist() if look else [True] * steps
    if W0 is None and any(resets):
        raise ValueError(
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
        raise ValueError(
            f"W0 has shape {tuple(W0.shape)}, but [P, n, n] or [P, B, n, n] is needed to go with "
            f"W of shape {tuple(W.shape)}"
        )
    return Plan(every, new_trial[..., None, None], resets), start
