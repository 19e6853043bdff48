"""The outer loop on several ranks (threads of this process) and after a resume, step by step."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from searches import RankComm, on_ranks, solo
from test_metagenrl_runs import SMALL
from tiny_runs import PRESET

from esmeta import older
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import record, train, watch
from esmeta.run.record import NullRun, RunDir, load_checkpoint, load_theta, read_metrics
from esmeta.run.train import Counters, Parts, Trainer
from esmeta.tree import theta_sha256

NEVER = SimpleNamespace(wanted=False)
# Steps so large that the best is soon behind; two restarts, the first of which begins below what
# came before it; everything written at every step.
SEED = 2
RESTLESS = (
    f"run.seed={SEED}",
    "optimizer.learning_rate=0.5", "optimizer.weight_decay=0.01", "budget.plateau=3",
    "budget.restarts=2", "budget.generations=40", "run.evaluate_every=1", "run.checkpoint_every=1",
)  # fmt: skip


def resolved(*more: str) -> configs.Config:
    return configs.resolve(tomllib.loads(PRESET), list(more))


class Ended:
    """What a run on ``size`` ranks leaves: the trainers by rank, and the trials each scored."""

    def __init__(
        self,
        out: Path,
        config: configs.Config,
        size: int = 1,
        *,
        resume: bool = False,
        stops: dict[int, Any] | None = None,
    ) -> None:
        self.out = out
        self.shares: list[list[range]] = [[] for _ in range(size)]

        def work(comm: RankComm) -> tuple[Trainer, str, Parts]:
            parts = train.build(config, comm.size)
            whole = parts.scored.heldout

            def heldout(*args: Any, first: int, **more: Any) -> Any:
                self.shares[comm.rank].append(range(first, args[1]))
                return whole(*args, first=first, **more)

            parts.scored.heldout = heldout  # type: ignore[method-assign]
            run: Any = NullRun()
            if comm.rank == 0:
                run = RunDir.create(out, config, resume=resume)
            stop: Any = (stops or {}).get(comm.rank, NEVER)
            trainer = Trainer(parts, comm, run, stop)  # type: ignore[arg-type]
            reason = trainer.train()
            run.close()
            return trainer, reason, parts

        ended = on_ranks(size, work)
        self.trainers = [trainer for trainer, _, _ in ended]
        self.reasons = [reason for _, reason, _ in ended]
        self.parts = ended[0][2]

    @property
    def counts(self) -> list[dict[str, Any]]:
        return [vars(trainer.count) for trainer in self.trainers]

    @property
    def hashes(self) -> list[str]:
        """Of theta after every step, without what only clocks know."""
        return [line["theta_sha256"] for line in read_metrics(self.out)]

    @property
    def lines(self) -> list[dict[str, Any]]:
        timing = ("seconds", "step_s", "evaluate_s", "wait_s", "search_s", "idle_mean", "idle_max")
        return [
            {k: v for k, v in line.items() if k not in timing} for line in read_metrics(self.out)
        ]

    def best(self) -> tuple[str, str]:
        theta, meta = load_theta(self.out / "best.safetensors")
        return theta_sha256(theta), meta["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The restless run in one piece, on one rank."""
    return Ended(tmp_path_factory.mktemp("whole") / "run", resolved(*RESTLESS))


