"""Whole trials on one page: what an agent does before and after it has learned.

``draw_harlow`` draws trials as space-time diagrams; ``draw_maze`` as the search for the target and
the ways back to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from esmeta.analysis.pictures import Trial, run_trial
from esmeta.analysis.plots import COLOURS, GREY, new_figure, save
from esmeta.policy import Policy
from esmeta.types import Params

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GOOD, _BAD, _FIXATION, _EMPTY = (178, 212, 240), (250, 211, 180), (214, 214, 214), (252, 252, 252)
_WALL, _FLOOR = (85, 85, 85), (250, 250, 250)


# --- Harlow ------------------------------------------------------------------------------------


def _harlow_rows(trial: Trial, task: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What lies on the line at every step, where the agent is, and which presentation it is.

    Returns colours uint8 ``[T, cells, 3]``, positions ``[T + 1]`` and presentations ``[T]``.
    """
    cells, count = task.cells, task.presentations
    lines = trial.states[0].tables.lines[0].numpy()
    margin = (lines.shape[-1] - cells + 1) // 2
    good = trial.data["values"][trial.data["good"]] / 10.0
    steps = len(trial.rewards)
    picture = np.empty((steps, cells, 3), dtype=np.uint8)
    picture[:] = _EMPTY
    places, shown = np.empty(steps + 1, dtype=np.int64), np.empty(steps, dtype=np.int64)
    for t, state in enumerate(trial.states[:steps]):
        block, places[t] = divmod(int(state.code[0, 0]), cells)
        shown[t] = block // 2
        line = lines[min(shown[t], count - 1), block % 2, margin : margin + cells]
        picture[t, line < 0] = _FIXATION
        picture[t, line > 0] = _BAD
        picture[t, (line > 0) & np.isclose(line, good)] = _GOOD
    # The code of a finished trial no longer says where the agent is.
    move = 2 * int(trial.actions[-1]) - 1
    places[-1] = min(max(places[-2] + move, 0), cells - 1)
    return picture, places, shown


def _space_time(axes: Axes, trial: Trial, task: Any, number: int) -> None:
    picture, places, shown = _harlow_rows(trial, task)
    steps = len(trial.rewards)
    axes.imshow(
        picture,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, task.cells - 0.5, steps - 0.5, -0.5),
    )
    axes.plot(places, np.arange(steps + 1), color="#333333", lw=1.6, zorder=3)
    choices = np.flatnonzero(np.abs(trial.rewards) > 0.5)
    for t in choices:
        right = trial.rewards[t] > 0
        axes.plot(
            places[t + 1],
            t + 1,
            marker="o" if right else "X",
            ms=9,
            color=COLOURS[0] if right else COLOURS[1],
            mec="white",
            zorder=5,
        )
        axes.axhline(t + 0.5, color="#999999", lw=0.6, ls=":", zorder=1)
    for k in range(shown[-1] + 1):
        axes.text(
            task.cells - 0.8, np.flatnonzero(shown == k).mean(), str(k + 1), color=GREY, ha="right"
        )
    right = int((trial.rewards[choices] > 0).sum())
    axes.set_title(f"trial {number}: {right} of {len(choices)} right", loc="left", fontsize=10)
    axes.set_xlabel("position")
    axes.set_xticks([])


def draw_harlow(
    policy: Policy,
    params: Params,
    task: Any,
    out: Path,
    indices: Sequence[int] = (0, 1, 2, 3),
    *,
    split: str = "test",
    seed: int = 0,
) -> Path:
    """Draw Harlow trials side by side as space-time diagrams; returns the path of the PNG.

    Time runs downwards (steps), position across. A column of colour is what lies there: fixation
    (grey), the good object (blue) and the bad one (orange), whose sides are drawn anew at every
    presentation; the dark line is the agent. An agent that learns from one choice always walks
    into blue after its first choice.
    """
    trials = [run_trial(policy, params, task, index, split, seed) for index in indices]
    figure, (panels,) = new_figure(len(trials), width=2.1, height=5.4)
    longest = max(len(trial.rewards) for trial in trials)
    for axes, trial, index in zip(panels, trials, indices, strict=True):
        _space_time(axes, trial, task, index)
        axes.set_facecolor("white")
        axes.set_ylim(longest + 0.8, -0.8)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        if axes is not panels[0]:
            axes.set_yticklabels([])
    panels[0].set_ylabel("time step (downwards)")
    _harlow_legend(figure)
    return save(figure, out)


