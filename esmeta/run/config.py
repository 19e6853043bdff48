"""Configuration: one TOML file, six sections, each checked by the dataclass it names.

``[task] [policy] [objective] [optimizer]`` have a ``name``, which is the name of a module; the
other keys are the fields of that module's dataclass, so every default stands beside the code that
reads it. ``[budget]`` and ``[run]`` are the dataclasses below. Modules are imported only by
:func:`resolve`, which keeps ``--help`` fast.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esmeta import errors, names, older
from esmeta.errors import UserError, listed, nearest
from esmeta.options import options_class, plain

Table = dict[str, Any]

KINDS = ("task", "policy", "objective", "optimizer")
"""Sections that name a module; see :mod:`esmeta.names`."""
SECTIONS = (*KINDS, "budget", "run")
NO_POLICY = "none"
"""``policy.name`` of runs whose objective trains agents of its own."""
DEFAULT_OBJECTIVE = "return"
DEFAULT_TRIALS = 16
# Keys that do not change what is computed, only where, how long, or what is written down.
NOT_IN_DIGEST = {
    "device",
    "threads",
    "checkpoint_every",
    "tensorboard",
    "metrics_every",
    "metrics_per_second",
    "rank_timeout",
    "remote_envs",
}
_SYNONYMS = {"generations": "updates", "updates": "generations"}


@options_class
class Budget:
    """When a run ends: at the first limit reached; at least one is needed.

    ``generations`` and ``updates`` both count steps of the optimizer; give one of the two.
    ``target`` ends the run as soon as the mean return of validation reaches it, ``plateau`` when
    that has had no new best for so many steps. The first ``restarts`` plateaus do not end it: the
    search begins anew from parameters drawn anew, and the best theta of all attempts is kept.
    """

    generations: int | None = None
    updates: int | None = None
    env_steps: int | None = None
    seconds: float | None = None
    target: float | None = None
    plateau: int | None = None
    restarts: int = 0

    def __post_init__(self) -> None:
        for name in ("generations", "updates", "env_steps", "plateau"):
            if getattr(self, name) is not None:
                errors.positive_int(name, getattr(self, name), example=1000)
        errors.non_negative_int("restarts", self.restarts, example=3)
        if self.restarts and self.plateau is None:
            raise UserError(
                f"restarts = {self.restarts}: a restart follows a plateau, and none is defined; "
                "write for example plateau = 500"
            )
        if self.seconds is not None:
            errors.finite_positive("seconds", self.seconds, example=3600)
        if self.target is not None:
            errors.finite("target", self.target)
        if self.generations is not None and self.updates is not None:
            raise UserError(
                f"generations = {self.generations} and updates = {self.updates}: these are two "
                "words for the steps of the optimizer; write only one of them"
            )
        if self.steps is None and self.env_steps is None and self.seconds is None:
            raise UserError(
                "no limit is given; write at least one of generations, updates, env_steps, seconds"
            )

    @property
    def steps(self) -> int | None:
        """Steps of the optimizer at most, under either name."""
        return self.updates if self.generations is None else self.generations


@options_class
class Run:
    """How a run is carried out. All ``*_every`` count steps of the optimizer; 0 means never.

    The last step is always written, whatever ``checkpoint_every`` says. ``rank_timeout`` is how
    many seconds ranks wait for one that does not come before they end the job; 0 chooses 600 s for
    the first steps and while rank 0 works alone between steps, later 60 s or ten times the median
    of the last steps, whichever is more. ``remote_envs``: under mpirun, one rank of each machine
    learns, and all ranks of that machine simulate its environments; else every rank learns. Those
    that serve wait for 600 s at least, as the learner may work alone for long.

    Of the steps that ``metrics_every`` chooses, at most ``metrics_per_second`` are written down on
    average, after the first thousand (0: all of them); scores and the last step always are.

    ``evaluate_trials`` tasks of the validation split score theta; what is selected (``budget``'s
    target and plateau, ``best.safetensors``) is selected on them. They are tasks as published,
    without training aids (:func:`esmeta.tasks.aid`), unless ``evaluate_as_trained`` is set.
    """

    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    checkpoint_every: int = 50
    evaluate_every: int = 20
    evaluate_trials: int = 64
    evaluate_as_trained: bool = False
    metrics_every: int = 1
    metrics_per_second: float = 5.0
    tensorboard: bool = True
    rank_timeout: float = 0.0
    remote_envs: bool = False

    def __post_init__(self) -> None:
        errors.non_negative_int("seed", self.seed)
        for name in ("checkpoint_every", "evaluate_every"):
            errors.non_negative_int(name, getattr(self, name), example=20)
        errors.non_negative("rank_timeout", self.rank_timeout, example=120)
        errors.non_negative("metrics_per_second", self.metrics_per_second, example=5)
        for name in ("threads", "evaluate_trials", "metrics_every"):
            errors.positive_int(name, getattr(self, name))
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device = {self.device!r}: write 'cpu', 'cuda' or e.g. 'cuda:1'")


@dataclass(frozen=True)
class Section:
    """A named choice with all its options, defaults included.

    ``instance`` is the checked dataclass of the named module, built from ``options``; None for
    ``policy.name = "none"``.
    """

    name: str
    options: Table
    instance: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class Config:
    """A fully resolved configuration. ``trials`` is B, the trials per member and step."""

    task: Section
    trials: int
    policy: Section
    objective: Section
    optimizer: Section
    budget: Budget
    run: Run


# --- presets ---------------------------------------------------------------------------------


def presets_folder() -> Path:
    """Where the presets are: inside the package when installed, ``runs/presets`` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "presets"
    return inside if inside.is_dir() else package.parent / "runs" / "presets"


