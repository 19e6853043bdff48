"""``python -m esmeta.train``: the outer loop over what a configuration names."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esmeta import errors, older
from esmeta.run import config as configs
from esmeta.run.cli import close_simulators, configuration, parser, prepare_process, refuse
from esmeta.run.parts import Parts, build
from esmeta.run.terminal import prepare_streams

if TYPE_CHECKING:
    from esmeta.envs.remote import Node
    from esmeta.ranks.comm import MPIComm, SelfComm
    from esmeta.run.record import NullRun, RunDir
    from esmeta.run.watch import Stop
    from esmeta.types import Comm, Metrics, Params, RunObjective

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop (SIGTERM, SIGUSR1) and saved a checkpoint first."""


@dataclass
class Counters:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    env_steps: int = 0
    validation: float = math.nan
    """The last mean return on the validation split; what follows is selected on it."""
    best: float = -math.inf
    best_step: int = 0
    restarts: int = 0
    peak: float = -math.inf
    """The best since the last restart, at ``peak_step``."""
    peak_step: int = 0


class Trainer:
    """The outer loop over optimizer steps; the same on every rank, files on rank 0 only."""

    def __init__(
        self, parts: Parts, comm: SelfComm | MPIComm, run: RunDir | NullRun, stop: Stop
    ) -> None:
        from esmeta.run.watch import Idle, Pace, TimeLimit

        self.parts = parts
        self.comm = comm
        self.run = run
        self.count = Counters()
        self.stop = stop
        self.limit = TimeLimit(parts.config.run.rank_timeout)
        self.idle = Idle(comm)
        self.pace = Pace(parts.config.run.metrics_per_second)
        self.rng = parts.rng
        self.state = self._first_state()
        if self.count.restarts:
            self.rng = parts.rng.fold("restart", self.count.restarts)

    def _first_state(self) -> Any:
        from esmeta.ranks.wire import share

        resumed = self.run.resumed
        payload = share(self.comm, None if resumed is None else resumed.payload)
        if payload is None:
            return self.parts.state
        self.count = Counters(**older.counters(payload["counters"]))
        return self.parts.optimizer.load_state_dict(payload["optimizer"], self.parts.theta)

    def train(self) -> str:
        """Run until the budget is used up; returns why it stopped."""
        from esmeta.run.progress import progress

        run = self.parts.config.run
        label = f"{self.parts.config.task.name} {self.parts.config.optimizer.name}"
        if self.count.step == 0 and run.evaluate_every:
            self._log(self._scores())
        budget = self.parts.config.budget
        with progress(budget.steps, label, rank=self.comm.rank) as bar:
            bar.update(self.count.step, self._fraction())
            reason = self._reason()
            if self._begins_anew(reason):  # another limit ended the run where a restart was due
                self._restart()
                reason = ""
            while not reason:
                metrics = self._step()
                if self._due(run.metrics_every):
                    metrics |= self.idle.metrics()
                scores = self._scores() if self._due(run.evaluate_every) else {}
                reason = self._reason()
                again = self._begins_anew(reason)
                reason = "" if again else reason
                if run.evaluate_every and not scores and reason not in ("", "signal"):
                    scores = self._scores()
                last = reason and run.metrics_every
                if scores or last or (self._due(run.metrics_every) and self.pace.lets()):
                    self._log(metrics | scores)
                bar.update(self.count.step, self._fraction(), **self._shown(metrics))
                if again:
                    self._restart()
                if self._due(run.checkpoint_every):
                    self._save()
        self._save()
        return reason

    def _begins_anew(self, reason: str) -> bool:
        """Whether a restart follows instead of the end."""
        return reason == "plateau" and self.count.restarts < self.parts.config.budget.restarts

    def _restart(self) -> None:
        """Begin anew from other parameters; counters, best theta and clock go on."""
        parts, count = self.parts, self.count
        count.restarts += 1
        count.peak, count.peak_step = -math.inf, count.step
        self.rng = parts.rng.fold("restart", count.restarts)
        theta = parts.objective.init(self.rng.key)
        theta = {name: leaf.to(parts.config.run.device) for name, leaf in theta.items()}
        self.state = parts.optimizer.init(theta, self.rng)

    def _shown(self, metrics: Metrics) -> Metrics:
        """What the progress bar says beside the time left."""
        shown = {k: metrics[k] for k in ("return_mean", "fitness_mean") if k in metrics}
        rate = self.count.env_steps / max(self.run.seconds, 1e-9)
        shown |= {"restarts": self.count.restarts} if self.count.restarts else {}
        return shown | {"validation": self.count.validation, "env_steps/s": rate}

    def _fraction(self) -> float:
        """Share of the budget that is used, by the limit that will be reached first."""
        budget, count = self.parts.config.budget, self.count
        used = (count.step, count.env_steps, self.run.seconds)
        limits = (budget.steps, budget.env_steps, budget.seconds)
        return max(u / limit for u, limit in zip(used, limits, strict=True) if limit is not None)

    def _due(self, every: int) -> bool:
        return every > 0 and self.count.step % every == 0

    def _step(self) -> Metrics:
        parts = self.parts
        word = "update" if parts.optimizer.gradient else "generation"
        self.comm.label = f"{word} {self.count.step}"
        self.comm.timeout_s = self.limit.in_step()
        began = time.monotonic()
        self.state, metrics = parts.optimizer.step(self.state, parts.objective, self.comm, self.rng)
        self.count.step += 1
        self.count.env_steps += int(metrics.pop("env_steps"))
        step_s = time.monotonic() - began
        self.limit.note(step_s)
        return metrics | {"step_s": step_s}

    def _log(self, metrics: Metrics) -> None:
        """One line of metrics; rank 0 only."""
        if self.comm.rank != 0:
            return
        from esmeta.tree import theta_sha256

        numbers: dict[str, Any] = {
            "env_steps": self.count.env_steps,
            "seconds": self.run.seconds,
            "theta_sha256": theta_sha256(self.parts.optimizer.theta(self.state)),
        }
        self.run.log(self.count.step, numbers | metrics)

    def _scores(self) -> Metrics:
        """Validation scores of theta, each rank doing its share of the trials."""
        theta, count = self.parts.optimizer.theta(self.state), self.count
        self.comm.timeout_s = self.limit.between_steps()
        trials = self.parts.config.run.evaluate_trials
        scores = heldout(self.parts.scored, theta, trials, "validation", self.comm)
        count.validation = scores["validation_return"]
        if count.validation > count.peak:
            count.peak, count.peak_step = count.validation, count.step
        if count.validation > count.best:
            count.best, count.best_step = count.validation, count.step
            self.run.save_best(count.step, theta, count.best)
        return scores

    def test(self) -> Metrics:
        """Scores on the test split of theta as it is, each rank doing its share of the trials."""
        parts = self.parts
        # Where a trial is the whole training of an agent, more of them would take as long as the
        # run.
        least = 1 if parts.objective.policy is None else 256
        trials = max(least, parts.config.run.evaluate_trials)
        self.comm.timeout_s = self.limit.between_steps()
        theta = parts.optimizer.theta(self.state)
        scores = {"trials": trials, **heldout(parts.scored, theta, trials, "test", self.comm)}
        self.run.add_scores(scores)
        return scores

    def _save(self) -> None:
        from esmeta.types import Spread

        optimizer = self.parts.optimizer
        if isinstance(optimizer, Spread):
            self.comm.timeout_s = self.limit.between_steps()
            self.state = optimizer.gather(self.state, self.parts.objective, self.comm)
        if self.comm.rank != 0:
            return
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
            "target": budget.target is not None and self.count.validation >= budget.target,
            "plateau": budget.plateau is not None
            and self.count.step - self.count.peak_step >= budget.plateau,
            "signal": self.stop.wanted,
        }
        flags = torch.tensor(
            [int(flag) for flag in reasons.values()], dtype=torch.int64, device="cpu"
        )
        self.comm.timeout_s = self.limit.between_steps()
        total = self.comm.sum_exact(flags).tolist()
        return next((name for name, flag in zip(reasons, total, strict=True) if flag), "")


