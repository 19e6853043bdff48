"""The plastic recurrence as one value: its write rule by name, its parameters, the code it runs.

A :class:`Rule` is made once, by ``prepare``, and goes through steps, scans and their backward as it
is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.kernels._writes import WRITES, Tensors, Write


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
    """What a gradient needs of a forward pass; None where none is asked for.

    Every ``plan.every``-th fast weights behind the first ``[C, P, B, n, n]``, and the values of
    tanh ``[T, S, P, B, n]``.
    """

    checkpoints: Tensor | None = None
    reads: Tensor | None = None


class Saved(NamedTuple):
    """Inputs of a forward pass and what it kept."""

    w_t: Tensor
    x: Tensor
    start_t: Tensor | None
    kept: Kept


class Forward(Protocol):
    """Steps through x ``[T, P, B, n]`` from transposed fast weights ``w_t`` ``[P, B, n, n]``.

    ``start_t`` is ``[P, 1 or B, n, n]``, transposed. Returns y, the last fast weights, and what a
    gradient needs if it is to be kept.
    """

    def __call__(
        self, plan: Plan, w_t: Tensor, x: Tensor, start_t: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor, Kept]: ...


class Code(NamedTuple):
    """Who computes.

    ``backward``: gradients of w_t, x, start_t and ``rule.tensors`` from rule, plan, ``Saved`` and
    the gradients of y and of the last fast weights.
    """

    forward: Forward
    backward: Callable[[Rule, Plan, Saved, Tensor, Tensor], Sequence[Tensor | None]]


class Rule(NamedTuple):
    """The recurrence with its parameters; S rounds, P members.

    ``name`` of the write rule; ``kappa`` ``[P, S, S+1]``; ``composite`` ``[P, S+1, S+1]``, row s =
    (b_s, c_{s,0}, .., c_{s,S-1}), from beta (see ``_recurrence``); ``alpha_t`` ``[P, n, n]``
    transposed, or None; ``write``, matrices transposed ``[P, n, n]`` and vectors ``[P, 1, n]``.
    """

    name: str
    kappa: Tensor
    composite: Tensor
    alpha_t: Tensor | None
    write: Tensors
    code: Code

    @property
    def spec(self) -> Write:
        """The write rule."""
        return WRITES[self.name]

    @property
    def depth(self) -> int:
        """S."""
        return self.kappa.shape[1]

    @property
    def neurons(self) -> int:
        """The n of its matrices; 0 where there are none, and any n goes."""
        matrices = (self.alpha_t, *self.write)
        return next((m.shape[-1] for m in matrices if m is not None), 0)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that gradients are for."""
        return self.kappa, self.composite, self.alpha_t, *self.write

    @classmethod
    def of(cls, name: str, tensors: Sequence[Tensor | None], code: Code) -> Rule:
        """A rule with these ``tensors``."""
        kappa, composite, alpha_t, *write = tensors
        assert kappa is not None and composite is not None, "only alpha_t may be missing"
        own = tuple(tensor for tensor in write if tensor is not None)
        return cls(name, kappa, composite, alpha_t, own, code)


class Parameters(NamedTuple):
    """What users give, checked: ``alpha``, ``kappa``, ``beta`` and ``write`` with their axis P."""

    name: str
    alpha: Tensor | None
    kappa: Tensor
    beta: Tensor
    write: Tensors


def checked(
    alpha: Tensor | None, kappa: Tensor, beta: Tensor, write: Tensors, name: str | None = None
) -> Parameters:
    """Check the parameters against each other and add the axis P where P = 1 left it out.

    Without a ``name``, the first rule with so many tensors as ``write`` has is meant.
    """
    kappa, beta = (t.unsqueeze(0) if t.dim() == 2 else t for t in (kappa, beta))
    shape = tuple(kappa.shape)
    if len(shape) != 3 or shape[1] < 1 or shape[2] != shape[1] + 1:
        raise UserError(
            f"kappa has shape {shape}, but [P, S, S+1] with depth S >= 1 is needed: one row per "
            "round s = 1..S, one column per l = 0..s; for depth 1 pass kappa of shape [P, 1, 2]"
        )
    if beta.shape != kappa.shape:
        raise UserError(
            f"beta has shape {tuple(beta.shape)} and kappa {shape}, but they must be equal "
            "([P, S, S+1]): initialise both with the same depth and population"
        )
    if not kappa.is_floating_point():
        raise UserError(
            f"kappa is {kappa.dtype}, but a floating-point type is needed: write kappa.float()"
        )
    name = _told(name, alpha, write)
    if alpha is not None:
        alpha = _shaped("alpha", alpha, 3, shape[0])
    tensors = tuple(
        _shaped(label, tensor, dims, shape[0])
        for (label, dims), tensor in zip(WRITES[name].tensors, write, strict=True)
    )
    check_kinds(kappa, {"beta": beta, **with_names(alpha, tensors)})
    # What reads memory knows no values that are stored with the other sign.
    tensors = tuple(tensor.resolve_neg() for tensor in tensors)
    alpha = None if alpha is None else alpha.resolve_neg()
    return Parameters(name, alpha, kappa.resolve_neg(), beta.resolve_neg(), tensors)