def preset_names() -> list[str]:
    """Names of all presets, in order."""
    return sorted(path.stem for path in presets_folder().glob("*.toml"))


def load(preset_or_path: str | Path) -> Table:
    """The unchecked tables of a preset (by name) or of a TOML file (by path)."""
    given = str(preset_or_path)
    is_path = given.endswith(".toml") or "/" in given or "\\" in given
    if not is_path and given not in preset_names():
        raise UserError(
            f"preset {given!r} does not exist{nearest(given, preset_names())}; there are: "
            f"{listed(preset_names())}; or give a path that ends in .toml"
        )
    path = Path(given) if is_path else presets_folder() / f"{given}.toml"
    try:
        return parse(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}; correct that line") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8; give a TOML file") from error
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}; give an existing TOML file or one of the "
            f"presets: {listed(preset_names())}"
        ) from error


def parse(text: str) -> dict[str, Any]:
    """Tables of a TOML text, also of one that an older run wrote."""
    return older.tables(tomllib.loads(text))


# --- resolution ------------------------------------------------------------------------------


def parse_override(text: str) -> tuple[str, str, Any]:
    """``section.key=value`` as (section, key, value); the value is TOML, else a bare string.

    The key of a nested option has dots: ``section.key.inner=value``.
    """
    address, equals, value_text = text.partition("=")
    section, _, key = address.strip().partition(".")
    if not (equals and section and all(key.split("."))):
        raise UserError(f"--set {text!r}: write section.key=value, for example run.seed=1")
    if section not in SECTIONS:
        raise UserError(
            f"--set {text!r}: section {section!r} does not exist{nearest(section, SECTIONS)}; "
            f"sections are: {', '.join(SECTIONS)}"
        )
    value_text = value_text.strip()
    try:
        parsed = tomllib.loads(f"value = {value_text}")
    except tomllib.TOMLDecodeError:
        return section, key, value_text
    return section, key, parsed["value"] if set(parsed) == {"value"} else value_text


def merge(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Table]:
    """The tables of a TOML file after ``overrides``, see :func:`resolve`; nothing is imported."""
    tables: dict[str, Table] = {name: {} for name in SECTIONS}
    for name, table in raw.items():
        if name not in SECTIONS:
            raise UserError(
                f"[{name}] is not a section{nearest(name, SECTIONS)}; sections are: "
                f"{', '.join(SECTIONS)}"
            )
        if not isinstance(table, Mapping):
            raise UserError(f"{name} = {table!r}: must be a section; write a line [{name}]")
        tables[name] = copy.deepcopy(dict(table))
        if name in KINDS and "name" in table:
            tables[name]["name"] = names.canonical(table["name"])
    tables["objective"].setdefault("name", DEFAULT_OBJECTIVE)
    parsed = [parse_override(text) for text in overrides]
    parsed = [(s, k, names.canonical(v) if s in KINDS and k == "name" else v) for s, k, v in parsed]
    for section, key, value in parsed:
        if key == "name" and section in KINDS and value != tables[section].get("name"):
            kept = {k: v for k, v in tables[section].items() if (section, k) == ("task", "trials")}
            tables[section] = {"name": value, **kept}
    given = {(section, key) for section, key, _ in parsed}
    for section, key, value in parsed:
        other = _SYNONYMS.get(key)
        if section == "budget" and other and (section, other) not in given:
            tables[section].pop(other, None)
        _set(tables[section], key, value)
    return tables


