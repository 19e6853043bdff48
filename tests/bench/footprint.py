"""Seconds to start and memory to train, against the budget.

    python tests/bench/footprint.py --json footprint.json
    python tests/bench/footprint.py --quick

Seconds are medians of fresh processes with warm file caches, by wall clock and by CPU time (user
and system; the two agree on an idle machine). The budget of imports is held against ``import
esmeta`` and against every public name, because names are imported when they are first used.

Memory is what Linux reports of each rank: VmRSS just before the first environment is made, and
after three generations VmHWM, the most that was ever resident, and VmRSS. Rank 0 then scores theta
and draws the curve; its peak with that is shown too.

The start of many ranks on one machine is timed from the command to the moment when all of them
have built everything and met; it needs about two seconds of CPU time per rank.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
IMPORT_S, HELP_S, RANK_MB = 1.5, 1.5, 450.0
BEFORE_MB, START_S, START_RANKS = 320.0, 20.0, 32
FORBIDDEN = ("ray", "pandas", "evotorch", "matplotlib", "tensorboard")
GENERATIONS = 3
LOADED = f"import sys; print(*[name for name in {FORBIDDEN} if name in sys.modules])"
STARTS = (
    ("python", None, ["-c", "pass"]),
    ("import torch", None, ["-c", "import torch"]),
    ("import esmeta", IMPORT_S, ["-c", f"import esmeta; {LOADED}"]),
    (
        "every public name",
        IMPORT_S,
        ["-c", f"import esmeta; [getattr(esmeta, name) for name in esmeta.__all__]; {LOADED}"],
    ),
    ("train --help", HELP_S, ["-m", "esmeta.train", "--help"]),
    ("evaluate --help", HELP_S, ["-m", "esmeta.evaluate", "--help"]),
    ("report --help", HELP_S, ["-m", "esmeta.report", "--help"]),
)


def environment() -> dict[str, str]:
    """The caller's, with this checkout on the path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path}


def start(arguments: list[str], cwd: str) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds and output of one interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, done.stdout


def starts(repeats: int, cwd: str) -> list[dict[str, Any]]:
    """Time every way to start, in turns; the first turn only warms the caches."""
    walls: dict[str, list[float]] = {name: [] for name, _, _ in STARTS}
    cpus: dict[str, list[float]] = {name: [] for name, _, _ in STARTS}
    output: dict[str, str] = {}
    for turn in range(repeats + 1):
        for name, _, arguments in STARTS:
            wall, cpu, output[name] = start(arguments, cwd)
            if turn:
                walls[name].append(wall)
                cpus[name].append(cpu)
    print(f"{'':<24} {'wall s':>8} {'CPU s':>8} {'budget':>8}")
    rows = []
    for name, budget, arguments in STARTS:
        wall, cpu = statistics.median(walls[name]), statistics.median(cpus[name])
        row = {"start": name, "wall_s": wall, "cpu_s": cpu, "budget_s": budget}
        line = f"{name:<24} {wall:>8.3f} {cpu:>8.3f} "
        line += (
            "       -"
            if budget is None
            else f"{budget:>8.2f}  {verdict(wall, budget)}, CPU {verdict(cpu, budget)}"
        )
        if LOADED in arguments[-1]:
            row["forbidden"] = output[name].split()
            line += f"; loaded of the forbidden: {', '.join(row['forbidden']) or 'none'}"
        print(line, flush=True)
        rows.append(row)
    return rows


def verdict(value: float, budget: float) -> str:
    """A word for people; nothing fails here."""
    return "within" if value <= budget else "OVER"


