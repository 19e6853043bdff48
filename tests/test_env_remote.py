"""Environments on all ranks of a machine: the same bits as on one, and failures with a name."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from faulty_env import VARIABLE
from test_faults import ranks_of
from test_resume import Job
from tiny_runs import final_hash, overrides, run_here, summary, write_preset

from esmeta.run.record import read_metrics

pytestmark = pytest.mark.mpi
slow = pytest.mark.slow
SCRIPT = ROOT / "tests" / "mpi" / "remote.py"
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


def test_tasks_have_the_same_bits_and_a_world_that_fails_is_told(mpirun: Any) -> None:
    """The learner may go on after a failure. Of three ranks two serve, and some have no world."""
    done = mpirun(3, SCRIPT, env={VARIABLE: "raise:1:3", "PYTHONPATH": PATHS})
    assert done.returncode == 0, done.stderr
    assert "told after 2 steps: rank 1 failed while it served environments:" in done.stdout
    assert "ArithmeticError: a world fell apart" in done.stdout and "faulty_env.py" in done.stdout
    assert re.search(r"ok 3 ranks, \d+ kinds: .*gym.*harlow.*mixed.*told", done.stdout)


OPTIONS = overrides("run.remote_envs=true", "run.tensorboard=false")


def scores(run: Path) -> str:
    """On validation during the run and on the test after it, as text: NaN is like NaN."""
    lines = [{k: v for k, v in x.items() if k[:10] == "validation"} for x in read_metrics(run)]
    return json.dumps([*lines, summary(run)["test"]], sort_keys=True)


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        (
            "gym-ppo",
            [
                "task.name=mixed",
                # Free motion is an aid: the ranks that serve must score the published cheetah.
                "task.parts=[{name='gym', id='Pendulum-v1'}, {name='cheetah_dir', ctrl_cost=0.0}]",
                "task.horizon=20",
                "task.trials=6",
                "optimizer.minibatches=2",
            ],
        ),
        pytest.param(
            "gym-ppo",
            ["optimizer.name=openes", "optimizer.popsize=6", "task.id=Pendulum-v1"],
            marks=slow,
        ),
        pytest.param("harlow-openes", ["optimizer.popsize=8", "task.horizon=30"], marks=slow),
    ],
)
def test_a_run_learns_the_same_theta(
    tmp_path: Path, mpirun: Any, preset: str, more: list[str]
) -> None:
    """One that learns and one that serves, against one process; evolution and gradients."""
    if "task.id=Pendulum-v1" in more:
        more = [*more, "task.horizon=20", "task.trials=3", "policy.std=learned"]
    steps = "budget.updates=3" if preset == "gym-ppo" else "budget.generations=3"
    words = overrides(
        *more, steps, "budget.target=none", "run.evaluate_every=2", "run.evaluate_trials=8"
    )
    args = [preset, *words, *OPTIONS, "--out"]
    done = mpirun(2, "-m", "esmeta.train", *args, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert "environments: 2 ranks of this machine" in done.stdout
    assert run_here(*args, tmp_path / "one") == 0
    assert final_hash(tmp_path / "two") == final_hash(tmp_path / "one")
    assert scores(tmp_path / "two") == scores(tmp_path / "one")
    assert summary(tmp_path / "two")["ranks"] == 1, "of those that learn"


@pytest.mark.parametrize(
    ("kind", "rank", "code", "words"),
    [
        ("raise", 1, 3, ["rank 0: exception at ", "rank 1 failed while it served", "fell apart"]),
        pytest.param(
            "raise", 0, 3, ["rank 0: exception at ", "ArithmeticError: a world"], marks=slow
        ),
        ("hang", 1, 3, ["TimeoutError: rank 0 of 2: step waited 5 s at ", "for rank 1 (hangs"]),
        pytest.param("exit", 1, 3, ["rank 1: sys.exit(0) at "], marks=slow),
        pytest.param("kill", 1, 9, [], marks=slow),
    ],
)
def test_failures_end_the_job_and_are_named(
    tmp_path: Path, mpirun: Any, kind: str, rank: int, code: int, words: list[str]
) -> None:
    """In the third step of an environment; the others are told why, or who is missing."""
    args = [write_preset(tmp_path), "--optimizer", "a2c", "--task", "faulty_env:Task"]
    limit = ["run.rank_timeout=500"] if kind == "hang" else []
    args += [*OPTIONS, *overrides("task.horizon=5", *limit), "--out", tmp_path / "run"]
    env = {VARIABLE: f"{kind}:{rank}:3", "PYTHONPATH": PATHS}
    done = mpirun(2, "-m", "esmeta.train", *args, env=env)
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_a_learner_that_hangs_is_named_by_those_that_serve(mpirun: Any) -> None:
    done = mpirun(3, SCRIPT, "idle")
    assert done.returncode == 3, done.stderr
    found = re.findall(
        r"TimeoutError: rank [12] of 3: serving waited 2 s at command 0 .*", done.stderr
    )
    assert found and "for rank 0 (hangs" in found[0], done.stderr


def test_windows_of_lives_are_refused_in_one_line(tmp_path: Path, mpirun: Any) -> None:
    args = [write_preset(tmp_path), "--optimizer", "nres", *OPTIONS, "--out", tmp_path / "run"]
    done = mpirun(2, "-m", "esmeta.train", *args)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().count("\n") == 0, done.stderr
    assert "RemoteEnv cannot be left and gone back to" in done.stderr
    assert not (tmp_path / "run").exists()


@slow
def test_a_signal_to_a_rank_that_serves_stops_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = overrides("budget.generations=1000000")
    job = Job(tmp_path, 2, write_preset(tmp_path), *OPTIONS, *endless, "--out", run)
    job.wait_for_step(run, 1)
    ranks_of(job)[1].send_signal(signal.SIGTERM)
    assert job.finish() == 75, job.stderr()
    assert summary(run)["stopped_by"] == "signal"


@pytest.mark.parametrize("value", ["maybe", "1", '"yes"'])
def test_bad_values(tmp_path: Path, value: str) -> None:
    from esmeta.errors import UserError

    with pytest.raises(UserError, match=r"run\.remote_envs = .*true or false"):
        run_here(
            write_preset(tmp_path),
            "--out",
            tmp_path / "run",
            *overrides(f"run.remote_envs={value}"),
        )
