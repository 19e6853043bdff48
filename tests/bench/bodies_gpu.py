"""Simulated bodies on a GPU: agreement, room for contacts, and speed against CPU physics.

    python tests/bench/bodies_gpu.py --json bodies_gpu.json
    python tests/bench/bodies_gpu.py --device cpu --worlds 16 --steps 20   # whether it works

Needs ``pip install "esmeta[gpu]"``. **Not run on a GPU yet**: all that is known of this script and
of ``engine="warp"`` is from Warp on the CPU.

1. ``tests/test_warp.py`` with its slow tests, on the GPU if there is one: single steps against
   MuJoCo in C, ends and restarts, models of their own, lost worlds, too little room.
2. Random actions in ``--worlds`` worlds for ``--steps`` control steps of every model, where nobody
   falls out: how many contacts and constraints there were, against the room; it fails if there was
   too little.
3. Control steps per second of wall time, with observation, reward and a step of a policy (two
   hidden layers of 64 on the device) before each: physics by Warp on the device; the same without
   the deterministic mode, in which results may depend on batch mates; physics by MuJoCo on all
   cores of the same host. The contenders take turns; figures are medians over the turns. The faster
   engine is what tasks/README.md should call the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mujoco
import torch

import esmeta
from esmeta.agent import heads
from esmeta.envs import warp
from esmeta.envs.mujoco import MujocoEnv
from esmeta.rng import Rng
from esmeta.tasks import make_task

TASKS = {"ant": "ant_dir", "cheetah": "cheetah_dir", "hopper": "hopper", "walker": "walker2d"}
STEPS = 50  # of a turn


def environment(name: str, engine: str, device: str, threads: int = 1) -> MujocoEnv:
    """The task's environment, in which nobody falls out."""
    task = make_task(name)
    definition = dataclasses.replace(task.definition(), healthy=None)
    options = {"engine": engine, "threads": threads, "device": device}
    return MujocoEnv(task.body(), definition, horizon=100_000, **options)


def room(name: str, worlds: int, steps: int, device: str) -> dict[str, float]:
    """The largest use of the buffers of Warp in ``steps`` control steps, and their sizes."""
    env, task = environment(name, "warp", device), make_task(name)
    state, _ = env.reset(task.sample(worlds, "train", Rng(0)), Rng(1))
    for t in range(steps):
        draws = Rng(2).fold(t).uniform(torch.arange(worlds, device=device), task.spec.action.size)
        state, _ = env.step(state, 2.0 * draws.unsqueeze(0) - 1.0)
    lost = env.metrics(state)["unstable"].mean()  # raises where there was too little room
    (held,) = env._worlds.values()
    return {
        "contacts per world": int(held._contacts_used.numpy()[0]) / worlds,
        "nconmax": held._d.naconmax / worlds,
        "constraints": int(held._rows_used.numpy().max()),
        "njmax": held._d.njmax,
        "lost": float(lost),
    }


def contender(name: str, worlds: int, device: str, env: MujocoEnv) -> Callable[[], float]:
    """Runs some control steps with a policy; returns how many per second of wall time."""
    task = make_task(name)
    tasks = task.sample(worlds, "train", Rng(0))
    brain = esmeta.make_policy("mlp", task.spec, neurons=64, hidden=(64,))
    bound = brain.bind({key: leaf.to(device) for key, leaf in brain.init(0).items()})
    noise = torch.rand(STEPS, 1, worlds, task.spec.action.size, device=device)

    @torch.no_grad()
    def run() -> float:
        state, ts = env.reset(tasks, Rng(1))
        wait(device)
        begin = time.perf_counter()
        memory = {}
        for t in range(STEPS):
            out, memory = brain.step_bound(bound, memory, ts, t)
            state, ts = env.step(state, heads.sample(out, noise[t]))
        wait(device)
        return STEPS * worlds / (time.perf_counter() - begin)

    return run


def wait(device: str) -> None:
    """For all that was asked of the GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def loose(name: str, worlds: int, device: str) -> MujocoEnv:
    """Warp without its deterministic mode."""
    env = environment(name, "warp", device)
    warp.DETERMINISTIC = False
    env.reset(make_task(name).sample(worlds, "train", Rng(0)), Rng(1))
    warp.DETERMINISTIC = True
    return env


def rates(name: str, worlds: int, turns: int, device: str, threads: int) -> dict[str, float]:
    """Median rate of every contender."""
    envs = {
        "warp": environment(name, "warp", device),
        "warp, loose": loose(name, worlds, device),
        f"cpu, {threads} threads": environment(name, "auto", device, threads),
    }
    runs = {key: contender(name, worlds, device, env) for key, env in envs.items()}
    found: dict[str, list[float]] = {key: [] for key in runs}
    for turn in range(turns + 1):
        for key, run in runs.items():
            rate = run()
            if turn:  # the first turn warms up
                found[key].append(rate)
    return {key: statistics.median(values) for key, values in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help='"cuda", or "cpu" to try the script')
    parser.add_argument("--worlds", type=int, default=8192, help="at most")
    parser.add_argument("--steps", type=int, default=1000, help="control steps of random actions")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of MuJoCo on the CPU")
    parser.add_argument("--no-tests", action="store_true", help="leave out tests/test_warp.py")
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; write --device cpu to try the script")
    if not args.no_tests:
        words = ["-m", "pytest", "-q", "-s", "-m", "slow or not slow", "tests/test_warp.py"]
        subprocess.run([sys.executable, *words], check=True)
    gpu = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None
    result: dict[str, object] = {"gpu": gpu, "mujoco": mujoco.__version__, "turns": args.turns}
    sizes = sorted({max(1, args.worlds // 16), max(1, args.worlds // 4), args.worlds})
    for body, name in TASKS.items():
        used = room(name, args.worlds, args.steps, args.device)
        print(f"\n{body}, {args.worlds} worlds, {args.steps} random steps: {used}", flush=True)
        found = {}
        for worlds in sizes:
            found[worlds] = rates(name, worlds, args.turns, args.device, args.threads)
            base = list(found[worlds].values())[-1]
            shown = (f"{key} {rate:.0f} ({rate / base:.2f})" for key, rate in found[worlds].items())
            print(f"  {worlds:6} worlds, control steps/s: {'; '.join(shown)}", flush=True)
        result[body] = {"room": used, "rates": found}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
