"""Derivatives of fast weights and dense layers, in every way that torch has of asking for them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from esmeta import kernels, make_policy
from esmeta.types import Continuous, Spec, TimeStep

NAMES = ("W", "x", "alpha", "kappa", "beta", "W0")
P, B, N, S, T = 1, 2, 4, 2, 5
RESET = torch.zeros(T, P, B, dtype=torch.bool)
RESET[2, 0, 1] = True


def inputs(dtype: torch.dtype) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = (P, B, N, N), (T, P, B, N), (P, N, N), (P, S, S + 1), (P, S, S + 1), (P, N, N)
    return [(0.5 * torch.randn(s, generator=rng, dtype=torch.float64)).to(dtype) for s in shapes]


def scan(W: Tensor, x: Tensor, alpha: Tensor, kappa: Tensor, beta: Tensor, W0: Tensor) -> Any:
    return kernels.plastic_scan(W, x, alpha, kappa, beta, W0=W0, new_trial=RESET)


def loop(W: Tensor, x: Tensor, alpha: Tensor, kappa: Tensor, beta: Tensor, W0: Tensor) -> Any:
    """The same by the oracle, which torch differentiates as it likes."""
    outputs = []
    for t, row in enumerate(x):
        W = torch.where(RESET[t][..., None, None], W0.unsqueeze(1), W)
        y, W = kernels.plastic_reference(W, row, alpha, kappa, beta)
        outputs.append(y)
    return torch.stack(outputs), W


def steps(W: Tensor, x: Tensor, alpha: Tensor, kappa: Tensor, beta: Tensor, W0: Tensor) -> Any:
    """The same by single steps, which may overwrite W."""
    prepared = kernels.prepare(alpha, kappa, beta)
    outputs = []
    for t, row in enumerate(x):
        W = torch.where(RESET[t][..., None, None], W0.unsqueeze(1), W)
        y, W = kernels.step_prepared(prepared, W, row, in_place=True)
        outputs.append(y)
    return torch.stack(outputs), W


def close(got: Any, want: Any, dtype: torch.dtype) -> None:
    bound = 1e-12 if dtype == torch.float64 else 2e-5
    pairs = zip(*(x if isinstance(x, list | tuple) else [x] for x in (got, want)), strict=True)
    for one, other in pairs:
        assert other.norm() > 0 and (one - other).norm() <= bound * other.norm()


def loss(run: Callable[..., Any], dtype: torch.dtype, linear: bool) -> Callable[[Tensor], Tensor]:
    """A loss of alpha; linear in y, its gradient depends on y by the adjoint alone."""
    W, x, _, kappa, beta, W0 = inputs(dtype)

    def value(alpha: Tensor) -> Tensor:
        y, last = run(W, x, alpha, kappa, beta, W0)
        return (y if linear else (y - 1.0).square()).sum() + last.sum()

    return value


def dual(value: Callable[[Tensor], Tensor], at: Tensor) -> list[Tensor]:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(value(forward_ad.make_dual(at, torch.ones_like(at))))
        assert out.tangent is not None
        return [out.primal, out.tangent]


def adapted(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """MAML: the gradient of the loss behind one gradient step."""
    leaf = at.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(leaf), leaf, create_graph=True)
    value(leaf - 0.1 * first).backward()
    assert leaf.grad is not None
    return leaf.grad


def by_backward(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    leaf = at.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the cycle that this makes
        value(leaf).backward(create_graph=True)
    assert leaf.grad is not None
    return torch.autograd.grad(leaf.grad.square().sum(), leaf)[0]


functional = torch.autograd.functional
WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "maml": adapted,
    "backward twice": by_backward,
    "first order": lambda f, a: torch.autograd.grad(
        f(leaf := a.clone().requires_grad_()), leaf, create_graph=True
    ),
    "grad": lambda f, a: grad(f)(a),
    "jacrev": lambda f, a: jacrev(f)(a),
    "jacfwd": lambda f, a: jacfwd(f)(a),
    "hessian": lambda f, a: hessian(f)(a),
    "jvp": lambda f, a: jvp(f, (a,), (torch.ones_like(a),)),
    "dual numbers": dual,
    "vmap": lambda f, a: vmap(f)(torch.stack([a, 2 * a])),
    "vmap of grad": lambda f, a: vmap(grad(f))(torch.stack([a, 2 * a])),
    "batched gradients": lambda f, a: functional.hessian(f, a, vectorize=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_asking_has_the_right_numbers(way: str, dtype: torch.dtype) -> None:
    alpha = inputs(dtype)[2]
    for linear in (False, True):
        want = WAYS[way](loss(loop, dtype, linear), alpha)
        for run in (scan, steps):
            close(WAYS[way](loss(run, dtype, linear), alpha), want, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_second_order_by_one_input_alone(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        results = []
        for run in (scan, loop):
            given: dict[str, Any] = dict(zip(NAMES, inputs(dtype), strict=True))
            leaf = given[name].requires_grad_()
            y, _ = run(**given)
            (first,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad(first.square().sum(), leaf))
        close(results[0], results[1], dtype)


def test_gradients_of_gradients_agree_with_finite_differences() -> None:
    leaves = [leaf.requires_grad_() for leaf in inputs(torch.float64)]
    assert torch.autograd.gradcheck(scan, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(scan, leaves, fast_mode=True)


def test_an_input_made_of_another_is_not_counted_twice() -> None:
    def value(run: Callable[..., Any], W0: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(NAMES, inputs(torch.float64), strict=True))
        given |= {"W0": W0, "W": W0.unsqueeze(1).expand(P, B, N, N).sin()}
        return run(**given)[0].square().sum()

    results = []
    for run in (scan, loop):
        leaf = inputs(torch.float64)[5].requires_grad_()
        (first,) = torch.autograd.grad(value(run, leaf), leaf, create_graph=True)
        results.append((first, *torch.autograd.grad(first.square().sum(), leaf)))
    close(results[0], results[1], torch.float64)


def test_last_weights_alone_and_what_no_output_depends_on() -> None:
    W, x, alpha, kappa, beta, W0 = inputs(torch.float64)
    kappa.requires_grad_()
    _, last = kernels.plastic_scan(W, x[:1], alpha, kappa[:, :1, :2], beta[:, :1, :2])
    # One round reads behind what it writes, so kappa does not reach W.
    (found,) = torch.autograd.grad(last.sum(), kappa, create_graph=True)
    assert torch.equal(found, torch.zeros_like(kappa))


def dense_loss(compiled: bool, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    rng = torch.Generator().manual_seed(1)
    x, second = (torch.randn(s, generator=rng).to(dtype) for s in ((2, 4, 3), (2, 5, 2)))
    biases = tuple(torch.randn(2, n, generator=rng).to(dtype) for n in (5, 2))

    def value(first: Tensor) -> Tensor:
        if compiled:
            net = kernels.network((first, second), biases, True)
            return kernels.dense(net, x[..., :1], x[..., 1:]).square().sum()
        hidden = torch.tanh(x @ first + biases[0].unsqueeze(1))
        return torch.tanh(hidden @ second + biases[1].unsqueeze(1)).square().sum()

    return value


@pytest.mark.parametrize("way", WAYS)
def test_dense_layers(way: str) -> None:
    first = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2))
    got = WAYS[way](dense_loss(True, torch.float32), first)
    want = WAYS[way](dense_loss(False, torch.float64), first.double())
    wide = [x.double() for x in (got if isinstance(got, list | tuple) else [got])]
    close(wide, want if isinstance(want, list | tuple) else [want], torch.float32)


SPEC = Spec(3, Continuous(2, -1.0, 1.0), 6)


@pytest.mark.parametrize("name", ["metods", "rl2", "lstm", "mlp"])
def test_second_order_through_a_policy(name: str) -> None:
    """MAML on theta of a whole policy, against a finite difference in float64."""
    policy = make_policy(name, SPEC, neurons=4, hidden=(4,), head_hidden=4)
    rng = torch.Generator().manual_seed(3)
    shape = (6, 1, 2)
    no = torch.zeros(shape, dtype=torch.bool)
    obs, action = (torch.randn(*shape, k, generator=rng, dtype=torch.float64) for k in (3, 2))
    ts = TimeStep(obs, action, torch.randn(shape, generator=rng).double(), no, no, no, no)
    start = {k: v.double() for k, v in policy.init(0).items()}
    bend = {k: torch.randn(v.shape, generator=rng).double() for k, v in start.items()}
    start = {k: v + 0.3 * bend[k] for k, v in start.items()}

    def loss_of(params: dict[str, Tensor]) -> Tensor:
        out, _ = policy.unroll(params, policy.initial_state(params, 2), ts)
        assert out.mean is not None
        return (out.mean - 1.0).square().sum()

    def meta(params: dict[str, Tensor]) -> Tensor:
        found = torch.autograd.grad(loss_of(params), list(params.values()), create_graph=True)
        return loss_of({k: v - 0.01 * g for (k, v), g in zip(params.items(), found, strict=True)})

    leaves = {k: v.clone().requires_grad_() for k, v in start.items()}
    found = torch.autograd.grad(meta(leaves), list(leaves.values()))
    slope = sum(float((g * bend[k]).sum()) for k, g in zip(leaves, found, strict=True))
    ends = [
        meta({k: (v + s * 1e-6 * bend[k]).requires_grad_() for k, v in start.items()}).item()
        for s in (1, -1)
    ]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_overwritten_weights_are_told_to_who_kept_them() -> None:
    W, x, alpha, kappa, beta, _ = inputs(torch.float32)
    W = W.mT.contiguous().mT  # laid out as steps leave it, so that it is overwritten
    leaf = torch.ones((), requires_grad=True)
    kept = (W * leaf).sum()
    before = W.clone()
    with torch.no_grad():
        prepared = kernels.prepare(alpha, kappa, beta)
        kernels.step_prepared(prepared, W, x[0], in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    # Where a gradient is asked for, W stays.
    W = before.mT.contiguous().mT.requires_grad_()
    y, _ = kernels.step_prepared(prepared, W, x[0], in_place=True)
    assert torch.equal(W, before)
    y.sum().backward()


def test_what_is_prepared_without_a_graph_has_no_half_of_one() -> None:
    W, x, alpha, kappa, beta, _ = (leaf.requires_grad_() for leaf in inputs(torch.float32))
    W, x = W.detach(), x.detach()
    policy = make_policy("rl2", SPEC, neurons=4)
    params = {k: v.requires_grad_() for k, v in policy.init(0).items()}
    with torch.no_grad():
        prepared, bound = kernels.prepare(alpha, kappa, beta), policy.bind(params)
    y, last = kernels.step_prepared(prepared, W, x[0])
    assert not y.requires_grad and not last.requires_grad
    ts = TimeStep(torch.ones(1, 2, 3), torch.ones(1, 2, 2), *[torch.zeros(1, 2)] * 5)
    out, _ = policy.step_bound(bound, policy.initial_state(params, 2), ts)
    assert out.mean is not None and not out.mean.requires_grad


def test_what_torch_records_holds_the_steps() -> None:
    W, x, alpha, kappa, beta, _ = inputs(torch.float32)
    prepared = kernels.prepare(alpha, kappa, beta)

    def step(W: Tensor) -> Any:
        return kernels.step_prepared(prepared, W, x[0], in_place=True)

    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is going out of use
        recorded: list[Any] = [torch.jit.trace(step, (W,)), make_fx(step)(W)]
    for program in recorded:
        close(list(program(W + 1)), list(step(W + 1)), torch.float32)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        y, _ = step(fake.from_tensor(W))
    assert y.shape == (P, B, N)
