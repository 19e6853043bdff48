"""A segment of the backward sweep as fused kernels take it: everything by step and trial."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.kernels._adjoint import Adjoints, Segment


class Packed(NamedTuple):
    """Contiguous tensors; k steps, P B trials, S rounds.

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


def pack(segment: Segment) -> Packed:
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
    return Packed(
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