def _set(table: Table, key: str, value: Any) -> None:
    outer, dot, inner = key.partition(".")
    if not dot:
        table[key] = value
        return
    nested = table.setdefault(outer, {})
    if not isinstance(nested, dict):
        raise UserError(f"{outer} = {nested!r} is no table; leave out what follows it in {key!r}")
    _set(nested, inner, value)


def _section(kind: str, table: Table) -> Section:
    name = table.pop("name", None)
    if (kind, name) == ("policy", NO_POLICY):
        if table:
            raise UserError(
                f"policy.{next(iter(table))}: policy.name = {NO_POLICY!r} takes no options; the "
                "agents of such an objective are described in [objective]"
            )
        return Section(NO_POLICY, {}, None)
    if not isinstance(name, str) or not name:
        given = "is missing" if name is None else f"= {name!r} is not a name"
        raise UserError(
            f'{kind}.name {given}; write name = "..." in [{kind}]; there are: '
            f"{listed(names.known(kind))}"
        )
    instance = names.make(kind, name, table)
    return Section(name, _options(instance), instance)


def _options(instance: Any) -> Table:
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}


def resolve(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Check the tables of a TOML file after applying ``overrides`` (``section.key=value``).

    An override that changes a ``name`` drops every option the file gives in that section, as they
    were chosen for something else: the defaults of the newly named module hold, except for
    options that are overridden too. ``task.trials`` is kept. ``budget.generations`` replaces
    ``budget.updates`` and the reverse.
    """
    tables = merge(raw, overrides)
    trials = plain(tables["task"].pop("trials", DEFAULT_TRIALS))
    errors.positive_int("task.trials", trials, example=DEFAULT_TRIALS)
    sections = {kind: _section(kind, tables[kind]) for kind in KINDS}
    budget = names.check_options(Budget, tables["budget"], "budget")
    run = names.check_options(Run, tables["run"], "run")
    for name in ("target", "plateau"):
        if getattr(budget, name) is not None and run.evaluate_every == 0:
            raise UserError(
                f"budget.{name} = {getattr(budget, name)} needs scores of validation, but "
                "run.evaluate_every = 0 never makes any; write for example run.evaluate_every = 20"
            )
    return Config(trials=trials, budget=budget, run=run, **sections)


def to_tables(config: Config) -> dict[str, Table]:
    """All values of a configuration, defaults included, as plain TOML types."""

    def toml(value: Any) -> Any:
        if value is None:
            return "none"
        if isinstance(value, Mapping):
            return {key: toml(item) for key, item in value.items()}
        if dataclasses.is_dataclass(value):
            return toml(_options(value))
        value = plain(value)  # what a class of the user's own makes of its options
        return [toml(item) for item in value] if isinstance(value, list | tuple) else value

    tables: dict[str, Table] = {}
    for kind in KINDS:
        section = getattr(config, kind)
        trials = {"trials": config.trials} if kind == "task" else {}
        tables[kind] = {"name": section.name, **trials, **toml(section.options)}
    for name, part in (("budget", config.budget), ("run", config.run)):
        tables[name] = toml(vars(part))
    return tables


def to_toml(config: Config) -> str:
    """The configuration as TOML, every default written; resolves to an equal one."""
    import tomli_w

    return tomli_w.dumps(to_tables(config))


def digest(config: Config) -> bytes:
    """SHA-256 of all that decides the course of a run, up to its end: 32 bytes.

    Budget, device, threads and what is merely written down may change when a run goes on.
    """
    tables = to_tables(config)
    del tables["budget"]
    tables["run"] = {k: v for k, v in tables["run"].items() if k not in NOT_IN_DIGEST}
    return hashlib.sha256(json.dumps(tables, sort_keys=True, default=repr).encode()).digest()
