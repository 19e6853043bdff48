"""``python -m esmeta.train``: command line, composition root and outer loop."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmeta import config as configs
from esmeta import errors

if TYPE_CHECKING:
    from esmeta.comm import MPIComm, SelfComm
    from esmeta.objectives.return_ import ReturnObjective
    from esmeta.policy import Policy
    from esmeta.record import NullRun, RunDir
    from esmeta.rng import Rng
    from esmeta.types import Metrics, Optimizer, Params, Task

# Ranks may wait this long for the slowest one (rank 0 also evaluates and writes files).
_COMM_TIMEOUT_S = 600.0
EXIT_STOPPED = 75
"""Exit code of a run that was told to stop (SIGTERM, SIGUSR1) and saved a checkpoint first."""


def parser() -> argparse.ArgumentParser:
    """The command line; a test freezes its flags."""
    p = argparse.ArgumentParser(
        prog="python -m esmeta.train",
        description="Meta-train a policy: evolution or policy gradients, one process or mpirun.",
        epilog="Presets are listed by --list. A run's files go to runs/out/ unless --out is given.",
    )
    p.add_argument("preset", nargs="?", help="preset name or TOML file (harlow-ppo)")
    p.add_argument("--task", help="task distribution, or package.module:Class of your own")
    p.add_argument(
        "--optimizer",
        help="openes nres pes pgpe snes sepcma, EvoTorch's evotorch_pgpe evotorch_snes cem xnes "
        "cmaes, a2c ppo, or package.module:Class",
    )
    p.add_argument("--objective", help="what theta is worth: return, or package.module:Class")
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key, e.g. optimizer.popsize=128; may be repeated",
    )
    p.add_argument("--seed", type=int, help="seed of everything random (default: the preset's, 0)")
    p.add_argument("--out", type=Path, help="run directory (runs/out/<preset>-<seed>-<time>)")
    p.add_argument("--device", help="cpu (default), cuda, cuda:N")
    p.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="RUN",
        help="go on with this run directory (or the one of --out), on any number of ranks",
    )
    p.add_argument("--list", action="store_true", help="list presets and exit")
    return p


@dataclass
class Parts:
    """Everything that a config names, built."""

    config: configs.Config
    task: Task
    policy: Policy
    objective: ReturnObjective
    optimizer: Optimizer
    theta: Params
    rng: Rng
    state: Any
    """The optimizer's first state; making it finds sizes that do not fit before files are made."""


def build(config: configs.Config) -> Parts:
    """Build task, policy, objective and optimizer of a resolved config."""
    import torch

    from esmeta.policy import build_policy
    from esmeta.rng import Rng

    torch.set_num_threads(config.run.threads)
    device = _device(config.run.device)
    task: Task = config.task.instance
    optimizer: Optimizer = config.optimizer.instance
    policy = build_policy(task.spec, config.policy.instance, value=optimizer.gradient)
    objective = config.objective.instance.make(
        policy, task, trials=config.trials, seed=config.run.seed, device=device
    )
    theta = {k: v.to(device) for k, v in policy.init(seed=config.run.seed).items()}
    rng = Rng(config.run.seed).fold("optimizer")
    state = optimizer.init(theta, rng)
    return Parts(config, task, policy, objective, optimizer, theta, rng, state)


def _device(name: str) -> str:
    import torch

    from esmeta.comm import local_rank

    if name == "cpu":
        return name
    found = torch.cuda.device_count()
    number = name.partition(":")[2]
    if found == 0 or (number and int(number) >= found):
        raise errors.UserError(
            f"run.device = {name!r}: this machine has {found} CUDA devices; write --device cpu"
        )
    # Ranks of one machine share its GPUs in turn.
    return name if number else f"cuda:{local_rank() % found}"


@dataclass
class Counters:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    env_steps: int = 0
    heldout: float = math.nan


class Stop:
    """Turns SIGTERM and SIGUSR1 into a wish to stop after the current step."""

    def __init__(self) -> None:
        self.wanted = False
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._note)

    def _note(self, *_: object) -> None:
        self.wanted = True


