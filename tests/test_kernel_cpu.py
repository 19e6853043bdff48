"""The compiled CPU kernel: accuracy in float32, what it does with bad numbers, threads, layouts."""

import math
import os
import platform
import subprocess
import sys
import tempfile

import llvmlite.binding as llvm
import pytest
import torch
from conftest import environment
from fences import stay_inside
from test_kernels import Case, backward, relative_error

from esmeta.kernels import (
    _cpu,
    _cpu_build,
    _cpu_run,
    plastic_reference,
    plastic_scan,
    plastic_step,
    prepare,
    step_prepared,
)

# (variant, n, S): every depth to 6, widths below, at and between multiples of a register.
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


def long_case(variant, n, S, P=2, B=5):
    """100 steps with resets whose memory neither fades nor explodes."""
    case = Case(variant, P, B, n, S, T=100, dtype=torch.float32, seed=n + S, per_trial=S % 2 == 0)
    rounds = torch.arange(S)
    case.beta *= 0.1
    case.beta[:, rounds, rounds] = 0.95
    case.new_trial = torch.rand(100, P, B, generator=torch.Generator().manual_seed(n)) < 0.05
    return case


@pytest.mark.parametrize(("variant", "n", "S"), SIZES)
def test_a_hundred_steps_with_resets_are_exact_to_float32(variant, n, S):
    case = long_case(variant, n, S)
    assert case.new_trial.any() and not case.new_trial.all()
    exact = doubled(case).loop(plastic_reference)
    for name, got, want in zip(RESULTS, case.scan(), exact, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got.double(), want) < 1e-5, name


@pytest.mark.parametrize(
    ("variant", "n", "S", "P", "B"),
    [(*size, 2, 5) for size in SIZES]
    + [("base", 5, 2, 4, 1), ("linear", 20, 3, 3, 1), ("mlp", 20, 2, 2, 5)],
)
def test_gradients_over_a_hundred_steps_are_exact_to_float32(variant, n, S, P, B):
    case = long_case(variant, n, S, P, B).require_grad()
    twin = doubled(case).require_grad()
    got = backward(case.scan(), case.inputs)
    want = backward(twin.scan(), twin.inputs)
    for value, exact in zip(got, want, strict=True):
        assert relative_error(value.double(), exact) < 1e-4


# Blocks of rows and of trials that are not full, one step, segments of one step and of all.
EDGES = [
    ("base", 2, 1, 1, 1, 1, None),
    ("base", 4, 2, 3, 1, 2, 1),
    ("base", 17, 1, 1, 3, 7, 3),
    ("base", 35, 4, 2, 2, 9, 4),
    ("no-alpha", 6, 2, 1, 3, 5, 2),
    ("linear", 16, 1, 2, 1, 6, 99),
    ("linear", 7, 2, 1, 5, 6, 1),
    ("mlp", 1, 1, 2, 1, 3, 2),
    ("mlp", 19, 3, 1, 3, 5, 2),
]


@pytest.mark.parametrize(("variant", "n", "S", "P", "B", "T", "every"), EDGES)
def test_gradients_at_the_edges_of_blocks(variant, n, S, P, B, T, every):
    case = Case(variant, P, B, n, S, T=T, dtype=torch.float32, per_trial=n % 2 == 0).require_grad()
    twin = doubled(case).require_grad()
    got = backward(case.scan(store_every=every), case.inputs)
    want = backward(twin.scan(), twin.inputs)
    for value, exact in zip(got, want, strict=True):
        assert relative_error(value.double(), exact) < 1e-5


def test_a_trial_that_diverged_spoils_no_other_trials_gradient():
    case = Case("base", 1, 5, 20, 2, T=6, dtype=torch.float32)
    case.new_trial[:] = False
    case.new_trial[3, :, 2] = True
    clean = backward(case.require_grad().scan(), [case.x])[0]
    with torch.no_grad():
        case.x[3, 0, 2] = torch.nan
    got = backward(case.scan(), [case.x])[0]
    assert got[3:, 0, 2].isnan().any() and not got[:3].isnan().any()
    got[3:, 0, 2] = clean[3:, 0, 2]
    assert torch.equal(got, clean)


