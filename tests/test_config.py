"""Configuration: names, options, overrides, round trip. Uses throw-away classes from outside."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from esmeta import errors, names
from esmeta.errors import UserError
from esmeta.run import config

OUTSIDE = """
from __future__ import annotations
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Optional
from esmeta.errors import finite_positive, positive_int
if TYPE_CHECKING:
    from nowhere import Something

@dataclass(frozen=True)
class Task:
    size: int = 8
    noise: float = 0.0
    walls: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    mode: Literal["easy", "hard"] = "easy"
    limit: Optional[float] = 2.5
    tag: str = "x"
    fast: bool = False
    either: int | str | None = None
    odd: Something | None = None
    _hidden: int = dataclasses.field(default=0, init=False)
    def __post_init__(self):
        positive_int("size", self.size)
        if self.noise > 5:
            raise ValueError("too much noise for this size")

@dataclass(frozen=True)
class Config:
    neurons: int = 20

@dataclass(frozen=True)
class Objective:
    weight: float = 1.0

@dataclass(frozen=True)
class OpenES:
    popsize: int = 64
    learning_rate: float = 0.01
    def __post_init__(self):
        finite_positive("learning_rate", self.learning_rate)

@dataclass(frozen=True)
class PPO:
    learning_rate: float = 3e-4
    epochs: int = 4

@dataclass(frozen=True)
class Nested:
    inner: PPO = PPO()
    weight: float = 1.0

@dataclass(frozen=True)
class Needy:
    level: int

class Plain:
    pass
