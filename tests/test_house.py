"""House rules that a program can check: layers, one loop, no hidden seeds, sizes, paths."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_MODULE_LINES = 700
MAX_FUNCTION_LINES = 60

# A module may import from its own row and from the rows above it.
LAYERS = [
    {
        "types",
        "rng",
        "tree",
        "names",
        "older",
        "errors",
        "options",
        "modes",
        "sharing",
        "capture",
    },
    {"kernels"},
    {"agent", "ranks", "comm"},
    {"policy"},
    {"envs", "tasks"},
    {"rl", "rollout"},
    {"evaluator", "lives", "learners", "summary"},
    {"evolution"},
    {"objectives", "optimizers"},
    {"run", "analysis"},
    {"train", "evaluate", "report", "launch", "learn"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Composition roots and the hosts that own a device; everything else follows its inputs.
MAY_CHOOSE_DEVICE = {
    "esmeta/run/parts.py",
    "esmeta/evaluator.py",
    "esmeta/envs/gym.py",
    "esmeta/envs/remote.py",
}
GLOBAL_SEEDING = {
    "torch.manual_seed",
    "torch.random.manual_seed",
    "torch.cuda.manual_seed",
    "torch.cuda.manual_seed_all",
    "np.random.seed",
    "numpy.random.seed",
    "random.seed",
}
# Floats of the default dtype, on the default device, unless they are told.
FACTORIES = set(
    "zeros ones empty full eye tensor as_tensor linspace logspace rand randn normal".split()
)
FACTORIES |= {"arange", "randint", "randperm", "scalar_tensor", "asarray", "empty_strided"}
INTEGERS = {"arange", "randint", "randperm"}
FOLDERS = "home|work|root|tmp|Users|mnt|usr|opt|var|etc"
ABSOLUTE = re.compile(rf"(?<![\w.:/~}}*])/({FOLDERS})/|\b[A-Z]:\\\\")


def sources(*folders: str) -> list[Path]:
    """All Python files below ``folders`` of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE = sources("esmeta", "tasks")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> list[str]:
    """Dotted name of a module, in parts: tasks/maze.py is esmeta.tasks.maze."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts if parts[0] == "esmeta" else ["esmeta", *parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a chain of attributes, with a call or subscript in it left out."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return dotted(node.value)
    return dotted(node.func) if isinstance(node, ast.Call) else ""


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


class Imports(ast.NodeVisitor):
    """Collects (line, imported dotted name); if ``typed``, also what a type checker alone sees."""

    def __init__(self, path: Path, typed: bool = False) -> None:
        self.typed, parts = typed, module_of(path)
        self.package = parts if path.name == "__init__.py" else parts[:-1]
        self.found: list[tuple[int, str]] = []
        self.visit(parse(path))

    def visit_If(self, node: ast.If) -> None:
        if self.typed or dotted(node.test) not in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            self.visit(node.test)
            for child in node.body:
                self.visit(child)
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        module = ".".join([*base, *filter(None, [node.module])])
        self.found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]


def test_every_module_has_a_layer():
    names = {module_of(path)[1] for path in PACKAGE if len(module_of(path)) > 1}
    assert names <= set(LEVEL), f"give these a row in LAYERS: {sorted(names - set(LEVEL))}"


def test_imports_go_downwards_only():
    wrong = []
    for path in PACKAGE:
        own = module_of(path)
        if len(own) == 1:
            continue  # esmeta/__init__.py holds the public names of all layers
        for line, target in Imports(path).found:
            parts = target.split(".")
            where = f"{name_of(path)}:{line} imports {target}"
            if parts[0] == "tasks":
                wrong.append(f"{where}; write esmeta.tasks")
            if parts[0] != "esmeta" or target == "esmeta.__version__":
                continue
            if len(parts) == 1 or parts[1] not in LEVEL:
                wrong.append(f"{where}; import from the module that defines the name")
            elif LEVEL[parts[1]] > LEVEL.get(own[1], len(LAYERS)):
                wrong.append(f"{where}, which lies above {own[1]}")
    assert not wrong, "\n".join(wrong)


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, or lie between two; none if there is none."""
    left = dict(imports)
    while True:
        wanted = set().union(*left.values())
        kept = {name: into & left.keys() for name, into in left.items() if name in wanted and into}
        if kept == left:
            return sorted(left)
        left = kept


