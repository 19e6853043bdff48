"""The plastic recurrence on a GPU in float32: fused steps, scans and their backward (Triton).

One program runs one trial; see ``_triton_code``. Fast weights are ``[P, B, n, n]`` transposed and
contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from esmeta.kernels import _triton_code
from esmeta.kernels._adjoint import Adjoints, Carried, Segment
from esmeta.kernels._recurrence import Folded
from esmeta.kernels._scan import Forward, Kept, Plan

_KERNELS: Any = _triton_code  # their types are the language's own


def forward(folded: Folded) -> Forward:
    """The forward pass with these parameters."""
    alpha, write = folded.alpha_t, folded.write[0] if folded.write else None
    kappa, composite = folded.kappa.contiguous(), folded.composite.contiguous()

    def run(
        plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Kept]:
        steps, population, batch, neurons = x.shape
        depth = kappa.shape[1]
        x, first = x.contiguous(), w_t.contiguous()
        y, last = torch.empty_like(x), first if plan.in_place else torch.empty_like(first)
        reads = checkpoints = y
        if keep:
            reads = x.new_empty(steps, depth, population, batch, neurons)
            checkpoints = first.new_empty(-(-steps // plan.every), *first.shape)
        start, mask = _restarts(plan.mask, start_t, first)
        _KERNELS.forward[(population * batch,)](
            first, x, start, mask, _or(alpha, first), kappa, composite, _or(write, first),
            y, last, reads, checkpoints,
            steps, population * batch, batch, start.shape[1], plan.every,
            KEEP=keep, RESETS=plan.mask is not None, ALPHA=alpha is not None,
            LINEAR=write is not None, **_sizes(neurons, depth),
        )  # fmt: skip
        if not keep:
            return y, last, Kept((), ())
        return y, last, Kept(checkpoints.unbind(0), reads.flatten(0, 1).unbind(0))

    return run


def back(segment: Segment, carried: Carried) -> tuple[Adjoints, Carried]:
    """Go back through a segment, as ``_adjoint.back``."""
    folded, _, rows, w_t, start_t, masks, grad_y = segment
    steps, population, batch, neurons = grad_y.shape
    trials, depth = population * batch, len(rows.posts)
    alpha, write = folded.alpha_t, folded.write[0] if folded.write else None

    def by_step(stack: Tensor) -> Tensor:
        # [P, R, J, n], R = k B with time outermost, to [k, P B, J, n].
        parts = stack.unflatten(1, (steps, batch)).transpose(0, 1)
        return parts.reshape(steps, trials, stack.shape[2], neurons)

    posts = by_step(rows.posts_stack)
    pres = posts if write is None else by_step(rows.pres_stack)
    slopes = by_step(torch.stack(rows.slopes, 2))
    flat = [response for row in rows.responses for response in row]
    flat = [r.expand_as(rows.posts[0]) for r in flat]
    responses = by_step(torch.stack(flat, 2)) if flat else posts
    mask = None
    if any(m is not None for m in masks):
        none = torch.zeros(population, batch, 1, 1, dtype=torch.bool, device=w_t.device)
        mask = torch.stack([none if m is None else m for m in masks])
    first = w_t.contiguous()
    start, marks = _restarts(mask, start_t, first)
    outs = [torch.empty_like(posts) for _ in range(5)]
    grad_x = torch.empty_like(grad_y, memory_format=torch.contiguous_format)
    carried = Carried(*(tensor.clone(memory_format=torch.contiguous_format) for tensor in carried))
    _KERNELS.backward[(trials,)](
        posts, pres, slopes, responses, first, start, marks, _or(alpha, first),
        folded.kappa.contiguous(), folded.composite.contiguous(), _or(write, first),
        grad_y.contiguous(),
        first.new_empty(steps, *first.shape),
        carried.w, carried.start, carried.alpha, carried.decay, *outs, grad_x,
        steps, trials, batch, start.shape[1],
        RESETS=mask is not None, ALPHA=alpha is not None, LINEAR=write is not None,
        **_sizes(neurons, depth),
    )  # fmt: skip
    post, drive, pull, pre, written = (
        out.view(steps, population, batch, depth, neurons).permute(1, 3, 0, 2, 4).flatten(2, 3)
        for out in outs
    )
    return Adjoints(post, drive, pull, pre, written.transpose(1, 2), grad_x), carried


def _restarts(mask: Tensor | None, start_t: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices that trials start from ``[P, 1 or B, n, n]`` and where; anything without a mask."""
    if mask is None or start_t is None:
        return like, like
    # Eight bits each: a pointer to bool is a pointer to single bits.
    return start_t.contiguous(), mask[..., 0, 0].contiguous().view(torch.uint8)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer must point somewhere, also where it is not used."""
    return other if tensor is None else tensor.contiguous()


def _sizes(neurons: int, depth: int) -> dict[str, Any]:
    wide = max(16, triton.next_power_of_2(neurons))
    warps = {16: 1, 32: 4, 64: 4, 128: 8}.get(wide, 16)
    rounds = max(2, triton.next_power_of_2(depth + 1))
    return {"n": neurons, "S": depth, "N": wide, "SP": rounds, "num_warps": warps}
