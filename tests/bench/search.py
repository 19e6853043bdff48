"""What a generation costs besides evaluation: time per number drawn, share of a run, memory.

    python tests/bench/search.py --json search.json

1. Noise, members, exact sums and update of the sliced searches with an objective that costs
   nothing, in nanoseconds per member and parameter, times ranks; the target is 10 (median of wall
   time, and of CPU time, which other programs disturb less; a mirrored search draws one number for
   two members, the others one for each).
2. Share of ``search_s`` in the generations of two presets; the target is 5 %.
3. Largest memory of each of 4 ranks at popsize 1,024 less that at popsize 32: the slice that a rank
   keeps of the noise (N D 4 bytes, halved by mirroring, over ranks) and not the population.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from _jobs import Free, job, middle, timed

SEARCHES = ("openes", "pgpe", "snes", "sepcma")
TARGET_NS, TARGET_SHARE = 10.0, 0.05


def peak_mb() -> float:
    """The most memory that this process ever had, MB of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM")


def free_search(names: list[str], size: int, popsize: int, generations: int) -> None:
    """Print a line per search and rank."""
    from esmeta.ranks.comm import make_comm
    from esmeta.rng import Rng

    torch.set_num_threads(1)
    comm, rows = make_comm(), -(-size // 200)
    for name in names:
        module = importlib.import_module(f"esmeta.optimizers.{name}")
        optimizer = module.Optimizer(popsize=popsize)
        state = optimizer.init({"w": torch.zeros(1, rows, 200)}, Rng(0))

        def step(optimizer: Any = optimizer) -> dict[str, float]:
            nonlocal state
            state, metrics = optimizer.step(state, Free(), comm, Rng(0))
            return metrics

        step()
        found = list(timed(step, generations))
        row = {
            "search": name,
            "rank": comm.rank,
            "size": rows * 200,
            "search_s": middle([metrics["search_s"] for _, _, metrics in found]),
            "cpu_s": middle([cpu for _, cpu, _ in found]),
            "peak_mb": peak_mb(),
        }
        # One write: lines of ranks must not mix.
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def preset_share(name: str, generations: int) -> None:
    """Print the share of search in the generations of a preset."""
    from esmeta.ranks.comm import SelfComm
    from esmeta.run import config, train

    parts = train.build(config.resolve(config.load(name), []))
    state = parts.state

    def step() -> dict[str, float]:
        nonlocal state
        state, metrics = parts.optimizer.step(state, parts.objective, SelfComm(), parts.rng)
        return metrics

    step()
    found = list(timed(step, generations))
    share = middle([metrics["search_s"] / wall for wall, _, metrics in found])
    row = {"preset": name, "share": share, "generation_s": middle([wall for wall, _, _ in found])}
    print(json.dumps(row), flush=True)


def overhead(size: int, popsize: int, generations: int, ranks: list[int]) -> list[Any]:
    """Print nanoseconds per member and parameter."""
    print(f"\nD = {size:,}, popsize {popsize:,}: ns per member and parameter, times ranks")
    print(f"{'search':<8} {'ranks':>5} {'wall ns':>8} {'CPU ns':>8} {'target':>7}")
    report = []
    for count in ranks:
        arguments = ["free", ",".join(SEARCHES), str(size), str(popsize), str(generations)]
        rows = job(__file__, arguments, count)
        for name in SEARCHES:
            mine = [row for row in rows if row["search"] == name]
            scale = 1e9 * count / (popsize * mine[0]["size"])
            wall = scale * max(row["search_s"] for row in mine)
            cpu = scale * max(row["cpu_s"] for row in mine)
            report.append({"search": name, "size": size, "ranks": count, "ns": wall, "cpu": cpu})
            print(f"{name:<8} {count:>5} {wall:>8.1f} {cpu:>8.1f} {TARGET_NS:>7.0f}", flush=True)
    return report


def memory(size: int, ranks: int) -> list[Any]:
    """Print what a rank of ``ranks`` needs for 1,024 members more than for 32."""
    print(f"\nD = {size:,}, {ranks} ranks: MB per rank at popsize 1,024 less those at 32")
    print(f"{'search':<8} {'largest':>8} {'kept noise':>11} {'population':>11}")
    report = []
    for name in ("openes", "snes"):
        peaks = {}
        for popsize in (32, 1024):
            rows = job(__file__, ["free", name, str(size), str(popsize), "2"], ranks)
            peaks[popsize] = sorted(row["peak_mb"] for row in rows)
        more = peaks[1024][-1] - peaks[32][-1]
        whole = 1024 * size * 4 / 1e6
        kept = whole / ranks / (2 if name == "openes" else 1)
        report.append({"search": name, "more_mb": more, "kept_mb": kept, "population_mb": whole})
        print(f"{name:<8} {more:>8.0f} {kept:>11.0f} {whole:>11.0f}", flush=True)
    return report


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 60_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--presets", nargs="*", default=["harlow-openes", "maze-openes"])
    parser.add_argument("--generations", type=int, default=7)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child
        if kind == "free":
            free_search(rest[0].split(","), *map(int, rest[1:]))
        else:
            preset_share(rest[0], int(rest[1]))
        return 0
    report: dict[str, Any] = {"load": os.getloadavg()}
    print(f"load {report['load']}")
    report["overhead"] = [
        row for size in args.sizes for row in overhead(size, 1024, args.generations, args.ranks)
    ]
    print(f"\n{'preset':<16} {'generation s':>12} {'search':>8} {'target':>7}")
    report["presets"] = []
    for name in args.presets:
        [row] = job(__file__, ["preset", name, str(args.generations)])
        report["presets"].append(row)
        print(f"{name:<16} {row['generation_s']:>12.3f} {row['share']:>8.1%} {TARGET_SHARE:>7.0%}")
    report["memory"] = memory(60_000, 4)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