def test_modules_import_one_another_in_no_circle():
    modules = {".".join(module_of(path)): path for path in PACKAGE}
    imports = {name: set() for name in modules}
    for name, path in modules.items():
        for _, target in Imports(path, typed=True).found:
            target = target if target in modules else target.rpartition(".")[0]
            imports[name] |= {target} & modules.keys() - {name}
    assert not circle(imports), "types count too; break it by what lies deeper"
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_only_rollout_steps_an_environment():
    steps = {
        name_of(path): [
            call.lineno
            for call in calls(parse(path))
            if isinstance(call.func, ast.Attribute)
            and call.func.attr == "step"
            and "env" in dotted(call.func.value).lower()
        ]
        for path in sources("esmeta")
        # envs/ holds the hosts: each advances the simulators that one step of its own stands for.
        if not name_of(path).startswith("esmeta/envs/")
    }
    loops = {name for name, lines in steps.items() if lines}
    assert loops == {"esmeta/rollout.py"}, f"environments are stepped in {loops}"
    assert len(steps["esmeta/rollout.py"]) == 1, "rollout.py holds one loop with one env.step"


def test_nobody_seeds_a_global_generator():
    wrong = [
        f"{name_of(path)}:{call.lineno} calls {dotted(call.func)}"
        for path in PACKAGE
        for call in calls(parse(path))
        if dotted(call.func) in GLOBAL_SEEDING
    ]
    assert not wrong, "\n".join(wrong)


def test_devices_are_chosen_in_few_places():
    wrong = []
    for path in PACKAGE:
        if name_of(path) in MAY_CHOOSE_DEVICE:
            continue
        for call in calls(parse(path)):
            if not isinstance(call.func, ast.Attribute):
                continue
            keywords = [word.value for word in call.keywords if word.arg == "device"]
            moved = {dotted(value) for value in [*call.args[:1], *keywords]}
            to_device = call.func.attr == "to" and moved & {"device", "self.device", "self._device"}
            if to_device or call.func.attr == "cuda" and dotted(call.func) != "torch.cuda":
                wrong.append(f"{name_of(path)}:{call.lineno} {ast.unparse(call)}")
    assert not wrong, "\n".join(wrong)


def without_kind(tree: ast.AST) -> list[str]:
    """Calls that make a tensor of torch's default dtype or device, whatever those are."""
    wrong = []
    for call in calls(tree):
        name = dotted(call.func).removeprefix("torch.")
        words = {word.arg for word in call.keywords}
        needed = {"device"} if name in INTEGERS else {"device", "dtype"}
        numbers = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        needed |= {"dtype"} if any(isinstance(number, float) for number in numbers) else set()
        made = dotted(call.func).startswith("torch.") and name in FACTORIES
        if (
            made
            and not needed <= words
            or dotted(call.func) in {"torch.Tensor", "torch.FloatTensor"}
        ):
            wrong.append(f"{call.lineno} {ast.unparse(call)}")
    return wrong


def test_tensors_are_made_with_dtype_and_device():
    wrong = [f"{name_of(path)}:{text}" for path in PACKAGE for text in without_kind(parse(path))]
    assert not wrong, "name dtype and device, which a user's defaults may change:\n" + "\n".join(
        wrong
    )
    code = "torch.zeros(2, device=d); torch.arange(3); torch.arange(0.0, device=d); torch.Tensor(2)"
    assert len(without_kind(ast.parse(code))) == 4
    assert not without_kind(ast.parse("torch.arange(3, device=d); torch.eye(2, dtype=t, device=d)"))


def test_every_module_has_a_docstring():
    missing = [name_of(path) for path in PACKAGE if not ast.get_docstring(parse(path))]
    assert not missing, f"no module docstring in {missing}"


def test_modules_and_functions_stay_short():
    long = []
    for path in PACKAGE:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_MODULE_LINES:
            long.append(f"{name_of(path)}: {lines} lines, at most {MAX_MODULE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    long.append(
                        f"{name_of(path)}:{node.lineno} {node.name}: {length} lines, "
                        f"at most {MAX_FUNCTION_LINES}"
                    )
    assert not long, "\n".join(long)


def test_no_absolute_paths():
    others = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    others += [ROOT / ".ci" / "run", *sorted((ROOT / "runs" / "presets").glob("*.toml"))]
    wrong = [
        f"{name_of(path)}:{number} {line.strip()}"
        for path in [*PACKAGE, *others]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if ABSOLUTE.search(line) and not line.startswith("#!")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_layer_check_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "esmeta" / "policy" / "probe.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from esmeta.run import hidden\nelse:\n    import esmeta.tree\n"
        "from ..kernels import a\nfrom . import b\n"
        "def f():\n    from esmeta import rollout\n",
        encoding="utf-8",
    )
    names = [name for _, name in Imports(path).found]
    assert names == [
        "typing.TYPE_CHECKING",
        "esmeta.tree",
        "esmeta.kernels.a",
        "esmeta.policy.b",
        "esmeta.rollout",
    ]
