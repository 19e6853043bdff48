"""Run directories as data: what each is, which differ in their seed only, and their scores."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esmeta import older
from esmeta.analysis.series import Series, common_end, from_rows, over_seeds
from esmeta.errors import UserError
from esmeta.run import config as configs
from esmeta.run.scoring import scored_config, variant
from esmeta.summary import summary
from esmeta.types import Reference

_NUMBERED = re.compile(r"(.+)_(\d+)")
# Differences that a label names before it is cut.
_LABEL_KEYS = 3
_NO_SCORE = math.nan, math.nan


@dataclass(frozen=True)
class RunData:
    """One run directory: resolved ``tables``, run.json as ``facts``, and metrics as ``rows``."""

    path: Path
    tables: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    old_scores: int | None
    """The last step that was scored before there was a validation split."""

    @property
    def seed(self) -> int:
        """Seed of everything random."""
        return self.tables["run"]["seed"]

    @property
    def last(self) -> dict[str, Any]:
        """The last line of the metrics."""
        return self.rows[-1]

    def scores(self, split: str) -> dict[str, Any]:
        """What theta is worth on a split, by names without it; empty if it is not known.

        On ``"test"`` at the end of the run, on ``"validation"`` when it was last scored, with that
        ``step``.
        """
        if split == "test":
            row = self.facts.get("test") or {}
        else:
            known = [row for row in self.rows if row.get("validation_return") is not None]
            row = known[-1] if known else {}
        own = {k.removeprefix(f"{split}_"): v for k, v in row.items() if k.startswith(split)}
        return {**own, "step": row["step"]} if "step" in row else own

    def curve(self, x: str) -> Series:
        """Return on the validation split against ``x``."""
        return from_rows(self.rows, "validation_return", x)


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that differ in their seed only."""

    label: str
    runs: list[RunData]
    reference: Reference
    scored: configs.Config | None = None
    """What their scores are of; None if it cannot be built here any more."""
    variant: str = ""
    """Which training aids their scores are without or with, for a sentence."""

    @classmethod
    def of(cls, label: str, runs: list[RunData]) -> Group:
        """Runs with what their scores are of and read against, as the first of them says."""
        try:
            config = configs.resolve(runs[0].tables)
            scored = scored_config(config)
            reference = scored.objective.instance.reference(scored.task.instance)
        except UserError as error:
            return cls(label, runs, Reference(math.nan, math.nan, str(error)))
        return cls(label, runs, reference, scored, variant(config, scored))

    @property
    def slug(self) -> str:
        """The label as part of a file's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-.")[:80] or "group"

    @property
    def task(self) -> str:
        """The task that is scored, with all its options: only groups with the same one compare."""
        if self.scored is not None:
            return repr(self.scored.task.instance)
        return json.dumps(self.runs[0].tables["task"], sort_keys=True)

    @property
    def split(self) -> str:
        """The split that tables show: the test, if all runs were scored on it when they ended."""
        return "test" if all(run.scores("test") for run in self.runs) else "validation"

    def remarks(self) -> list[str]:
        """What a reader of the means must know."""
        notes = []
        seeds = Counter(run.seed for run in self.runs)
        twice = sorted(seed for seed, count in seeds.items() if count > 1)
        if twice:
            notes.append(f"seed {twice[0]} occurs more than once: the s.e. over seeds is too small")
        if len({run.last["step"] for run in self.runs}) > 1:
            notes.append("the runs stopped after different numbers of steps")
        if self.split == "validation":
            notes.append(
                "not every run was scored on the test split: scores are of the validation split, "
                "which runs select on; python -m esmeta.evaluate RUN gives those of the test"
            )
            found = [(run.scores("validation").get("step"), run.last["step"]) for run in self.runs]
            late = sorted({str(step) for step, last in found if step is not None and step < last})
            if late:
                notes.append(f"scores are those of the last evaluation, at step {', '.join(late)}")
        old = [(run, run.old_scores) for run in self.runs if run.old_scores is not None]
        if old:
            until = sorted({str(step) for run, step in old if step < run.last["step"]})
            part = f" up to step {', '.join(until)}" if until else ""
            notes.append(
                f"made before there was a validation split: curves{part} are of the test split, "
                "with the training aids of the run's task"
            )
        elif self.variant:
            notes.append(f"scores are of the {self.split} split{self.variant}")
        open_ = [str(run.seed) for run in self.runs if not run.facts.get("stopped_by")]
        if open_:
            notes.append(f"not finished: seed {', '.join(open_)}")
        return notes


def read_run(path: Path) -> RunData:
    """Read a run directory that esmeta.train wrote."""
    from esmeta.run.record import written_lines

    if not (path / "config.toml").is_file():
        raise UserError(
            f"{path}: not a run directory (no config.toml); give one that esmeta.train wrote"
        )
    lines = written_lines(path)
    rows = [older.metrics(line) for line in lines]
    if not rows:
        raise UserError(
            f"{path}: no metrics yet; wait for its first logged step, or train longer (every "
            "run.metrics_every steps a line is written)"
        )
    try:
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {}
    tables = configs.load(path / "config.toml")
    if not all(isinstance(tables.get(name), dict) for name in configs.SECTIONS):
        raise UserError(
            f"{path / 'config.toml'}: a section is missing; a run has all of: "
            f"{', '.join(configs.SECTIONS)}; restore the file or leave out this run"
        )
    return RunData(path, tables, facts, rows, older.last_scores(lines))


def _flat(run: RunData) -> dict[str, Any]:
    """All options that decide the course of training, as ``section.key``."""
    ignored = {"seed", "evaluate_every", "evaluate_trials", *configs.NOT_IN_DIGEST}
    return {
        f"{section}.{key}": value
        for section, table in run.tables.items()
        for key, value in table.items()
        if section != "run" or key not in ignored
    }


def _base_label(run: RunData) -> str:
    silent = {("policy", configs.NO_POLICY), ("objective", configs.DEFAULT_OBJECTIVE)}
    found = [(kind, run.tables[kind]["name"]) for kind in configs.KINDS]
    return " ".join(name for kind, name in found if (kind, name) not in silent)


def _labels(runs: Sequence[RunData]) -> list[str]:
    """One label per group: the names, and the options in which namesakes differ."""
    bases = [_base_label(run) for run in runs]
    labels = []
    for run, base in zip(runs, bases, strict=True):
        mine = _flat(run)
        namesakes = [_flat(other) for other, name in zip(runs, bases, strict=True) if name == base]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in namesakes)]
        shown = [f"{key.partition('.')[2]}={mine[key]}" for key in differing[:_LABEL_KEYS]]
        label = " ".join([base, ", ".join(shown)]).strip()
        same = labels.count(label)
        labels.append(f"{label} #{same + 1}" if same else label)
    return labels


def group_runs(paths: Sequence[Path]) -> list[Group]:
    """Runs by configuration, in the order given; a directory given twice counts once."""
    distinct = {path.resolve(): path for path in paths}
    found: dict[str, list[RunData]] = {}
    for path in distinct.values():
        run = read_run(path)
        found.setdefault(json.dumps(_flat(run), sort_keys=True, default=str), []).append(run)
    members = [sorted(runs, key=lambda run: run.seed) for runs in found.values()]
    labels = _labels([runs[0] for runs in members])
    return [Group.of(label, runs) for label, runs in zip(labels, members, strict=True)]


# --- numbers -----------------------------------------------------------------------------------


def mean_se(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the values that are not NaN; NaN where there are too few."""
    found = summary(torch.tensor(values, dtype=torch.float64, device="cpu"))
    return found.mean, found.se


