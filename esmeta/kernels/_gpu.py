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
from esmeta.kernels._segments import pack, unpack

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
            checkpoints = first.new_empty((steps - 1) // plan.every, *first.shape)
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
    folded, packed = segment.folded, pack(segment)
    alpha, write = folded.alpha_t, folded.write[0] if folded.write else None
    steps, population, batch, neurons = packed.grad_y.shape
    like = packed.first
    _KERNELS.backward[(population * batch,)](
        packed.posts, packed.pres, packed.slopes, packed.responses, like,
        _or(packed.start, like), _or(packed.mask, like), _or(alpha, like),
        folded.kappa.contiguous(), folded.composite.contiguous(), _or(write, like),
        packed.grad_y, packed.weights, *carried, *packed.outs, packed.grad_x,
        steps, population * batch, batch, max(1, packed.starts),
        RESETS=packed.starts > 0, ALPHA=alpha is not None, LINEAR=write is not None,
        **_sizes(neurons, packed.posts.shape[2]),
    )  # fmt: skip
    return unpack(packed), carried


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
    warps = {16: 1, 32: 4, 64: 8}.get(wide, 16)
    rounds = max(2, triton.next_power_of_2(depth + 1))
    return {"n": neurons, "S": depth, "N": wide, "SP": rounds, "num_warps": warps}
