"""Generations per second of esmeta's searches and of EvoTorch's own, on the same evaluator.

    python tests/bench/side_by_side.py --json side_by_side.json

The same task, popsize and number of parameters; every generation evaluates the same tasks, so that
all do the same work. ``large``: a recurrent policy of about 60,000 parameters with a very short
trial, popsize 1,024, where the search matters; ``small``: the policy of ``harlow-openes`` on a
shorter Harlow, popsize 256. EvoTorch runs as it comes: in one process, with two Ray actors that
evaluate (``ray``), and with two that also sample and compute gradients (``ray-dist``, which CMAES
does not have). esmeta runs on one rank and on two. openes is compared with EvoTorch's PGPE.
Wall seconds per generation (medians; the first is left out); CPU seconds only for one process.
Targets for openes and pgpe: 2 x the fastest of EvoTorch at ``large``, never slower elsewhere.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _jobs import job, middle, timed
from torch import Tensor

SIZES = ("large", "small")
MODES = ("plain", "ray", "ray-dist")
# Rival of each search.
RIVALS = {"openes": "PGPE", "pgpe": "PGPE", "snes": "SNES", "sepcma": "CMAES"}
WARM = 1


def evaluator_of(size: str) -> tuple[Any, int]:
    """The evaluator and the popsize."""
    import esmeta

    if size == "large":
        task = esmeta.make_task("bandit", horizon=2)
        policy = esmeta.make_policy("rl2", task.spec, neurons=122)
        return esmeta.PopulationEvaluator(policy, task, trials=2), 1024
    task = esmeta.make_task("harlow", horizon=20, mirrored=True)
    policy = esmeta.make_policy("metods", task.spec, neurons=20, depth=2)
    return esmeta.PopulationEvaluator(policy, task, trials=8), 256


class Score:
    """Mean returns on the tasks of generation 0, for Ray a class that pickles."""

    def __init__(self, size: str) -> None:
        self.evaluator, _ = evaluator_of(size)

    def __call__(self, values: Tensor) -> Tensor:
        """Fitness float64 ``[N]`` of solutions ``[N, D]``."""
        torch.set_num_threads(1)
        returns = self.evaluator(values.as_subclass(Tensor)).returns
        return returns.mean(dim=1).float()


class SameTasks:
    """The objective of esmeta's searches: the same tasks in every generation."""

    device = torch.device("cpu")

    def __init__(self, evaluator: Any) -> None:
        self.evaluator = evaluator

    def fitness(self, params: Any, step: int | Tensor) -> Any:
        """Returns of members."""
        return self.evaluator(params)


def say(name: str, step: Callable[[], Any], count: int, size: int) -> None:
    """Time a search and print its line."""
    for _ in range(WARM):
        step()
    found = list(timed(step, count))
    walls, cpus = [wall for wall, _, _ in found], [cpu for _, cpu, _ in found]
    row = {"search": name, "size": size, "wall_s": middle(walls), "cpu_s": middle(cpus)}
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def ours(size: str, count: int) -> None:
    """esmeta's searches on the ranks of this job."""
    from esmeta.ranks.comm import make_comm
    from esmeta.rng import Rng

    torch.set_num_threads(1)
    comm = make_comm()
    evaluator, popsize = evaluator_of(size)
    objective, theta = SameTasks(evaluator), evaluator.policy.init()
    for name in RIVALS:
        optimizer = importlib.import_module(f"esmeta.optimizers.{name}").Optimizer(popsize=popsize)
        state = optimizer.init(theta, Rng(0))

        def step(optimizer: Any = optimizer) -> None:
            nonlocal state
            state, _ = optimizer.step(state, objective, comm, Rng(0))

        say(name if comm.rank == 0 else "", step, count, evaluator.size)


def theirs(size: str, count: int, mode: str) -> None:
    """EvoTorch's searchers in ``mode``: plain, ray or ray-dist."""
    torch.set_num_threads(1)
    from evotorch import Problem, algorithms

    score, (_, popsize) = Score(size), evaluator_of(size)
    actors: dict[str, Any] = {}
    if mode != "plain":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        actors = {"num_actors": 2}
    center = score.evaluator.policy.init()
    from esmeta.tree import ravel

    start = ravel(center)[0]
    for name in dict.fromkeys(RIVALS.values()):
        if name == "CMAES" and mode == "ray-dist":
            continue
        problem = Problem(
            "max",
            score,
            solution_length=len(start),
            initial_bounds=(-1, 1),
            dtype=torch.float32,
            vectorized=True,
            # EvoTorch 0.6.1 cannot seed its actors: it calls a method that Problem does not have.
            seed=None if actors else 0,
            store_solution_stats=False,
            **actors,
        )
        options: dict[str, Any] = {"popsize": popsize, "stdev_init": 0.05, "center_init": start}
        if name == "PGPE":
            options |= {"center_learning_rate": 0.02, "stdev_learning_rate": 0.1}
        if name == "CMAES":
            options |= {"separable": True}
        elif mode == "ray-dist":
            options |= {"distributed": True}
        search = getattr(algorithms, name)(problem, **options)
        say(name, search.step, count, len(start))
        if actors:
            problem.kill_actors()
    if mode != "plain":
        ray.shutdown()


def compare(size: str, count: int, modes: list[str], timeout: float) -> list[Any]:
    """Print the table of one size."""
    rows: dict[str, dict[str, Any]] = {}
    for ranks in (1, 2):
        found = job(__file__, ["ours", size, str(count)], ranks, timeout)
        rows[f"esmeta {ranks}"] = {row["search"]: row for row in found if row["search"]}
    for mode in modes:
        found = job(__file__, ["theirs", size, str(count), mode], 1, timeout)
        rows[mode] = {row["search"]: row for row in found}
    one = rows["esmeta 1"]
    print(f"\n{size}: D = {one['openes']['size']:,}; wall seconds per generation (CPU in brackets)")
    heads = ["esmeta 1", "esmeta 2", *modes, "1 rank x", "2 ranks x", "CPU x"]
    print(f"{'search':<8} {'rival':<6}" + "".join(f"{head:>16}" for head in heads))
    report = []
    for name, rival in RIVALS.items():
        cells = {
            job_: found.get(name if "esmeta" in job_ else rival) for job_, found in rows.items()
        }
        line = f"{name:<8} {rival:<6}"
        for job_, cell in cells.items():
            text = "-" if cell is None else f"{cell['wall_s']:.3f}"
            if cell is not None and job_ in ("esmeta 1", "plain"):
                text += f" ({cell['cpu_s']:.3f})"
            line += f"{text:>16}"
        fastest = min(cell["wall_s"] for j, cell in cells.items() if j in modes and cell)
        ratios = [fastest / cells[f"esmeta {ranks}"]["wall_s"] for ranks in (1, 2)]
        if cells.get("plain"):
            ratios.append(cells["plain"]["cpu_s"] / cells["esmeta 1"]["cpu_s"])
        print(line + "".join(f"{ratio:>16.2f}" for ratio in ratios), flush=True)
        report.append({"size": size, "search": name, "cells": cells, "ratios": ratios})
    return report


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--generations", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=900, help="seconds per job")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, size, count, *mode = args.child
        (ours if kind == "ours" else theirs)(size, int(count), *mode)
        return 0
    report: dict[str, Any] = {"load": os.getloadavg(), "cores": os.cpu_count(), "rows": []}
    print(f"load {report['load']}, {report['cores']} cores")
    for size in args.sizes:
        report["rows"] += compare(size, args.generations, args.modes, args.timeout)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
