"""tests/bench: every script starts, and the small ones run to their end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BENCHES = sorted((ROOT / "tests" / "bench").glob("[!_]*.py"))
# What a script is told to be done within a minute.
SMALL = {
    "throughput": ("--quick", "--no-compile", "--repeats", "1"),
    "plastic": ("--no-compile", "--repeats", "1"),
    "learners": ("--agents", "4", "--repeats", "1"),
    "updates": ("--only", "harlow", "--repeats", "1"),
    "scan_memory": (),
    "failed_members": ("--seeds", "1"),
}


def run(script: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", [path.stem for path in BENCHES])
def test_starts(name: str) -> None:
    assert "usage:" in run(ROOT / "tests" / "bench" / f"{name}.py", "--help")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_runs(name: str) -> None:
    assert run(ROOT / "tests" / "bench" / f"{name}.py", *SMALL[name]).strip()
