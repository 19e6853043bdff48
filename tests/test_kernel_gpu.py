"""The Triton kernels: on a GPU where there is one, else the same source in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment
from fences import stay_inside
from test_kernel_cpu import doubled
from test_kernels import Case, backward, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

from esmeta.kernels import (  # noqa: E402
    _dispatch,
    _gpu,
    explain,
    plastic_reference,
    prepare,
    step_prepared,
)

# (variant, n, S): widths below, at and between powers of two.
SIZES = [
    ("base", 1, 1),
    ("base", 20, 2),
    ("base", 16, 2),
    ("linear", 9, 3),
    ("no-alpha", 7, 3),
    ("base", 5, 4),
]


def test_explain_names_the_kernel() -> None:
    assert "Triton kernel on cuda (n=20, S=2, base, float32)" in explain("cuda", 20, 2)
    assert "adjoint, fused" in explain("cuda", 20, 2, True)
    assert "at most n = 256" in explain("cuda", 257, 2)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All calls go to the Triton kernels, and memory that is not written is NaN."""
    monkeypatch.setattr(_dispatch, "_code", _gpu.code)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def case(variant: str, n: int, S: int, T: int = 4) -> Case:
    made = Case(variant, 2, 2, n, S, T=T, dtype=torch.float32, seed=n, per_trial=S % 2 == 0)
    made.new_trial[:] = False
    made.new_trial[0, 0, 0] = made.new_trial[2, 1, 1] = True
    for name, value in vars(made).items():
        if isinstance(value, torch.Tensor):
            setattr(made, name, value.to(DEVICE))
    made.write = tuple(tensor.to(DEVICE) for tensor in made.write)
    return made


@pytest.mark.parametrize(("variant", "n", "S"), SIZES)
def test_outputs_and_gradients_are_exact_to_float32(variant: str, n: int, S: int) -> None:
    one = case(variant, n, S).require_grad()
    twin = doubled(one).require_grad()
    with torch.no_grad():
        results = zip(one.scan(), twin.loop(plastic_reference), strict=True)
        for got, want in results:
            assert got.dtype == torch.float32 and relative_error(got.double(), want) < 1e-5
    grads = backward(one.scan(store_every=2), one.inputs)
    exact = backward(twin.loop(plastic_reference), twin.inputs)
    for got, want in zip(grads, exact, strict=True):
        assert relative_error(got.double(), want) < 1e-5


def test_a_loop_of_steps_is_the_scan_and_runs_are_alike() -> None:
    one = case("base", 12, 2)
    prepared = prepare(one.alpha, one.kappa, one.beta)
    with torch.no_grad():
        for in_place in (False, True):
            W, ys = one.W.clone(), []
            for t in range(len(one.x)):
                fresh = one.new_trial[t][..., None, None]
                start = one.W0 if one.W0.dim() == 4 else one.W0.unsqueeze(1)
                W = torch.where(fresh, start, W).mT.contiguous().mT
                y, new = step_prepared(prepared, W, one.x[t], in_place=in_place)
                assert (new.data_ptr() == W.data_ptr()) == in_place
                W = new
                ys.append(y)
            for _ in range(2):
                y, last = one.scan()
                assert torch.equal(y, torch.stack(ys)) and torch.equal(last, W)


def test_gradients_do_not_depend_on_the_segments() -> None:
    one = case("linear", 6, 2).require_grad()
    runs = [backward(one.scan(store_every=k), one.inputs) for k in (1, 3, 4)]
    for grads in runs[1:]:
        for got, want in zip(grads, runs[0], strict=True):
            assert relative_error(got, want) < 1e-6


FENCED = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch
from fences import fenced
from test_kernel_gpu import case
from test_kernels import backward
from esmeta.kernels import _dispatch, _gpu, _triton_code

one = case("linear", 5, 2, T=3).require_grad()
_dispatch._code = _gpu.code
want = backward(one.scan(store_every=2), one.inputs)
more = int(sys.argv[1])

class Fencing:
    # Launches a kernel with all tensors between pages that may not be touched.
    def __init__(self, kernel, at_end):
        self.kernel, self.at_end = kernel, at_end

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            near = [
                fenced(a.detach(), self.at_end) if isinstance(a, torch.Tensor) else a
                for a in arguments
            ]
            self.kernel[(grid[0] + more,)](*near, **options)
            for a, b in zip(arguments, near):
                if isinstance(a, torch.Tensor):
                    a.detach().copy_(b)
        return launch

forward, back = _triton_code.forward, _triton_code.backward
for at_end in (True, False):
    _triton_code.forward, _triton_code.backward = Fencing(forward, at_end), Fencing(back, at_end)
    got = backward(one.scan(store_every=2), one.inputs)
    assert all(map(torch.equal, got, want))
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="the fences are pages of the host's memory")
def test_nothing_is_read_or_written_out_of_bounds() -> None:
    stay_inside(FENCED, ())


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from esmeta.kernels import _gpu, _triton_code, prepare
from test_kernels import Case

for kernel in (_triton_code.forward, _triton_code.backward):
    for variant in ("base", "linear"):
        one = Case(variant, 1, 1, 20, 2, dtype=torch.float32)
        alpha = one.alpha if variant == "base" else None
        rule = prepare(alpha, one.kappa, one.beta, one.write)
        fixed = {"KEEP": True, "RESETS": True}
        sizes = _gpu._options(rule, 20)
        options = {"num_warps": sizes.pop("num_warps")}
        fixed = {k: v for k, v in (fixed | sizes).items() if k in kernel.arg_names}
        kinds = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(fixed, "constexpr")
        kinds |= dict.fromkeys(("steps", "trials", "batch", "starts"), "i32") | {"mask": "*u8"}
        kinds |= {"every": "i32"} if "every" in kinds else {}
        values = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
        source = ASTSource(fn=kernel, signature=kinds, constexprs=values, attrs={})
        code = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        print(len(code.asm["cubin"]) > 1000)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path: Any) -> None:
    # The interpreter accepts what the compiler does not; this needs no GPU.
    env = environment({"TRITON_CACHE_DIR": str(tmp_path)})
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env["PYTHONPATH"]])
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == 4 * "True\n", done.stderr
