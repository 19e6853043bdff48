"""Control steps per second of simulated bodies against MuJoCo itself and gymnasium's vector.

    python tests/bench/bodies.py --json bodies.json
    python tests/bench/bodies.py --quick

One process, CPU time. The contenders take turns; every turn is the same work, cut into pieces (one
step of a batch, or as many of one world), each of which counts with its fastest turn: on a busy
machine others empty the caches in between, which is not the code's doing. The same with the median
of the turns stands beside it. All run the same model under uniform actions from the same kind of
starts for 40 steps (resets are not on the clock), and none ends early.

* ``raw``: ``mj_step`` on one ``MjData`` in a Python loop, one call per control step, with nothing
  observed or paid, on the model as esmeta sets it up (no constraint islands). ``raw, gymnasium's``
  has the islands, which is what gymnasium and everybody else runs.
* ``env``: one step of esmeta's environment with observation and reward, for B trials at once.
* ``env + policy``: with a step of a policy (two hidden layers of 64, actions drawn) before each.
* ``batch 16``: MuJoCo's own batch of worlds and nothing else, and ``batch 16 + torch`` with a dozen
  bare torch operations before each step, which is that policy without an environment, a
  distribution or a reward: more than any policy in torch at 16 trials can reach.
* ``sync``: gymnasium's ``SyncVectorEnv`` of 16, with its observation and reward.
* ``half over``: the environment where half of the trials have ended, and its share of the cost.
* ``threads``: wall time of one thread over that of two, B = 256. ``ranks``: steps per second of two
  processes at once over those of one alone, B = 128 each. Both say nothing on a busy machine.

The ant is that of ``ant_dir`` (no contact forces); gymnasium's has them, and ``ant with forces``
(the row engine) is like for like.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
if importlib.util.find_spec("imageio") is None:
    # Gymnasium imports it for the pictures of its window only.
    sys.modules["imageio"] = types.ModuleType("imageio")

import gymnasium  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from esmeta.run.cli import prepare_process  # noqa: E402

# As every training run does; all contenders profit.
prepare_process()

import esmeta  # noqa: E402
from esmeta.agent import heads  # noqa: E402
from esmeta.envs.mujoco import MujocoEnv  # noqa: E402
from esmeta.envs.mujoco_model import build_model, log_warnings, slice_of  # noqa: E402
from esmeta.rng import Rng  # noqa: E402
from esmeta.tasks import make_task  # noqa: E402

STEPS = 40
BODIES = {"ant": ("ant_dir", "Ant-v5"), "cheetah": ("cheetah_dir", "HalfCheetah-v5")}
PIECE = 20  # control steps of one world that are a piece of raw's
Contender = tuple[Callable[[], list[float]], int]
"""One turn, which returns the CPU seconds of each piece, and its number of control steps."""


class Clock:
    """CPU seconds of this process from piece to piece."""

    def __init__(self) -> None:
        self.pieces: list[float] = []
        self._last = time.process_time()

    def tick(self) -> None:
        """The end of a piece."""
        now = time.process_time()
        self.pieces.append(now - self._last)
        self._last = now


def raw(name: str, worlds: int, *, islands: bool) -> Contender:
    """``mj_step`` and nothing else, ``worlds`` trials one after the other."""
    body = make_task(name).body()
    model = build_model(body)
    if islands:
        model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    acts = rng.uniform(-1, 1, size=(worlds, STEPS, model.nu))
    noise = rng.uniform(-0.1, 0.1, size=(worlds, model.nq))
    speed = rng.normal(size=(worlds, model.nv)) * 0.1

    def run() -> list[float]:
        clock = Clock()
        for world in range(worlds):
            mujoco.mj_resetData(model, data)
            data.qpos += noise[world]
            data.qvel = speed[world]
            for t, action in enumerate(acts[world], start=1):
                data.ctrl = action
                mujoco.mj_step(model, data, nstep=body.frame_skip)
                if t % PIECE == 0:
                    clock.tick()
        return clock.pieces

    return run, worlds * STEPS


def environment(name: str, options: dict[str, object], threads: int = 1) -> MujocoEnv:
    """The task's environment without an early end."""
    task = make_task(name, **options)
    definition = dataclasses.replace(task.definition(), healthy=None)
    return MujocoEnv(
        task.body(), definition, horizon=task.spec.horizon, engine=task.engine, threads=threads
    )


