"""``python -m esmeta.evaluate RUN``: score a finished run's theta on tasks of a split."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmeta import errors, names
from esmeta.options import for_json
from esmeta.run import config as configs
from esmeta.run.cli import Parser, guarded
from esmeta.run.parts import make_objective
from esmeta.run.terminal import prepare_streams

if TYPE_CHECKING:
    from torch import Tensor

    from esmeta.policy import Policy
    from esmeta.rollout import Intervention
    from esmeta.types import Fitness, Params, Reference, RunObjective, State, Task, TimeStep

LESIONS = ("none", "reset-memory", "reset-memory-each-step", "zero-reward")


def parser() -> argparse.ArgumentParser:
    """The command line; a test freezes its flags."""
    p = Parser(
        prog="python -m esmeta.evaluate",
        description="Score the theta of a finished run: mean and standard error over tasks of the "
        "test split, as published (training aids such as twins are left out).",
    )
    p.add_argument("run", type=Path, help="run directory of esmeta.train")
    p.add_argument("--trials", type=int, default=1000, help="number of tasks (%(default)s)")
    p.add_argument("--seed", type=int, help="seed of the tasks (default: the run's)")
    p.add_argument(
        "--split",
        default="test",
        choices=names.SPLITS,
        help="tasks of training, of validation (runs are selected on them) or of the test "
        "(%(default)s)",
    )
    p.add_argument(
        "--as-trained",
        action="store_true",
        help="keep the training aids of the run's task instead of scoring the published one",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="another task of the same family, e.g. task.size=10, or other options of an objective "
        "that trains agents, e.g. objective.saturation=0; may be repeated",
    )
    p.add_argument(
        "--lesion",
        default="none",
        choices=LESIONS,
        help="control: memory reset at the start of every episode inside the trial or before every "
        "step, or the reward input held at zero (%(default)s)",
    )
    p.add_argument(
        "--greedy", action="store_true", help="the most likely action instead of a sampled one"
    )
    p.add_argument(
        "--best",
        action="store_true",
        help="theta of the best score of validation during the run instead of the last",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return p


def load(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    best: bool = False,
    as_trained: bool = False,
) -> tuple[Policy, Params, Task]:
    """Policy, theta (leaves ``[1, ...]``) and task of a run directory.

    ``overrides`` (``task.key=value``) give another task of the same family with the same spec, or
    (``objective.key=value``) other options of the objective with the same theta.
    ``best``: theta of the best score of validation during the run instead of the last.
    The task is the published one, without training aids (:func:`esmeta.tasks.aid`) that are not
    among the overrides; ``as_trained`` keeps them.
    """
    objective, params, config = open_run(run_dir, overrides, best=best, as_trained=as_trained)
    if objective.policy is None:
        raise errors.UserError(
            f"{run_dir}: theta of objective {config.objective.name!r} is not a policy; score it "
            f"with python -m esmeta.evaluate {run_dir}, or use esmeta.evaluate.open_run"
        )
    return objective.policy, params, config.task.instance


def open_run(
    run_dir: str | Path,
    overrides: Sequence[str] = (),
    *,
    best: bool = False,
    as_trained: bool = False,
    device: str = "cpu",
) -> tuple[RunObjective, Params, configs.Config]:
    """Objective, theta (leaves ``[1, ...]``) and configuration of a run; see :func:`load`.

    Task and objective of the configuration are those that the run is scored by.
    """
    from esmeta.run.record import load_theta
    from esmeta.run.scoring import scored_config

    path = Path(run_dir)
    if not (path / "config.toml").is_file():
        raise errors.UserError(
            f"{path}: not a run directory (no config.toml); give one that esmeta.train wrote"
        )
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not key.startswith(("task.", "objective.")) or key == "objective.name":
            raise errors.UserError(
                f"--set {text!r}: only options of the task and of the objective can change here: "
                "write task.KEY=VALUE or objective.KEY=VALUE"
            )
    config = configs.resolve(configs.load(path / "config.toml"), list(overrides))
    told = [configs.parse_override(text)[1] for text in overrides]
    config = scored_config(config, told, as_trained=as_trained)
    params, _ = load_theta(path / "best.safetensors" if best else path)
    objective = make_objective(config, device)
    found = {name: tuple(leaf.shape[1:]) for name, leaf in params.items()}
    if found != objective.shapes:
        raise errors.UserError(
            f"{path}: theta has other shapes than the policy for this task, or this objective, "
            "needs; --set may not change the sizes of observations, actions or networks"
        )
    return objective, params, config


def lesion(name: str, policy: Policy, params: Params) -> Intervention | None:
    """What a lesion changes before each step; None for ``none``."""
    import torch

    if name == "zero-reward":
        return lambda state, ts: (state, ts._replace(reward=torch.zeros_like(ts.reward)))
    if name == "none":
        return None
    prepared, each = policy.bind(params).memory, name == "reset-memory-each-step"

    def reset(state: State, ts: TimeStep) -> tuple[State, TimeStep]:
        now = torch.ones_like(ts.new_episode) if each else ts.new_episode
        return policy.memory.reset(prepared, state, now), ts

    return reset


def check_lesion(name: str, policy: Policy, params: Params, task: Task) -> None:
    """Refuse a lesion that changes nothing of this policy in this task."""
    from esmeta.tasks import single

    spec, changes, instead = task.spec, "", "leave --lesion out"
    if name == "zero-reward" and policy.config.reward_input_scale == 0:
        changes = "the policy is not shown the reward (policy.reward_input_scale = 0)"
    elif name.startswith("reset-memory") and not policy.initial_state(params, 1):
        changes = "the policy has no memory"
    elif name != "none" and spec.horizon == 1:
        changes = "a trial is one step (task.horizon = 1)"
    elif name == "reset-memory" and spec.episodes_per_trial == 1:
        if single(task, spec.horizon) is task:  # else episodes begin anew until the trial is over
            changes = "a trial of this task is one episode"
            instead = "write --lesion reset-memory-each-step, or give trials several episodes"
    if changes:
        raise errors.UserError(f"--lesion {name} would change nothing: {changes}; {instead}")


def table(
    fitness: Fitness, groups: Tensor, reference: Reference, about: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return, steps and the task's own scores over trials ``[B]``, summed up.

    ``groups`` int64 ``[B]`` has one number for trials that share randomness.
    """
    from esmeta.summary import summary

    rows = {"return": fitness.returns, "steps": fitness.steps.double(), **fitness.metrics}
    result: dict[str, dict[str, Any]] = {}
    for name, values in rows.items():
        mean, se, sd, count, independent = summary(values.flatten(), groups)
        found = {"mean": mean, "se": se, "sd": sd, "trials": count, "independent": independent}
        result[name] = found
    result["return"] |= {"random": reference.random, "best": reference.best, **about}
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    prepare_streams()
    args = parser().parse_args(argv)
    return guarded(lambda: _show(args), args.run)