class Trainer:
    """The outer loop over optimizer steps; the same on every rank, files on rank 0 only."""

    def __init__(self, parts: Parts, comm: SelfComm | MPIComm, run: RunDir | NullRun) -> None:
        self.parts = parts
        self.comm = comm
        self.run = run
        self.count = Counters()
        self.stop = Stop()
        self.rng = parts.rng
        self.state = self._first_state()

    def _first_state(self) -> Any:
        from esmeta.comm import share

        resumed = self.run.resumed
        payload = share(self.comm, None if resumed is None else resumed.payload)
        if payload is None:
            return self.parts.state
        self.count = Counters(**payload["counters"])
        return self.parts.optimizer.load_state_dict(payload["optimizer"], self.parts.theta)

    def train(self) -> str:
        """Run until the budget is used up; returns why it stopped."""
        from esmeta.progress import progress

        run = self.parts.config.run
        label = f"{self.parts.config.task.name} {self.parts.config.optimizer.name}"
        if self.count.step == 0 and run.evaluate_every:
            self._log({})
        budget = self.parts.config.budget
        with progress(budget.steps, label, rank=self.comm.rank) as bar:
            bar.update(self.count.step, self._fraction())
            while not (reason := self._reason()):
                metrics = self._step()
                if self.count.step % run.metrics_every == 0 or self._score_now():
                    self._log(metrics)
                bar.update(self.count.step, self._fraction(), **self._shown(metrics))
                if self._due(run.checkpoint_every):
                    self._save()
        self._save()
        return reason

    def _shown(self, metrics: Metrics) -> Metrics:
        """What the progress bar says beside the time left."""
        shown = {k: metrics[k] for k in ("return_mean", "fitness_mean") if k in metrics}
        rate = self.count.env_steps / max(self.run.seconds, 1e-9)
        return shown | {"heldout": self.count.heldout, "env_steps/s": rate}

    def _fraction(self) -> float:
        """Share of the budget that is used, by the limit that will be reached first."""
        budget, count = self.parts.config.budget, self.count
        used = (count.step, count.env_steps, self.run.seconds)
        limits = (budget.steps, budget.env_steps, budget.seconds)
        return max(u / limit for u, limit in zip(used, limits, strict=True) if limit is not None)

    def _score_now(self) -> bool:
        """Whether held-out scores are due: every so often, and when the budget is used up."""
        every = self.parts.config.run.evaluate_every
        return self._due(every) or (every > 0 and self._fraction() >= 1.0)

    def _due(self, every: int) -> bool:
        return every > 0 and self.count.step % every == 0

    def _step(self) -> Metrics:
        self.comm.label = f"step {self.count.step}"
        began = time.monotonic()
        parts = self.parts
        self.state, metrics = parts.optimizer.step(self.state, parts.objective, self.comm, self.rng)
        self.count.step += 1
        self.count.env_steps += int(metrics.pop("env_steps"))
        return metrics | {"step_s": time.monotonic() - began}

    def _log(self, metrics: Metrics) -> None:
        """One line of metrics, with held-out scores where they are due; rank 0 only."""
        if self.comm.rank != 0:
            return
        from esmeta.tree import theta_sha256

        theta = self.parts.optimizer.theta(self.state)
        scores: Metrics = {}
        if self._score_now():
            scores = heldout(self.parts, theta, self.parts.config.run.evaluate_trials)
            self.count.heldout = scores["heldout_return"]
        numbers: dict[str, Any] = {
            "env_steps": self.count.env_steps,
            "seconds": self.run.seconds,
            "theta_sha256": theta_sha256(theta),
        }
        self.run.log(self.count.step, numbers | metrics | scores)

    def _save(self) -> None:
        if self.comm.rank != 0:
            return
        optimizer = self.parts.optimizer
        payload = {
            "optimizer": optimizer.state_dict(self.state),
            "counters": dict(vars(self.count)),
        }
        self.run.save_checkpoint(self.count.step, optimizer.theta(self.state), payload)

    def _reason(self) -> str:
        """Why to stop now, decided by rank 0's clock and any rank's signal; empty to go on."""
        import torch

        budget = self.parts.config.budget
        reasons = {
            "steps": budget.steps is not None and self.count.step >= budget.steps,
            "env_steps": budget.env_steps is not None and self.count.env_steps >= budget.env_steps,
            "seconds": budget.seconds is not None and self.run.seconds >= budget.seconds,
            "target": budget.target is not None and self.count.heldout >= budget.target,
            "signal": self.stop.wanted,
        }
        flags = torch.tensor([int(flag) for flag in reasons.values()], dtype=torch.int64)
        total = self.comm.sum_exact(flags).tolist()
        return next((name for name, flag in zip(reasons, total, strict=True) if flag), "")