def test_tanh_is_exact_to_float32():
    points = torch.cat([torch.linspace(-12, 12, 20_001), torch.logspace(-30, 0, 2_001)])
    points = torch.cat([points, torch.tensor([math.nan, math.inf, -math.inf])])
    # One neuron whose output is tanh(W v) with v = 1.
    rule = torch.zeros(1, 1, 1), torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2)
    y, _ = plastic_step(points.reshape(1, -1, 1, 1), torch.ones(1, len(points), 1), *rule)
    got, want = y.flatten()[:-3].double(), torch.tanh(points[:-3].double())
    assert ((got - want).abs() <= 4e-7 * want.abs()).all()
    assert (got.abs() <= 1).all()
    assert y.flatten()[-3].isnan()
    assert y.flatten()[-2:].tolist() == [1.0, -1.0]


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
    monkeypatch.setattr(_cpu_run, "_THREAD_WORK", 1)
    case = Case("base", 3, 21, 20, 2, T=4, dtype=torch.float32).require_grad()
    alone = [*case.scan(), *backward(case.scan(), case.inputs)]
    used = set()
    pool = _cpu_run._pool
    monkeypatch.setattr(_cpu_run, "_pool", lambda n, *rest: (used.add(n), pool(n, *rest))[1])
    torch.set_num_threads(4)
    try:
        together = [*case.scan(), *backward(case.scan(), case.inputs)]
    finally:
        torch.set_num_threads(1)
    assert used == {4}
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("n", [5, 20])
def test_a_step_in_place_has_the_same_bits_and_takes_no_new_memory(n):
    case = Case("base", 2, 5, n, 2, T=2, dtype=torch.float32)
    prepared = prepare(case.alpha, case.kappa, case.beta)
    y, W = step_prepared(prepared, case.W, case.x[0])
    kept = W.clone()
    want = step_prepared(prepared, W, case.x[1])
    assert torch.equal(W, kept)
    y, new = step_prepared(prepared, W, case.x[1], in_place=True)
    assert torch.equal(y, want[0]) and torch.equal(new, want[1])
    assert new.data_ptr() == W.data_ptr()
    case.alpha.requires_grad_()
    W = kept.clone()
    y, new = step_prepared(prepare(case.alpha, case.kappa, case.beta), W, case.x[1], in_place=True)
    assert torch.equal(W, kept) and torch.equal(new, want[1])


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
print(y.flatten().tolist(), "llvmlite" in sys.modules)
"""


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
    assert all(name.endswith((f"-{os.geteuid()}.o", f"-{os.geteuid()}.lock")) for name in files)
    assert (
        len(files) == 2
        and "lock" in files[0]
        and files[1].startswith(f"plastic-{_cpu_run.LANES}-3-1-1-base-")
    )


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("sys.exit('no LLVM here')", "exit code 1; .*reinstall llvmlite(.|\n)*no LLVM here"),
        ("sys.exit(17)", r"ended with exit code 17; (.|\n)*\(nothing\)"),
        ("pass", "ended with exit code 0, but gave no code"),
        ("os.kill(os.getpid(), 9)", r"ended by signal 9, Killed \(as when memory runs out\)"),
        ("os.kill(os.getpid(), 11)", "ended by signal 11, Segmentation fault; "),
    ],
)
def test_a_compiler_that_fails_is_reported_and_leaves_nothing(tmp_path, monkeypatch, code, words):
    broken = tmp_path / "broken.py"
    broken.write_text(f"import os, sys; {code}")
    monkeypatch.setattr(_cpu_build, "_SOURCE", broken)
    monkeypatch.setattr(_cpu_build, "cache_folders", lambda: [tmp_path])
    with pytest.raises(RuntimeError, match=words):
        _cpu_build._machine_code("plastic", 3, 1, 1, "base")
    assert sorted(os.listdir(tmp_path)) == ["broken.py", f"compiling-{os.geteuid()}.lock"]


SIZE = ("plastic", 3, 1, 1, "base")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder, and how often something was compiled."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(_cpu_build, "cache_folders", lambda: [folder])
    compiled, count = _cpu_build._compiled, []
    code = _cpu_build._machine_code(*SIZE)
    (file,) = folder.glob("*.o")

    def counted(words):
        count.append(words)
        return code if words[2:] == ["3", "1", "1", "base"] else compiled(words)

    monkeypatch.setattr(_cpu_build, "_compiled", counted)
    return file, code, count


def damage(data, how):
    if how == "truncated":
        return data[:-1]
    if how == "empty":
        return b""
    middle = len(data) // 2 if how == "flipped" else 10
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "header"])
def test_damaged_code_is_compiled_again_and_repaired(cache, how):
    file, code, count = cache
    whole = file.read_bytes()
    assert _cpu_build._machine_code(*SIZE) == code and count == []
    file.write_bytes(damage(whole, how))
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 1
    assert file.read_bytes() == whole
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 1


def test_code_of_another_size_is_not_taken(cache):
    file, code, count = cache
    other = _cpu_build._machine_code("plastic", 4, 1, 1, "base")
    (theirs,) = set(file.parent.glob("*.o")) - {file}
    file.write_bytes(theirs.read_bytes())
    assert _cpu_build._machine_code(*SIZE) == code != other and len(count) == 2


def test_code_for_another_processor_is_not_taken(cache, monkeypatch):
    file, code, count = cache
    monkeypatch.setattr(_cpu_build, "_processor", lambda: "another")
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 1
    assert len(set(file.parent.glob("*.o"))) == 2, "each finds its own"


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_what_others_may_write_to_is_not_run(cache, mode):
    file, code, count = cache
    file.chmod(mode)
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 1
    assert file.stat().st_mode & 0o777 == 0o644


def test_what_others_have_written_is_not_run(cache, monkeypatch):
    file, code, count = cache
    if os.geteuid() == 0:
        os.chown(file, 12345, -1)
    else:
        monkeypatch.setattr(_cpu_build, "_USER", os.geteuid() + 1)
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 1


def test_links_are_not_followed(cache, tmp_path):
    file, code, count = cache
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    lock = file.parent / f"compiling-{os.geteuid()}.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(tmp_path / "elsewhere")
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 1
    assert (tmp_path / "elsewhere").read_bytes() == before and not file.is_symlink()


def test_a_disk_that_is_full_or_read_only_is_no_hindrance(cache, tmp_path, monkeypatch):
    file, code, count = cache
    file.unlink()

    def full(*words, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        assert _cpu_build._machine_code(*SIZE) == code
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert _cpu_build._machine_code(*SIZE) == code
    assert len(count) == 2 and not list(file.parent.glob("*.o")) + list(file.parent.glob("*.part"))
    (tmp_path / "a file").write_text("")
    folders = [tmp_path / "a file", tmp_path / "a file" / "below", tmp_path / "second"]
    monkeypatch.setattr(_cpu_build, "cache_folders", lambda: folders)
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 3
    assert _cpu_build._machine_code(*SIZE) == code and len(count) == 3
    assert (tmp_path / "second" / file.name).exists()


def test_where_the_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("ESMETA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    own, beside, user = _cpu_build.cache_folders()
    assert (own, user) == (tmp_path / "own", tmp_path / "user" / "esmeta")
    assert beside.name == "__pycache__"
    monkeypatch.delenv("ESMETA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody has a home
    assert _cpu_build.cache_folders() == [beside]


def test_code_placed_by_us_and_code_linked_by_llvm_are_the_same(monkeypatch):
    case = long_case("base", 20, 2)
    want = case.scan()
    code = _cpu_build._machine_code("plastic", 20, 2, 1, "base")
    linked = _cpu_build._PROTOTYPE(_cpu_build._linked(code))
    monkeypatch.setattr(_cpu_build, "function", lambda *size: linked)
    assert all(torch.equal(a, b) for a, b in zip(case.scan(), want, strict=True))


NARROW = """
import sys
sys.path.insert(0, sys.argv[1])
import importlib.util
spec = importlib.util.spec_from_file_location("compiler", sys.argv[1] + "/__main__.py")
compiler = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compiler)
kind, row, *words = sys.argv[3:]
with open(sys.argv[2], "wb") as file:
    file.write(compiler.machine_code(kind, int(row), words, "haswell"))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the other processor is an x86-64")
