"""Networks of dense layers with tanh between them, on a CPU in float32 by one compiled function.

Bits of a row depend on nothing but the row, so that a rollout, its recorded sequence and any split
of trials agree exactly.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import pad

from esmeta.errors import UserError
from esmeta.kernels import _cpu_build
from esmeta.kernels._cpu_run import CONSTANTS, LANES, TOGETHER, address, blank, plain, run_blocks
from esmeta.modes import exact, followed

_CONSTANTS = address(CONSTANTS)


class Network(NamedTuple):
    """Layers ready to apply: ``weights`` ``[P, K, N]``, ``biases`` ``[P, N]`` as they were given.

    ``padded`` are the same in the memory that the function reads; ``squash``: tanh behind the last.
    ``work`` are the multiply-adds of a row.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    squash: bool
    padded: tuple[Tensor, ...]
    places: tuple[tuple[int, int], ...]
    """Addresses of ``padded``, by layer."""
    widths: tuple[int, ...]
    """Of every layer."""
    work: int

    def __reduce__(self) -> tuple[Any, ...]:
        return network, (self.weights, self.biases, self.squash)  # addresses are not copied


def network(weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], squash: bool) -> Network:
    """Pad float32 layers on the CPU and compile what they need for an input in one part."""
    _check_layers(weights, biases)
    if not torch.is_grad_enabled():
        weights, biases = (tuple(t.detach() for t in leaves) for leaves in (weights, biases))
    widths = tuple(weight.shape[2] for weight in weights)
    work = sum(weight.shape[1] * weight.shape[2] for weight in weights)
    if followed():
        return Network(weights, biases, squash, (), (), widths, work)
    padded = []
    for pair in zip(weights, biases, strict=True):
        for tensor in pair:
            short = -tensor.shape[-1] % LANES
            padded.append(pad(tensor.detach(), (0, short)) if short else plain(tensor))
    _cpu_build.function("dense", int(squash), 1, weights[0].shape[1], *widths)
    pointers = [address(tensor) for tensor in padded]
    places = tuple(zip(pointers[0::2], pointers[1::2], strict=True))
    return Network(weights, biases, squash, tuple(padded), places, widths, work)


def dense(net: Network, *parts: Tensor) -> Tensor:
    """Parts of the input ``[P, M, K_i]`` to ``[P, M, N]``; K is the sum of the K_i.

    Differentiable in everything, as often as wanted. The same bits however the input is parted.
    """
    _check_parts(net, parts)
    if followed() or not net.places:
        return _outputs(torch.cat(parts, -1), net.weights, net.biases, net.squash)[-1]
    if torch.is_grad_enabled():
        leaves = (*net.weights, *net.biases)
        if any(t.requires_grad for t in (*parts, *leaves)):
            return _Dense.apply(net, torch.cat(parts, -1), *leaves)
    return _run(net, parts, False)[0]


def _run(net: Network, parts: Sequence[Tensor], keep: bool) -> tuple[Tensor, list[Tensor]]:
    """The output, and if they are kept the outputs of the layers before the last."""
    population, batch, _ = parts[0].shape
    widths = net.widths
    # This is called between the steps of a simulator, when nothing is in the caches: every
    # operation that is not done counts.
    parts = [p if p.is_contiguous() and not p.is_neg() else plain(p) for p in parts]
    shares = [part.shape[2] for part in parts]
    y = blank(population, batch, widths[-1])
    hidden = [blank(population, batch, n) for n in widths[:-1]] if keep else []
    table = array("q", map(address, parts))
    table.extend((address(y), _CONSTANTS))
    for k, place in enumerate(net.places):
        table.extend((*place, address(hidden[k]) if k < len(hidden) else 0))
    table.extend((population, batch, int(keep)))
    call = _cpu_build.function("dense", int(net.squash), len(shares), *shares, *widths)
    run_blocks(call, table, population * -(-batch // TOGETHER), population * batch * net.work)
    return y, hidden


def _check_layers(weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> None:
    """Refuse layers that do not go together, whose memory could not be read safely."""
    given = [tuple(tensor.shape) for pair in zip(weights, biases, strict=True) for tensor in pair]
    population, rows = weights[0].shape[0], weights[0].shape[1]
    fitting: list[tuple[int, ...]] = []
    for weight in weights:
        fitting += [(population, rows, weight.shape[-1]), (population, weight.shape[-1])]
        rows = weight.shape[-1]
    if given != fitting:
        raise UserError(
            f"weights and biases of a network have shapes {given}, but [P, K, N] and [P, N] with "
            f"one P and each K the N before are needed: {fitting}"
        )
    _check_kind(*weights, *biases)


def _check_parts(net: Network, parts: Sequence[Tensor]) -> None:
    lead = (len(net.weights[0]), parts[0].shape[1])
    width = sum(part.shape[2] for part in parts if part.shape[:2] == lead)
    if width != net.weights[0].shape[1]:
        raise UserError(
            f"the parts of the input have shapes {[tuple(part.shape) for part in parts]}, but "
            f"[P, M, K_i] with P = {lead[0]} and K = {net.weights[0].shape[1]} in all is needed"
        )
    _check_kind(*parts)


def _check_kind(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu:
            raise UserError(
                f"a tensor of the network is {tensor.dtype} on {tensor.device}, but compiled "
                "layers are float32 on the CPU: write tensor.float().cpu()"
            )


class _Context(FunctionCtx):
    net: Network
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _Dense(torch.autograd.Function):
    """The network with its gradient in torch operations."""

    @staticmethod
    def forward(ctx: _Context, net: Network, x: Tensor, *leaves: Tensor) -> Tensor:
        y, hidden = _run(net, (x,), True)
        ctx.net = net
        ctx.save_for_backward(x, *leaves, *hidden, y)
        return y

    @staticmethod
    @exact
    def backward(ctx: _Context, *grads: Any) -> tuple[Tensor | None, ...]:
        layers = len(ctx.net.weights)
        x, *rest = ctx.saved_tensors
        weights, biases, outs = rest[:layers], rest[layers : 2 * layers], rest[2 * layers :]
        if torch.is_grad_enabled():
            # For a gradient of this gradient the layers' outputs must know where they come from.
            outs = _outputs(x, weights, biases, ctx.net.squash)
        inputs = [x, *outs[:-1]]
        grad = cast(Tensor, grads[0])
        weight_grads, bias_grads = [], []
        for k in reversed(range(layers)):
            if k < layers - 1 or ctx.net.squash:
                grad = grad * (1 - outs[k] * outs[k])
            weight_grads.append(torch.bmm(inputs[k].mT, grad))
            bias_grads.append(grad.sum(1))
            if k > 0 or ctx.needs_input_grad[1]:
                grad = torch.bmm(grad, weights[k].mT)
        grad_x = grad if ctx.needs_input_grad[1] else None
        return None, grad_x, *weight_grads[::-1], *bias_grads[::-1]


@exact
def _outputs(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], squash: bool
) -> list[Tensor]:
    outs = []
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.baddbmm(bias.unsqueeze(1), x, weight)
        x = torch.tanh(x) if k < len(weights) - 1 or squash else x
        outs.append(x)
    return outs