def _harlow_legend(figure: Figure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    colours = ["#{:02x}{:02x}{:02x}".format(*colour) for colour in (_FIXATION, _GOOD, _BAD)]
    words = ("fixation", "good object", "bad object")
    handles: list[Any] = [
        Patch(facecolor=colour, label=word) for colour, word in zip(colours, words, strict=True)
    ]
    handles.append(Line2D([], [], color="#333333", lw=1.6, label="agent"))
    for marker, colour, word in (("o", COLOURS[0], "reward +1"), ("X", COLOURS[1], "reward -1")):
        handles.append(Line2D([], [], ls="", marker=marker, color=colour, ms=8, label=word))
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9)


# --- maze --------------------------------------------------------------------------------------


def _maze_paths(trial: Trial) -> tuple[list[np.ndarray], bool]:
    """Cells visited from each start or teleport on, and whether the last way met the target."""
    cells = trial.data["walls"].size
    goal = int(trial.data["target"])
    places = [int(state.code[0, 0]) % cells for state in trial.states]
    paths, path = [], [places[0]]
    for place, reward in zip(places[1:], trial.rewards, strict=True):
        if reward > 0:
            paths.append([*path, goal])
            path = [place]
        else:
            path.append(place)
    complete = len(path) < 2
    return [np.array(p) for p in (paths if complete else [*paths, path])], complete


def _board(axes: Axes, trial: Trial) -> None:
    walls = trial.data["walls"]
    picture = np.where(walls[..., None], np.array(_WALL), np.array(_FLOOR)).astype(np.uint8)
    axes.imshow(picture, interpolation="nearest")
    y, x = divmod(int(trial.data["target"]), walls.shape[1])
    axes.plot(x, y, marker="*", ms=17, color=COLOURS[1], mec="white", zorder=6)
    axes.set_xticks([])
    axes.set_yticks([])


def _way(axes: Axes, path: np.ndarray, side: int, shift: float, colour: str, style: str) -> None:
    """One way through the maze, moved off the centres of the cells by ``shift``."""
    y, x = np.divmod(path, side)
    axes.plot(x + shift, y + shift, style, color=colour, lw=2, zorder=4)
    axes.plot(x[0] + shift, y[0] + shift, "o", ms=6, color=colour, mec="white", zorder=5)


def _first_way(axes: Axes, path: np.ndarray, side: int) -> None:
    """The way to the first hit, from dark to light."""
    from matplotlib import colormaps

    # The whole way drifts across the cell, so that passing twice shows as two lines.
    drift = np.linspace(-0.28, 0.28, len(path)) * min(1.0, len(path) / 30)
    shades = colormaps["viridis"](np.linspace(0.0, 0.9, max(len(path) - 1, 1)))
    y, x = np.divmod(path, side) + drift
    for t, shade in enumerate(shades[: len(path) - 1]):
        pair = slice(t, t + 2)
        axes.plot(x[pair], y[pair], color=shade, lw=2.2, zorder=4, solid_capstyle="round")
    axes.plot(x[0], y[0], "o", ms=7, color=shades[0], mec="white", zorder=5)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _before_and_after(before: Axes, after: Axes, trial: Trial, number: int) -> None:
    side = trial.data["walls"].shape[1]
    paths, complete = _maze_paths(trial)
    found = complete or len(paths) > 1
    for axes in (before, after):
        _board(axes, trial)
    _first_way(before, paths[0], side)
    steps = _count(len(paths[0]) - 1, "step")
    words = f"found after {steps}" if found else f"not found in {steps}"
    before.set_title(f"trial {number}: {words}", fontsize=10)
    shifts = np.linspace(-0.25, 0.25, max(len(paths) - 1, 1))
    for k, path in enumerate(paths[1:]):
        open_ = k == len(paths) - 2 and not complete
        _way(after, path, side, shifts[k], COLOURS[k % len(COLOURS)], ":" if open_ else "-")
    ways = [len(path) - 1 for path in (paths[1:] if complete else paths[1:-1])]
    again = f"found again {_count(len(ways), 'time')}"
    mean = f" (mean {np.mean(ways):.1f} steps)" if ways else ""
    after.set_title(again + mean if found else "nothing to return to", fontsize=10)


def draw_maze(
    policy: Policy,
    params: Params,
    task: Any,
    out: Path,
    indices: Sequence[int] = (0, 1, 2),
    *,
    split: str = "test",
    seed: int = 0,
) -> Path:
    """Draw maze trials in columns; returns the path of the PNG.

    Above the way to the first hit (from dark to light in time), below the ways from each teleport
    on (dotted: cut off by the end of the trial). Dots are starts and the star is the target, which
    the agent cannot see.
    """
    figure, panels = new_figure(len(indices), 2, width=2.9, height=3.15)
    for column, index in enumerate(indices):
        trial = run_trial(policy, params, task, index, split, seed)
        _before_and_after(panels[0, column], panels[1, column], trial, index)
    panels[0, 0].set_ylabel("until the target is found", fontsize=11)
    panels[1, 0].set_ylabel("afterwards, from each teleport", fontsize=11)
    return save(figure, out)
