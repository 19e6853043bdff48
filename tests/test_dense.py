"""Compiled dense layers: exact to float32, with gradients; bits depend on nothing but the row."""

from __future__ import annotations

import pytest
import torch
from fences import stay_inside
from torch import Tensor

from esmeta.kernels import dense, network

# (widths of the input and the layers, tanh behind the last): below, at and between eights.
SIZES = [([1, 1], False), ([11, 12, 12], False), ([24, 8, 2], True), ([30, 64, 33, 7], True)]


def layers(widths: list[int], members: int = 3) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rng = torch.Generator().manual_seed(sum(widths))
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    weights = tuple(torch.randn(members, a, b, generator=rng) / a**0.5 for a, b in pairs)
    return weights, tuple(torch.randn(members, b, generator=rng) for _, b in pairs)


def plainly(
    x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...], squash: bool
) -> Tensor:
    for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x @ weight + bias.unsqueeze(1)
        x = torch.tanh(x) if k < len(weights) - 1 or squash else x
    return x


def inputs(widths: list[int], rows: int = 13) -> Tensor:
    return torch.randn(3, rows, widths[0], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("widths", "squash"), SIZES)
def test_output_and_gradients_are_exact_to_float32(widths: list[int], squash: bool) -> None:
    weights, biases = layers(widths)
    leaves = [t.requires_grad_() for t in (inputs(widths), *weights, *biases)]
    got = dense(network(weights, biases, squash), leaves[0])
    twins = [t.detach().double().requires_grad_() for t in leaves]
    count = len(weights) + 1
    want = plainly(twins[0], tuple(twins[1:count]), tuple(twins[count:]), squash)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, rtol=0, atol=2e-6)
    factor = torch.linspace(-1, 1, got.numel()).reshape(got.shape)
    grads = torch.autograd.grad((got * factor).sum(), leaves)
    exact = torch.autograd.grad((want * factor).sum(), twins)
    for grad, right in zip(grads, exact, strict=True):
        assert (grad.double() - right).norm() <= 1e-5 * right.norm()


def test_gradients_of_gradients() -> None:
    widths = [5, 8, 3]
    weights, biases = layers(widths)
    leaves = [t.requires_grad_() for t in (inputs(widths), *weights, *biases)]
    results = []
    for double in (False, True):
        here = [
            t.detach().to(torch.float64 if double else t.dtype).requires_grad_() for t in leaves
        ]
        x, w, b = here[0], tuple(here[1:3]), tuple(here[3:])
        y = plainly(x, w, b, True) if double else dense(network(w, b, True), x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), here))
    for got, want in zip(*results, strict=True):
        assert want.norm() > 0 and (got.double() - want).norm() <= 1e-5 * want.norm()


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    weights, biases = layers([4, 3])
    x = inputs([4])
    leaf = weights[0].requires_grad_()
    dense(network(weights, biases, False), x).sum().backward()
    assert leaf.grad is not None and x.grad is None
    with torch.no_grad():
        assert not dense(network(weights, biases, False), x).requires_grad


@pytest.mark.parametrize(("widths", "squash"), SIZES)
def test_a_row_depends_on_nothing_but_the_row(widths: list[int], squash: bool) -> None:
    weights, biases = layers(widths)
    net, x = network(weights, biases, squash), inputs(widths)
    whole = dense(net, x)
    for rows in (1, 2, 3, 4, 5, 12):
        assert torch.equal(dense(net, x[:, :rows]), whole[:, :rows])
    one = network(tuple(w[1:2] for w in weights), tuple(b[1:2] for b in biases), squash)
    assert torch.equal(dense(one, x[1:2]), whole[1:2])
    cuts = [1, widths[0] // 2, widths[0] - 1 - widths[0] // 2]
    parts = x.split([c for c in cuts if c > 0], -1) if widths[0] > 1 else (x,)
    assert torch.equal(dense(net, *parts), whole)
    assert torch.equal(dense(net, *(part.expand_as(part) for part in parts)), whole)
    leaf = x.clone().requires_grad_()
    assert torch.equal(dense(net, leaf), whole)


FENCED = """
import sys
import torch
from fences import fenced
from esmeta.kernels import _cpu_build, _dense
from test_dense import inputs, layers

more = int(sys.argv[1])
for widths, squash in (([11, 12, 9], False), ([5, 3, 8], True), ([16, 16], False)):
    weights, biases = layers(widths)
    x = inputs(widths, 7)
    net = _dense.network(weights, biases, squash)
    want, hidden = _dense._run(net, (x,), True)
    for at_end in (True, False):
        close = net._replace(padded=tuple(fenced(t, at_end) for t in net.padded))
        parts = [fenced(t, at_end) for t in x.split([2, widths[0] - 2], -1)]
        blank, _dense.blank = _dense.blank, lambda *shape: fenced(blank(*shape), at_end)
        function = _cpu_build.function
        _cpu_build.function = lambda *size: (
            lambda table, low, high: function(*size)(table, low, high + more)
        )
        y, kept = _dense._run(close, parts, True)
        _dense.blank, _cpu_build.function = blank, function
        assert torch.equal(y, want) and all(map(torch.equal, kept, hidden))
"""


def test_nothing_is_read_or_written_out_of_bounds() -> None:
    stay_inside(FENCED, ())
