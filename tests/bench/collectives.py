"""Seconds per collective and bytes per generation, on several ranks of this machine.

    python tests/bench/collectives.py --json collectives.json
    python tests/bench/collectives.py --ranks 2 --members 4096 --trials 4 --parameters 60000

Both transports are timed: memory that the ranks share, and MPI's messages. Collectives are those
of a generation of evolution: the returns of all members, two exact sums over all parameters, the
comparison of hashes, and the decision to go on. Seconds are those of rank 0 from a start that all
ranks share; more ranks than cores wait for each other's turn, and so does every rank on a busy
machine: the tenth percentile tells what the collectives take. Bytes are counted in real runs of
three presets, sent as messages, and held against 8 N K + 16 D + 9 N + 256.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUDGET_MS = {2: 0.5, 8: 3.0}
RUNS = (
    ("bandit-openes", 64, 64),
    ("bandit-snes", 64, 64),
    ("harlow-openes", 256, 16),
)


def measure(members: int, trials: int, parameters: int, repeats: int, *, messages: bool) -> int:
    """Time the collectives; runs on every rank, rank 0 prints one JSON object."""
    import torch

    from esmeta.ranks import transport
    from esmeta.ranks.comm import install_excepthook, make_comm

    if messages:
        transport.SharedMemory = transport.Messages  # type: ignore[misc, assignment]
    comm = make_comm(60.0)
    install_excepthook(comm)
    counts = [len(range(rank, members, comm.size)) for rank in range(comm.size)]
    rows = torch.rand(counts[comm.rank], trials + 1, dtype=torch.float64)
    sums = torch.ones(2 * parameters, dtype=torch.int64)
    flags = torch.zeros(5, dtype=torch.int64)
    work: dict[str, Any] = {
        f"gather_rows {members} x {trials + 1} float64": lambda: comm.gather_rows(rows, counts),
        f"sum_exact 2 x {parameters} int64": lambda: comm.sum_exact(sums),
        "same (32 bytes)": lambda: comm.same(bytes(32)),
        "sum_exact 5 int64": lambda: comm.sum_exact(flags),
    }
    found: dict[str, list[float]] = {}
    for name, collective in work.items():
        times = []
        for _ in range(repeats + 10):
            comm.barrier()
            began = time.perf_counter()
            collective()
            times.append(time.perf_counter() - began)
        found[name] = [1e6 * seconds for seconds in times[10:]]
    if comm.rank == 0:
        print(json.dumps(found))
    return 0


def mpirun(ranks: int, *words: object) -> str:
    """Output of a Python command on several ranks."""
    beside = Path(sys.executable).with_name("mpirun")
    command = str(beside) if beside.exists() else shutil.which("mpirun")
    if command is None:
        raise SystemExit("there is no mpirun; pip install mpich")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [command, "-n", str(ranks), sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise SystemExit(f"{words} on {ranks} ranks failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def seconds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of times."""
    sizes = [str(n) for n in (args.members, args.trials, args.parameters, args.repeats)]
    print(
        f"{'ranks':>5} {'by':<8}  {'collective':<36} {'p10 us':>7} {'median us':>9} {'p99 us':>7}"
    )
    rows = []
    for ranks in args.ranks:
        totals = {}
        for by in ("memory", "messages"):
            script = Path(__file__).resolve()
            found = json.loads(mpirun(ranks, script, "--child", by, *sizes))
            total = least = 0.0
            for name, times in found.items():
                median = statistics.median(times)
                p10, p99 = (sorted(times)[int(share * len(times))] for share in (0.1, 0.99))
                total, least = total + median, least + p10
                row = {"p10_us": p10, "median_us": median, "p99_us": p99}
                rows.append({"ranks": ranks, "by": by, "collective": name, **row})
                times_us = f"{p10:>7.0f} {median:>9.0f} {p99:>7.0f}"
                print(f"{ranks:>5} {by:<8}  {name:<36} {times_us}", flush=True)
            totals[by] = total
            budget = BUDGET_MS.get(ranks)
            held = f" (budget {budget} ms on idle cores)" if budget else ""
            whole = f"{'all of a generation':<36} {least:>7.0f} {total:>9.0f}{held}"
            print(f"{ranks:>5} {by:<8}  {whole}", flush=True)
        print(f"{ranks:>5} memory against messages: {totals['messages'] / totals['memory']:.1f} x")
    return rows


def traffic() -> list[dict[str, Any]]:
    """The table of bytes, from three generations of real runs on two ranks."""
    print(f"\n{'preset':<16} {'N':>5} {'K':>4} {'D':>7} {'bytes':>9} {'limit':>9}  pickled calls")
    rows = []
    for preset, members, trials in RUNS:
        with tempfile.TemporaryDirectory(prefix="esmeta-traffic-") as folder:
            sets = (
                f"optimizer.popsize={members}",
                f"task.trials={trials}",
                "budget.generations=3",
                "run.evaluate_every=1000",
            )
            words = [word for pair in sets for word in ("--set", pair)]
            script = ROOT / "tests" / "mpi" / "traffic.py"
            out = mpirun(2, script, preset, *words, "--out", Path(folder) / "run")
        line = next(line for line in out.splitlines() if line.startswith("traffic "))
        numbers = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}
        size, _ = numbers.pop("D"), numbers.pop("buffered")
        limit = 8 * members * trials + 16 * size + 9 * members + 256
        pickled = line.partition("pickled=")[2]
        row = {"preset": preset, "N": members, "K": trials, "D": size, "limit": limit}
        rows.append(row | {"bytes": sum(numbers.values()), "pickled": pickled})
        print(
            f"{preset:<16} {members:>5} {trials:>4} {size:>7} {sum(numbers.values()):>9} "
            f"{limit:>9}  {pickled}",
            flush=True,
        )
    return rows


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="(2 4 8)")
    parser.add_argument("--members", type=int, default=4096, help="N (4096)")
    parser.add_argument("--trials", type=int, default=4, help="K (4)")
    parser.add_argument("--parameters", type=int, default=60_000, help="D (60000)")
    parser.add_argument("--repeats", type=int, default=1000, help="of each collective (1000)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        by, *sizes = args.child
        return measure(*map(int, sizes), messages=by == "messages")
    print(f"load {os.getloadavg()}, {os.cpu_count()} cores")
    report = {"load": os.getloadavg(), "seconds": seconds(args), "traffic": traffic()}
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
