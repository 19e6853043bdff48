"""Runs that ask for more memory than there is: exit 2, one line, what would fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from esmeta.errors import out_of_memory
from esmeta.run import config as configs
from esmeta.run import room

# A process that may have 1.5 GB more than it has with all modules loaded.
LIMITED = """
import resource, sys
from esmeta.run import train
import esmeta.evaluator, esmeta.run.record, esmeta.analysis.plots, matplotlib.pyplot
from esmeta.optimizers import openes, ppo
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 1_500_000_000,) * 2)
sys.exit(train.main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's here")
@pytest.mark.parametrize(
    ("preset", "sets", "cure"),
    [
        ("harlow-openes", ["policy.neurons=20000"], r"optimizer.popsize = \d+"),
        ("harlow-ppo", ["policy.neurons=20000"], r"optimizer.minibatches = \d+"),
        ("harlow-ppo", ["task.trials=100000", "policy.neurons=64"], r"optimizer.minibatches = \d+"),
    ],
)
def test_a_run_that_is_too_large_says_so(
    tmp_path: Path, preset: str, sets: list[str], cure: str
) -> None:
    words = [word for each in sets for word in ("--set", each)]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, preset, *words, "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if "esmeta: error" in line]
    assert "Traceback" not in done.stderr and "out of memory" in line
    for each in sets:
        name, _, value = each.partition("=")
        assert f"{name} = {value}" in line
    assert re.search(cure, line), line
    # What asked for it may be a mistake in somebody's own code.
    kept = Path(line.rpartition("traceback: ")[2])
    assert re.search("MemoryError|RuntimeError", kept.read_text())


def test_what_would_fit() -> None:
    config = configs.resolve(configs.load("harlow-openes"), ["optimizer.popsize=1024"])
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes."
    free = room._free()
    assert free > 1e8
    error = RuntimeError(said.format(int(free * 3)))
    assert out_of_memory(error) and not out_of_memory(RuntimeError("shapes do not fit"))
    # Three times what is free, of which half is taken: an eighth of the members.
    assert "write for example optimizer.popsize = 128," in str(room.too_large(error, config, "x"))
    assert "optimizer.popsize = 512," in str(room.too_large(MemoryError(), config, "x"))
    many = configs.resolve(configs.load("harlow-ppo"), ["task.trials=4", "optimizer.minibatches=4"])
    assert "write fewer policy.neurons" in str(room.too_large(MemoryError(), many, "x"))
    two = configs.resolve(configs.load("harlow-openes"), ["optimizer.popsize=2"])
    assert "write fewer policy.neurons" in str(room.too_large(MemoryError(), two, "x"))
    agents = configs.resolve(configs.load("pendulum-metagenrl"))
    assert "write fewer objective.agents" in str(room.too_large(MemoryError(), agents, "x"))
