"""Parameter trees and flat vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esmeta.types import Params


def shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    """Shape of every leaf without the axis P."""
    return {name: tuple(leaf.shape[1:]) for name, leaf in params.items()}


def size_of(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Number of scalars of one member, D."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def ravel(params: Params) -> Tensor:
    """Flatten a parameter tree ``[P, ...]`` to ``[P, D]``, leaves in the tree's own order."""
    return torch.cat([leaf.reshape(leaf.shape[0], -1) for leaf in params.values()], dim=1)


def unravel_shapes(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """The inverse of :func:`ravel`: ``[P, D]`` to leaves ``[P, ...]`` (views where possible)."""
    size = size_of(shapes)
    if vector.ndim != 2 or vector.shape[1] != size:
        raise ValueError(
            f"unravel: got a tensor of shape {tuple(vector.shape)}; the policy has D = {size} "
            f"parameters, so pass [P, {size}] (one row per member)"
        )
    params, start = {}, 0
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        params[name] = vector[:, start : start + count].reshape(vector.shape[0], *shape)
        start += count
    return params


def stack_members(members: Sequence[Params]) -> Params:
    """Join single members (leaves without P) along a new first axis P."""
    return {name: torch.stack([member[name] for member in members]) for name in members[0]}


def theta_sha256(params: Params) -> str:
    """Hash of the flat float32 vector of the first member: the identity of theta in every log."""
    flat = ravel({name: leaf[:1] for name, leaf in params.items()})
    data = flat.detach().to(dtype=torch.float32, device="cpu").contiguous().numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def leaves_of(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts, in order; None is skipped."""
    if isinstance(tree, Tensor):
        return [tree]
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, tuple | list):
        raise TypeError(f"a {type(tree).__name__} is neither a tensor nor a container of tensors")
    return [leaf for item in tree for leaf in leaves_of(item)]


def with_leaves(tree: Any, leaves: Sequence[Tensor]) -> Any:
    """``tree`` with other tensors in the order of :func:`leaves_of`."""
    rest = iter(leaves)

    def build(item: Any) -> Any:
        if isinstance(item, Tensor):
            return next(rest)
        if item is None:
            return None
        if isinstance(item, Mapping):
            return {name: build(value) for name, value in item.items()}
        parts = [build(value) for value in item]
        named = isinstance(item, tuple) and type(item) is not tuple
        return type(item)(*parts) if named else type(item)(parts)

    return build(tree)
