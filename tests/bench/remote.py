"""Environment steps per second of one rank alone, and of all ranks serving it.

    python tests/bench/remote.py --ranks 2
    python tests/bench/remote.py --tasks gym:Pendulum-v1 cheetah_dir ant_dir --batch 64

One policy acts in B trials at once (the setting of a2c, ppo and of a GPU that holds the policy),
on environments in its own process and on those of all ranks, in turn and in one job: the ranks
that serve sleep meanwhile. Printed are medians over repeats and ratios; the returns must agree.
Where other programs use the cores too, look at the ratio per CPU second of the learner: how much
less it has to do, at best by the number of ranks (what it spins while it waits counts as work).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import _jobs
import torch

import esmeta
from esmeta import rollout as loop
from esmeta.rng import Rng
from esmeta.types import BatchedEnv

TASKS = ("gym:Pendulum-v1", "gym:LunarLanderContinuous-v3", "cheetah_dir", "ant_dir")


def make(name: str) -> Any:
    """``gym:ID`` or the name of a task; trials of at most 100 steps."""
    task, _, environment = name.partition(":")
    options = {"id": environment} if environment else {}
    return esmeta.make_task(task, **options, horizon=100)


def play(policy: Any, params: Any, env: BatchedEnv, tasks: Any) -> tuple[float, float, int, float]:
    """Wall and CPU seconds, environment steps and the sum of returns of one batch of trials."""
    start, cpu = time.perf_counter(), time.process_time()
    begin = loop.start(policy, params, env, tasks, Rng(1))
    kept = loop.Returns(*begin.ts.reward.shape, device="cpu")
    loop.rollout(policy, env, begin, kept)
    spent = time.perf_counter() - start, time.process_time() - cpu
    return *spent, int(kept.steps.sum()), float(kept.returns.sum())


@torch.no_grad()
def child(name: str, batch: int, repeats: int) -> None:
    """On every rank: rank 0 measures, the others serve."""
    from esmeta.envs.remote import Node
    from esmeta.ranks.comm import MPIComm, install_excepthook, make_comm

    torch.set_num_threads(1)
    comm = make_comm(timeout_s=300)
    install_excepthook(comm)
    assert isinstance(comm, MPIComm)
    task = make(name)
    node = Node(comm, 300, lambda: False)
    if node.learners is None:
        node.serve(task)
        return
    policy = esmeta.make_policy("metods", task.spec, neurons=32)
    params, tasks = policy.init(0), task.sample(batch, "train", Rng(0))
    envs = {"alone": task.make_env("cpu"), "served": node.task(task).make_env("cpu")}
    rates: dict[str, list[float]] = {
        kind: [] for kind in ("alone", "served", "alone_cpu", "served_cpu")
    }
    for repeat in range(1 + repeats):
        told = {}
        for kind, env in envs.items():
            seconds, cpu, steps, told[kind] = play(policy, params, env, tasks)
            if repeat:  # the first one makes simulators
                rates[kind].append(steps / seconds)
                rates[f"{kind}_cpu"].append(steps / cpu)
        assert told["alone"] == told["served"], told
    print(json.dumps({"task": name, "batch": batch, "ranks": comm.size, **rates}), flush=True)
    node.close(0)


def summary(result: dict[str, Any]) -> tuple[float, float, float, float]:
    """Medians of both rates, and of their ratio by the clock and by the learner's CPU time."""

    def ratio(kind: str) -> float:
        pairs = zip(result[f"alone{kind}"], result[f"served{kind}"], strict=True)
        return _jobs.middle([served / alone for alone, served in pairs])

    return _jobs.middle(result["alone"]), _jobs.middle(result["served"]), ratio(""), ratio("_cpu")


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="trials at once (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="write all rates here")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error("--ranks must be at least 2: one learns, the others serve")
    results = []
    for name in args.tasks:
        words = [name, str(args.batch), str(args.repeats)]
        (result,) = _jobs.job(__file__, words, ranks=args.ranks)
        results.append(result)
        alone, served, ratio, freed = summary(result)
        print(
            f"{name:>32}: {alone:9,.0f} steps/s alone, {served:9,.0f} on {args.ranks} ranks, "
            f"{ratio:.2f} x; per CPU second of the learner {freed:.2f} x",
            flush=True,
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
