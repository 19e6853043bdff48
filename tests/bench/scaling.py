"""Generations per second on several ranks, and a model of many more.

    python tests/bench/scaling.py --preset maze-openes --ranks 1 2 --json scaling.json

Measured: the preset's generations on each number of ranks, in turns, and the efficiency against
one rank; idle is the share of time that a rank waits for others. On a machine with other work the
CPU column is the better guide: CPU seconds of one rank over those of all ranks together, which
shows what is done twice but not who waits.

Modelled, from measurements of this machine: a generation on P ranks takes

    T(P) = e(m) + s m D + u D + f + c(P),    m = members of the busiest rank

with e(m) the measured time to evaluate m members in one call (interpolated), s the search's time
per member and parameter, u and f its time per parameter and per generation that do not shrink with
P, and c(P) = log2(P) times the collectives of 2 ranks on one machine: no network. It assumes one
core per rank, cores that do not slow each other down, and no held-out scores; those cost rank 0
``heldout`` seconds every ``run.evaluate_every`` generations and are shown apart. Members are dealt
out in blocks: as long as there are fewer blocks than ranks, ranks stay idle, so the model is
printed for several sizes of block, with the preset's popsize, with 16 members per rank, and with
the preset's popsize per rank. Efficiency is members per second against P times those of one rank:
with the preset's popsize, and (strict) with the number of members that one rank evaluates fastest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _jobs import Free, job, middle, timed

TARGETS = {2: 0.85, 32: 0.95}
BLOCKS = (16, 4, 2)
FAR = (32, 1024)


def build(preset: str) -> Any:
    """The parts of a preset, one thread."""
    from esmeta.run import config, train

    return train.build(config.resolve(config.load(preset), []))


def generations(preset: str, count: int) -> None:
    """Time generations; one line per rank."""
    from esmeta.ranks.comm import make_comm

    parts, comm = build(preset), make_comm()
    state = parts.state

    def step() -> dict[str, float]:
        nonlocal state
        state, metrics = parts.optimizer.step(state, parts.objective, comm, parts.rng)
        return metrics

    step()
    found = list(timed(step, count))
    row = {
        "rank": comm.rank,
        "wall_s": middle([wall for wall, _, _ in found]),
        "cpu_s": middle([cpu for _, cpu, _ in found]),
        "idle": middle([metrics["wait_s"] / wall for wall, _, metrics in found]),
    }
    # One write: lines of ranks must not mix.
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def costs(preset: str, repeats: int) -> None:
    """Measure the terms of the model in one process; one line."""
    from esmeta.ranks.comm import SelfComm
    from esmeta.tree import ravel

    parts = build(preset)
    theta = ravel(parts.theta)
    popsize, size = parts.optimizer.popsize, theta.shape[1]
    evaluate = {}
    for members in sorted({2, 4, 8, 16, 32, 64, popsize}):
        batch = theta.repeat(members, 1)
        parts.objective.fitness(batch, 0)
        calls = timed(lambda batch=batch: parts.objective.fitness(batch, 0), repeats)
        evaluate[members] = min(cpu for _, cpu, _ in calls)

    def search(popsize: int) -> float:
        optimizer = dataclasses.replace(parts.optimizer, popsize=popsize)
        state = optimizer.init(parts.theta, parts.rng)
        calls = timed(lambda: optimizer.step(state, Free(), SelfComm(), parts.rng), repeats + 1)
        return min(cpu for _, cpu, _ in calls)

    small, large = search(16), search(1024)
    per_member = (large - small) / (1024 - 16)
    trials = parts.config.run.evaluate_trials
    [(_, heldout, _)] = timed(lambda: parts.objective.heldout(parts.theta, trials), 1)
    print(
        json.dumps(
            {
                "size": size,
                "popsize": popsize,
                "evaluate": evaluate,
                "search_member_s": per_member,
                # Shaping, ascent, hash: per generation, and on every rank.
                "search_rest_s": small - 16 * per_member,
                "heldout_s": heldout,
                "evaluate_every": parts.config.run.evaluate_every,
                "trials": parts.config.trials,
            }
        )
    )


def collectives(size: int, popsize: int, trials: int, repeats: int) -> None:
    """Median seconds of a generation's collectives together; one line from rank 0."""
    from esmeta.ranks.comm import make_comm

    comm = make_comm()
    counts = [popsize // comm.size] * comm.size
    rows = torch.zeros(counts[0], 2 * trials, dtype=torch.float64)
    sums = torch.zeros(1, size, dtype=torch.int64)

    def once() -> None:
        comm.gather_rows(rows, counts)
        comm.sum_exact(sums)
        comm.same(b"theta")

    times = []
    for _ in range(repeats):
        comm.sum_exact(torch.zeros(1, dtype=torch.int64))
        begin = time.perf_counter()
        once()
        times.append(time.perf_counter() - begin)
    if comm.rank == 0:
        print(json.dumps({"median_s": middle(times), "least_s": min(times)}))


def measured(preset: str, ranks: list[int], count: int, turns: int) -> list[Any]:
    """Print the table of what was measured."""
    found: dict[int, list[list[Any]]] = {number: [] for number in ranks}
    for _ in range(turns):
        for number in ranks:
            found[number].append(job(__file__, ["generations", preset, str(count)], number))
    print(f"\nmeasured, {preset}, {count} generations x {turns} turns")
    print(f"{'ranks':>5} {'gen/s':>7} {'efficiency':>11} {'CPU':>6} {'idle mean':>10} {'max':>6}")
    report: list[Any] = []
    for number in ranks:
        wall = middle([max(row["wall_s"] for row in rows) for rows in found[number]])
        cpu = middle([sum(row["cpu_s"] for row in rows) for rows in found[number]])
        idle = [[row["idle"] for row in rows] for rows in found[number]]
        mean, most = (middle([f(i) for i in idle]) for f in (np.mean, max))
        report.append({"ranks": number, "wall_s": wall, "cpu_s": cpu, "idle": mean, "most": most})
        first = report[0]
        efficiency = first["wall_s"] * first["ranks"] / (wall * number)
        target = f"  target {TARGETS[number]}" if number in TARGETS else ""
        print(
            f"{number:>5} {1 / wall:>7.3f} {efficiency:>11.3f} {first['cpu_s'] / cpu:>6.3f} "
            f"{mean:>10.3f} {most:>6.3f}{target}",
            flush=True,
        )
    return report


def modelled(preset: str, repeats: int) -> dict[str, Any]:
    """Print the terms of the model and what it predicts."""
    [cost] = job(__file__, ["costs", preset, str(repeats)])
    args = [str(cost[key]) for key in ("size", "popsize", "trials")]
    [two] = job(__file__, ["collectives", *args, "400"], 2)
    evaluate = {int(members): seconds for members, seconds in cost["evaluate"].items()}
    popsize = cost["popsize"]
    print(f"\nmodel of {preset}: D = {cost['size']:,}, popsize {popsize}, CPU seconds")
    for members, seconds in evaluate.items():
        print(f"  e({members:>3}) = {seconds:.4f} s, {1e3 * seconds / members:.2f} ms per member")
    per = 1e9 * cost["search_member_s"] / cost["size"]
    print(f"  search {per:.1f} ns per member and parameter; rest {cost['search_rest_s']:.2e} s")
    print(f"  collectives on 2 ranks {two['median_s']:.1e} s (least {two['least_s']:.1e})")
    print(f"  held-out scores {cost['heldout_s']:.3f} s every {cost['evaluate_every']} generations")

    def seconds(members: int, ranks: int) -> float:
        x, y = list(evaluate), list(evaluate.values())
        compute = float(np.interp(members, x, y)) + members * cost["search_member_s"]
        return compute + cost["search_rest_s"] + two["least_s"] * math.log2(ranks)

    alone = popsize / seconds(popsize, 1)
    best = max(members / seconds(members, 1) for members in evaluate)
    heldout = cost["heldout_s"] / max(1, cost["evaluate_every"])
    print(
        f"\n{'block':>5} {'ranks':>6} {'popsize':>8} {'busy':>6} {'gen/s':>8} {'efficiency':>11} "
        f"{'strict':>7} {'strict with held-out':>21}"
    )
    report: dict[str, Any] = {"cost": cost, "collectives": two, "predicted": []}
    for ranks in FAR:
        for total in sorted({popsize, ranks * 16, ranks * popsize}):
            for block in BLOCKS:
                blocks = -(-total // block)
                time_s = seconds(-(-blocks // ranks) * block, ranks)
                row = {
                    "block": block,
                    "ranks": ranks,
                    "popsize": total,
                    "busy": min(ranks, blocks),
                    "gen_per_s": 1 / time_s,
                    "efficiency": total / time_s / (ranks * alone),
                    "strict": total / time_s / (ranks * best),
                    "heldout": total / (time_s + heldout) / (ranks * best),
                }
                report["predicted"].append(row)
                target = f"  target {TARGETS[ranks]}" if ranks in TARGETS else ""
                print(
                    f"{block:>5} {ranks:>6} {total:>8} {row['busy']:>6} {row['gen_per_s']:>8.2f} "
                    f"{row['efficiency']:>11.3f} {row['strict']:>7.3f} {row['heldout']:>21.3f}"
                    f"{target}"
                )
    return report


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="maze-openes")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="0: the model only")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, *rest = args.child
        if kind == "collectives":
            collectives(*map(int, rest))
        else:
            {"generations": generations, "costs": costs}[kind](rest[0], int(rest[1]))
        return 0
    report: dict[str, Any] = {"load": os.getloadavg(), "cores": os.cpu_count()}
    print(f"load {report['load']}, {report['cores']} cores")
    if args.turns:
        report["measured"] = measured(args.preset, args.ranks, args.generations, args.turns)
    report["model"] = modelled(args.preset, 3)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
