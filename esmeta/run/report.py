"""``python -m esmeta.report RUN...``: table, figures and one self-contained HTML page."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esmeta import names
from esmeta.errors import UserError, non_negative_int
from esmeta.run.cli import Parser, guarded
from esmeta.run.terminal import prepare_streams

if TYPE_CHECKING:
    from esmeta.analysis.groups import Group, RunData

_FILM_FPS = 20
"""Frames per second at most."""


def parser() -> argparse.ArgumentParser:
    """The command line; a test freezes its flags."""
    p = Parser(
        prog="python -m esmeta.report",
        description="Compare runs: a table, figures, and one HTML page with everything in it. "
        "Runs that differ in their seed only are averaged.",
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    p.add_argument(
        "--out",
        type=Path,
        metavar="DIR|FILE.html",
        help="where the page and its figures go (RUN/report for one run, ./report for several)",
    )
    p.add_argument(
        "--picture",
        action="store_true",
        help="also draw test trials of the first run of each configuration (PNG and GIF)",
    )
    p.add_argument(
        "--trial", type=int, default=0, metavar="N", help="which one is animated (%(default)s)"
    )
    p.add_argument(
        "--film",
        choices=("png", "mp4"),
        help="with --picture: write the animation also as a folder of PNG frames, or as MP4 "
        "(needs ffmpeg)",
    )
    return p


@dataclass(frozen=True)
class Destination:
    """Where files go: the page, and figures beside it with a common beginning of their names."""

    page: Path
    prefix: str

    @classmethod
    def choose(cls, out: Path | None, runs: Sequence[Path]) -> Destination:
        """The destination for ``--out``, or the default one."""
        if out is None:
            out = runs[0] / "report" if len(runs) == 1 else Path("report")
        if out.suffix.lower() in (".html", ".htm"):
            chosen = cls(out, f"{out.stem}-")
        else:
            chosen = cls(out / "report.html", "")
        try:
            chosen.page.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out {out}: {error.strerror or error}; give a directory that can be made, or "
                "a file that ends in .html"
            ) from error
        return chosen

    def figure(self, name: str) -> Path:
        """Path of a figure."""
        return self.page.parent / f"{self.prefix}{name}"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal: the first column to the left, numbers to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _comparable(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of the same task, wherever there are at least two."""
    by_task: dict[str, list[Group]] = {}
    for group in groups:
        by_task.setdefault(group.task, []).append(group)
    return [found for found in by_task.values() if len(found) > 1]


def _compare(groups: Sequence[Group], where: Destination, number: int) -> list[str]:
    from esmeta.analysis import page, plots
    from esmeta.analysis.groups import budget_table

    rows = budget_table(groups)
    name = groups[0].runs[0].tables["task"]["name"]
    print(f"\n{name}: validation return at equal budgets\n{text_table(rows)}")
    out = where.figure(f"compare{number + 1 if number else ''}.png")
    picture = plots.compare({g.label: [run.path for run in g.runs] for g in groups}, out)
    notes = ["Values between two evaluations are linear. ± is over seeds, or trials for one seed."]
    hardware = {(r.facts.get("cpus"), r.facts.get("gpu")) for g in groups for r in g.runs}
    if len(hardware) > 1:
        notes.append("The runs were made on different hardware: wall times do not compare.")
    return [
        page.heading(f"{name}: configurations compared"),
        page.table(rows),
        *(page.paragraph(note, note=True) for note in notes),
        page.image(
            picture,
            "Validation return; the dotted line is where the shortest budget ends.",
        ),
    ]


def _provenance(run: RunData) -> str:
    facts = run.facts
    versions = ", ".join(f"{name} {value}" for name, value in facts.get("versions", {}).items())
    command = shlex.join(["python", "-m", "esmeta.train", *facts.get("command", [])])
    gpu = facts.get("gpu") or "no GPU"
    return "\n".join(
        [
            f"run       {run.path.resolve().name}, seed {run.seed}",
            f"command   {command if 'command' in facts else 'unknown'}",
            f"versions  {versions or 'unknown'}",
            f"commit    {facts.get('commit') or 'unknown'}",
            f"machine   {facts.get('platform', 'unknown')}, {facts.get('cpus', '?')} CPUs, {gpu}, "
            f"{facts.get('ranks', '?')} ranks",
            f"stopped   {facts.get('stopped_by') or 'not finished'}",
            f"theta     {run.last.get('theta_sha256', 'unknown')}",
        ]
    )


@dataclass(frozen=True)
class Pictures:
    """What is drawn of a trial: which one, and whether also as ``png`` frames or ``mp4``."""

    trial: int = 0
    film: str | None = None