def ours(name: str, batch: int, *, policy: bool = False, over: float = 0.0, **options: object):
    """Esmeta's environment on ``batch`` trials, of which the share ``over`` has ended."""
    task, env = make_task(name, **options), environment(name, options)
    tasks = task.sample(batch, "train", Rng(0))
    acts = torch.rand(STEPS, 1, batch, task.spec.action.size) * 2 - 1
    brain = esmeta.make_policy("mlp", task.spec, neurons=64, hidden=(64,))
    bound = brain.bind(brain.init(0))
    ended = (torch.arange(batch) < over * batch).unsqueeze(0)

    @torch.no_grad()
    def run() -> list[float]:
        state, ts = env.reset(tasks, Rng(1))
        state = state._replace(over=ended)
        memory, clock = {}, Clock()
        for t in range(STEPS):
            action = acts[t]
            if policy:
                out, memory = brain.step_bound(bound, memory, ts, t)
                action = heads.sample(out, acts[t])
            state, ts = env.step(state, action)
            clock.tick()
        return clock.pieces

    return run, batch * STEPS


def bare(name: str, batch: int, *, policy: bool) -> Contender:
    """MuJoCo's batch of worlds, with or without a policy's bare operations."""
    from mujoco.batch import Batch

    body = make_task(name).body()
    model = build_model(body)
    worlds, data, rng = (
        Batch(model, batch, nthread=1),
        mujoco.MjData(model),
        np.random.default_rng(0),
    )
    parts = [slice_of(model, part) for part in (mujoco.mjtState.mjSTATE_QPOS,
             mujoco.mjtState.mjSTATE_QVEL, mujoco.mjtState.mjSTATE_CTRL)]  # fmt: skip
    first = np.empty_like(worlds.state)
    for row in first:
        mujoco.mj_getState(model, data, row, mujoco.mjtState.mjSTATE_INTEGRATION)
        row[parts[0]] += rng.uniform(-0.1, 0.1, size=model.nq)
        row[parts[1]] = rng.normal(size=model.nv) * 0.1
    rows = torch.from_numpy(worlds.state)
    seen, control = rows[:, parts[0].start : parts[1].stop], rows[:, parts[2]]
    acts = torch.rand(STEPS, batch, model.nu) * 2 - 1
    sizes = [model.nq + model.nv + model.nu + 1, 64, 64, model.nu]
    layers = [
        (torch.randn(out) * 0.1, torch.randn(width, out) * 0.1)
        for width, out in itertools.pairwise(sizes)
    ]
    reward = torch.zeros(batch, 1)

    @torch.no_grad()
    def run() -> list[float]:
        worlds.state[...] = first
        action, clock = acts[0], Clock()
        for t in range(STEPS):
            if policy:
                x = torch.cat([seen.float(), action, reward], dim=-1)
                for bias, weight in layers[:-1]:
                    x = torch.tanh(torch.addmm(bias, x, weight))
                action = torch.addmm(*layers[-1][:1], x, layers[-1][1]) + 0.5 * acts[t]
                control.copy_(action.clamp(-1, 1))
            else:
                control.copy_(acts[t])
            worlds.step(None, nstep=body.frame_skip)
            clock.tick()
        return clock.pieces

    return run, batch * STEPS


def sync(name: str, batch: int) -> Contender:
    """Gymnasium's vector of environments, begun anew as often."""
    make = [lambda: gymnasium.make(name, disable_env_checker=True).unwrapped] * batch
    log_warnings(mujoco)
    envs = gymnasium.vector.SyncVectorEnv(make)
    rng = np.random.default_rng(0)
    acts = rng.uniform(-1, 1, size=(STEPS, *envs.action_space.shape)).astype(np.float32)

    def run() -> list[float]:
        envs.reset(seed=0)
        clock = Clock()
        for action in acts:
            envs.step(action)
            clock.tick()
        return clock.pieces

    return run, batch * STEPS


