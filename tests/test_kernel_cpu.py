"""The compiled CPU kernel: accuracy in float32, what it does with bad numbers, threads, layouts."""

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import environment
from numba import cfunc, njit
from test_kernels import Case, backward, relative_error

from esmeta.kernels import (
    _cpu,
    _cpu_build,
    _cpu_code,
    plastic_reference,
    plastic_scan,
    plastic_step,
)

# (variant, n, S): every depth to 6, widths below, at and between multiples of eight.
SIZES = [
    ("base", 1, 1),
    ("base", 20, 2),
    ("base", 20, 4),
    ("linear", 20, 2),
    ("no-alpha", 20, 3),
    ("linear", 33, 5),
    ("base", 48, 6),
]
RESULTS = ("y", "W")


def doubled(case):
    """The same case in float64."""
    twin = Case.__new__(Case)
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = value.detach().double()
        elif isinstance(value, tuple):
            value = tuple(tensor.detach().double() for tensor in value)
        setattr(twin, name, value)
    return twin


def long_case(variant, n, S):
    """100 steps with resets whose memory neither fades nor explodes."""
    case = Case(variant, 2, 5, n, S, T=100, dtype=torch.float32, seed=n + S, per_trial=S % 2 == 0)
    rounds = torch.arange(S)
    case.beta *= 0.1
    case.beta[:, rounds, rounds] = 0.95
    case.new_trial = torch.rand(100, 2, 5, generator=torch.Generator().manual_seed(n)) < 0.05
    return case


@pytest.mark.parametrize(("variant", "n", "S"), SIZES)
def test_a_hundred_steps_with_resets_are_exact_to_float32(variant, n, S):
    case = long_case(variant, n, S)
    assert case.new_trial.any() and not case.new_trial.all()
    exact = doubled(case).loop(plastic_reference)
    for name, got, want in zip(RESULTS, case.scan(), exact, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got.double(), want) < 1e-5, name


@pytest.mark.parametrize(("variant", "n", "S"), SIZES)
def test_gradients_over_a_hundred_steps_are_exact_to_float32(variant, n, S):
    case = long_case(variant, n, S).require_grad()
    twin = doubled(case).require_grad()
    got = backward(case.scan(), case.inputs)
    want = backward(twin.scan(), twin.inputs)
    for value, exact in zip(got, want, strict=True):
        assert relative_error(value.double(), exact) < 1e-4


