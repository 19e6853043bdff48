"""Figures of runs: learning curves, and configurations at equal steps and equal wall time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esmeta.analysis.series import (
    TRAINING,
    Series,
    common_end,
    from_rows,
    over_seeds,
    thinned,
)
from esmeta.types import Reference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every common kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#666666"
_DPI = 110
_Rows = list[dict[str, Any]]
_X_LABELS = {"env_steps": "environment steps", "seconds": "wall time (s)"}
_EQUAL = {"env_steps": "at equal environment steps", "seconds": "at equal wall time"}
_NUMBERED = re.compile(r"validation_(.+)_(\d+)")
# Longer budgets differ by so much only on a logarithmic axis.
_LOG_RATIO = 20.0


def new_figure(
    columns: int, rows: int = 1, *, width: float = 5.2, height: float = 3.7
) -> tuple[Figure, Any]:
    """An empty figure, and its panels row by row; inches each."""
    # Not pyplot: it keeps global state and every figure that is not closed.
    from matplotlib.figure import Figure

    size = (width * columns, height * rows)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, out: Path) -> Path:
    """Write ``figure`` as a PNG; returns its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", metadata={"Software": None})
    return out


def _tidy(axes: Axes, x: str, title: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(_X_LABELS[x])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _curve(axes: Axes, curve: Series, colour: str, label: str, style: str = "-") -> None:
    """A line with its band of one standard error; single points become visible dots."""
    marker = "o" if len(curve) < 3 else ""
    axes.plot(curve.x, curve.y, style, color=colour, lw=2, marker=marker, label=label, zorder=3)
    known = np.isfinite(curve.se)
    low, high = curve.y - curve.se, curve.y + curve.se
    axes.fill_between(
        curve.x, low, high, where=known.tolist(), color=colour, alpha=0.2, lw=0, zorder=2
    )


def _references(axes: Axes, reference: Reference) -> None:
    for name, value, style in (("best", reference.best, "--"), ("random", reference.random, ":")):
        if not math.isfinite(value):
            continue
        axes.axhline(value, color=GREY, lw=1.2, ls=style, zorder=1)
        axes.annotate(
            f"{name} {value:.3g}",
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2 if name == "best" else -2),
            textcoords="offset points",
            ha="right",
            va="bottom" if name == "best" else "top",
            fontsize=9,
            color=GREY,
        )


def _return_panel(axes: Axes, logs: list[_Rows], reference: Reference) -> None:
    for name, label in zip(TRAINING, ("training", "training (population mean)"), strict=True):
        curves = [thinned(from_rows(rows, name, "env_steps")) for rows in logs]
        for k, curve in enumerate(curves):
            known = label if k == 0 and len(curve) else None
            axes.plot(curve.x, curve.y, color=COLOURS[1], lw=0.8, alpha=0.55, label=known)
    curves = [from_rows(rows, "validation_return", "env_steps") for rows in logs]
    mean = over_seeds(curves)
    if len(curves) > 1:
        for curve in curves:
            axes.plot(curve.x, curve.y, color=COLOURS[0], lw=0.8, alpha=0.4)
    if len(mean):
        kind = f"mean of {len(curves)} runs ± s.e." if len(curves) > 1 else "± s.e."
        _curve(axes, mean, COLOURS[0], f"validation, {kind}")
    axes.margins(y=0.09)
    _references(axes, reference)
    _tidy(axes, "env_steps", "return of a trial")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, loc="best")
    else:
        axes.text(0.5, 0.5, "nothing logged yet", transform=axes.transAxes, ha="center")


def _second_metrics(logs: list[_Rows]) -> tuple[str, list[str]]:
    """Title and names of the metrics for the second panel; no names, no panel."""
    names = {name: None for rows in logs for row in rows for name in row}
    numbered = [match for match in map(_NUMBERED.fullmatch, names) if match]
    if numbered:
        stem = numbered[0].group(1)
        family = [match.group(0) for match in numbered if match.group(1) == stem]
        return stem, sorted(family, key=lambda name: int(name.rpartition("_")[2]))
    if "validation_success" in names:
        return "success", ["validation_success"]
    return "", []


def _metric_panel(axes: Axes, logs: list[_Rows], title: str, names: list[str]) -> None:
    import matplotlib

    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(names)))
    for name, shade in zip(names, shades, strict=True):
        curve = over_seeds([from_rows(rows, name, "env_steps") for rows in logs])
        if not len(curve):
            continue
        colour = COLOURS[0] if len(names) == 1 else shade
        # One seed has no error bar here: the standard error of these is not logged.
        _curve(axes, curve, colour, name.rpartition("_")[2])
    axes.set_ylim(-0.03, 1.03)
    what = f"{title} at presentation" if title == "accuracy" else title
    _tidy(axes, "env_steps", f"validation {title}")
    if len(names) > 1:
        axes.legend(
            title=what,
            frameon=False,
            fontsize=9,
            ncols=min(len(names), 6),
            handlelength=1.2,
            loc="lower right",
        )


def learning_curve(runs: Sequence[Path], out: Path, reference: Reference) -> Path:
    """Draw return against environment steps of runs that differ in their seed only.

    Return on the validation split with a band of one standard error (over trials for one run, over
    seeds for several), training return (thin), the reference scores, and where the task has them
    accuracy per presentation or success in a second panel. Returns the path of the PNG.
    """
    from esmeta.run.record import read_metrics

    logs = [read_metrics(run) for run in runs]
    title, names = _second_metrics(logs)
    figure, (panels,) = new_figure(2 if names else 1)
    _return_panel(panels[0], logs, reference)
    if names:
        _metric_panel(panels[1], logs, title, names)
    return save(figure, out)


def _compare_panel(axes: Axes, groups: Mapping[str, list[_Rows]], x: str) -> None:
    ends, starts = [], []
    styles = cycle(["-"] * len(COLOURS) + ["--"] * len(COLOURS))
    for (label, runs), colour, style in zip(groups.items(), cycle(COLOURS), styles, strict=False):
        curves = [from_rows(rows, "validation_return", x) for rows in runs]
        mean = over_seeds(curves)
        if not len(mean):
            continue
        count = f" ({len(curves)} runs)" if len(curves) > 1 else ""
        _curve(axes, mean, colour, f"{label}{count}", style)
        ends.append(common_end(curves))
        starts += [float(curve.x[curve.x > 0][0]) for curve in curves if (curve.x > 0).any()]
    if ends and max(ends) > _LOG_RATIO * min(ends) > 0:
        axes.set_xscale("log")
        axes.set_xlim(left=min(starts) * 0.8)
    if len(ends) > 1 and max(ends) > 1.05 * min(ends):
        axes.axvline(min(ends), color=GREY, lw=1, ls=":", zorder=1)
    _tidy(axes, x, _EQUAL[x])
    axes.set_ylabel("validation return")


def compare(groups: Mapping[str, Sequence[Path]], out: Path) -> Path:
    """Draw one curve per configuration, the mean over its runs with a band of one s.e.

    ``groups`` maps labels to runs that differ in their seed only; one panel is against environment
    steps, one against wall time. A dotted line marks where the shortest configuration ends.
    Returns the path of the PNG.
    """
    from esmeta.run.record import read_metrics

    logs = {label: [read_metrics(run) for run in runs] for label, runs in groups.items()}
    rows = min(math.ceil(len(groups) / 2), 4)
    figure, (panels,) = new_figure(len(_EQUAL), height=3.7 + 0.25 * rows)
    for axes, x in zip(panels, _EQUAL, strict=True):
        _compare_panel(axes, logs, x)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return save(figure, out)