def _show(args: argparse.Namespace) -> int:
    errors.positive_int("--trials", args.trials, example=1000)
    scores, reference = _scores(args)
    if args.json:
        print(json.dumps(for_json(scores), allow_nan=False))
        return 0
    row = scores["return"]
    how = [f"lesion {args.lesion}"] if args.lesion != "none" else []
    how += ["the most likely actions"] if args.greedy else []
    how += ["best theta of validation"] if args.best else []
    of = ", ".join([f"{args.split} split{row['variant']}", *how])
    print(f"{of}; mean ± s.e., s.d. over trials")
    for name, row in scores.items():
        count, independent = row["trials"], row["independent"]
        trials = f"{count} trials" + (f" in {independent} groups" if independent < count else "")
        print(f"{name:>16}  {row['mean']:10.4f} ± {row['se']:<8.4f} {row['sd']:10.4f}  ({trials})")
    print(f"{'':>16}  {reference.words()}")
    return 0


def _scores(args: argparse.Namespace) -> tuple[dict[str, dict[str, Any]], Reference]:
    import torch

    from esmeta.run.scoring import variant

    objective, params, config = open_run(
        args.run, args.set, best=args.best, as_trained=args.as_trained
    )
    trained = configs.resolve(configs.load(args.run / "config.toml"), args.set)
    about = {"split": args.split, "variant": variant(trained, config), "lesion": args.lesion}
    about |= {"greedy": args.greedy, "theta": "best" if args.best else "last"}
    seed = config.run.seed if args.seed is None else args.seed
    errors.non_negative_int("--seed", seed)
    control = _control(args, objective, params, config)
    groups = objective.groups(torch.arange(args.trials, device="cpu"), args.split)
    fitness = objective.heldout(params, args.trials, seed, split=args.split, **control)
    reference = config.objective.instance.reference(config.task.instance)
    return table(fitness, groups, reference, about), reference


def _control(
    args: argparse.Namespace, objective: RunObjective, params: Params, config: configs.Config
) -> dict[str, Any]:
    """How the policy acts other than by itself: the most likely actions, a lesion."""
    from esmeta.agent import heads

    policy = objective.policy
    if policy is None:
        if args.greedy or args.lesion != "none":
            raise errors.UserError(
                f"--greedy and --lesion are for runs whose theta is a policy; this one has "
                f"objective {config.objective.name!r}: leave them out"
            )
        return {}
    check_lesion(args.lesion, policy, params, config.task.instance)
    control: dict[str, Any] = {}
    if args.greedy:
        control["act"] = lambda out, noise: heads.mode(out)
    if args.lesion != "none":
        control["intervene"] = lesion(args.lesion, policy, params)
    return control