def test_tanh_is_exact_to_float32():
    tanh = njit(lambda x: _cpu_code._tanh(x))
    points = torch.cat([torch.linspace(-12, 12, 20_001), torch.logspace(-30, 0, 2_001)])
    for x in points.tolist():
        x = float(torch.tensor(x))
        got, want = float(tanh(_cpu_code._F(x))), math.tanh(x)
        assert abs(got - want) <= 4e-7 * abs(want)
        assert abs(got) <= 1
    assert math.isnan(tanh(_cpu_code._F(math.nan)))
    assert (tanh(_cpu_code._F(math.inf)), tanh(_cpu_code._F(-math.inf))) == (1, -1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_trial_stays_diverged_and_alone(bad):
    case = Case("base", 2, 6, 20, 2, T=3, dtype=torch.float32)
    case.new_trial[:] = False
    clean_y, clean_W = case.scan()
    case.W[1, 2, 3, 4] = bad
    y, W = case.scan()
    hit = torch.zeros(2, 6, dtype=torch.bool)
    hit[1, 2] = True
    assert not W[hit].isfinite().all()
    assert torch.equal(y[:, ~hit], clean_y[:, ~hit])
    assert torch.equal(W[~hit], clean_W[~hit])
    if math.isnan(bad):
        assert y[:, hit].isnan().any()


@pytest.mark.parametrize("n", [5, 20])
def test_what_lies_between_the_rows_is_never_used(n):
    case = Case("base", 2, 5, n, 2, dtype=torch.float32)
    want = case.step(plastic_step, case.W, case.x[0])
    columns = -(-n // 8) * 8
    storage = torch.full((2, 5, n, columns), torch.nan)
    storage[..., :n] = case.W.mT
    tight = torch.full((2 * 5 * n * columns - (columns - n),), torch.nan)
    cut = tight.as_strided((2, 5, n, n), (5 * n * columns, n * columns, columns, 1))
    cut.copy_(case.W.mT)
    for layout in (storage[..., :n].mT, cut.mT, case.W.mT.contiguous().mT):
        got = case.step(plastic_step, layout, case.x[0])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_threads_do_not_change_bits(monkeypatch):
    monkeypatch.setattr(_cpu, "_THREAD_WORK", 1)
    case = Case("base", 3, 21, 20, 2, T=4, dtype=torch.float32)
    alone = case.scan()
    used = set()
    in_threads = _cpu._in_threads
    monkeypatch.setattr(
        _cpu, "_in_threads", lambda call, n, t: (used.add(t), in_threads(call, n, t))[1]
    )
    torch.set_num_threads(4)
    try:
        together = case.scan()
    finally:
        torch.set_num_threads(1)
    assert used == {4}
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_inputs_are_left_as_they_are():
    case = Case("linear", 2, 5, 20, 2, T=4, dtype=torch.float32)
    inputs = [case.W, case.x, case.kappa, case.beta, case.W0, case.alpha, *case.write]
    before = [tensor.clone() for tensor in inputs]
    _, W = case.scan()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
    again = W.clone()
    plastic_scan(W, case.x, case.alpha, case.kappa, case.beta, write=case.write)
    assert torch.equal(W, again)


# Compiled once, kept on disk ---------------------------------------------------------------------

STEP = """
import sys, torch
from esmeta.kernels import plastic_step
one = torch.ones(1, 3, 3)
y, _ = plastic_step(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3), one, *[torch.ones(1, 1, 2)] * 2)
print(y.flatten().tolist(), "numba" in sys.modules)
"""


def test_sizes_agree_with_what_is_compiled():
    assert (_cpu._LANES, _cpu._TRIALS) == (_cpu_code.LANES, _cpu_code.TRIALS)
    assert _cpu_build._NAME == _cpu_code.NAME


def test_processes_that_miss_a_size_compile_it_once_and_never_load_the_compiler(tmp_path):
    (tmp_path / "cache").mkdir()
    command = [sys.executable, "-c", STEP]
    env = environment({"ESMETA_CACHE": str(tmp_path / "cache")})
    several = [
        subprocess.Popen(command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0] for process in several]
    y = math.tanh(3) + 1
    assert len(set(said)) == 1 and said[0].endswith("False\n")
    assert eval(said[0].removesuffix("False\n")) == pytest.approx([y] * 6)
    files = sorted(os.listdir(tmp_path / "cache"))
    assert len(files) == 2 and files[0].startswith("plastic-3-1-1-0-") and "lock" in files[1]


def test_a_compiler_that_fails_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys; sys.exit('no LLVM here')")
    monkeypatch.setattr(_cpu_build, "_SOURCE", broken)
    monkeypatch.setattr(_cpu_build, "cache_folder", lambda: tmp_path)
    with pytest.raises(RuntimeError, match="reinstall numba(.|\n)*no LLVM here"):
        _cpu_build._machine_code(3, 1, True, False)
    assert sorted(os.listdir(tmp_path)) == ["broken.py", "plastic.lock"]


def test_the_cache_lies_where_it_can_be_written(tmp_path, monkeypatch):
    folder = _cpu_build.cache_folder.__wrapped__
    monkeypatch.setenv("ESMETA_CACHE", str(tmp_path / "own"))
    assert folder() == tmp_path / "own"
    monkeypatch.delenv("ESMETA_CACHE")
    assert folder().name == "__pycache__"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(_cpu_build, "_SOURCE", tmp_path / "file" / "x.py")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert folder() == tmp_path / "user" / "esmeta"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert folder().is_dir() and not list(folder().iterdir())


@pytest.mark.parametrize(("variant", "n", "S"), [("base", 5, 2), ("linear", 9, 3)])
def test_no_index_is_out_of_bounds(variant, n, S, monkeypatch):
    case = Case(variant, 2, 5, n, S, T=4, dtype=torch.float32, per_trial=True)
    case.new_trial[1, 0, 4] = True
    case.require_grad()
    plain = [*case.scan(store_every=3), *backward(case.scan(store_every=3), case.inputs)]
    unlinked = _cpu_code._function(n, S, True, variant == "linear")
    checked = cfunc(_cpu_code.signature(), boundscheck=True, error_model="numpy")(unlinked)
    plainly = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 14, *[ctypes.c_int64] * 8)
    call = plainly(checked.address)
    monkeypatch.setattr(_cpu_build, "function", lambda *size: call)
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    results = [*case.scan(store_every=3), *backward(case.scan(store_every=3), case.inputs)]
    assert not errors
    for got, want in zip(results, plain, strict=True):
        assert relative_error(got, want) < 1e-5
    # The same code with one trial too many does go out of bounds, and says so.
    one_more = lambda *a: call(*a[:-1], a[-1] + 1)  # noqa: E731
    monkeypatch.setattr(_cpu_build, "function", lambda *size: one_more)
    case.scan()
    assert "out of bounds" in str(errors[0].exc_value)
