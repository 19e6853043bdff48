"""Modes of torch that a caller may be in: which of them esmeta's code has to know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad

from esmeta.errors import UserError

P = ParamSpec("P")
R = TypeVar("R")


def followed() -> bool:
    """Whether torch follows operations, so that it must see them: compiled code is none.

    So it is inside transforms of ``torch.func`` (vmap, grad, jvp, ...), in forward-mode
    differentiation, while a function is traced or compiled, and under a dispatch mode, where
    tensors may hold no numbers at all.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
    )


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function compute in the precision of its arguments, also inside ``torch.autocast``."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                with torch.autocast(device, enabled=False):
                    return wrapped(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapped


def differentiating(function: Callable[P, R]) -> Callable[P, R]:
    """:func:`exact`, for a function that differentiates, forwards and backwards.

    Raises ``UserError`` inside ``torch.inference_mode``, whose tensors have no gradients.
    """
    function = exact(function)

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled():
            raise UserError(
                "training needs gradients, which torch.inference_mode rules out for all that is "
                "made in it: leave it, or write torch.no_grad"
            )
        return function(*args, **kwargs)

    return wrapped


@exact
def affine(bias: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [P, M, K] @ weight [P, K, N] + bias [P, 1 or M, N]`` in their own precision."""
    return torch.baddbmm(bias, x, weight)