"""


@pytest.fixture(scope="module", autouse=True)
def outside(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "outside_mod.py").write_text(OUTSIDE)
    (folder / "needs_more.py").write_text("import a_package_nobody_has\n")
    (folder / "broken_mod.py").write_text("raise ValueError('a bug in the module')\n")
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def raw(**changes: dict[str, Any]) -> dict[str, Any]:
    tables: dict[str, Any] = {
        "task": {"name": "outside_mod:Task", "trials": 4, "size": 5},
        "policy": {"name": "outside_mod:Config"},
        "objective": {"name": "outside_mod:Objective"},
        "optimizer": {"name": "outside_mod:OpenES", "popsize": 32, "learning_rate": 0.5},
        "budget": {"generations": 10},
    }
    for section, table in changes.items():
        tables[section] = tables.get(section, {}) | table
    return tables


def refused(*parts: str, overrides: list[str] | None = None, **changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        config.resolve(raw(**changes), overrides or [])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_defaults_and_given_values_are_resolved() -> None:
    c = config.resolve(raw())
    assert c.task.name == "outside_mod:Task" and c.trials == 4
    assert c.task.options["size"] == 5 and c.task.options["walls"] == (1, 2)
    assert "_hidden" not in c.task.options and "trials" not in c.task.options
    assert c.task.instance.size == 5 and c.optimizer.instance.popsize == 32
    assert c.run == config.Run() and c.budget.steps == 10
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.trials = 3  # type: ignore[misc]
    without = raw()
    del without["task"]["trials"]
    assert config.resolve(without).trials == config.DEFAULT_TRIALS == 16


def test_options_can_be_nested() -> None:
    given = raw(objective={"name": "outside_mod:Nested", "inner": {"epochs": 3}})
    c = config.resolve(given, ["objective.inner.learning_rate=1"])
    inner = c.objective.instance.inner
    assert (inner.epochs, inner.learning_rate, type(inner).__name__) == (3, 1.0, "PPO")
    again = config.resolve(config.parse(config.to_toml(c)))
    assert again == c and again.objective.instance == c.objective.instance
    assert config.digest(again) == config.digest(c) != config.digest(config.resolve(given))
    for change, *words in (
        ("inner.epohs=3", "objective.inner.epohs", "did you mean 'epochs'"),
        ("inner.epochs=x", "objective.inner.epochs = 'x'", "an integer"),
        ("inner=3", "objective.inner = 3", "a table"),
        ("weight.x=3", "objective.weight = {'x': 3}", "a finite number"),
    ):
        refused(*words, overrides=["objective.name=outside_mod:Nested", f"objective.{change}"])
    refused("weight = 2.0", "no table", "'weight.x'", overrides=["objective.weight.x=3"],
            objective={"weight": 2.0})  # fmt: skip


def test_types_are_converted_or_refused() -> None:
    task = {"noise": 2, "walls": [3], "pair": [1, 2], "mode": "hard", "limit": "none", "either": 3}
    options = config.resolve(raw(task=task)).task.options
    assert options["noise"] == 2.0 and type(options["noise"]) is float
    assert options["walls"] == (3,) and options["pair"] == (1, 2.0)
    assert options["mode"] == "hard" and options["limit"] is None and options["either"] == 3
    assert config.resolve(raw(task={"either": "word"})).task.options["either"] == "word"
    refused("task.size = True", "integer", task={"size": True})
    refused("task.size = 2.0", "integer", task={"size": 2.0})
    refused("task.noise = nan", "finite", task={"noise": float("nan")})
    refused("task.noise = inf", "finite", task={"noise": float("inf")})
    refused("task.noise = 1000", "finite", task={"noise": 10**400})
    refused("task.noise = True", "finite", task={"noise": True})
    refused("task.fast = 1", "true or false", task={"fast": 1})
    refused("task.tag = 1", "text", task={"tag": 1})
    refused("task.walls = 3", "a list", task={"walls": 3})
    refused("task.walls = ['a']", "integer", task={"walls": ["a"]})
    refused("task.pair = [1]", "a list of 2 values", task={"pair": [1]})
    refused("task.mode = 'hrad'", "easy, hard", "did you mean 'hard'", task={"mode": "hrad"})
    refused("task.limit = 'no'", 'or "none"', task={"limit": "no"})
    refused("task.either = 1.5", "an integer", "or text", task={"either": 1.5})


def test_unknown_keys_sections_and_missing_values_say_what_there_is() -> None:
    refused("task.sise", "did you mean 'size'", "mode", task={"sise": 3})
    refused("run.sead", "did you mean 'seed'", run={"sead": 3})
    refused("[optimiser]", "did you mean 'optimizer'", optimiser={"name": "x"})
    refused("optimizer.level is missing", overrides=["optimizer.name=outside_mod:Needy"])
    with pytest.raises(UserError, match="task = 3: must be a section"):
        config.resolve(raw() | {"task": 3})
    with pytest.raises(UserError, match="not a name"):
        config.resolve(raw(task={"name": 3}))


def test_value_errors_of_the_class_carry_the_section() -> None:
    refused("task.size = 0: must be an integer >= 1; write", task={"size": 0})
    refused("task: too much noise", task={"noise": 9})
    refused("optimizer.learning_rate = -1.0", "finite number > 0", optimizer={"learning_rate": -1})
    refused("task.trials = 0", task={"trials": 0})
    refused("task.trials = True", task={"trials": True})


def test_budget_needs_a_limit_and_one_word_for_steps() -> None:
    both = {"generations": 3, "updates": 4}
    refused("budget.generations = 3 and updates = 4", "only one", budget=both)
    with pytest.raises(UserError, match="budget: no limit is given"):
        config.resolve(raw() | {"budget": {"target": 1.0}})
    for limit, steps in (({"updates": 7}, 7), ({"env_steps": 9}, None), ({"seconds": 2}, None)):
        assert config.resolve(raw() | {"budget": limit}).budget.steps == steps
    never = {"evaluate_every": 0}
    refused("budget.plateau = 9 needs scores of validation", budget={"plateau": 9}, run=never)
    refused("budget.target = 1.0 needs", "every = 20", budget={"target": 1}, run=never)
    refused("budget.restarts = -1", budget={"plateau": 9, "restarts": -1})
    refused("budget.restarts = 2: a restart follows a plateau", budget={"restarts": 2})
    refused("budget.plateau = 0", budget={"plateau": 0})
    refused("budget.seconds = 0.0", budget={"seconds": 0})
    refused("budget.env_steps = -1", budget={"env_steps": -1})
    replaced = config.resolve(raw(), ["budget.updates=3"]).budget
    assert replaced.steps == 3 and replaced.generations is None
    refused("only one", overrides=["budget.updates=3", "budget.generations=4"])


def test_run_is_checked() -> None:
    refused("run.seed = -1", run={"seed": -1})
    refused("run.threads = 0", run={"threads": 0})
    refused("run.device = 'gpu'", "cuda", run={"device": "gpu"})
    refused("run.checkpoint_every = -5", run={"checkpoint_every": -5})
    c = config.resolve(raw(run={"device": "cuda:1", "evaluate_every": 0}))
    assert c.run.device == "cuda:1" and c.run.evaluate_every == 0


def test_override_values_are_toml_else_bare_strings() -> None:
    parse = config.parse_override
    assert parse("run.seed=3") == ("run", "seed", 3)
    assert parse("task.walls=[1, 2]") == ("task", "walls", [1, 2])
    assert parse("task.tag=a=b") == ("task", "tag", "a=b")
    assert parse('task.tag="3"') == ("task", "tag", "3")
    assert parse("task.tag=1\nseed = 3") == ("task", "tag", "1\nseed = 3")
    assert parse("task.fast = true") == ("task", "fast", True)
    assert parse("task.tag=") == ("task", "tag", "")
    for bad in ("seed=3", "run.seed", "run.a..b=3", ".seed=3", "run.=3", "="):
        with pytest.raises(UserError, match="section.key=value"):
            parse(bad)
    with pytest.raises(UserError, match="did you mean 'run'"):
        parse("rin.seed=3")
    c = config.resolve(raw(), ["task.size=6", "task.size=7", "task.mode=hard", "task.limit=none"])
    assert c.task.options["size"] == 7 and c.task.options["mode"] == "hard"
    assert c.task.options["limit"] is None


def test_a_changed_name_drops_the_old_options_but_not_trials() -> None:
    c = config.resolve(raw(), ["optimizer.epochs=9", "optimizer.name=outside_mod:PPO"])
    assert c.optimizer.options == {"learning_rate": 3e-4, "epochs": 9}
    assert c.trials == 4 and c.task.options["size"] == 5
    same = config.resolve(raw(), ["optimizer.name=outside_mod:OpenES"])
    assert same.optimizer.options["popsize"] == 32
    other = config.resolve(raw(), ["task.name=outside_mod:Needy", "task.level=1"])
    assert other.trials == 4 and other.task.options == {"level": 1}
    source = raw()
    config.resolve(source, ["task.size=9"])
    assert source == raw(), "resolve must not change what it is given"


def test_toml_round_trip_is_equal_and_complete() -> None:
    import tomllib

    changes = {"task": {"limit": "none", "tag": 'q"\\é', "walls": []}, "run": {"seed": 2**62}}
    c = config.resolve(raw(**changes))
    text = config.to_toml(c)
    again = config.resolve(tomllib.loads(text))
    assert again == c and config.to_toml(again) == text
    assert config.digest(again) == config.digest(c)
    written = tomllib.loads(text)
    assert set(written["run"]) == {f.name for f in dataclasses.fields(config.Run)}
    assert set(written["task"]) == set(c.task.options) | {"name", "trials"}
    assert written["task"]["limit"] == "none"


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("run.device=cuda", False),
        ("run.threads=2", False),
        ("run.checkpoint_every=1", False),
        ("run.tensorboard=false", False),
        ("run.metrics_every=3", False),
        ("budget.generations=99", False),
        ("budget.seconds=99", False),
        ("run.seed=1", True),
        ("task.trials=5", True),
        ("task.size=6", True),
        ("optimizer.learning_rate=0.25", True),
        ("objective.weight=2", True),
        ("policy.neurons=21", True),
    ],
)
def test_digest_changes_with_what_decides_the_result(override: str, changes: bool) -> None:
    base, other = config.resolve(raw()), config.resolve(raw(), [override])
    assert len(config.digest(base)) == 32
    assert (config.digest(base) != config.digest(other)) is changes
    assert base != other


def make_package(folder: Path, name: str, files: dict[str, str]) -> None:
    (folder / name).mkdir()
    for file, text in files.items():
        (folder / name / file).write_text(text)


def test_modules_are_listed_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = "from dataclasses import dataclass\n@dataclass\nclass Objective:\n    x: int = 1\n"
    files = {"__init__.py": "", "_private.py": "", "return_.py": good, "boom.py": "1 / 0"}
    make_package(tmp_path, "fake_objectives", files)
    make_package(tmp_path / "fake_objectives", "folder", {"__init__.py": good})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(names.KINDS, "objective", ("fake_objectives", "Objective"))
    assert names.known("objective") == ["boom", "folder", "return"]
    assert names.load("objective", "return").__module__ == "fake_objectives.return_"
    assert names.load("objective", "folder").__name__ == "Objective"
    with pytest.raises(UserError, match=r"'retrun' .*did you mean 'return'.*boom, folder, return"):
        names.load("objective", "retrun")
    without = raw()
    del without["objective"]
    assert config.resolve(without).objective.name == "return"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("outside_mod:Tusk", "did you mean 'Task'"),
        ("outside_mod:Plain", "not a dataclass"),
        ("not_there:Task", "no module 'not_there'"),
        ("not_there.sub:Task", "no module 'not_there.sub'"),
        ("needs_more:Task", "needs the Python package 'a_package_nobody_has'"),
        (":Task", "not a name"),
        ("outside_mod:", "not a name"),
        ("a b:c", "not a name"),
    ],
)
def test_outside_classes_that_cannot_be_loaded(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        names.load("task", name)


def test_a_bug_inside_a_module_is_not_the_users() -> None:
    with pytest.raises(ValueError, match="a bug in the module") as caught:
        names.load("task", "broken_mod:Task")
    assert not isinstance(caught.value, UserError)


def test_presets_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "presets_folder", lambda: tmp_path)
    (tmp_path / "maze.toml").write_text("[run]\nseed = 4\n")
    (tmp_path / "bad.toml").write_text("[run\n")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert config.preset_names() == ["bad", "binary", "maze"]
    assert config.load("maze") == {"run": {"seed": 4}}
    assert config.load(tmp_path / "maze.toml") == {"run": {"seed": 4}}
    with pytest.raises(UserError, match=r"'mase' .*did you mean 'maze'.*bad, binary, maze"):
        config.load("mase")
    with pytest.raises(UserError, match="not valid TOML.*line 1"):
        config.load("bad")
    with pytest.raises(UserError, match="UTF-8"):
        config.load("binary")
    with pytest.raises(UserError, match=r"none\.toml: No such file"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(UserError, match="Is a directory"):
        config.load(f"{tmp_path}/")


def test_validators_refuse_wrong_values_and_pass_right_ones() -> None:
    nan, inf = float("nan"), float("inf")
    cases: list[tuple[Any, list[Any], list[Any]]] = [
        (errors.positive_int, [1, 9], [0, -1, True, 1.0, "1", None, nan]),
        (errors.non_negative_int, [0, 9], [-1, False, 0.0, nan]),
        (errors.finite, [-1, 0.5], [nan, inf, True, "1"]),
        (errors.finite_positive, [1, 1e-9], [0, 0.0, -1, nan, inf, True, "1", 10**400]),
        (errors.non_negative, [0, 0.0, 3], [-1e-9, nan, inf, -inf, True]),
        (errors.fraction, [0, 1, 0.5], [-0.1, 1.1, nan, True]),
    ]
    for check, good, bad in cases:
        for value in good:
            check("x.y", value)
        for value in bad:
            with pytest.raises(UserError, match=r"^x\.y = .*: must be .*; write for example"):
                check("x.y", value)
    errors.one_of("a", "b", ["b", "c"])
    with pytest.raises(UserError, match="did you mean 'centered'"):
        errors.one_of("a", "centred", ["centered", "raw"])
    assert errors.nearest("zzz", ["abc"]) == ""
    assert str(UserError("two\n  lines")) == "two lines"


def test_importing_config_is_light() -> None:
    code = textwrap.dedent("""
        import sys, importlib.util as u, types
        package = types.ModuleType("esmeta"); package.__path__ = [sys.argv[1]]
        sys.modules["esmeta"] = package
        import esmeta.run.config
        heavy = {"torch", "numpy", "tomli_w", "rich", "mpi4py", "tensorboard"} & set(sys.modules)
        assert not heavy, heavy
    """)
    folder = str(Path(config.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=30)


def test_what_older_runs_wrote_means_what_it_did(tmp_path: Path) -> None:
    """Options that came later have the value that stands for what was done before."""
    given = config.resolve(config.load("pendulum-metagenrl"))
    text = config.to_toml(given)
    assert 'snippets = "steps"' in text and "evaluate_as_trained = false" in text
    now = text.replace('snippets = "steps"\n', "")
    before = now.replace("evaluate_as_trained = false\n", "")
    found = []
    for kept in (now, before):
        path = tmp_path / "config.toml"
        path.write_text(kept)
        found.append(config.resolve(config.load(path)).objective.options["snippets"])
    assert found == ["episodes", "steps"]
    assert config.digest(config.resolve(config.parse(before))) == config.digest(given)
