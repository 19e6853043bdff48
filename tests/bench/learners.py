"""Agents that learn as one batch against a loop over them, and lives on two ranks against one.

    python tests/bench/learners.py --json learners.json
    python tests/bench/learners.py --ranks 1 2      # only on an idle machine with as many cores

``update``: one update of ``--agents`` agents (normaliser, buffer, loss, gradient, Adam) in one
call, against the same update of each agent by itself, which is how a learner for one agent would be
used; EPG's learned loss and PPO at EPG's sizes (buffer 256, networks 64-64, 32 new steps), and
rounds of TD3 (batch 100, networks 64-64). Both are run on the same experience and their parameters
compared before the clock starts. Repeats alternate; figures are medians of CPU seconds, one thread.

``lives``: environment steps per second of generations of ``displacement-epg`` under mpirun, by wall
time, after the first generation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"

from esmeta.run.cli import prepare_process  # noqa: E402

# As every training run does; all contenders profit.
prepare_process()

import torch  # noqa: E402

from esmeta.agent.inner import inner_policy  # noqa: E402
from esmeta.objectives._loss_network import LossNetwork  # noqa: E402
from esmeta.rl.losses import Loss, PolicyGradient  # noqa: E402
from esmeta.rl.off_policy import (  # noqa: E402
    DeterministicGradient,
    ReplayLearner,
    ReplayOptions,
)
from esmeta.rl.on_policy import SegmentLearner, SegmentOptions  # noqa: E402
from esmeta.rng import Rng  # noqa: E402
from esmeta.rollout import Trajectory  # noqa: E402
from esmeta.types import Continuous, Spec, TimeStep  # noqa: E402

SPEC = Spec(obs_size=11, action=Continuous(3), horizon=8192)
NEW, BUFFER, ROUNDS = 32, 256, 4


def experience(agents: int, steps: int) -> Trajectory:
    """Random steps without ends, ``[T, P, 1, ...]``, those of an agent side by side."""
    g = torch.Generator().manual_seed(0)

    def draw(length: int, *more: int) -> torch.Tensor:
        return torch.randn(agents, length, 1, *more, generator=g).transpose(0, 1)

    obs, action, reward = draw(steps + 1, 11), draw(steps + 1, 3).clamp(-1, 1), draw(steps + 1)
    no = torch.zeros_like(reward, dtype=torch.bool)
    ts = TimeStep(obs, action, reward, no, no, no, no)
    return Trajectory({}, ts, action[1:], ~no[1:], None, {})


def part(new: Trajectory, agent: int) -> Trajectory:
    """One agent's share of the experience."""
    *ts, action, active = (leaf[:, agent : agent + 1] for leaf in (*new.ts, new.action, new.active))
    return Trajectory({}, TimeStep(*ts), action, active, None, {})


def segments(kind: str, agents: int) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """The update of all agents in one batch, the same in a loop, and updates per call."""
    net = LossNetwork(SPEC, BUFFER)
    losses: dict[str, Loss] = {"learned": net.loss(net.init(Rng(0))), "ppo": PolicyGradient()}
    loss = losses[kind]
    agent = inner_policy(SPEC, "epg", (64, 64), frozenset({"value", "unit"}), std=1.0)
    learner = SegmentLearner(agent, SegmentOptions(period=NEW, epochs=1, minibatch=32), BUFFER)
    index, rng, new = torch.arange(agents), Rng(1), experience(agents, NEW)
    whole = learner.init(rng, index)
    alone = [learner.init(rng, index[p : p + 1]) for p in range(agents)]
    parts = [part(new, p) for p in range(agents)]
    return (
        lambda: [learner.update(whole, new, loss, rng)],
        lambda: [
            learner.update(state, own, loss, rng) for state, own in zip(alone, parts, strict=True)
        ],
        agents,
    )


def off_policy(agents: int) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """The same for some rounds of TD3."""
    agent = inner_policy(SPEC, "metagenrl", (64, 64), frozenset({"critics"}), std=0.1)
    options = ReplayOptions(period=ROUNDS, capacity=1000, update_after=500)
    learner = ReplayLearner(agent, options)
    index, rng, old = torch.arange(agents), Rng(1), experience(agents, 1000)
    loss = DeterministicGradient()

    def full(rows: torch.Tensor, steps: Trajectory) -> Any:
        state = learner.init(rng, rows)
        return state._replace(replay=state.replay.add(steps))

    whole = full(index, old)
    alone = [full(index[p : p + 1], part(old, p)) for p in range(agents)]
    new = experience(agents, ROUNDS)
    parts = [part(new, p) for p in range(agents)]
    return (
        lambda: [learner.update(whole, new, loss, rng)],
        lambda: [
            learner.update(state, own, loss, rng) for state, own in zip(alone, parts, strict=True)
        ],
        agents * ROUNDS,
    )


def timed(run: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def updates(agents: int, repeats: int) -> list[dict[str, Any]]:
    """Agent updates per CPU second, in one batch and in a loop."""
    rows = []
    for kind in ("learned", "ppo", "td3"):
        batch, loop, count = off_policy(agents) if kind == "td3" else segments(kind, agents)
        together, one_by_one = batch()[0], loop()
        for name, leaf in together.params.items():
            single = torch.cat([state.params[name] for state in one_by_one])
            torch.testing.assert_close(leaf, single, rtol=1e-3, atol=1e-4)
        seconds = [(timed(batch), timed(loop)) for _ in range(repeats)]
        rates = [count / statistics.median(column) for column in zip(*seconds, strict=True)]
        rows.append(
            {"loss": kind, "batch": rates[0], "loop": rates[1], "ratio": rates[0] / rates[1]}
        )
        print(
            f"{kind:8s} {rates[0]:10.0f} agent updates/s in one batch of {agents}, "
            f"{rates[1]:8.0f} in a loop: {rates[0] / rates[1]:.1f} x",
            flush=True,
        )
    return rows


def lives(ranks: list[int], generations: int) -> list[dict[str, Any]]:
    """Environment steps per second of EPG on each number of ranks."""
    mpirun = Path(sys.executable).with_name("mpirun")
    rows = []
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            command = [str(mpirun), "-n", str(count), sys.executable, "-m", "esmeta.train"]
            command += ["displacement-epg", "--out", str(out)]
            for change in (
                f"budget.generations={generations}", "run.evaluate_every=0",
                "run.evaluate_trials=2", "run.tensorboard=false",
            ):  # fmt: skip
                command += ["--set", change]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
            lines = (out / "metrics.jsonl").read_text().splitlines()
        log = [json.loads(line) for line in lines]
        steps = [b["env_steps"] - a["env_steps"] for a, b in zip(log, log[1:], strict=False)]
        rate = statistics.median(s / row["step_s"] for s, row in zip(steps, log[1:], strict=True))
        rows.append({"ranks": count, "env_steps_per_s": rate, "ratio": rate / rows[0][
            "env_steps_per_s"] if rows else 1.0})  # fmt: skip
        print(
            f"{count} ranks: {rate:,.0f} environment steps/s, {rows[-1]['ratio']:.2f} x", flush=True
        )
    return rows


def main() -> None:
    """Print the table; with ``--json`` write it too."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--agents", type=int, default=64)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--ranks", type=int, nargs="*", default=[])
    p.add_argument("--generations", type=int, default=6)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"torch": torch.__version__, "agents": args.agents}
    result["lives"] = lives(args.ranks, args.generations)
    if not args.ranks:
        result["updates"] = updates(args.agents, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