def with_names(alpha: Tensor | None, write: Tensors) -> dict[str, Tensor | None]:
    """What alpha and the tensors of U are called where they are wrong."""
    return {"alpha": alpha} | {f"write[{k}]": tensor for k, tensor in enumerate(write)}


def check_name(name: str) -> None:
    """Refuse a write rule that does not exist."""
    if name not in WRITES:
        raise UserError(f"variant is {name!r}, but it must be one of {', '.join(sorted(WRITES))}")


def _told(name: str | None, alpha: Tensor | None, write: Tensors) -> str:
    if name is None:
        names = ("base" if alpha is not None else "no-alpha", *list(WRITES)[2:])
        name = next((k for k in names if len(WRITES[k].tensors) == len(write)), None)
    else:
        check_name(name)
    if name is None or len(WRITES[name].tensors) != len(write):
        allowed = [f"({', '.join(n for n, _ in w.tensors)}) ({k})" for k, w in WRITES.items()]
        raise UserError(f"write has {len(write)} tensors, but {', '.join(allowed)} are allowed")
    if name == "no-alpha" and alpha is not None:
        raise UserError("variant is 'no-alpha' and alpha is given: write alpha=None, or 'base'")
    return name


def check_kinds(like: Tensor, named: Mapping[str, Tensor | None], base: str = "kappa") -> None:
    """Refuse tensors whose dtype or device is not that of ``like``."""
    for name, tensor in named.items():
        if tensor is None or (tensor.dtype == like.dtype and tensor.device == like.device):
            continue
        raise UserError(
            f"{name} is {tensor.dtype} on {tensor.device} and {base} {like.dtype} on "
            f"{like.device}, but one dtype and device are needed: write {name}.to({base})"
        )


def check_state(
    kappa: Tensor, others: Mapping[str, Tensor | None], W: Tensor, v: Tensor, name: str = "v"
) -> None:
    """Check fast weights ``[P, B, n, n]`` and activations ``[P, B, n]`` against the parameters."""
    check_kinds(kappa, {"W": W, name: v})
    if W.dim() != 4 or W.shape[-1] != W.shape[-2]:
        raise UserError(
            f"W has shape {tuple(W.shape)}, but [P, B, n, n] is needed (rows post-synaptic); "
            "for one matrix pass W[None, None]"
        )
    if tuple(v.shape) != tuple(W.shape[:3]):
        raise UserError(
            f"{name} has shape {tuple(v.shape)}, but [P, B, n] = {tuple(W.shape[:3])} is needed "
            f"to go with W of shape {tuple(W.shape)}"
        )
    population, neurons = W.shape[0], W.shape[-1]
    if kappa.shape[0] != population:
        raise UserError(
            f"W has P = {population} and kappa P = {kappa.shape[0]}; share parameters with "
            "kappa.expand(P, -1, -1), or fold the trials of one parameter set into the axis B"
        )
    for label, tensor in others.items():
        if tensor is not None and tensor.shape[-1] != neurons:
            raise UserError(
                f"{label} has {tensor.shape[-1]} neurons and W has {neurons}: they must be equal"
            )


def _shaped(name: str, tensor: Tensor, dims: int, population: int) -> Tensor:
    if tensor.dim() == dims - 1 and population == 1:
        tensor = tensor.unsqueeze(0)
    square = dims == 2 or tensor.shape[-1] == tensor.shape[-2]
    if tensor.dim() != dims or tensor.shape[0] != population or not square:
        wanted = f"[{population}, n, n]" if dims == 3 else f"[{population}, n]"
        raise UserError(
            f"{name} has shape {tuple(tensor.shape)}, but {wanted} is needed: its first axis is "
            "that of kappa (it may be left out only when P = 1)"
        )
    return tensor


def folded(given: Parameters) -> tuple[Tensor | None, ...]:
    """``Rule.tensors`` of checked parameters (differentiable)."""
    alpha_t = None if given.alpha is None else given.alpha.mT.contiguous()
    return given.kappa, _composite(given.beta), alpha_t, *in_rows(given.write)


def in_rows(write: Tensors) -> Tensors:
    """U's tensors as rows are multiplied with them: see ``Rule``."""
    return tuple(t.mT.contiguous() if t.dim() == 3 else t.unsqueeze(1) for t in write)


def _composite(beta: Tensor) -> Tensor:
    depth = beta.shape[1]
    unit = torch.eye(depth + 1, dtype=beta.dtype, device=beta.device)
    rows = [unit[:1].expand(beta.shape[0], -1)]
    for s in range(1, depth + 1):
        entries = beta[:, s - 1, : s + 1].split(1, dim=1)
        row = entries[s] * unit[s]
        for coefficient, previous in zip(entries[:-1], rows, strict=True):
            row = torch.addcmul(row, coefficient, previous)
        rows.append(row)
    return torch.stack(rows, 1)