def _pictures(group: Group, where: Destination, wanted: Pictures) -> list[str]:
    """Trials of a group's first run, of the test split; a warning where they cannot be drawn."""
    from esmeta.analysis import page, pictures
    from esmeta.run.evaluate import load
    from esmeta.types import Illustrated

    run = group.runs[0]
    try:
        policy, params, task = load(run.path)
        rate = pictures.frame_rate(task)
        every = math.ceil(rate / _FILM_FPS)
        frames = pictures.trial_frames(
            policy, params, task, wanted.trial, seed=run.seed, every=every
        )
    except UserError as error:
        print(f"esmeta: warning: no picture of {group.label}: {error}", file=sys.stderr)
        return [page.paragraph(f"No picture: {error}", note=True)]
    parts = []
    if isinstance(task, Illustrated):
        out = where.figure(f"trials-{group.slug}.png")
        names.function(task.figures)(policy, params, task, out, seed=run.seed)
        parts.append(page.image(out, f"Test trials of theta, seed {run.seed}."))
    name, fps = f"trial-{group.slug}", rate / every
    if wanted.film == "png":
        print(f"frames: {pictures.write_frames(frames, where.figure(name))}")
    if wanted.film == "mp4":
        print(f"film: {pictures.write_mp4(frames, where.figure(f'{name}.mp4'), fps)}")
    out = pictures.write_gif(frames, where.figure(f"{name}.gif"), fps)
    return [
        *parts,
        page.image(out, f"Test trial {wanted.trial} of theta, seed {run.seed}."),
    ]


def _objective_figures(group: Group, where: Destination) -> list[str]:
    """What the first run's objective has drawn of itself, such as a learned loss."""
    from esmeta.analysis import page
    from esmeta.run.evaluate import open_run
    from esmeta.types import Illustrated

    options = group.scored and group.scored.objective.instance
    if not isinstance(options, Illustrated):
        return []

    def place(name: str) -> Path:
        return where.figure(f"{name}-{group.slug}.png")

    try:
        objective, theta, _ = open_run(group.runs[0].path)
        drawn = names.function(options.figures)(objective, theta, group.reference, place)
    except UserError as error:  # such as too few simulators for the agents of a figure
        print(f"esmeta: warning: no figures of {group.label}: {error}", file=sys.stderr)
        return [page.paragraph(f"No figures of what was learned: {error}", note=True)]
    return [page.image(out, caption) for out, caption in drawn]


def _section(group: Group, where: Destination, wanted: Pictures | None) -> list[str]:
    """Print a group's table and return its part of the page."""
    from esmeta.analysis import page, plots
    from esmeta.analysis.groups import runs_table

    rows = runs_table(group)
    reference = group.reference
    known = reference.words()
    remarks = group.remarks()
    print(f"\n{group.label}  ({known})\n{text_table(rows)}")
    for remark in remarks:
        print(f"note: {remark}")
    out = where.figure(f"curve-{group.slug}.png")
    plots.learning_curve([run.path for run in group.runs], out, reference)
    first = group.runs[0].path / "config.toml"
    return [
        page.heading(group.label),
        page.table(rows),
        *(page.paragraph(remark, note=True) for remark in remarks),
        page.paragraph(f"Return of a trial: {known} ({reference.note}).", note=True),
        page.image(out, "Learning curve."),
        *_objective_figures(group, where),
        *(_pictures(group, where, wanted) if wanted else []),
        page.folded("versions and commands", "\n\n".join(map(_provenance, group.runs))),
        page.folded(
            f"resolved configuration (seed {group.runs[0].seed})", first.read_text(encoding="utf-8")
        ),
    ]


def _summary(groups: Sequence[Group]) -> list[list[str]]:
    from esmeta.analysis.groups import final, interval_text, plus_minus

    rows = [
        [
            "configuration",
            "runs",
            "env steps",
            "return",
            "95 % over seeds",
            "split",
            "random",
            "best",
        ]
    ]
    for group in groups:
        steps = max(run.last.get("env_steps") or 0 for run in group.runs)
        reference = group.reference
        known = [f"{reference.random:.4g}", f"{reference.best:.4g}"]
        scores = [plus_minus(*final(group)), interval_text(group), group.split]
        rows.append([group.label, str(len(group.runs)), f"{steps:,}", *scores, *known])
    return rows


def report(
    runs: Sequence[Path], out: Path | None = None, *, pictures: Pictures | None = None
) -> Path:
    """Print tables, write figures and the page; returns the path of the page."""
    from esmeta.analysis import page
    from esmeta.analysis.groups import group_runs

    groups = group_runs(runs)
    where = Destination.choose(out, runs)
    try:
        sections = [part for group in groups for part in _section(group, where, pictures)]
        compared = [
            part
            for number, found in enumerate(_comparable(groups))
            for part in _compare(found, where, number)
        ]
        head = [page.table(_summary(groups))] if len(groups) > 1 else []
        note = "Return: mean ± standard error, over seeds or (one seed) over independent trials."
        tasks = dict.fromkeys(group.runs[0].tables["task"]["name"] for group in groups)
        title = f"esmeta: {', '.join(tasks)}"
        parts = [*head, page.paragraph(note, note=True), *compared, *sections]
        where.page.write_text(page.page(title, parts), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{where.page.parent} cannot be written ({error.strerror or error}); give another --out"
        ) from error
    print(f"\npage: {where.page}")
    return where.page


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    prepare_streams()
    args = parser().parse_args(argv)
    # Single trials are too small for more threads, which only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    def command() -> int:
        non_negative_int("--trial", args.trial)
        if args.film and not args.picture:
            raise UserError(f"--film {args.film}: draws nothing without --picture; add it")
        wanted = Pictures(args.trial, args.film) if args.picture else None
        report(args.runs, args.out, pictures=wanted)
        return 0

    return guarded(command)