@pytest.mark.parametrize(
    ("variant", "n", "S"), [("base", 20, 2), ("linear", 9, 3), ("base", 70, 1), ("mlp", 9, 2)]
)
def test_bits_do_not_depend_on_the_width_of_vectors(variant, n, S, tmp_path, monkeypatch):
    case = long_case(variant, n, S).require_grad()
    want = [*case.scan(), *backward(case.scan(), case.inputs)]

    def narrow(kind):
        path = tmp_path / kind
        words = [kind, *map(str, (_cpu_run.LANES, n, S, 1, variant))]
        folder = str(_cpu_build._SOURCE)
        subprocess.run([sys.executable, "-c", NARROW, folder, str(path), *words], check=True)
        return _cpu_build._PROTOTYPE(_cpu_build._placed(_cpu_build._text(path.read_bytes())))

    # The rest of a mlp's scan is in torch operations.
    known = {kind: narrow(kind) for kind in ("plastic", "backward")[variant == "mlp" :]}
    monkeypatch.setattr(_cpu_build, "function", lambda kind, *words: known[kind])
    got = [*case.scan(), *backward(case.scan(), case.inputs)]
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), index


@pytest.mark.parametrize(("variant", "n", "S"), [("base", 20, 2), ("linear", 9, 3)])
def test_bits_do_not_depend_on_the_padding_of_rows(variant, n, S, monkeypatch):
    case = long_case(variant, n, S).require_grad()
    want = [*case.scan(), *backward(case.scan(), case.inputs)]
    other = 24 - _cpu_run.LANES  # 8 for 16, 16 for 8
    for module in (_cpu, _cpu_build):
        monkeypatch.setattr(module, "LANES", other)
    for function in (_cpu._strides, _cpu_build.function):
        function.cache_clear()
    try:
        got = [*case.scan(), *backward(case.scan(), case.inputs)]
        assert _cpu._strides((1, n, n))[-2] == -(-n // other) * other
    finally:
        for function in (_cpu._strides, _cpu_build.function):
            function.cache_clear()
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), index


