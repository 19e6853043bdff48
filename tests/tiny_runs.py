"""Training runs of a few milliseconds per step, in this process, for the tests of the CLI."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from esmeta.run import train

PRESET = """
[task]
name = "bandit"
trials = 3
horizon = 5
[policy]
name = "metods"
neurons = 4
hidden = [4]
head_hidden = 4
w0 = "sampled"
[optimizer]
name = "openes"
popsize = 22
[budget]
generations = 6
[run]
checkpoint_every = 2
evaluate_every = 3
evaluate_trials = 8
tensorboard = false
"""


def write_preset(folder: Path, name: str = "tiny.toml") -> Path:
    """The preset above as a file in ``folder``."""
    path = folder / name
    path.write_text(PRESET, encoding="utf-8")
    return path


def overrides(*pairs: str) -> list[str]:
    """``--set`` in front of every pair."""
    return [word for pair in pairs for word in ("--set", pair)]


def run_here(*args: object) -> int:
    """``esmeta.train`` in this process, which gets its hook back."""
    hook = sys.excepthook
    try:
        return train.main([str(arg) for arg in args])
    finally:
        sys.excepthook = hook


def summary(run: Path) -> dict[str, object]:
    """``run.json``."""
    return json.loads((run / "run.json").read_text(encoding="utf-8"))


def final_hash(run: Path) -> str:
    """Hash of theta of a finished run."""
    digest = summary(run)["theta_sha256"]
    assert isinstance(digest, str) and len(digest) == 64
    return digest


def files(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its content; folders as empty."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }
