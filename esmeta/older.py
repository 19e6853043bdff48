"""What runs of before wrote, in the words of today: the one place that knows of older formats.

Before there was a validation split, runs were scored on the test split all along and called those
scores ``heldout``; before an option was there, a run had none of it and did what :data:`_LATER`
says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_LATER = {("objective", "metagenrl"): {"snippets": "steps"}}
"""Options that came after runs were made without them, and what those did."""
_SCORES = re.compile("^heldout_")
_KEPT = ("step", "env_steps", "restarts")


def tables(found: dict[str, Any]) -> dict[str, Any]:
    """The tables of a configuration; those of an older run are completed as they were meant."""
    run = found.get("run", {})
    # A run writes every key there is; the second came with the validation split.
    if "rank_timeout" in run and "evaluate_as_trained" not in run:
        for (section, name), options in _LATER.items():
            if found.get(section, {}).get("name") == name:
                found[section] = {**options, **found[section]}
    return found


def metrics(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics; ``heldout_*`` is what ``validation_*`` is to others."""
    return {_SCORES.sub("validation_", name): value for name, value in line.items()}


def last_scores(lines: Iterable[dict[str, Any]]) -> int | None:
    """The last step that was scored before there was a validation split; None where none is."""
    steps = [line["step"] for line in lines if any(map(_SCORES.match, line))]
    return max(steps, default=None)


def counters(saved: dict[str, Any]) -> dict[str, Any]:
    """Counters of a checkpoint; what was best by the test split is forgotten."""
    if "heldout" not in saved:
        return saved
    kept = {name: saved[name] for name in _KEPT if name in saved}
    return kept | {"best_step": saved["step"], "peak_step": saved["step"]}


def search(arrays: dict[str, Any]) -> dict[str, Any]:
    """Arrays of an evolution search; once those of EvoTorch had a centre, and no units."""
    if "center" not in arrays:
        return arrays
    rest = {name: value for name, value in arrays.items() if name != "center"}
    return {"theta": arrays["center"], "unit": 1.0, **rest}


def checkpoint(saved: dict[str, Any]) -> dict[str, Any]:
    """The fields of a checkpoint; older ones do not say which simulators made them."""
    return {"simulators": {}, **saved}
