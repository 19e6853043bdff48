"""Sequences of plastic steps that keep few tensors for their gradient.

Plain automatic differentiation keeps O(T S n^2) numbers per trial. ``CheckpointedScan`` keeps the S
values of tanh of every step and one matrix every ``every`` steps; its backward rebuilds the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from esmeta.kernels._recurrence import constants, run
from esmeta.kernels._rule import Kept, Plan, Rule, Saved
from esmeta.modes import exact, followed


def steps(
    rule: Rule, plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Steps from transposed fast weights, through the adjoint where a gradient is asked for."""
    w_t, x = w_t.resolve_neg(), x.resolve_neg()
    start_t = None if start_t is None else start_t.resolve_neg()
    if followed():
        return run(constants(rule), plan, w_t, x, start_t, False)[:2]
    if torch.is_grad_enabled():
        tensors = rule.tensors
        if any(t is not None and t.requires_grad for t in (w_t, x, start_t, *tensors)):
            kept = plan._replace(in_place=False)
            return CheckpointedScan.apply(rule, kept, w_t, x, start_t, *tensors)
        with torch.no_grad():
            return steps(rule, plan, w_t, x, start_t)
    if plan.in_place:
        # For what has kept W for a gradient of its own: it is told that W is no more.
        torch.autograd.graph.increment_version(w_t)
    return rule.code.forward(plan, w_t, x, start_t, False)[:2]


class _Context(FunctionCtx):
    rule: Rule
    plan: Plan
    inputs: int
    saved_tensors: tuple[Tensor, ...]


class CheckpointedScan(torch.autograd.Function):
    """Steps with O(T S n + (T / every) n^2) numbers per trial kept for the backward pass.

    Where that pass is itself to be differentiated, or followed by torch, it is torch's own.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        rule: Rule,
        plan: Plan,
        w_t: Tensor,
        x: Tensor,
        start_t: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``tensors`` are those of the rule, which torch has to see."""
        y, last, (checkpoints, reads) = rule.code.forward(plan, w_t, x, start_t, True)
        ctx.rule, ctx.plan, ctx.inputs = rule, plan, 3 + len(tensors)
        # Torch keeps None as it is; its annotation forgets to say so.
        kept = cast("tuple[Tensor, ...]", (w_t, x, start_t, *tensors, checkpoints, reads))
        ctx.save_for_backward(*kept)
        return y, last

    @staticmethod
    @exact
    def backward(ctx: _Context, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_y, grad_w = cast(tuple[Tensor, Tensor], grads)
        in_memory = torch._C._has_storage(grad_y) and torch._C._has_storage(grad_w)
        if torch.is_grad_enabled() or followed() or not in_memory:
            return None, None, *_plainly(ctx, grad_y, grad_w)
        plan, saved = ctx.plan, ctx.saved_tensors
        w_t, x, start_t, *tensors = saved[: ctx.inputs]
        rule = Rule.of(ctx.rule.name, tensors, ctx.rule.code)
        inputs = Saved(w_t, x, start_t, Kept(*saved[ctx.inputs :]))
        return None, None, *rule.code.backward(rule, plan, inputs, grad_y.resolve_neg(), grad_w)


def _plainly(ctx: _Context, grad_y: Tensor, grad_w: Tensor) -> Sequence[Tensor | None]:
    """The gradient by plain automatic differentiation, as a function of all that it depends on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one input may have been made of another one.
        inputs = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[: ctx.inputs]]
        w_t, x, start_t, *tensors = inputs
        assert w_t is not None and x is not None, "only what resets and alpha_t may be missing"
        k = constants(Rule.of(ctx.rule.name, tensors, ctx.rule.code))
        y, last, _ = run(k, ctx.plan, w_t, x, start_t, False)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    pairs = [(y, grad_y), (last, grad_w)]
    known, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    found = iter(torch.autograd.grad(known, wanted, grads, create_graph=again, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
