"""A run that was stopped, killed or resumed on other ranks ends with the same theta."""

from __future__ import annotations

import random
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import OPEN_MPI, environment, find_mpirun, kill_leftovers, marked, wait_for
from tiny_runs import final_hash, overrides, run_here, summary, write_preset

from esmeta.run.record import load_checkpoint, read_metrics

OPTIMIZERS = {
    "openes": ["optimizer.weight_decay=0.01", "optimizer.sigma_decay=0.9"],
    "nres": ["optimizer.weight_decay=0.01", "optimizer.window=2"],
    "pes": ["optimizer.window=1"],
    "snes": [],
    "evotorch_snes": [],
    "a2c": ["optimizer.schedule=linear", "optimizer.schedule_updates=5"],
    "ppo": ["optimizer.minibatches=2", "optimizer.epochs=2"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_and_three_steps_are_six(tmp_path: Path, name: str) -> None:
    preset = write_preset(tmp_path)
    common = ["--optimizer", name, *overrides(*OPTIMIZERS[name])]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert run_here(preset, "--out", whole, *common, *overrides("budget.generations=6")) == 0
    assert run_here(preset, "--out", half, *common, *overrides("budget.generations=3")) == 0
    middle = final_hash(half)
    assert middle != final_hash(whole)
    # The resolved config of the run itself is enough to go on.
    assert run_here("--resume", half, *overrides("budget.generations=6")) == 0
    assert final_hash(half) == final_hash(whole)
    one, two = read_metrics(whole), read_metrics(half)
    timing = {"seconds", "step_s", "evaluate_s", "wait_s", "search_s"}
    for a, b in zip(one, two, strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {
            k: v for k, v in b.items() if k not in timing
        }
    assert summary(half)["env_steps"] == summary(whole)["env_steps"]
    # Nothing is left to do: the same theta again.
    assert run_here("--resume", "--out", half) == 0
    assert final_hash(half) == final_hash(whole)


class Job:
    """A command in other processes: python alone, or ``ranks`` of them."""

    def __init__(
        self, folder: Path, ranks: int, *args: object, module: str = "esmeta.train"
    ) -> None:
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-m", module, *map(str, args)]
        if ranks > 1:
            command = [str(find_mpirun()), "-n", str(ranks), *command]
        self.errors = open(folder / f"{self.mark}.err", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment({**OPEN_MPI, "ESMETA_TEST_JOB": self.mark}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )

    def wait_for_step(self, run: Path, step: int) -> None:
        def reached() -> bool:
            return max((line["step"] for line in read_metrics(run)), default=-1) >= step

        wait_for(f"step {step}", reached, self.process)

    def stderr(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def kill(self) -> None:
        """SIGKILL to every process of the job at once."""
        assert self.process.poll() is None, self.stderr()
        for process in marked(self.mark):
            process.kill()
        self.process.wait()
        assert not kill_leftovers(self.mark, grace=120)

    def finish(self) -> int:
        """The exit code; fails if a process outlives it."""
        try:
            return self.process.wait(240)
        finally:
            assert not kill_leftovers(self.mark, grace=30)


LONG = overrides("run.evaluate_every=0", "run.checkpoint_every=3")
ENDLESS = [*LONG, *overrides("budget.generations=1000000")]


@pytest.mark.mpi
def test_killed_runs_go_on_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    preset, run, whole = write_preset(tmp_path), tmp_path / "run", tmp_path / "whole"
    moment = random.Random()  # a new moment every time: all of them must do
    reached = [0]
    for ranks, resume in ((1, []), (2, ["--resume"])):
        job = Job(tmp_path, ranks, preset, "--out", run, *ENDLESS, *resume)
        job.wait_for_step(run, reached[-1] + moment.randint(4, 20))
        time.sleep(moment.random() * 0.02)
        job.kill()
        checkpoint = load_checkpoint(run)
        assert checkpoint is not None and checkpoint.step > reached[-1]
        reached.append(checkpoint.step)
    end = overrides(f"budget.generations={reached[-1] + 7}")
    assert run_here(preset, "--out", run, *LONG, *end, "--resume") == 0
    assert run_here(preset, "--out", whole, *LONG, *end) == 0
    assert final_hash(run) == final_hash(whole), f"killed at {reached}"
    lines, expected = read_metrics(run), read_metrics(whole)
    assert [x["theta_sha256"] for x in lines] == [x["theta_sha256"] for x in expected]
    assert summary(run)["ranks"] == 1
