"""A sequence of plastic steps that keeps few tensors for its gradient.

Plain automatic differentiation keeps O(T S n^2) numbers per trial. ``CheckpointedScan`` keeps the S
values of tanh of every step and one matrix every ``every`` steps; its backward rebuilds the rest
one segment at a time and applies the hand-written adjoint of ``_adjoint``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from esmeta.kernels._adjoint import Back, Sweep
from esmeta.kernels._recurrence import Constants, Folded, advance, constants
from esmeta.modes import exact, followed


class Plan(NamedTuple):
    """What is not differentiated: checkpoint spacing, and where fast weights start afresh.

    ``mask`` is bool ``[T, P, B, 1, 1]`` or None; ``resets[t]`` says on the host whether step t
    resets any trial. ``in_place`` allows to overwrite the fast weights that come in.
    """

    every: int
    mask: Tensor | None
    resets: list[bool]
    in_place: bool = False


class Kept(NamedTuple):
    """What a gradient needs of a forward pass: see :func:`run`."""

    checkpoints: Sequence[Tensor]
    reads: Sequence[Tensor]


class Forward(Protocol):
    """A way to run the steps: :func:`run` with its constants, or a fused kernel.

    Arguments and results are those of :func:`run`; without ``keep``, ``Kept`` may be empty.
    """

    def __call__(
        self, plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Kept]: ...


class Code(NamedTuple):
    """Who computes: the steps, and the segments of the backward sweep."""

    forward: Forward
    back: Back


class _Context(FunctionCtx):
    back: Back
    plan: Plan
    inputs: int
    saved_tensors: tuple[Tensor, ...]


@exact
def run(
    k: Constants, plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Kept]:
    """Step through x ``[T, P, B, n]`` from transposed fast weights ``[P, B, n, n]``.

    ``start_t`` is ``[P, 1 or B, n, n]``, transposed. Returns y, the last fast weights and, if they
    are to be kept, every ``plan.every``-th fast weights behind the first and the T S values of tanh
    in order.
    """
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
    return torch.stack(outputs), w_t, Kept(checkpoints, reads)


class CheckpointedScan(torch.autograd.Function):
    """``run`` with O(T S n + (T / every) n^2) numbers per trial kept for the backward pass.

    Where that pass is itself to be differentiated, or followed by torch, it is torch's own.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        code: Code,
        plan: Plan,
        w_t: Tensor,
        x: Tensor,
        start_t: Tensor | None,
        *folded: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``folded`` is kappa, composite, alpha_t and then the write tensors of ``Folded``."""
        y, last, (checkpoints, reads) = code.forward(plan, w_t, x, start_t, True)
        ctx.back, ctx.plan = code.back, plan
        ctx.inputs = 3 + len(folded)
        # Torch keeps None as it is; its annotation forgets to say so.
        kept = cast("tuple[Tensor, ...]", (w_t, x, start_t, *folded, *checkpoints, *reads))
        ctx.save_for_backward(*kept)
        return y, last

    @staticmethod
    @exact
    def backward(ctx: _Context, grad_y: Tensor, grad_w: Tensor) -> tuple[Tensor | None, ...]:
        """Sweep the segments from the last to the first."""
        in_memory = torch._C._has_storage(grad_y) and torch._C._has_storage(grad_w)
        if torch.is_grad_enabled() or followed() or not in_memory:
            return None, None, *_plainly(ctx, grad_y, grad_w)
        grad_y = grad_y.resolve_neg()
        every, mask, resets, _ = ctx.plan
        inputs = ctx.inputs
        w_t, x, start_t, *folded = ctx.saved_tensors[:inputs]
        depth = folded[0].shape[1]
        count = -(-len(x) // every)
        checkpoints = (w_t, *ctx.saved_tensors[inputs : inputs + count - 1])
        reads = ctx.saved_tensors[inputs + count - 1 :]
        sweep = Sweep(
            _unpack(tuple(folded)),
            start_t,
            grad_w.clone(memory_format=torch.contiguous_format),
            ctx.back,
        )
        grad_x: list[Tensor] = []
        for number in reversed(range(count)):
            low, high = number * every, min((number + 1) * every, len(x))
            masks = [mask[t] if mask is not None and resets[t] else None for t in range(low, high)]
            part = reads[low * depth : high * depth]
            tanh = [torch.cat(part[s::depth], 1) for s in range(depth)]
            grad_x.append(
                sweep.segment(x[low:high], tanh, checkpoints[number], masks, grad_y[low:high])
            )
        grad_start = None if start_t is None else sweep.carried.start.sum_to_size(start_t.shape)
        grads = sweep.parameter_gradients()
        return None, None, sweep.carried.w, torch.cat(grad_x[::-1]), grad_start, *grads


def _plainly(ctx: _Context, grad_y: Tensor, grad_w: Tensor) -> list[Tensor | None]:
    """The gradient by plain automatic differentiation, as a function of all that it depends on."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, because one input may have been made of another one.
        inputs = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[: ctx.inputs]]
        w_t, x, start_t, *folded = inputs
        assert w_t is not None and x is not None, "only what resets and alpha_t may be missing"
        y, last, _ = run(constants(_unpack(tuple(folded))), ctx.plan, w_t, x, start_t, False)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    pairs = [(y, grad_y), (last, grad_w)]
    known, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
    found = iter(torch.autograd.grad(known, wanted, grads, create_graph=again, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]


def _unpack(folded: tuple[Tensor | None, ...]) -> Folded:
    kappa, composite, alpha_t, *write = folded
    assert kappa is not None and composite is not None, "only alpha_t may be missing"
    return Folded(kappa, composite, alpha_t, tuple(w for w in write if w is not None))
