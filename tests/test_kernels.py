"""The plastic recurrence: Algorithm 1, finite differences, hand-computed numbers and bits."""

import importlib.util
import itertools
from math import ceil, tanh
from pathlib import Path

import pytest
import torch

from esmeta.kernels import (
    _dispatch,
    explain,
    plastic_reference,
    plastic_scan,
    plastic_step,
    prepare,
    step_prepared,
)
from esmeta.kernels._writes import WRITES, Write

VARIANTS = ["base", "no-alpha", "linear", "mlp"]
SPEC = importlib.util.spec_from_file_location(
    "scan_memory", Path(__file__).parent / "bench" / "scan_memory.py"
)
scan_memory = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scan_memory)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Case:
    """Random parameters near the identity, so that what is written long ago still matters."""

    def __init__(self, variant, P, B, n, S, T=1, per_trial=False, dtype=torch.float64, seed=0):
        rng = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            values = torch.randn(*shape, generator=rng, dtype=torch.float64) * scale
            return values.to(dtype)

        self.W = normal(P, B, n, n, scale=0.5 / n**0.5)
        self.x = normal(T, P, B, n)
        self.alpha = None if variant == "no-alpha" else normal(P, n, n, scale=0.1)
        self.kappa, self.beta = normal(P, S, S + 1, scale=0.1), normal(P, S, S + 1, scale=0.1)
        for s in range(1, S + 1):
            self.kappa[:, s - 1, s] += 1
            self.beta[:, s - 1, s - 1] += 1
        if variant == "no-alpha":
            for s in range(1, S + 1):
                self.beta[:, s - 1, s] *= 0.3
        self.W0 = normal(P, *((B,) if per_trial else ()), n, n, scale=0.5 / n**0.5)
        self.new_trial = torch.rand(T, P, B, generator=rng) < 0.3
        eye, small = torch.eye(n, dtype=dtype), 1 / n**0.5
        self.write = {
            "linear": lambda: (eye + normal(P, n, n, scale=0.1),),
            "mlp": lambda: (
                normal(P, n, n, scale=small),
                normal(P, n, scale=0.1),
                normal(P, n, n, scale=small),
                normal(P, n, scale=0.1),
            ),
        }.get(variant, tuple)()

    @property
    def inputs(self):
        first = (self.W, self.x, self.kappa, self.beta, self.W0)
        return [*first, *(() if self.alpha is None else (self.alpha,)), *self.write]

    def with_inputs(self, inputs):
        self.W, self.x, self.kappa, self.beta, self.W0, *rest = inputs
        if self.alpha is not None:
            self.alpha, *rest = rest
        self.write = tuple(rest)

    def require_grad(self):
        for tensor in self.inputs:
            tensor.requires_grad_()
        return self

    def step(self, function, W, v):
        return function(W, v, self.alpha, self.kappa, self.beta, write=self.write)

    def loop(self, function):
        W, outputs = self.W, []
        start = self.W0 if self.W0.dim() == 4 else self.W0.unsqueeze(1)
        for v, mask in zip(self.x, self.new_trial, strict=True):
            y, W = self.step(function, torch.where(mask[..., None, None], start, W), v)
            outputs.append(y)
        return torch.stack(outputs), W

    def scan(self, **options):
        return plastic_scan(
            *(self.W, self.x, self.alpha, self.kappa, self.beta),
            **{"W0": self.W0, "new_trial": self.new_trial, "write": self.write, **options},
        )


def relative_error(value, expected):
    value, expected = value.detach(), expected.detach()
    return float((value - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def backward(outputs, inputs):
    rng = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=rng, dtype=torch.float64) for o in outputs]
    total = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs)


# Numbers by hand -------------------------------------------------------------------------------


