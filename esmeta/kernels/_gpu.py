"""The plastic recurrence on a GPU in float32: fused steps, scans and their backward (Triton).

One program runs one trial; see ``_triton_code``. Fast weights are ``[P, B, n, n]`` transposed and
contiguous.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from esmeta.kernels import _triton_code
from esmeta.kernels._adjoint import Adjoints, Carried, Segment, sweep
from esmeta.kernels._rule import Code, Kept, Plan, Rule

_KERNELS: Any = _triton_code  # their types are the language's own


def code(rule: Rule) -> Code:
    """The Triton kernels with these parameters."""
    return Code(
        functools.partial(_forward, rule, *_parameters(rule)), functools.partial(sweep, back)
    )


def _forward(
    rule: Rule, kappa: Tensor, composite: Tensor, alpha: Tensor, write: Tensor,
    plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Kept]:  # fmt: skip
    steps, population, batch, _ = x.shape
    x, first = x.contiguous(), w_t.contiguous()
    y, last = torch.empty_like(x), first if plan.in_place else torch.empty_like(first)
    reads = checkpoints = y
    if keep:
        reads = x.new_empty(steps, rule.depth, *x.shape[1:])
        checkpoints = first.new_empty((steps - 1) // plan.every, *first.shape)
    start = mask = first  # a pointer must point somewhere, also where it is not used
    if plan.mask is not None and start_t is not None:
        # Eight bits each: a pointer to bool is a pointer to single bits.
        start, mask = start_t.contiguous(), plan.mask[..., 0, 0].contiguous().view(torch.uint8)
    _KERNELS.forward[(population * batch,)](
        first, x, start, mask, alpha, kappa, composite, write, y, last, reads, checkpoints,
        steps, population * batch, batch, start.shape[1], plan.every,
        KEEP=keep, RESETS=plan.mask is not None, **_options(rule, x.shape[-1]),
    )  # fmt: skip
    if not keep:
        return y, last, Kept()
    return y, last, Kept(checkpoints, reads)


def back(segment: Segment, carried: Carried) -> tuple[Adjoints, Carried]:
    """Go back through a segment, as ``_adjoint.back``."""
    rule, packed = segment.rule, _pack(segment)
    steps, population, batch, neurons = packed.grad_y.shape
    kappa, composite, alpha, write = _parameters(rule)
    start, mask = packed.start, packed.mask
    _KERNELS.backward[(population * batch,)](
        *packed[:5], packed.first if start is None else start,
        packed.first if mask is None else mask, alpha, kappa, composite, write,
        packed.grad_y, packed.weights, *carried, *packed.outs,
        steps, population * batch, batch, max(1, packed.starts),
        RESETS=packed.starts > 0, **_options(rule, neurons),
    )  # fmt: skip
    return packed.outs, carried


class _Packed(NamedTuple):
    """A segment, everything by step and trial. Contiguous tensors; k steps, P B trials, S rounds.

    ``posts``, ``pres``, ``slopes`` ``[k, P B, S, n]``, ``responses`` ``[k, P B, S (S-1) / 2, n]``,
    ``first`` and ``weights`` (room) ``[(k,) P, B, n, n]``; ``start`` ``[P, starts, n, n]`` and
    ``mask`` uint8 ``[k, P, B]``, None without resets; ``grad_y`` ``[k, P, B, n]``; ``outs`` are to
    be filled.
    """

    posts: Tensor
    pres: Tensor
    slopes: Tensor
    responses: Tensor
    first: Tensor
    start: Tensor | None
    mask: Tensor | None
    grad_y: Tensor
    weights: Tensor
    outs: Adjoints

    @property
    def starts(self) -> int:
        return 0 if self.start is None else self.start.shape[1]


def _pack(segment: Segment) -> _Packed:
    """What the kernels read, and room for what they write."""
    rows, masks = segment.rows, segment.masks
    steps, population, batch, neurons = segment.grad_y.shape

    def by_step(stack: Tensor) -> Tensor:
        # [P, R, J, n], R = k B with time outermost.
        parts = stack.unflatten(1, (steps, batch)).transpose(0, 1)
        # With one trial per member the reshaped stack is still a view that is not contiguous.
        return parts.reshape(steps, population * batch, stack.shape[2], neurons).contiguous()

    posts = by_step(rows.posts_stack)
    own = rows.pres_stack is not rows.posts_stack
    responses = [r.expand_as(rows.posts[0]) for row in rows.responses for r in row]
    start = mask = None
    if segment.start_t is not None and any(m is not None for m in masks):
        none = torch.zeros(population, batch, 1, 1, dtype=torch.bool, device=posts.device)
        # Eight bits each: for Triton a pointer to bool is one to single bits.
        mask = torch.stack([none if m is None else m for m in masks])[..., 0, 0].view(torch.uint8)
        start = segment.start_t.contiguous()
    first, grad_y = segment.w_t.contiguous(), segment.grad_y.contiguous()
    outs = Adjoints._make(torch.empty_like(like) for like in (*[posts] * 5, grad_y))
    return _Packed(
        posts,
        by_step(rows.pres_stack) if own else posts,
        by_step(torch.stack(rows.slopes, 2)),
        by_step(torch.stack(responses, 2)) if responses else posts,
        first,
        start,
        mask,
        grad_y,
        first.new_empty(steps, *first.shape),
        outs,
    )


def _parameters(rule: Rule) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kappa, composite, alpha and U's tensors side by side; kappa again for what is missing."""
    kappa, composite = rule.kappa.contiguous(), rule.composite.contiguous()
    alpha = kappa if rule.alpha_t is None else rule.alpha_t.contiguous()
    write = torch.cat([t.flatten(1) for t in rule.write], 1) if rule.write else kappa
    return kappa, composite, alpha, write


def _options(rule: Rule, neurons: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    wide = max(16, triton.next_power_of_2(neurons))
    warps = {16: 1, 32: 4, 64: 8}.get(wide, 16)
    rounds = max(2, triton.next_power_of_2(rule.depth + 1))
    sizes = {"n": neurons, "S": rule.depth, "N": wide, "SP": rounds, "num_warps": warps}
    numbers = sum(tensor[0].numel() for tensor in rule.write)
    own = {"OWN": rule.spec.factor is not None, "RULE": rule.name, "SIZE": numbers}
    return {"ALPHA": rule.alpha_t is not None, **own, **sizes}