def heldout(parts: Parts, theta: Params, trials: int) -> Metrics:
    """Mean scores of theta on held-out tasks, with the standard error of the return."""
    from esmeta.evaluate import summary

    fitness = parts.objective.heldout(theta, trials)
    mean, error, _ = summary(fitness.returns.flatten())
    scores = {"heldout_return": mean, "heldout_se": error}
    scores["heldout_steps"] = float(fitness.steps.double().mean())
    return scores | {
        f"heldout_{name}": summary(values.flatten())[0] for name, values in fitness.metrics.items()
    }


def report(parts: Parts, trainer: Trainer, reason: str, out: Path) -> None:
    """Print what was learned, and draw the learning curve."""
    from esmeta.analysis.plots import learning_curve

    theta = parts.optimizer.theta(trainer.state)
    trials = max(256, parts.config.run.evaluate_trials)
    scores = heldout(parts, theta, trials)
    reference = parts.task.reference
    picture = learning_curve([out], out / "curve.png", reference)
    count = trainer.count
    print(
        f"\n{parts.config.task.name} by {parts.config.optimizer.name}: stopped by {reason} after "
        f"{count.step} steps, {count.env_steps:,} environment steps, {trainer.run.seconds:.0f} s\n"
        f"held-out return {scores['heldout_return']:.3f} ± {scores['heldout_se']:.3f} "
        f"({trials} tasks; random {reference.random:.3g}, best possible or known "
        f"{reference.best:.3g})"
    )
    known = {"heldout_return", "heldout_se"}
    rest = {k.removeprefix("heldout_"): v for k, v in scores.items() if k not in known}
    print("  ".join(f"{name} {value:.3f}" for name, value in rest.items()))
    print(f"run: {out}\ncurve: {picture}", flush=True)


def _configuration(args: argparse.Namespace) -> tuple[configs.Config, Path, bool]:
    """The resolved config, the run directory, and whether it is to be gone on with."""
    resume = args.resume is not None
    folder: Path | None = args.resume if resume and args.resume != Path() else args.out
    if resume and folder is None:
        raise errors.UserError("--resume needs a run directory; write --resume RUN")
    source = args.preset or (str(folder / "config.toml") if resume and folder else "harlow-ppo")
    overrides = [
        f"{section}={value}"
        for section, value in (
            ("task.name", args.task),
            ("optimizer.name", args.optimizer),
            ("objective.name", args.objective),
            ("run.seed", args.seed),
            ("run.device", args.device),
        )
        if value is not None
    ]
    config = configs.resolve(configs.load(source), [*overrides, *args.set])
    if folder is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / "out" / f"{Path(source).stem}-{config.run.seed}-{stamp}"
    return config, folder, resume


def _prepare_process() -> None:
    """What must be set before numpy and torch start their thread pools."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def run(args: argparse.Namespace, comm: SelfComm | MPIComm) -> int:
    """Train as the command line says; returns the exit code."""
    config, out, resume = _configuration(args)
    if not comm.same(configs.digest(config)):
        raise errors.UserError(
            "the ranks were given different configurations; start all with the same command "
            "line, presets and esmeta version"
        )
    parts = build(config)
    from esmeta.record import NullRun, RunDir

    folder = RunDir.create(out, config, resume=resume) if comm.rank == 0 else NullRun()
    trainer = Trainer(parts, comm, folder)
    reason = trainer.train()
    if comm.rank == 0:
        theta = parts.optimizer.theta(trainer.state)
        count = trainer.count
        folder.finish(
            count.step, theta, env_steps=count.env_steps, ranks=comm.size, stopped_by=reason
        )
        report(parts, trainer, reason, out)
    return EXIT_STOPPED if reason == "signal" else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 2 bad input, 75 told to stop)."""
    args = parser().parse_args(argv)
    if args.list:
        print("\n".join(configs.preset_names()))
        return 0
    _prepare_process()
    from esmeta.comm import install_excepthook, make_comm

    comm = make_comm(_COMM_TIMEOUT_S)
    install_excepthook(comm)
    return run(args, comm)


if __name__ == "__main__":
    sys.exit(main())