def interval_text(group: Group) -> str:
    """Student's 95 % interval of a group's return over its seeds, ``1.23 to 1.45``, or a dash."""
    values = [_number(run.scores(group.split).get("return")) for run in group.runs]
    count = sum(not math.isnan(value) for value in values)
    if count < 2:
        return "-"
    mean, error = mean_se(values)
    wide = error * _student(count - 1)
    return f"{mean - wide:.3f} to {mean + wide:.3f}"


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: exact for few degrees of freedom, else a series.

    The series is Abramowitz & Stegun 26.7.5; from 10 on it is right to 1e-4.
    """
    exact = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
    if freedom <= len(exact):
        return exact[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def final(group: Group) -> tuple[float, float]:
    """Return at the end: mean and standard error over seeds, or over trials for a single run."""
    found = [run.scores(group.split) for run in group.runs]
    if len(found) == 1:
        return _number(found[0].get("return")), _number(found[0].get("se"))
    return mean_se([_number(scores.get("return")) for scores in found])


def task_metrics(group: Group) -> dict[str, list[str]]:
    """Heading of a column -> names of the task's scores in it (``accuracy_1`` .. in one)."""
    skip = {"return", "se", "sd", "steps", "step"}
    columns: dict[str, list[str]] = {}
    for name in group.runs[0].scores(group.split):
        if name not in skip:
            match = _NUMBERED.fullmatch(name)
            columns.setdefault(match.group(1) if match else name, []).append(name)
    return {
        f"{title} {names[0].rpartition('_')[2]}-{names[-1].rpartition('_')[2]}"
        if len(names) > 1
        else names[0]: names
        for title, names in columns.items()
    }


