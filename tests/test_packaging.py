"""The built package, from anywhere but the checkout; what import loads; pins."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import esmeta

# The package is built once.
pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).resolve().parents[1]
HEAVY = "torch numpy evotorch ray pandas matplotlib tensorboard gymnasium mujoco mpi4py rich"
# A user's own files that must not be picked up instead of ours.
TRAPS = ("tasks.py", "runs.py", "presets.py", "policy.py", "kernels.py", "harlow.py")


def python(code: str, cwd: Path, path: Path) -> str:
    """Run ``code`` in ``cwd`` with nothing but ``path`` on PYTHONPATH; returns its output."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tree(folder: str, suffix: str) -> set[str]:
    """Files of ``folder`` in the checkout, relative to it."""
    base = ROOT / folder
    return {path.relative_to(base).as_posix() for path in base.rglob(f"*{suffix}")}


@pytest.fixture
def user_folder(tmp_path: Path) -> Path:
    """A working directory with modules whose names could shadow ours."""
    for name in TRAPS:
        (tmp_path / name).write_text(f"raise RuntimeError('a stranger: {name}')\n")
    return tmp_path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel, and nothing else, is installed into."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(target), str(built[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_wheel_holds_package_tasks_and_presets(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        license_text = next(name for name in wheel.namelist() if name.endswith("/LICENSE"))
        assert b"Apache License" in wheel.read(license_text)
    modules = {f"esmeta/{name}" for name in tree("esmeta", ".py")}
    modules |= {f"esmeta/tasks/{name}" for name in tree("tasks", ".py")}
    presets = {f"esmeta/presets/{name}" for name in tree("runs/presets", ".toml")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert {name for name in names if name.endswith(".toml")} == presets
    models = {f"esmeta/tasks/{name}" for name in tree("tasks", ".xml")}
    assert {name for name in names if name.endswith(".xml")} == models and len(models) >= 2
    assert {"esmeta/py.typed", "esmeta/tasks/__init__.py", "esmeta/tasks/harlow.py"} <= names
    assert all(name.startswith("esmeta/") and "__pycache__" not in name for name in names)
    assert f"-{esmeta.__version__}-" in built[1].name


def test_sdist_is_complete(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.split("/", 1)[1] for name in sdist.getnames()}
    wanted = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"}
    wanted |= {"Makefile", "constraints.txt", ".ci/run"}
    wanted |= {f"tests/{name}" for name in tree("tests", ".py")}
    wanted |= {f"docs/examples/{name}" for name in tree("docs/examples", ".py")}
    assert wanted <= names
    assert not [name for name in names if name.startswith(("runs/out", ".venv", ".git/"))]


def test_installed_wheel_works_anywhere(installed, user_folder):
    code = (
        "import esmeta, esmeta.run.config as c; print(esmeta.__file__);"
        "names = esmeta.task_names();"
        "print(*names); print(*c.preset_names()); [esmeta.make_task(n) for n in names[:3]];"
        "import esmeta.tasks.harlow as h; print(h.__file__)"
    )
    home, tasks, presets, harlow = python(code, user_folder, installed).splitlines()
    assert Path(home).is_relative_to(installed) and Path(harlow).is_relative_to(installed)
    assert tasks.split() == esmeta.task_names()
    assert presets.split() == sorted(path.stem for path in (ROOT / "runs/presets").glob("*.toml"))


def test_uninstalled_checkout_works_anywhere(user_folder):
    code = (
        "import esmeta; print(*esmeta.task_names()); import esmeta.tasks.harlow as h;"
        "print(h.__file__)"
    )
    tasks, harlow = python(code, user_folder, ROOT).splitlines()
    assert tasks.split() == esmeta.task_names()
    assert Path(harlow) == ROOT / "tasks" / "harlow.py"


def test_import_is_light(user_folder):
    code = f"import sys, esmeta; print(*(set({HEAVY.split()!r}) & set(sys.modules)))"
    assert python(code, user_folder, ROOT) == ""


def test_core_names_load_no_optional_package(user_folder):
    code = (
        "import sys, esmeta; [getattr(esmeta, n) for n in ('make_task', 'make_policy',"
        "'PopulationEvaluator', 'Fitness', 'ravel', 'unravel')];"
        "print(*({'evotorch', 'ray', 'pandas', 'matplotlib', 'tensorboard'} & set(sys.modules)))"
    )
    assert python(code, user_folder, ROOT) == ""


@pytest.mark.parametrize("name", esmeta.__all__)
def test_public_name(name):
    assert getattr(esmeta, name) is not None
    assert name in dir(esmeta)


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="no attribute 'make_taks'"):
        esmeta.make_taks  # noqa: B018


def test_every_dependency_is_pinned_within_its_bounds():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    extras = project["optional-dependencies"]
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in pins)
    for text in [*project["dependencies"], *extras["mujoco"], *extras["mpi"], *extras["dev"]]:
        requirement = Requirement(text)
        if requirement.name == "triton":
            continue  # torch for CUDA asks for a version of its own
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{text} does not admit {pin}"
