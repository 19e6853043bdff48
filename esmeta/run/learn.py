"""``python -m esmeta.learn LEARNER``: train a batch of agents by a hand-written loss.

The baselines of learned losses, in the same harness: every agent lives one trial of its own task,
from fresh networks, and the return over that life is reported. With ``--test-episodes`` the policy
is scored after its life too, as the fitness of a learned loss is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmeta import errors, names
from esmeta.options import for_json
from esmeta.run import config as configs
from esmeta.run.cli import Parser, guarded, prepare_process
from esmeta.run.terminal import prepare_streams

if TYPE_CHECKING:
    from torch import Tensor

    from esmeta.lives import AgentLives
    from esmeta.rl.diary import Diary
    from esmeta.rl.losses import Loss
    from esmeta.types import Task


def parser() -> argparse.ArgumentParser:
    """The command line; a test freezes its flags."""
    p = Parser(
        prog="python -m esmeta.learn",
        description="Train a batch of agents by a hand-written loss and report the return over "
        "their lives: mean ± standard error over agents.",
    )
    p.add_argument("learner", help="ppo, reinforce, td3, offpolicy_reinforce, or package.module:C")
    p.add_argument("--task", required=True, help="task distribution, or package.module:Class")
    p.add_argument(
        "--steps", type=int, default=10_000, help="of a life: task.horizon (%(default)s)"
    )
    p.add_argument("--agents", type=int, default=4, help="trained as one batch (%(default)s)")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="an option of learner, task or policy, e.g. learner.hidden=[64,64]; may be repeated",
    )
    p.add_argument(
        "--policy",
        default=configs.NO_POLICY,
        help="what the agents are, e.g. rl2, metods, or package.module:Class; none: the networks "
        "that were published with the learner (%(default)s)",
    )
    p.add_argument(
        "--split",
        default="test",
        choices=names.SPLITS,
        help="of the tasks (%(default)s); choose settings on validation",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:N")
    p.add_argument("--parts", type=int, default=10, help="parts of the life in the table")
    p.add_argument(
        "--test-episodes",
        type=int,
        default=0,
        help="episodes played after the life with the policy as it then is; 0: none (%(default)s)",
    )
    p.add_argument("--test-steps", type=int, default=1000, help="of each at most (%(default)s)")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers there")
    return p


def build(args: argparse.Namespace) -> tuple[AgentLives, Loss]:
    """The lives and the loss that the command line names."""
    import torch

    from esmeta.lives import AgentLives

    tables: dict[str, dict[str, Any]] = {"task": {"horizon": args.steps}, "learner": {}}
    tables["policy"] = {}
    for text in args.set:
        section, _, rest = text.partition(".")
        if section not in tables:
            raise errors.UserError(
                f"--set {text!r}: write task.KEY=VALUE, learner.KEY=VALUE or policy.KEY=VALUE"
            )
        _, key, value = configs.parse_override(f"task.{rest}")
        tables[section][key] = value
    for name, value in (
        ("--steps", args.steps),
        ("--agents", args.agents),
        ("--parts", args.parts),
        ("--test-steps", args.test_steps),
    ):
        errors.positive_int(name, value, example=4)
    errors.non_negative_int("--seed", args.seed)
    errors.non_negative_int("--test-episodes", args.test_episodes)
    maker = names.make("learner", args.learner, tables["learner"])
    task: Task = names.make("task", args.task, tables["task"])
    policy = None
    if args.policy != configs.NO_POLICY:
        policy = names.make("policy", args.policy, tables["policy"])
    elif tables["policy"]:
        raise errors.UserError(
            f"--set policy.{next(iter(tables['policy']))}: the published agents take no options; "
            "write --policy rl2, or an option of the learner"
        )
    learner, loss = maker.make(task.spec, task.spec.horizon, policy)
    lives = AgentLives(
        learner,
        task,
        args.seed,
        torch.device(args.device),
        test_episodes=args.test_episodes,
        test_steps=args.test_steps,
    )
    lives.check_length()  # lives are lived one step after the other: any simulator will do
    room = lives.most_agents(args.agents)
    if room < args.agents:
        raise errors.UserError(
            f"--agents {args.agents}: they live in one batch, for which task.most_worlds has room "
            f"for {room}: write --agents {room}, or task.most_worlds = "
            f"{args.agents * (1 + args.test_episodes)}"
        )
    return lives, loss


def learn(lives: AgentLives, loss: Loss, agents: int, split: str) -> tuple[Diary, Tensor | None]:
    """Let ``agents`` agents, numbers 0 and up, live and learn.

    Also returns what their test episodes earn after it, a mean of each agent, float64 ``[agents]``;
    None where there are none.
    """
    import torch

    from esmeta.rl.diary import Diary
    from esmeta.run.progress import progress

    # A batch of one rounds differently; its twin is left out.
    index = torch.arange(max(2, agents), device="cpu")
    diary, life = Diary(), lives.begin(index, split)
    with progress(lives.updates, "learning") as bar:
        for update in range(lives.updates):
            life, new = lives.advance(life, loss, split)
            diary.add(new, agents)
            bar.update(update + 1, (update + 1) / lives.updates)
    scores = lives.score(life, split)[0][:agents] if lives.test_episodes else None
    return diary, scores


def table(diary: Diary, parts: int) -> list[dict[str, float]]:
    """Mean return of episodes and its standard error over agents, by part of the life."""
    steps = diary.reward.shape[1]
    columns = enumerate(diary.curve(parts).unbind(1), start=1)
    return [{"steps": steps * k // parts} | over_agents(column) for k, column in columns]


def over_agents(scores: Tensor) -> dict[str, float]:
    """Mean of the agents' scores and its standard error."""
    from esmeta.summary import summary

    mean, error, _, count, _ = summary(scores)
    return {"return": mean, "se": error, "agents": count}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    prepare_streams()
    args = parser().parse_args(argv)
    prepare_process()
    import torch

    torch.set_num_threads(1)
    return guarded(lambda: _learn(args))


def _learn(args: argparse.Namespace) -> int:
    out = None if args.out is None else args.out.absolute()  # environments may change the folder
    lives, loss = build(args)
    began = time.monotonic()
    diary, scores = learn(lives, loss, args.agents, args.split)
    rows = table(diary, args.parts)
    test = None if scores is None else over_agents(scores)
    seconds = time.monotonic() - began
    if out is not None:
        told = ("learner", "task", "policy", "set", "split", "seed")
        facts = {name: getattr(args, name) for name in told}
        facts |= {"seconds": seconds, "curve": rows, "test": test}
        try:
            out.write_text(json.dumps(for_json(facts), allow_nan=False) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise errors.UserError(f"--out {args.out}: {reason}; give another file") from error
    print(
        f"{args.task} by {args.learner}: {args.agents} agents on tasks of the {args.split} split, "
        f"{seconds:.0f} s; mean ± s.e. over agents"
    )
    for row in rows:
        print(f"{row['steps']:>10,} steps  return {row['return']:10.3f} ± {row['se']:.3f}")
    if test is not None:
        episodes = f"{args.test_episodes} test episodes of at most {args.test_steps:,} steps"
        print(f"after the life  return {test['return']:10.3f} ± {test['se']:.3f}  ({episodes})")
    return 0