def status(key: str) -> float:
    """A line of this process's memory in /proc, in MB of 10^6 bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {key}")


def child(preset: str, folder: Path) -> int:
    """Train in this process and leave its memory in ``folder``; runs on every rank."""
    from esmeta.run import train

    seen: dict[str, Any] = {"rank": 1}
    plain = train.report

    def note() -> None:
        loaded = [name for name in FORBIDDEN if name in sys.modules]
        seen.update(trained_mb=status("VmHWM"), rss_mb=status("VmRSS"), loaded=loaded)

    def report(*arguments: Any) -> None:
        # Only rank 0 comes here.
        seen["rank"] = 0
        note()
        plain(*arguments)

    built = train.build

    def build(config: Any, ranks: int = 1) -> Any:
        task = type(config.task.instance)
        plain_env = task.make_env

        def make_env(self: Any, device: Any) -> Any:
            seen.setdefault("before_mb", status("VmRSS"))
            return plain_env(self, device)

        task.make_env = make_env
        return built(config, ranks)

    train.report, train.build = report, build
    budget = f"budget.generations={GENERATIONS}"
    code = train.main([preset, "--set", budget, "--out", str(folder / "run")])
    if seen["rank"]:
        note()
    seen["peak_mb"] = status("VmHWM")
    (folder / f"memory-{os.getpid()}.json").write_text(json.dumps(seen))
    return code


def start_child(preset: str, folder: Path) -> int:
    """Build everything, meet the other ranks, note the time and leave; runs on every rank."""
    from esmeta.run import train

    def met(trainer: Any) -> str:
        trainer.comm.barrier()
        if trainer.comm.rank == 0:
            (folder / "met").write_text(str(time.time()))
        return "steps"

    train.Trainer.train = met  # type: ignore[method-assign]
    train.Trainer.test = lambda _: {}  # type: ignore[method-assign]
    train.report = lambda *_: None
    return train.main([preset, "--out", str(folder / "run"), "--set", "run.tensorboard=false"])


def on_ranks(ranks: int, *words: str) -> list[str] | None:
    """The command that runs this script on several ranks; None without an mpirun."""
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    if ranks == 1:
        return command
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    return None if mpirun is None else [mpirun, "-n", str(ranks), *command]


def start_many(preset: str, ranks: int) -> dict[str, Any]:
    """Seconds from the command until all ranks have met."""
    row: dict[str, Any] = {"preset": preset, "ranks": ranks, "budget_s": START_S}
    command = on_ranks(ranks, "--start", preset)
    if command is None:
        print(f"start of {ranks} ranks: skipped, there is no mpirun")
        return row
    with tempfile.TemporaryDirectory(prefix="esmeta-footprint-") as folder:
        began = time.time()
        subprocess.run(
            [*command, folder], cwd=folder, env=environment(), capture_output=True, check=True
        )
        row["start_s"] = float((Path(folder) / "met").read_text()) - began
    print(
        f"start of {ranks} ranks of {preset} on {os.cpu_count()} cores: {row['start_s']:.1f} s, "
        f"budget {START_S:.0f} s  {verdict(row['start_s'], START_S)}",
        flush=True,
    )
    return row


def training(preset: str, ranks: int) -> list[dict[str, Any]]:
    """Memory of every rank of a short run."""
    command = on_ranks(ranks, "--child", preset)
    if command is None:
        print(f"{preset}, {ranks} ranks: skipped, there is no mpirun")
        return []
    with tempfile.TemporaryDirectory(prefix="esmeta-footprint-") as folder:
        done = subprocess.run(
            [*command, folder], cwd=folder, env=environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        found = [json.loads(path.read_text()) for path in Path(folder).glob("memory-*.json")]
    rows = sorted(found, key=lambda row: row["rank"])
    for row in rows:
        row |= {"preset": preset, "ranks": ranks, "budget_mb": RANK_MB}
        print(
            f"{preset:<16} {ranks:>5} {row['rank']:>5} {row['before_mb']:>9.0f} "
            f"{row['trained_mb']:>9.0f} {row['rss_mb']:>9.0f} {row['peak_mb']:>12.0f}  "
            f"before {verdict(row['before_mb'], BEFORE_MB)}, trained "
            f"{verdict(row['trained_mb'], RANK_MB)}, with the end "
            f"{verdict(row['peak_mb'], RANK_MB)}; loaded by training: "
            f"{', '.join(row['loaded']) or 'none'}",
            flush=True,
        )
    return rows


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="one process of each kind, no mpirun")
    parser.add_argument("--start", nargs=2, metavar=("PRESET", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("PRESET", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]))
    if args.start:
        return start_child(args.start[0], Path(args.start[1]))
    print(f"load {os.getloadavg()}; forbidden at import: {', '.join(FORBIDDEN)}")
    with tempfile.TemporaryDirectory(prefix="esmeta-footprint-") as folder:
        started = starts(1 if args.quick else 5, folder)
    print(
        f"\nMB of 10^6 bytes; budgets: before environments {BEFORE_MB:.0f}, VmHWM {RANK_MB:.0f}\n"
        f"{'preset':<16} ranks  rank    before     VmHWM     VmRSS  HWM with end"
    )
    jobs = [("harlow-openes", 1), ("harlow-cem", 1)]
    jobs += [] if args.quick else [("harlow-openes", 2), ("harlow-cem", 2)]
    trained = [row for preset, ranks in jobs for row in training(preset, ranks)]
    print()
    many = [] if args.quick else [start_many("harlow-openes", START_RANKS)]
    if args.json:
        report = {"load": os.getloadavg(), "starts": started, "training": trained, "many": many}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
