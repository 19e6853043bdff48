"""What runs of before wrote, in the words of today: the one place that knows of older formats.

Before there was a validation split, runs were scored on the test split all along and called those
scores ``heldout``; before an option was there, a run had none of it and did what :data:`_LATER`
says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from esmeta.types import State

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


def agents(saved: State) -> State:
    """MetaGenRL's agents of one environment, leaves ``[P, ...]``, as they are stored today.

    How long they had lived was once said by their replay alone, which lay in the order of its rows,
    and had what followed each step beside it; and Adam had moments and steps of each leaf.
    """
    if "count" not in saved:
        return {"lived": saved["state.0"], **saved}
    import torch

    def part(name: str) -> list[Tensor]:
        count = sum(key.startswith(f"{name}.") for key in saved)
        return [saved[f"{name}.{i}"] for i in range(count)]

    replay, count = part("replay"), int(saved["count"][0])
    size = replay[0].shape[1]
    rows = torch.arange(count - size, count, device="cpu") % size
    obs, action, reward, after, *flags = (leaf[:, rows] for leaf in replay)
    obs = torch.cat([obs, after[:, -1:]], dim=1)
    steps = [torch.cat([leaf, leaf[:, -1:]], dim=1) for leaf in (action, reward, *flags)]
    learned = part("learned")
    size = len(learned) // 5
    first, second, updates = (learned[k * size : (k + 1) * size] for k in (2, 3, 4))
    adams = []
    for own in (slice(size // 3), slice(size // 3, size)):  # the policy; two critics like it
        flat = [torch.cat([leaf.flatten(1) for leaf in some[own]], 1) for some in (first, second)]
        adams += [*flat, updates[own][0]]
    state = [saved["count"], saved["updates"], obs, *steps, *learned[: 2 * size], *adams]
    parts = {"state": state, "ts": part("where"), "scores": part("scores")}
    kept = {name: saved[name] for name in saved
            if name in ("index", "trial", "t", "owed") or name.startswith("env.")}  # fmt: skip
    kept["lived"] = saved["count"]
    return kept | {f"{name}.{i}": leaf for name in parts for i, leaf in enumerate(parts[name])}