def equal_budget(groups: Sequence[Group], x: str) -> tuple[float, dict[str, tuple[float, float]]]:
    """The largest ``x`` that every run reached, and the validation return of each group there."""
    curves = {group.label: [run.curve(x) for run in group.runs] for group in groups}
    curves = {label: [c for c in found if len(c)] for label, found in curves.items()}
    curves = {label: found for label, found in curves.items() if found}
    end = common_end([curve for found in curves.values() for curve in found])
    return end, {label: over_seeds(found).at(end) for label, found in curves.items()}


# --- tables ------------------------------------------------------------------------------------


def plus_minus(value: float, error: float) -> str:
    """``1.234 ± 0.056``; a dash where the value is unknown."""
    if math.isnan(value):
        return "-"
    return f"{value:.3f}" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def _metric_text(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    values = [mean_se([_number(row.get(name)) for row in rows])[0] for name in names]
    digits = 2 if len(names) > 1 else 3
    return " ".join("-" if math.isnan(value) else f"{value:.{digits}f}" for value in values)


def runs_table(group: Group) -> list[list[str]]:
    """Heading, one row per run, and with several seeds their means ± s.e. and 95 % interval."""
    metrics = task_metrics(group)
    columns = [f"{group.split} return", "s.d. over trials", *metrics]
    table = [["seed", "steps", "env steps", "seconds", *columns]]
    for run in group.runs:
        scores = run.scores(group.split)
        value, error, spread = (_number(scores.get(name)) for name in ("return", "se", "sd"))
        table.append(
            [
                str(run.seed),
                f"{run.last['step']:,}",
                f"{run.last.get('env_steps') or 0:,}",
                f"{_number(run.last.get('seconds')):,.1f}",
                plus_minus(value, error),
                plus_minus(spread, math.nan),
                *(_metric_text([scores], names) for names in metrics.values()),
            ]
        )
    if len(group.runs) > 1:
        rows = [run.scores(group.split) for run in group.runs]
        means = [mean_se([_number(r.last.get(k)) for r in group.runs])[0] for k in _AXES]
        table.append(
            [
                "mean",
                *(f"{mean:,.{digits}f}" for mean, digits in zip(means, (0, 0, 1), strict=True)),
                plus_minus(*final(group)),
                "",
                *(_metric_text(rows, names) for names in metrics.values()),
            ]
        )
        table.append(["95 %", "", "", "", interval_text(group), "", *([""] * len(metrics))])
    return table


_AXES = ("step", "env_steps", "seconds")


def budget_table(groups: Sequence[Group]) -> list[list[str]]:
    """Heading, and per group its validation return at equal environment steps and wall time."""
    head, columns = ["configuration", "runs"], []
    for x, unit in (("env_steps", "environment steps"), ("seconds", "s")):
        end, scores = equal_budget(groups, x)
        digits = 1 if x == "seconds" else 0
        head.append("-" if math.isnan(end) else f"at {end:,.{digits}f} {unit}")
        columns.append(scores)
    rows = [
        [
            group.label,
            str(len(group.runs)),
            *(plus_minus(*scores.get(group.label, _NO_SCORE)) for scores in columns),
        ]
        for group in groups
    ]
    return [head, *rows]
