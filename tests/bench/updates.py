"""What an update costs, whole: CPU seconds, minor page faults and peak memory, beside another tree.

    python tests/bench/updates.py
    python tests/bench/updates.py --against ../before --only maze-128 --repeats 5

A run of many updates less one of few, each a process of its own, so that the start of a process and
what is compiled in it cancel; trees take turns. ``--against`` is a checkout of any commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FEW = 2
WIDE = ["policy.hidden=[64]", "policy.head_hidden=64"]
# name -> (preset, updates more than a few, overrides)
WORK: dict[str, tuple[str, int, list[str]]] = {
    "harlow": ("harlow-ppo", 40, []),
    "maze-64": ("maze-ppo", 30, []),
    "maze-128": ("maze-ppo", 12, ["policy.neurons=128", *WIDE]),
    "maze-200": ("maze-ppo", 6, ["policy.neurons=200", *WIDE]),
    "maze-gru-64": ("maze-gru-ppo", 20, []),
    "cheetah-dir": ("cheetah-dir-ppo", 10, []),
    "long-64": ("maze-ppo", 4, ["task.horizon=5000", "task.trials=64"]),
    "long-128": ("maze-ppo", 2, ["task.horizon=5000", "policy.neurons=128", *WIDE]),
}


class Cost(NamedTuple):
    """Of a process: CPU seconds, those of them in the system, minor page faults, peak MB."""

    cpu: float
    system: float
    faults: float
    peak: float


def run(tree: Path, preset: str, updates: int, overrides: Sequence[str]) -> Cost:
    """Train for some updates, by the code of ``tree``."""
    quiet = ["run.evaluate_every=0", "run.checkpoint_every=0", "run.evaluate_trials=1"]
    sets = [f"budget.updates={updates}", *quiet, *overrides]
    words = [word for each in sets for word in ("--set", each)]
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "esmeta.train", preset, *words, "--out", f"{folder}/run"]
        with open(f"{folder}/said", "w+", encoding="utf-8") as said:
            child = subprocess.Popen(
                command, cwd=tree, env=env, stdout=subprocess.DEVNULL, stderr=said
            )
            _, status, used = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                said.seek(0)
                raise SystemExit(f"{' '.join(command)} in {tree}:\n{said.read()}")
    megabytes = used.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    return Cost(used.ru_utime + used.ru_stime, used.ru_stime, used.ru_minflt, megabytes)


def update(tree: Path, name: str) -> Cost:
    """What one update costs; the peak is that of the run."""
    preset, more, overrides = WORK[name]
    few, many = (run(tree, preset, n, overrides) for n in (FEW, FEW + more))
    costs = [(b - a) / more for a, b in zip(few[:3], many[:3], strict=True)]
    return Cost(*costs, peak=many.peak)


def main(argv: Sequence[str] | None = None) -> int:
    """Print and, if asked, write one row per work and tree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="another checkout, run in turn")
    parser.add_argument("--only", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    trees = {"here": ROOT} | ({"against": args.against.resolve()} if args.against else {})
    rows = []
    print(
        f"{'work':<12} {'tree':<8} {'CPU s':>8} {'system':>8} {'faults':>9} {'peak MB':>8} {'':>6}"
    )
    for name in args.only:
        found: dict[str, list[Cost]] = {tree: [] for tree in trees}
        for _ in range(args.repeats):
            for tree, path in trees.items():
                found[tree].append(update(path, name))
        middle = {t: Cost(*map(statistics.median, zip(*c, strict=True))) for t, c in found.items()}
        for tree, cost in middle.items():
            times = middle["against"].cpu / cost.cpu if len(trees) > 1 else 1.0
            print(
                f"{name:<12} {tree:<8} {cost.cpu:>8.3f} {cost.system:>8.3f} {cost.faults:>9.0f} "
                f"{cost.peak:>8.0f} {times:>5.2f}x",
                flush=True,
            )
            rows.append({"work": name, "tree": tree, **cost._asdict(), "all": found[tree]})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