def heldout(
    objective: RunObjective, theta: Params, trials: int, split: str, comm: Comm | None = None
) -> Metrics:
    """Mean scores of theta on the tasks of a split; s.e. and s.d. of the return.

    With ``comm`` the ranks share the trials; scores are the same bits for any number of ranks.
    """
    import torch

    from esmeta.summary import summary

    # Where there are fewer trials than ranks, every rank runs them all.
    shared = comm is not None and trials >= comm.size
    ranks, rank = (comm.size, comm.rank) if comm is not None and shared else (1, 0)
    bounds = [trials * r // ranks for r in range(ranks + 1)]
    fitness = objective.heldout(theta, bounds[rank + 1], first=bounds[rank], split=split)
    columns = {"return": fitness.returns, "steps": fitness.steps, **fitness.metrics}
    rows = torch.stack([values.double().flatten() for values in columns.values()], dim=1)
    if comm is not None and shared:
        rows = comm.gather_rows(rows, [b - a for a, b in itertools.pairwise(bounds)])
    groups = objective.groups(torch.arange(trials, device="cpu"), split)
    found = [summary(values, groups) for values in rows.unbind(1)]
    scores = {f"{split}_{name}": each.mean for name, each in zip(columns, found, strict=True)}
    return scores | {f"{split}_se": found[0].se, f"{split}_sd": found[0].sd}


def report(parts: Parts, trainer: Trainer, scores: Metrics, reason: str, out: Path) -> None:
    """Print what was learned, by ``scores`` on the test split, and draw the learning curve."""
    from esmeta.analysis.plots import learning_curve
    from esmeta.run.scoring import scored_config, variant

    config, scored = parts.config, scored_config(parts.config)
    reference = scored.objective.instance.reference(scored.task.instance)
    picture = learning_curve([out], out / "curve.png", reference)
    count, of = trainer.count, f"{scores['trials']} tasks of the test split"
    print(
        f"\n{parts.config.task.name} by {parts.config.optimizer.name}: stopped by {reason} after "
        f"{count.step} steps, {count.env_steps:,} environment steps, {trainer.run.seconds:.0f} s\n"
        f"test return {scores['test_return']:.3f} ± {scores['test_se']:.3f} (s.e.; s.d. "
        f"{scores['test_sd']:.3f}; {of}{variant(config, scored)}; "
        f"{reference.words()})"
    )
    known = {"trials", "test_return", "test_se", "test_sd"}
    rest = {k.removeprefix("test_"): v for k, v in scores.items() if k not in known}
    print("  ".join(f"{name} {value:.3f}" for name, value in rest.items()))
    print(f"run: {out}\ncurve: {picture}", flush=True)


def run(args: argparse.Namespace, comm: SelfComm | MPIComm, stop: Stop) -> int:
    """Train as the command line says; returns the exit code."""
    config, out, resume = configuration(args)
    out = out.absolute()  # an environment may change the working directory
    if not comm.same(configs.digest(config)):
        raise errors.UserError(
            "the ranks were given different configurations; start all with the same command "
            "line, presets and esmeta version"
        )
    if not config.run.remote_envs or comm.size == 1:
        return learn(config, out, resume, comm, stop)
    from esmeta.envs.remote import Node
    from esmeta.run.watch import START_S

    # Between two requests the learner updates, compiles, writes files and draws, perhaps slowly.
    node = Node(comm, max(config.run.rank_timeout, START_S), lambda: stop.noted)
    stop.others = node.stop_wanted
    return node.lead_or_serve(
        config.task.instance,
        lambda learners: learn(config, out, resume, learners, stop, node),
        config.run.threads,
    )


def learn(
    config: configs.Config, out: Path, resume: bool, comm: Any, stop: Stop, node: Node | None = None
) -> int:
    """Train on the ranks of ``comm``; returns the exit code."""
    try:
        parts = build(config, comm.size, node)
        from esmeta.run.record import NullRun, RunDir

        folder = RunDir.create(out, config, resume=resume) if comm.rank == 0 else NullRun()
        try:
            return _learn(parts, out, folder, comm, stop, node)
        finally:
            folder.close()  # others may go on with it, whatever ended it here
    except (MemoryError, RuntimeError) as error:
        if not errors.out_of_memory(error):
            raise
        from esmeta.run.room import too_large

        failure = too_large(error, config, comm.label)
        failure.__cause__ = error
        _keep_traceback(failure, out, comm.rank)
        raise failure from error


def _learn(
    parts: Parts, out: Path, folder: RunDir | NullRun, comm: Any, stop: Stop, node: Node | None
) -> int:
    memory = parts.objective.explain(parts.optimizer.gradient)
    if comm.rank == 0:
        where = "" if node is None else f"\nenvironments: {node.ranks} ranks of this machine"
        word = "runs" if parts.objective.policy is None else "memory"
        print(f"{word}: {memory}{where}", flush=True)
    trainer = Trainer(parts, comm, folder, stop)
    try:
        return _finish(trainer, trainer.train(), folder, out, memory)
    except errors.UserError as error:
        _keep_traceback(error, out, comm.rank)
        raise


def _keep_traceback(error: errors.UserError, out: Path, rank: int) -> None:
    errors.keep_traceback(
        error, out, f"rank-{rank}-{errors.TRACEBACK}" if rank else errors.TRACEBACK
    )


def _finish(trainer: Trainer, reason: str, folder: RunDir | NullRun, out: Path, memory: str) -> int:
    """Say what was learned and why training stopped; returns the exit code."""
    parts, comm = trainer.parts, trainer.comm
    idle = trainer.idle.by_rank()
    if comm.rank == 0:
        theta = parts.optimizer.theta(trainer.state)
        count = trainer.count
        folder.finish(
            count.step,
            theta,
            env_steps=count.env_steps,
            ranks=comm.size,
            restarts=count.restarts,
            stopped_by=reason,
            idle=idle,
            memory=memory,
        )
    # To score what trains agents, agents must be trained first: not when there is no time.
    scored = reason != "signal" or parts.objective.policy is not None
    scores = trainer.test() if scored else {}
    if comm.rank == 0 and scored:
        report(parts, trainer, scores, reason, out)
    elif comm.rank == 0:
        print(f"stopped by {reason} after {trainer.count.step} steps\nrun: {out}", flush=True)
    return EXIT_STOPPED if reason == "signal" else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 done, 2 bad input, 75 told to stop)."""
    prepare_streams()
    args = parser().parse_args(argv)
    if args.list:
        print("\n".join(configs.preset_names()))
        return 0
    prepare_process()
    from esmeta.ranks.comm import EXIT_EXCEPTION, install_excepthook, make_comm
    from esmeta.run.watch import START_S, Stop

    stop = Stop()
    try:
        comm = make_comm(START_S)
    except errors.UserError as error:
        return refuse(str(error))
    install_excepthook(comm)
    try:
        code = run(args, comm, stop)
    except SystemExit as left:
        # Nothing here leaves so; others would wait for a rank whose own code does.
        close_simulators()
        comm.abort(EXIT_EXCEPTION, f"sys.exit({left.code!r}) at {comm.label} ended the run")
    finally:
        close_simulators()
        if argv is not None:  # called by somebody whose process goes on
            stop.end(leaving=False)
    if argv is None:
        stop.end(leaving=True)
    return code