def test_the_restless_run_has_all_that_may_be_forgotten(whole: Ended) -> None:
    (count,) = whole.counts
    assert count["restarts"] == 2 and whole.reasons == ["plateau"]
    scores = [line["validation_return"] for line in whole.lines]
    assert count["best"] == max(scores) and count["best_step"] == scores.index(max(scores))
    assert count["best_step"] < count["step"] - 3
    assert whole.best() == (whole.hashes[count["best_step"]], str(count["best_step"]))
    steps = [line["env_steps"] for line in whole.lines]
    assert steps == sorted(steps) and count["env_steps"] == steps[-1] > 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_take_the_same_steps_and_share_the_trials(
    tmp_path: Path, whole: Ended, ranks: int
) -> None:
    run = Ended(tmp_path / "run", resolved(*RESTLESS), ranks)
    assert run.lines == whole.lines and run.best() == whole.best()
    assert run.counts == whole.counts * ranks and run.reasons == whole.reasons * ranks
    assert len(run.shares[0]) == len(whole.lines)
    for shares in zip(*run.shares, strict=True):
        # Each trial once, in the order of ranks, and no rank without any.
        assert [trial for share in shares for trial in share] == list(range(8))
        assert all(len(share) in (8 // ranks, 8 // ranks + 1) for share in shares)


def test_ranks_share_the_trials_of_the_test(tmp_path: Path) -> None:
    few = resolved("budget.generations=2", "run.evaluate_every=0")
    one, three = (Ended(tmp_path / str(size), few, size) for size in (1, 3))
    found = []
    for run in (one, three):
        run.trainers[0].run = NullRun()  # the folder is closed
        found.append(
            on_ranks(len(run.trainers), lambda comm, run=run: run.trainers[comm.rank].test())
        )
    assert found[1] == found[0] * 3 and found[0][0]["trials"] == 256
    assert [shares[-1] for shares in three.shares] == [range(85), range(85, 170), range(170, 256)]


def test_fewer_trials_than_ranks_are_scored_by_all(tmp_path: Path) -> None:
    few = resolved("run.evaluate_trials=2", "budget.generations=3", "run.evaluate_every=1")
    one, three = (Ended(tmp_path / str(size), few, size) for size in (1, 3))
    assert one.lines == three.lines and one.counts * 3 == three.counts
    assert three.shares == [[range(2)] * 4] * 3


@pytest.mark.parametrize("ranks", [1, 3])
def test_wherever_it_is_stopped_it_goes_on(tmp_path: Path, whole: Ended, ranks: int) -> None:
    end = whole.counts[0]["step"]
    best = whole.counts[0]["best_step"]
    first, second = _restarts(whole)
    for stop in sorted({1, best + 1, first - 1, first, first + 2, second + 1, end - 1}):
        out = tmp_path / str(stop)
        Ended(out, resolved(*RESTLESS, f"budget.generations={stop}"))
        found = load_checkpoint(out)
        assert found is not None and found.step == stop
        again = Ended(out, resolved(*RESTLESS), ranks, resume=True)
        assert again.lines == whole.lines, f"stopped at {stop}"
        assert again.counts == whole.counts * ranks and again.reasons == whole.reasons * ranks
        assert again.best() == whole.best(), f"stopped at {stop}, best at {best}"
        assert len(again.shares[0]) == end - stop  # nothing is scored twice


def test_a_restart_begins_elsewhere_with_noise_of_its_own(whole: Ended) -> None:
    first, second = _restarts(whole)
    scores = [line["validation_return"] for line in whole.lines]
    # A plateau is counted from the attempt's own peak, not from what an earlier one reached.
    assert scores[first + 1] <= max(scores[: first + 1]) and second > first + 3
    parts = train.build(resolved(*RESTLESS))
    for number, begun in enumerate(_restarts(whole), start=1):
        rng = Rng(SEED).fold("optimizer").fold("restart", number)
        state = parts.optimizer.init(parts.objective.init(rng.key), rng)
        for step in (1, 2):
            state, _ = parts.optimizer.step(state, parts.objective, solo(), rng)
            assert theta_sha256(parts.optimizer.theta(state)) == whole.hashes[begun + step]
    begun_with = train.build(resolved(*RESTLESS)).objective.init(SEED)
    assert all(
        theta_sha256(parts.objective.init(Rng(SEED).fold("optimizer").fold("restart", k).key))
        != theta_sha256(begun_with)
        for k in (1, 2)
    )


def test_a_restart_has_a_plateaus_time_before_its_first_score(tmp_path: Path) -> None:
    run = Ended(tmp_path / "run", resolved(*RESTLESS, "run.evaluate_every=5"))
    # Restarts after 3 and 5 + 3 steps, scores at 0, 5 and 10, and the end at 10 + 3.
    assert (run.counts[0]["step"], run.counts[0]["restarts"]) == (13, 2)


def _restarts(run: Ended) -> list[int]:
    """The steps after which a restart came: three steps without a new best of the attempt."""
    found, peak, at = [], -math.inf, 0
    for line in run.lines:
        if line["validation_return"] > peak:
            peak, at = line["validation_return"], line["step"]
        elif line["step"] - at == 3 and len(found) < 2:
            found.append(line["step"])
            peak, at = -math.inf, line["step"]
    return found


# --- budgets and clocks -------------------------------------------------------------------------


def test_what_was_used_before_a_resume_counts(tmp_path: Path) -> None:
    quiet = ("run.evaluate_every=0", "run.checkpoint_every=1")
    run = Ended(tmp_path / "run", resolved(*quiet, "budget.generations=3"), 2)
    used = run.counts[0]["env_steps"]
    limit = f"budget.env_steps={used + 1}"
    again = Ended(tmp_path / "run", resolved(*quiet, limit, "budget.generations=9"), 2, resume=True)
    assert again.reasons == ["env_steps"] * 2 and again.counts[0]["step"] == 4


def test_seconds_before_a_resume_count_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(record, "time", SimpleNamespace(monotonic=lambda: clock.now))
    quiet = ("run.evaluate_every=0", "budget.generations=2")
    run = RunDir.create(tmp_path / "run", resolved(*quiet))
    clock.now += 70.0  # what the first part of the run took
    parts = train.build(resolved(*quiet))
    Trainer(parts, solo(), run, NEVER).train()  # type: ignore[arg-type]
    run.close()
    clock.now += 500.0  # nobody trained
    limit = ("run.evaluate_every=0", "budget.generations=9", "budget.seconds=60")
    again = Ended(tmp_path / "run", resolved(*limit), 2, resume=True)
    assert again.reasons == ["seconds"] * 2 and again.counts[1]["step"] == 2
    more = ("run.evaluate_every=0", "budget.generations=4", "budget.seconds=80")
    last = Ended(tmp_path / "run", resolved(*more), 2, resume=True)
    assert last.reasons == ["steps"] * 2


class After:
    """Wants to stop at the ``count``-th look."""

    def __init__(self, count: int) -> None:
        self.count = count

    @property
    def wanted(self) -> bool:
        self.count -= 1
        return self.count < 0


@pytest.mark.parametrize("rank", [0, 2])
def test_one_rank_that_is_told_stops_all(tmp_path: Path, rank: int) -> None:
    long = resolved("budget.generations=50", "run.evaluate_every=2", "run.checkpoint_every=0")
    run = Ended(tmp_path / "run", long, 3, stops={rank: After(5)})
    assert run.reasons == ["signal"] * 3
    found = load_checkpoint(tmp_path / "run")
    assert found is not None and found.step == 5 == run.counts[rank]["step"]
    # A stop is not waited for with scores.
    assert [line["step"] for line in run.lines if "validation_return" in line] == [0, 2, 4]


def test_the_last_step_is_scored(tmp_path: Path) -> None:
    run = Ended(tmp_path / "run", resolved("budget.generations=5", "run.evaluate_every=3"), 2)
    assert [line["step"] for line in run.lines if "validation_return" in line] == [0, 3, 5]


def test_counters_of_before_the_validation_split_forget_what_was_best() -> None:
    old = {"step": 7, "env_steps": 70, "heldout": 0.4, "best": 0.9, "best_step": 3, "restarts": 1}
    kept = Counters(**older.counters(old | {"peak": 0.5, "peak_step": 6}))
    assert kept == Counters(7, 70, kept.validation, -math.inf, 7, 1, -math.inf, 7)
    assert math.isnan(kept.validation)


# --- idle ranks ---------------------------------------------------------------------------------


def test_a_pace_is_kept_on_average() -> None:
    now = 0.0
    pace = watch.Pace(5.0, clock=lambda: now)
    assert sum(pace.lets() for _ in range(5000)) == 1000
    counts = []
    for _ in range(20):  # seconds of 100 steps
        now += 1.0
        counts.append(sum(pace.lets() for _ in range(100)))
    assert counts == [5] * 20
    now += 1e6
    assert sum(pace.lets() for _ in range(5000)) == 1000
    assert all(watch.Pace(0.0, clock=lambda: now).lets() for _ in range(5000))


def test_fast_steps_are_thinned_but_scores_and_the_last_step_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch.Pace, "BURST", 2.0)
    more = ("run.metrics_per_second=1e-6", "run.evaluate_every=4", "budget.generations=9")
    few = Ended(tmp_path / "few", resolved(*more))
    assert [line["step"] for line in read_metrics(few.out)] == [0, 1, 2, 4, 8, 9]
    whole = Ended(tmp_path / "all", resolved(*more, "run.metrics_per_second=0"))
    assert [line["step"] for line in read_metrics(whole.out)] == list(range(10))
    assert few.hashes[-1] == whole.hashes[-1]


def test_shares_of_idle_time_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def work(comm: RankComm) -> tuple[Any, ...]:
        idle = watch.Idle(comm)  # type: ignore[arg-type]
        found = []
        for waited in (0.1, 0.3):
            comm.barrier()
            if comm.rank == 0:
                clock.now += 10.0
            comm.waited_s += 10.0 * waited * (comm.rank + 1)
            comm.barrier()
            found.append(idle.metrics())
        return (*found, idle.by_rank())

    for first, second, shares in on_ranks(3, work):
        assert first == pytest.approx({"idle_mean": 0.2, "idle_max": 0.3})
        assert second == pytest.approx({"idle_mean": 0.6, "idle_max": 0.9})
        assert shares == pytest.approx([0.2, 0.4, 0.6])


# --- agents that live on ranks ------------------------------------------------------------------


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Equal, also where both are NaN."""
    return one.dtype == two.dtype and torch.equal(one.nan_to_num(7.5), two.nan_to_num(7.5))


AGENTS = (*SMALL, "objective.agents=5", "optimizer.learning_rate=0.01", "run.checkpoint_every=0")


def agents(*more: str) -> configs.Config:
    return configs.resolve(configs.load("pendulum-metagenrl"), [*AGENTS, *more])


def test_agents_of_all_ranks_are_saved_and_dealt_out_again(tmp_path: Path) -> None:
    whole = Ended(tmp_path / "whole", agents("budget.updates=6"), 2)
    half = Ended(tmp_path / "half", agents("budget.updates=4"), 2)
    found = load_checkpoint(tmp_path / "half")
    assert found is not None
    saved = found.payload["optimizer"]["agents"]
    assert saved["0/index"].tolist() == [0, 1, 2, 3, 4]
    assert {len(leaf) for leaf in saved.values()} == {5}
    # Rows are those of their agents: every leaf is what its rank had.
    for trainer, rows in zip(half.trainers, (slice(0, 2), slice(2, 5)), strict=True):
        own = half.parts.objective.save(trainer.state.agents)  # type: ignore[attr-defined]
        assert all(same(leaf, saved[name][rows]) for name, leaf in own.items())
    again = Ended(tmp_path / "half", agents("budget.updates=6"), 2, resume=True)
    assert again.hashes == whole.hashes and again.lines == whole.lines
    # Other ranks add the same gradients in another order.
    for size in (1, 3):
        out = tmp_path / f"on{size}"
        Ended(out, agents("budget.updates=4"), 2)
        other = Ended(out, agents("budget.updates=6"), size, resume=True)
        held = [t.state.agents[0].life.numbers.tolist() for t in other.trainers]
        assert [len(rows) for rows in held] == [5 * (r + 1) // size - 5 * r // size
                                                for r in range(size)]  # fmt: skip
        assert sum(held, []) == [0, 1, 2, 3, 4]
        for a, b in zip(other.lines, whole.lines, strict=True):
            assert a["meta_loss"] == pytest.approx(b["meta_loss"], rel=1e-4)
            assert a["env_steps"] == b["env_steps"]