def thread_gain(name: str, turns: int) -> float:
    """Wall time of one thread over that of two, batch 256."""
    times: dict[int, list[float]] = {1: [], 2: []}
    task = make_task(name)
    tasks = task.sample(256, "train", Rng(0))
    acts = torch.rand(20, 1, 256, task.spec.action.size) * 2 - 1
    envs = {threads: environment(name, {}, threads) for threads in times}
    for _ in range(turns):
        for threads, env in envs.items():
            state, _ = env.reset(tasks, Rng(1))
            begin = time.perf_counter()
            for action in acts:
                state, _ = env.step(state, action)
            times[threads].append(time.perf_counter() - begin)
    return min(times[1]) / min(times[2])


def rate_alone(name: str, seconds: float = 4.0) -> float:
    """Control steps per second of wall time of this process, batch 128."""
    task, env = make_task(name), environment(name, {})
    tasks = task.sample(128, "train", Rng(0))
    acts = torch.rand(20, 1, 128, task.spec.action.size) * 2 - 1
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        state, _ = env.reset(tasks, Rng(1))
        begin = time.perf_counter()
        for action in acts:
            state, _ = env.step(state, action)
        best = min(best, time.perf_counter() - begin)
    return 128 * len(acts) / best


def rank_gain(name: str) -> float:
    """Rates of two processes at once over that of one."""
    rates = {}
    for count in (1, 2):
        command = [sys.executable, __file__, "--rate", name]
        ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        rates[count] = sum(float(rank.communicate()[0]) for rank in ranks)
    return rates[2] / rates[1]


def compare(body: str, turns: int, batches: list[int]) -> dict[str, dict[str, float]]:
    """The best and the median rate of all contenders on one body."""
    name, gym_name = BODIES[body]
    contenders = {
        "raw": raw(name, 16, islands=False),
        "raw, gymnasium's": raw(name, 16, islands=True),
        "sync": sync(gym_name, 16),
    }
    for batch in batches:
        contenders[f"env {batch}"] = ours(name, batch)
        contenders[f"env {batch} rows"] = ours(name, batch, engine="rows")
    contenders["batch 16"] = bare(name, 16, policy=False)
    contenders["batch 16 + torch"] = bare(name, 16, policy=True)
    contenders["env 16 + policy"] = ours(name, 16, policy=True)
    contenders["half over"] = ours(name, 64, over=0.5)
    if body == "ant":
        contenders["env 64 with forces"] = ours(name, 64, contact="mj")
    turned: dict[str, list[list[float]]] = {key: [] for key in contenders}
    order = list(contenders)
    for turn in range(turns + 1):
        for key in order[turn % len(order) :] + order[: turn % len(order)]:
            pieces = contenders[key][0]()
            if turn:  # the first turn warms up
                turned[key].append(pieces)
    rates = {}
    for key, (_, steps) in contenders.items():
        pieces = np.array(turned[key])
        best, median = pieces.min(axis=0).sum(), np.median(pieces, axis=0).sum()
        rates[key] = {"best": steps / float(best), "median": steps / float(median)}
    return rates


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="five turns instead of 25")
    parser.add_argument("--json", help="also write the numbers to this file")
    parser.add_argument("--rate", metavar="TASK", help="print the rate of one process and be done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rate:
        print(rate_alone(args.rate))
        return
    turns = 5 if args.quick else 25
    result: dict[str, dict[str, dict[str, float]]] = {}
    for body in BODIES:
        rates = result[body] = compare(body, turns, [16, 64, 256])
        print(f"\n{body}: control steps per CPU second, share of raw, of sync; medians")
        for key, rate in rates.items():
            shares = (
                f"{rate[which] / rates[base][which]:6.2f}"
                for which in ("best", "median")
                for base in ("raw", "sync")
            )
            print(f"  {key:20} {rate['best']:9.0f} {' '.join(shares)}")
        share = rates["env 64"]["best"] / rates["half over"]["best"]
        gain = thread_gain(BODIES[body][0], turns)
        ranks = rank_gain(BODIES[body][0])
        rates |= {"ratios": {"cost of half": share, "two threads": gain, "two ranks": ranks}}
        print(
            f"  half over costs {share:.2f} of all; two threads {gain:.2f} times one, two ranks "
            f"{ranks:.2f} times"
        )
    if args.json:
        facts = {"mujoco": mujoco.__version__, "numpy": np.__version__, "turns": turns}
        Path(args.json).write_text(json.dumps({**facts, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
