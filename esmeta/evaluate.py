"""``python -m esmeta.evaluate RUN``: score a finished run's theta on held-out tasks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmeta import config as configs
from esmeta import errors
from esmeta.cli import Parser

if TYPE_CHECKING:
    from torch import Tensor

    from esmeta.policy import Policy
    from esmeta.rollout import Intervention
    from esmeta.types import Fitness, Params, Reference, Task

LESIONS = ("none", "reset-memory", "zero-reward")


def parser() -> argparse.ArgumentParser:
    """The command line; a test freezes its flags."""
    p = Parser(
        prog="python -m esmeta.evaluate",
        description="Score the theta of a finished run on held-out tasks: mean and standard error.",
    )
    p.add_argument("run", type=Path, help="run directory of esmeta.train")
    p.add_argument("--trials", type=int, default=1000, help="held-out tasks (%(default)s)")
    p.add_argument("--seed", type=int, help="seed of the held-out tasks (default: the run's)")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="task.KEY=VALUE",
        help="another task of the same family, e.g. task.size=10; may be repeated",
    )
    p.add_argument(
        "--lesion",
        default="none",
        choices=LESIONS,
        help="control: memory reset at the start of every episode inside the trial, or the reward "
        "input held at zero (%(default)s)",
    )
    p.add_argument(
        "--greedy", action="store_true", help="the most likely action instead of a sampled one"
    )
    p.add_argument(
        "--best",
        action="store_true",
        help="theta of the best held-out score during the run instead of the last",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return p


def load(
    run_dir: str | Path, overrides: Sequence[str] = (), *, best: bool = False
) -> tuple[Policy, Params, Task]:
    """Policy, theta (leaves ``[1, ...]``) and task of a run directory.

    ``overrides`` (``task.key=value``) give another task of the same family with the same spec.
    ``best``: theta of the best held-out score during the run instead of the last.
    """
    objective, params, config = open_run(run_dir, overrides, best=best)
    if config.objective.name != "return":
        raise errors.UserError(
            f"{run_dir}: theta of objective {config.objective.name!r} is not a policy; score it "
            f"with python -m esmeta.evaluate {run_dir}, or use esmeta.evaluate.open_run"
        )
    return objective.policy, params, config.task.instance


def open_run(
    run_dir: str | Path, overrides: Sequence[str] = (), *, best: bool = False, device: str = "cpu"
) -> tuple[Any, Params, configs.Config]:
    """Objective, theta (leaves ``[1, ...]``) and configuration of a run; see :func:`load`."""
    from esmeta.policy import build_policy
    from esmeta.record import load_theta

    path = Path(run_dir)
    if not (path / "config.toml").is_file():
        raise errors.UserError(
            f"{path}: not a run directory (no config.toml); give one that esmeta.train wrote"
        )
    for text in overrides:
        if not text.startswith("task."):
            raise errors.UserError(f"--set {text!r}: only task.KEY=VALUE can change here")
    config = configs.resolve(configs.load(path / "config.toml"), list(overrides))
    params, _ = load_theta(path / "best.safetensors" if best else path)
    task: Task = config.task.instance
    policy = None
    if config.policy.instance is not None:
        value = config.optimizer.instance.gradient
        policy = build_policy(task.spec, config.policy.instance, value=value)
    objective = config.objective.instance.make(
        policy, task, trials=config.trials, seed=config.run.seed, device=device
    )
    found = {name: tuple(leaf.shape[1:]) for name, leaf in params.items()}
    if found != objective.shapes:
        raise errors.UserError(
            f"{path}: theta has other shapes than the policy for this task needs; "
            "--set may not change the sizes of observations or actions"
        )
    return objective, params, config


def lesion(name: str, policy: Policy, params: Params) -> Intervention | None:
    """What a lesion changes before each step; None for ``none``."""
    import torch

    if name == "zero-reward":
        return lambda state, ts: (state, ts._replace(reward=torch.zeros_like(ts.reward)))
    if name == "reset-memory":
        prepared = policy.bind(params).memory
        return lambda state, ts: (policy.memory.reset(prepared, state, ts.new_episode), ts)
    return None


def summary(values: Tensor) -> tuple[float, float, int]:
    """Mean, standard error of the mean and number of the entries that are not NaN."""
    kept = values[~values.isnan()]
    if kept.numel() < 2:
        return (float(kept.mean()) if kept.numel() else math.nan), math.nan, kept.numel()
    return float(kept.mean()), float(kept.std() / math.sqrt(kept.numel())), kept.numel()


def table(fitness: Fitness, reference: Reference) -> dict[str, dict[str, float]]:
    """Mean and standard error over trials of the return, the steps and the task's own scores."""
    rows = {"return": fitness.returns, "steps": fitness.steps.double(), **fitness.metrics}
    result = {}
    for name, values in rows.items():
        mean, error, count = summary(values.flatten())
        result[name] = {"mean": mean, "se": error, "trials": count}
    result["return"] |= {"random": reference.random, "best": reference.best}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        errors.positive_int("--trials", args.trials, example=1000)
        scores = _scores(args)
    except errors.UserError as error:
        print(f"esmeta: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(scores))
        return 0
    for name, row in scores.items():
        print(f"{name:>16}  {row['mean']:10.4f} ± {row['se']:.4f}  ({row['trials']} trials)")
    row = scores["return"]
    print(f"{'':>16}  random {row['random']:.4g}, best possible or known {row['best']:.4g}")
    return 0


def _scores(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    import torch

    from esmeta.evaluator import PopulationEvaluator
    from esmeta.policy import _heads as heads

    objective, params, config = open_run(args.run, args.set, best=args.best)
    task: Task = config.task.instance
    reference = config.objective.instance.reference(task)
    seed = config.run.seed if args.seed is None else args.seed
    errors.non_negative_int("--seed", seed)
    if config.objective.name != "return":
        if args.greedy or args.lesion != "none":
            raise errors.UserError(
                f"--greedy and --lesion are for runs whose theta is a policy; this one has "
                f"objective {config.objective.name!r}: leave them out"
            )
        return table(objective.heldout(params, args.trials, seed), reference)
    policy = objective.policy
    evaluator = PopulationEvaluator(policy, task, trials=args.trials)
    fitness = evaluator(
        params,
        seed=seed,
        split="test",
        index=torch.arange(args.trials),
        act=(lambda out, noise: heads.mode(out)) if args.greedy else heads.sample,
        intervene=lesion(args.lesion, policy, params),
    )
    return table(fitness, reference)


if __name__ == "__main__":
    sys.exit(main())