def scalars(rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("function", [plastic_reference, plastic_step])
def test_one_neuron_by_hand(function):
    W, v = scalars([[[[0.5]]]]), scalars([[[2.0]]])
    alpha, kappa, beta = scalars([[0.1]]), scalars([[0.5, 2.0]]), scalars([[0.9, 3.0]])
    y, after = function(W, v, alpha, kappa, beta)
    assert float(y) == pytest.approx(2.5231883119115297, abs=1e-14)
    # 0.9 * 0.5 + 3 * 0.1 * 2 * 2: the write sees v^(0) = 2, not v^(1) = 2.52.
    assert float(after) == pytest.approx(1.65, abs=1e-14)
    kappa, beta = (
        scalars([[0.5, 2.0, 9.0], [0.25, -1.0, 3.0]]),
        scalars([[0.9, 3.0, 9.0], [0.2, 0.7, 2.0]]),
    )
    y, after = function(W, v, alpha, kappa, beta)
    assert float(y) == pytest.approx(0.9753599647852211, abs=1e-13)
    assert float(after) == pytest.approx(2.5282958514733913, abs=1e-13)


@pytest.mark.parametrize("function", [plastic_reference, plastic_step])
def test_presynaptic_factor_by_hand(function):
    W, v, alpha = scalars([[[[0.0]]]]), scalars([[[2.0]]]), scalars([[0.5]])
    rows = scalars([[0.0, 1.0]])
    one, half = scalars([[[1.0]]]), scalars([[0.5]])
    assert float(function(W, v, alpha, rows, rows, write=(3 * one,))[1]) == pytest.approx(6.0)
    # alpha v (W2 tanh(W1 v + b1) + b2) = 0.5 * 2 * (4 tanh(2.5) + 0.5)
    mlp = (one, half, 4 * one, half)
    expected = 4 * tanh(2.5) + 0.5
    assert float(function(W, v, alpha, rows, rows, write=mlp)[1]) == pytest.approx(expected)


def test_rows_are_postsynaptic():
    W = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    W[0, 0, 1, 0] = 1.0
    v = scalars([[[1.0, 0.0]]])
    alpha = scalars([[1.0, 2.0], [3.0, 4.0]])
    for function in (plastic_reference, plastic_step):
        rows, A = scalars([[0.0, 1.0]]), scalars([[0.0, 0.0], [1.0, 0.0]])
        y, after = function(W, v, alpha, rows, rows, write=(A,))
        assert y.flatten().tolist() == pytest.approx([0.0, tanh(1.0)])
        # post v = (1, 0), pre A v = (0, 1): only entry (0, 1), scaled by alpha[0, 1] = 2.
        assert after.flatten().tolist() == pytest.approx([0.0, 2.0, 0.0, 0.0])


# Against Algorithm 1 ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [1, 5, 20, 33])
def test_step_and_scan_equal_the_reference(variant, n):
    sizes = [(1, 1), (1, 3), (3, 1), (2, 17)]
    for S, (P, B) in itertools.product(range(1, 6), sizes):
        case = Case(variant, P, B, n, S, T=5, per_trial=(S + B) % 2 == 0, seed=S)
        expected = case.loop(plastic_reference)
        with torch.no_grad():
            results = [case.loop(plastic_step), case.scan()]
        for got, want in itertools.chain(*(zip(r, expected, strict=True) for r in results)):
            assert got.shape == want.shape
            assert relative_error(got, want) < 1e-12, (S, P, B)


def test_composite_matrices_of_every_round():
    # With kappa[s,s] = 1 alone, v^(s) = tanh(W^(s-1) v^(s-1)) exposes every composite product.
    case = Case("base", 2, 3, 7, 4)
    for S in range(1, 5):
        kappa, beta = torch.zeros(2, S, S + 1, dtype=torch.float64), case.beta[:, :S, : S + 1]
        for s in range(S):
            kappa[:, s, s + 1] = 1
        got = plastic_step(case.W, case.x[0], case.alpha, kappa, beta)
        want = plastic_reference(case.W, case.x[0], case.alpha, kappa, beta)
        assert relative_error(got[0], want[0]) < 1e-13
        assert relative_error(got[1], want[1]) < 1e-13


def test_population_axis_may_be_left_out_when_it_is_one():
    case = Case("linear", 1, 3, 5, 2)
    short = plastic_step(
        *(case.W, case.x[0], case.alpha[0], case.kappa[0], case.beta[0]),
        write=(case.write[0][0],),
    )
    full = case.step(plastic_step, case.W, case.x[0])
    assert all(torch.equal(a, b) for a, b in zip(short, full, strict=True))


# Gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("S", [1, 2, 3])
def test_scan_gradients_equal_finite_differences(variant, S):
    case = Case(variant, 2, 2, 2, S, T=4, per_trial=S == 2).require_grad()

    def function(*inputs):
        case.with_inputs(inputs)
        return case.scan(store_every=3)

    assert case.new_trial[1:].any()
    assert torch.autograd.gradcheck(function, tuple(case.inputs), atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("per_trial", [False, True])
def test_gradients_equal_autograd_through_the_reference(variant, per_trial):
    for S, (P, B), every in [(1, (1, 3), 1), (2, (2, 3), None), (3, (3, 1), 4), (5, (1, 2), 99)]:
        case = Case(variant, P, B, 6, S, T=9, per_trial=per_trial, seed=S).require_grad()
        want = backward(case.loop(plastic_reference), case.inputs)
        for outputs in (case.loop(plastic_step), case.scan(store_every=every)):
            for got, expected in zip(backward(outputs, case.inputs), want, strict=True):
                assert relative_error(got, expected) < 1e-10, (S, every)


def test_gradient_of_one_output_alone_and_without_resets():
    case = Case("base", 2, 3, 5, 2, T=6).require_grad()
    case.new_trial = torch.zeros_like(case.new_trial)
    inputs = [case.W, case.x, case.kappa, case.beta, case.alpha]
    for chosen in (0, 1):
        want = backward([case.loop(plastic_reference)[chosen]], inputs)
        got = backward([case.scan(W0=None, new_trial=None)[chosen]], inputs)
        for g, w in zip(got, want, strict=True):
            assert relative_error(g, w) < 1e-10
    assert not any(g.any() for g in torch.autograd.grad(case.scan()[0].sum(), [case.W0]))


def test_only_some_inputs_require_grad():
    case = Case("base", 1, 3, 5, 2, T=6)
    case.alpha.requires_grad_()
    want = backward(case.loop(plastic_reference), [case.alpha])
    assert relative_error(backward(case.scan(), [case.alpha])[0], want[0]) < 1e-10


def test_backward_is_deterministic():
    case = Case("base", 2, 5, 20, 2, T=10, dtype=torch.float32).require_grad()
    first, second = (backward(case.scan(), case.inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_entries_beyond_the_round_are_ignored(variant):
    case = Case(variant, 2, 3, 5, 3, T=5)
    clean = case.scan()
    beyond = torch.ones(3, 4).triu(2).bool()
    case.kappa[:, beyond] = torch.nan
    case.beta[:, beyond] = torch.nan
    case.require_grad()
    for outputs in (case.scan(), case.loop(plastic_step), case.loop(plastic_reference)):
        assert all(relative_error(a, b) < 1e-12 for a, b in zip(outputs, clean, strict=True))
        gradients = backward(outputs, case.inputs)
        assert all(g.isfinite().all() for g in gradients)
        for gradient in gradients[2:4]:
            assert not gradient[:, beyond].any()
            assert gradient[:, ~beyond].all()


# Bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scan_is_bit_for_bit_a_loop_of_steps(variant, dtype):
    # In float32 every size is compiled, so there are fewer.
    few = dtype == torch.float32 and variant != "mlp"
    depths, widths = ((1, 3), (5, 20)) if few else ((1, 2, 4), (1, 5, 20, 33))
    for S, (P, B), n in itertools.product(depths, [(1, 1), (2, 3), (1, 20)], widths):
        case = Case(variant, P, B, n, S, T=5, dtype=dtype).require_grad()
        with_grad, looped = case.scan(), case.loop(plastic_step)
        with torch.no_grad():
            consts = prepare(case.alpha, case.kappa, case.beta, case.write)
            prepared = case.loop(lambda W, v, *_, c=consts, **__: step_prepared(c, W, v))
            others = [case.scan(), case.loop(plastic_step), looped, prepared]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(with_grad, other, strict=True))


def test_layout_of_the_fast_weights_does_not_change_bits():
    case = Case("base", 2, 4, 20, 2, dtype=torch.float32)
    transposed = case.W.mT.contiguous().mT
    first = case.step(plastic_step, case.W, case.x[0])
    second = case.step(plastic_step, transposed, case.x[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [1, 5, 20, 33])
def test_bits_do_not_depend_on_the_split_of_the_batch(variant, n):
    P, B, S, T = 3, 37, 3 if n < 33 else 2, 3
    case = Case(variant, P, B, n, S, T=T, dtype=torch.float32)
    y, W = case.scan()
    blocks = [(slice(p, q), slice(a, b)) for p, q, a, b in SPLITS]
    for members, trials in blocks:
        part_y, part_W = plastic_scan(
            case.W[members, trials],
            case.x[:, members, trials],
            None if case.alpha is None else case.alpha[members],
            case.kappa[members],
            case.beta[members],
            W0=case.W0[members],
            new_trial=case.new_trial[:, members, trials],
            write=tuple(tensor[members] for tensor in case.write),
        )
        assert torch.equal(part_y, y[:, members, trials]), (members, trials)
        assert torch.equal(part_W, W[members, trials]), (members, trials)


SPLITS = [
    (0, 1, 0, 37),
    (1, 3, 0, 37),
    (0, 3, 0, 1),
    (0, 3, 5, 7),
    (1, 2, 3, 6),
    (1, 2, 30, 37),
    (2, 3, 1, 17),
    (2, 3, 20, 37),
    (0, 2, 0, 15),
    (2, 3, 36, 37),
]


# Rules by name ---------------------------------------------------------------------------------


def gain(write, v):
    return write[0] * v, None


GAIN = Write(
    (("g", 2),),
    gain,
    back=lambda write, _, grad: write[0] * grad,
    gradients=lambda write, v, _, grad: ((v * grad).sum(1, keepdim=True),),
    fused=(),
)


def test_one_more_rule_is_one_entry(monkeypatch):
    monkeypatch.setitem(WRITES, "gain", GAIN)
    case = Case("base", 2, 3, 5, 3, T=6).require_grad()
    g = (1 + torch.arange(10.0, dtype=torch.float64).view(2, 5) / 10).requires_grad_()
    inputs = [*case.inputs, g]
    with pytest.raises(ValueError, match="A has shape"):
        case.scan(write=(g,))  # without a name, one tensor is the A of linear
    got = case.scan(write=(g,), variant="gain")
    want = case.scan(write=(torch.diag_embed(g),))  # U(v) = diag(g) v
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(got, want, strict=True))
    for a, b in zip(backward(got, inputs), backward(want, inputs), strict=True):
        assert relative_error(a, b) < 1e-12
    options = {"write": (g,), "variant": "gain"}
    step = [case.W, case.x[0], case.alpha, case.kappa, case.beta]
    exact = plastic_reference(*step, **options)
    assert all(map(torch.allclose, plastic_step(*step, **options), exact))
    assert "not know the write variant gain" in explain("cpu", 5, 3, variant="gain")


def test_a_rule_is_told_by_its_name():
    case = Case("linear", 1, 2, 3, 1)
    rule = prepare(case.alpha, case.kappa, case.beta, case.write)
    assert rule.name == "linear"
    assert prepare(None, case.kappa, case.beta).name == "no-alpha"
    assert prepare(None, case.kappa, case.beta, case.write).name == "linear"
    for name, message in [("cubic", "must be one of base"), ("mlp", "write has 1 tensors")]:
        with pytest.raises(ValueError, match=message):
            prepare(case.alpha, case.kappa, case.beta, case.write, variant=name)
    with pytest.raises(ValueError, match="alpha=None"):
        prepare(case.alpha, case.kappa, case.beta, variant="no-alpha")


# Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 3])
def test_memory_kept_for_backward_follows_the_formula(S):
    P, B, n = 1, 4, 32
    saved = {T: scan_memory.saved_bytes("scan", P, B, n, S, T) for T in (256, 1024)}

    def bound(T):
        checkpoints = ceil(T / ceil(T**0.5))
        return 4 * P * B * (T * (S + 1) * n + checkpoints * n * n)

    parameters = 4 * P * (n * n + 10 * (S + 1) ** 2)
    assert saved[256] <= bound(256) + parameters
    assert saved[1024] - saved[256] == bound(1024) - bound(256)
    plain = scan_memory.saved_bytes("autograd", P, B, n, S, 256)
    assert plain > 256 * 4 * P * B * n * n > 4 * saved[256]


# Errors and words ------------------------------------------------------------------------------


def test_bad_input_says_what_to_do():
    case = Case("base", 2, 3, 5, 2, T=4)
    W, x, alpha, kappa, beta = case.W, case.x, case.alpha, case.kappa, case.beta
    step = [
        ("depth S >= 1", (W, x[0], alpha, kappa[:, :0, :1], beta[:, :0, :1])),
        ("pass W\\[None, None\\]", (W[0, 0], x[0], alpha, kappa, beta)),
        ("v has shape", (W, x[0, :, :2], alpha, kappa, beta)),
        ("alpha has shape", (W, x[0], alpha[:1], kappa, beta)),
        ("alpha has 4 neurons", (W, x[0], alpha[:, :4, :4], kappa, beta)),
        ("same depth", (W, x[0], alpha, kappa, beta[:, :1, :2])),
        ("kappa.expand", (W, x[0], alpha[:1], kappa[:1], beta[:1])),
    ]
    for message, arguments in step:
        for function in (plastic_step, plastic_reference):
            with pytest.raises(ValueError, match=message):
                function(*arguments)
    with pytest.raises(ValueError, match="write has 2 tensors"):
        plastic_step(W, x[0], alpha, kappa, beta, write=(alpha, alpha))
    new_trial = torch.ones_like(case.new_trial)
    scan = [
        ("W0 is None", {"new_trial": new_trial}),
        ("W0 has shape", {"new_trial": new_trial, "W0": case.W0[:1]}),
        ("new_trial is", {"new_trial": new_trial[0], "W0": case.W0}),
        ("store_every is 0", {"store_every": 0}),
    ]
    for message, options in scan:
        with pytest.raises(ValueError, match=message):
            plastic_scan(W, x, alpha, kappa, beta, **options)
    with pytest.raises(ValueError, match="T >= 1"):
        plastic_scan(W, x[:0], alpha, kappa, beta)
    nothing_new = torch.zeros_like(new_trial)
    assert plastic_scan(W, x, alpha, kappa, beta, new_trial=nothing_new)[0].shape == x.shape


def test_explain_names_the_path(monkeypatch):
    assert explain("cpu", 20, 2).startswith("compiled CPU kernel on cpu (n=20, S=2, base, float32)")
    assert "hand-written" in explain("cpu", 20, 2, requires_grad=True)
    assert explain("cuda:1", 20, 2).endswith("no gradient is asked for, so nothing is kept")
    for why in ("not for float64", "not know the write variant mlp", "no fused kernel for mps"):
        device = "mps" if "mps" in why else "cpu"
        dtype = torch.float64 if "float64" in why else torch.float32
        text = explain(device, 20, 2, variant="mlp" if "mlp" in why else "base", dtype=dtype)
        assert text.startswith(f"torch operations on {device}") and why in text
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: False)
    assert explain("cuda", 20, 2).endswith(
        "which is not installed: pip install triton; no gradient is asked for, so nothing is kept"
    )
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    assert explain("cuda", 20, 2).startswith("Triton kernel on cuda (n=20, S=2, base, float32)")
    assert "\n" not in explain("cuda", 200, 4, variant="mlp")
    with pytest.raises(ValueError, match="base, linear, mlp, no-alpha"):
        explain("cpu", 20, 2, variant="cubic")
