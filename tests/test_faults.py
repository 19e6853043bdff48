"""A rank that fails ends the job, is named, and costs no result; disks that are full cost none."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, marked
from fault_runs import GENERATIONS, fail_and_resume, uninterrupted
from test_resume import Job
from tiny_runs import final_hash, overrides, run_here, summary, write_preset

from esmeta.errors import UserError
from esmeta.ranks.comm import SelfComm
from esmeta.run.record import load_checkpoint, read_metrics
from esmeta.run.watch import TimeLimit


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return uninterrupted(tmp_path_factory.mktemp("whole"))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("kind", "rank", "code"),
    [
        ("hang", 0, 3),
        pytest.param("kill", 1, 9, marks=pytest.mark.slow),
        pytest.param("raise", 1, 3, marks=pytest.mark.slow),
        pytest.param("exit", 1, 3, marks=pytest.mark.slow),
    ],
)
def test_a_failure_ends_the_job_and_the_run_goes_on(
    tmp_path: Path, expected: str, kind: str, rank: int, code: int
) -> None:
    outcome = fail_and_resume(tmp_path, kind, rank, GENERATIONS // 2, 2, 1, expected)
    assert outcome.code == code and outcome.named and outcome.orphans == 0, outcome.stderr
    assert outcome.equal, outcome.stderr
    # Every rank knows who is missing, one says so.
    assert outcome.stderr.count("Error:") == (1 if kind in {"raise", "hang"} else 0)


# --- time limits and idle ranks --------------------------------------------------------------


def test_the_limit_follows_the_pace_of_the_run() -> None:
    limit = TimeLimit()
    assert limit.in_step() == limit.between_steps() == 600
    for _ in range(2):
        limit.note(2.0)
    assert limit.in_step() == 600, "two steps are no pace"
    limit.note(2.0)
    assert limit.in_step() == 60 and limit.between_steps() == 600
    for seconds in (9.0, 9.0, 9.0, 500.0):
        limit.note(seconds)
    assert limit.in_step() == 90, "ten times the median, which an exception does not move"
    for _ in range(20):
        limit.note(7.0)
    assert limit.in_step() == 70, "of the last 20 steps"
    for _ in range(20):
        limit.note(100.0)
    assert limit.in_step() == limit.between_steps() == 1000
    fixed = TimeLimit(7.5)
    assert fixed.in_step() == fixed.between_steps() == 7.5


@pytest.mark.parametrize(("name", "label"), [("openes", "generation 5"), ("a2c", "update 5")])
def test_collectives_know_where_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, label: str
) -> None:
    comm = SelfComm()
    monkeypatch.setattr("esmeta.ranks.comm.make_comm", lambda seconds: comm)
    less = overrides("run.evaluate_every=0")
    limits: list[float] = []
    plain = TimeLimit.in_step
    # Steps as slow as ten times of them are the least limit, however slow this machine is.
    note = TimeLimit.note
    monkeypatch.setattr(TimeLimit, "note", lambda self, step_s: note(self, 6.0))
    monkeypatch.setattr(TimeLimit, "in_step", lambda self: limits.append(plain(self)) or limits[-1])
    assert (
        run_here(write_preset(tmp_path), "--out", tmp_path / "run", "--optimizer", name, *less) == 0
    )
    assert comm.label == label and comm.timeout_s == 600
    assert {*limits} == {600, 60} and limits == sorted(limits, reverse=True)
    # Another limit is no other run.
    more = overrides("run.rank_timeout=7.5", "budget.generations=8")
    assert run_here("--resume", tmp_path / "run", *more) == 0
    assert comm.timeout_s == 7.5


@pytest.mark.mpi
def test_idle_ranks_are_told_apart(tmp_path: Path, mpirun: Any) -> None:
    """One of two ranks comes when the other is there already, which idles."""
    preset, run = write_preset(tmp_path), tmp_path / "run"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import os, pathlib, time\n"
        "from dataclasses import dataclass\n"
        "from esmeta.objectives.return_ import Objective as Plain\n"
        "@dataclass(frozen=True)\n"
        "class Objective(Plain):\n"
        "    def make(self, *args, **options):\n"
        "        made = super().make(*args, **options)\n"
        "        plain = made.fitness\n"
        "        def fitness(params, step):\n"
        "            found, other = plain(params, step), pathlib.Path(f'there-{step}')\n"
        "            if os.environ['PMI_RANK'] == '0':\n"
        "                other.touch()\n"
        "            else:\n"
        "                while not other.exists():\n"
        "                    time.sleep(0.01)\n"
        "                time.sleep(0.5)\n"
        "            return found\n"
        "        made.fitness = fitness\n"
        "        return made\n",
        encoding="utf-8",
    )
    args = ["-m", "esmeta.train", preset, "--out", run, "--objective", "slow:Objective"]
    args += overrides("run.evaluate_every=0", "budget.generations=4")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = mpirun(2, *args, env={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    idle = summary(run)["idle"]
    assert isinstance(idle, list) and len(idle) == 2
    # In order only, as other programs hold up both: in 4 steps it waits for half a second each.
    assert 0.0 <= idle[1] < idle[0] <= 1.0, idle
    for line in read_metrics(run):
        # Of two ranks: the mean of the largest and of another that is not negative.
        assert line["idle_max"] / 2 <= line["idle_mean"] < line["idle_max"] <= 1.0
    seconds = summary(run)["seconds"]
    assert isinstance(seconds, float) and idle[0] * seconds > 1.9


# --- told to stop ------------------------------------------------------------------------------


def ranks_of(job: Job) -> dict[int, psutil.Process]:
    """The training processes of a job by rank."""
    return {
        int(process.environ()["PMI_RANK"]): process
        for process in marked(job.mark)
        if "PMI_RANK" in process.environ()
    }


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("who", "name"),
    [
        ("last rank", "SIGUSR1"),
        pytest.param("last rank", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("mpirun", "SIGTERM", marks=pytest.mark.slow),
        pytest.param("mpirun", "SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_anywhere_stops_all_ranks_with_a_checkpoint(
    tmp_path: Path, who: str, name: str
) -> None:
    preset, run = write_preset(tmp_path), tmp_path / "run"
    long = overrides("budget.generations=100000", "run.evaluate_every=0", "run.checkpoint_every=0")
    job = Job(tmp_path, 2, preset, "--out", run, *long)
    job.wait_for_step(run, 5)
    target = job.process if who == "mpirun" else ranks_of(job)[1]
    for _ in range(3):  # batch systems repeat themselves
        with contextlib.suppress(psutil.NoSuchProcess):  # done already
            target.send_signal(getattr(signal, name))
        time.sleep(0.02)
    assert job.finish() == 75, job.stderr()
    checkpoint = load_checkpoint(run)
    assert checkpoint is not None and checkpoint.step == read_metrics(run)[-1]["step"] >= 5
    assert summary(run)["stopped_by"] == "signal"


# --- full and read-only disks -------------------------------------------------------------------

# TensorBoard writes in a thread, which dies of the error.
THREAD = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@contextlib.contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The kernel lets no file of this process grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("tensorboard", ["false", pytest.param("true", marks=THREAD)])
def test_a_file_that_may_not_grow(tmp_path: Path, tensorboard: str) -> None:
    """There is no room for metrics.jsonl (or the events) to grow; checkpoints still fit."""
    preset, run = write_preset(tmp_path), tmp_path / "run"
    more = overrides(
        "budget.generations=400",
        "run.evaluate_every=0",
        f"run.tensorboard={tensorboard}",
        "run.checkpoint_every=1",
    )
    with files_at_most(24_000), pytest.raises(UserError) as caught:
        run_here(preset, "--out", run, *more)
    file = r"metrics\.jsonl" if tensorboard == "false" else r"(metrics\.jsonl|tensorboard)"
    assert re.fullmatch(
        rf".*/run/{file} cannot be written \(File too large\); the last checkpoint "
        "is intact: make room, then go on with --resume",
        str(caught.value),
    ), caught.value
    saved = load_checkpoint(run)
    assert saved is not None and saved.step >= 10
    # With room again the run ends as if nothing had happened.
    end = overrides(f"budget.generations={saved.step + 3}", "run.tensorboard=false")
    assert run_here("--resume", run, *end) == 0
    assert run_here(preset, "--out", tmp_path / "whole", *more, *end) == 0
    assert final_hash(run) == final_hash(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("file", ["checkpoint/current.ckpt", "theta.safetensors", "run.json"])
def test_a_full_disk_under_each_file(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files are written beside the old ones first: here onto a device that is always full."""
    preset, run = write_preset(tmp_path), tmp_path / "run"
    less = overrides("run.evaluate_every=0", "budget.generations=4")
    assert run_here(preset, "--out", run, *less) == 0
    before = load_checkpoint(run)
    assert before is not None and before.step == 4
    trap = run / f"{file}.tmp"
    trap.symlink_to("/dev/full")
    message = f"{run}/{file} cannot be written (No space left on device); the last checkpoint"
    with pytest.raises(UserError, match=re.escape(message)):
        run_here("--resume", run, *overrides("budget.generations=6"))
    capsys.readouterr()
    after = load_checkpoint(run)
    assert after is not None and after.step == (6 if file == "theta.safetensors" else 4)
    assert capsys.readouterr().err == "", "no checkpoint was damaged"
    trap.unlink(missing_ok=True)
    assert run_here("--resume", run, *overrides("budget.generations=6")) == 0
    whole = overrides("run.evaluate_every=0", "budget.generations=6")
    assert run_here(preset, "--out", tmp_path / "whole", *whole) == 0
    assert final_hash(run) == final_hash(tmp_path / "whole")
