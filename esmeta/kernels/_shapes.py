"""Shapes of the arguments of the plastic recurrence: checked once, given the axis P."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from esmeta.errors import UserError

VARIANTS = {0: "base", 1: "linear", 4: "mlp"}
"""Write variant by the number of tensors in ``write``."""

_WRITE_SHAPES = {
    0: (),
    1: (("A", 3),),
    4: (("W1", 3), ("b1", 2), ("W2", 3), ("b2", 2)),
}


class Rule(NamedTuple):
    """Parameters of the recurrence, each with its axis P.

    Shapes: ``alpha`` ``[P, n, n]`` or None, ``kappa`` and ``beta`` ``[P, S, S+1]``, ``write`` as in
    ``plastic_reference``.
    """

    alpha: Tensor | None
    kappa: Tensor
    beta: Tensor
    write: tuple[Tensor, ...]


def as_rule(
    alpha: Tensor | None, kappa: Tensor, beta: Tensor, write: tuple[Tensor, ...] = ()
) -> Rule:
    """Check the parameters against each other and add the axis P where P = 1 left it out."""
    if kappa.dim() == 2:
        kappa = kappa.unsqueeze(0)
    if beta.dim() == 2:
        beta = beta.unsqueeze(0)
    shape = tuple(kappa.shape)
    if len(shape) != 3 or shape[1] < 1 or shape[2] != shape[1] + 1:
        raise ValueError(
            f"kappa has shape {shape}, but [P, S, S+1] with depth S >= 1 is needed: one row per "
            "round s = 1..S, one column per l = 0..s; for depth 1 pass kappa of shape [P, 1, 2]"
        )
    if beta.shape != kappa.shape:
        raise ValueError(
            f"beta has shape {tuple(beta.shape)} and kappa {shape}, but they must be equal "
            "([P, S, S+1]): initialise both with the same depth and population"
        )
    if not kappa.is_floating_point():
        raise UserError(
            f"kappa is {kappa.dtype}, but a floating-point type is needed: write kappa.float()"
        )
    if len(write) not in VARIANTS:
        raise ValueError(
            f"write has {len(write)} tensors, but () (base), (A,) (linear) and (W1, b1, W2, b2) "
            "(mlp) are allowed"
        )
    population = shape[0]
    if alpha is not None:
        alpha = _matrix("alpha", alpha, 3, population)
    tensors = tuple(
        _matrix(name, tensor, dims, population)
        for (name, dims), tensor in zip(_WRITE_SHAPES[len(write)], write, strict=True)
    )
    check_kinds(kappa, {"beta": beta, "alpha": alpha} | _named(tensors))
    # What reads memory knows no values that are stored with the other sign.
    tensors = tuple(tensor.resolve_neg() for tensor in tensors)
    alpha = None if alpha is None else alpha.resolve_neg()
    return Rule(alpha, kappa.resolve_neg(), beta.resolve_neg(), tensors)


def check_kinds(like: Tensor, named: Mapping[str, Tensor | None], base: str = "kappa") -> None:
    """Refuse tensors whose dtype or device is not that of ``like``."""
    for name, tensor in named.items():
        if tensor is None or (tensor.dtype == like.dtype and tensor.device == like.device):
            continue
        raise UserError(
            f"{name} is {tensor.dtype} on {tensor.device} and {base} {like.dtype} on "
            f"{like.device}, but one dtype and device are needed: write {name}.to({base})"
        )


def _named(write: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"write[{number}]": tensor for number, tensor in enumerate(write)}


def check_state(rule: Rule, W: Tensor, v: Tensor, name: str = "v") -> None:
    """Check fast weights ``[P, B, n, n]`` and activations ``[P, B, n]`` against the parameters."""
    check_kinds(rule.kappa, {"W": W, name: v})
    if W.dim() != 4 or W.shape[-1] != W.shape[-2]:
        raise ValueError(
            f"W has shape {tuple(W.shape)}, but [P, B, n, n] is needed (rows post-synaptic); "
            "for one matrix pass W[None, None]"
        )
    if tuple(v.shape) != tuple(W.shape[:3]):
        raise ValueError(
            f"{name} has shape {tuple(v.shape)}, but [P, B, n] = {tuple(W.shape[:3])} is needed "
            f"to go with W of shape {tuple(W.shape)}"
        )
    population, neurons = W.shape[0], W.shape[-1]
    if rule.kappa.shape[0] != population:
        raise ValueError(
            f"W has P = {population} and kappa P = {rule.kappa.shape[0]}; share parameters with "
            "kappa.expand(P, -1, -1), or fold the trials of one parameter set into the axis B"
        )
    for label, tensor in {"alpha": rule.alpha, **_named(rule.write)}.items():
        if tensor is not None and tensor.shape[-1] != neurons:
            raise ValueError(
                f"{label} has {tensor.shape[-1]} neurons and W has {neurons}: they must be equal"
            )


def _matrix(name: str, tensor: Tensor, dims: int, population: int) -> Tensor:
    if tensor.dim() == dims - 1 and population == 1:
        tensor = tensor.unsqueeze(0)
    square = dims == 2 or tensor.shape[-1] == tensor.shape[-2]
    if tensor.dim() != dims or tensor.shape[0] != population or not square:
        wanted = f"[{population}, n, n]" if dims == 3 else f"[{population}, n]"
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but {wanted} is needed: its first axis is "
            "that of kappa (it may be left out only when P = 1)"
        )
    return tensor