def test_code_that_needs_linking_is_recognised():
    code = _cpu_build._machine_code("plastic", 20, 2, 1, "base")
    assert len(_cpu_build._text(code)) > 1000
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(reloc="pic")
    module = llvm.parse_assembly(
        "declare void @other()\ndefine void @f() {\n call void @other()\n ret void\n}"
    )
    assert _cpu_build._text(target.emit_object(module)) is None


# A process of its own: what goes out of bounds ends it.
FENCED = """
import sys
import torch
from fences import fenced
from test_kernels import Case, backward
from esmeta.kernels import _cpu, _cpu_build, _cpu_run

kind, variant, n, S, more = *sys.argv[1:3], *map(int, sys.argv[3:])
case = Case(variant, 2, 5, n, S, T=4, dtype=torch.float32, per_trial=True).require_grad()
case.new_trial[:] = False
case.new_trial[1, 0, 4] = True

def results():
    outputs = case.scan(store_every=3)
    return *outputs, *backward(outputs, case.inputs)

def near(t, at_end):
    whole = t.as_strided((*t.shape[:-1], t.stride(-2)), t.stride())
    return fenced(whole, at_end)[..., : t.shape[-1]]

want = results()
function = _cpu_build.function

def with_more(called, *size):
    call = function(called, *size)
    return lambda table, low, high: call(table, low, high + (more if called == kind else 0))

makers = {
    (module, name): getattr(module, name)
    for module in (_cpu, _cpu_run)
    for name in "plain _padded _room _widened _block blank zeros".split()
    if hasattr(module, name)
}
_cpu_build.function = with_more
for at_end in (True, False):
    for (module, name), make in makers.items():
        setattr(module, name, lambda *given, make=make: near(make(*given), at_end))
    assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))
"""


@pytest.mark.parametrize("kind", ["plastic", "backward"])
def test_nothing_is_read_or_written_out_of_bounds(kind):
    sizes = [("base", 5, 2), ("linear", 9, 3), ("no-alpha", 50, 1), ("base", 16, 4)]
    sizes += [("mlp", 9, 2)] if kind == "backward" else []
    stay_inside(FENCED, *((kind, *size) for size in sizes))
