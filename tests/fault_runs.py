"""One failure of one rank of a small real run, and what became of it; for tests and a benchmark."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from conftest import OPEN_MPI, ROOT, environment, find_mpirun, kill_leftovers
from faulty import VARIABLE
from tiny_runs import final_hash, run_here

GENERATIONS = 20
LIMIT_S = 2.0
"""How long a rank waits for one that hangs; a hundred times as long until then (``hurry``)."""
OPTIONS = f"""
--objective faulty:Objective
--set optimizer.popsize=64 --set task.trials=8
--set budget.generations={GENERATIONS} --set run.checkpoint_every=4
--set run.rank_timeout={100 * LIMIT_S:g} --set run.evaluate_every=0 --set run.tensorboard=false
""".split()
# What must stand on stderr, with the generation and, of ranks that are not killed, the rank.
NAMED = {
    "raise": "esmeta: rank {rank}: exception at generation {generation}\n",
    "hang": "at generation {generation} for rank {rank} (",
    "exit": "esmeta: rank {rank}: sys.exit(0) at generation {generation} ",
    "kill": " ended by Killed (signal 9) at generation {generation};",
}


@dataclass(frozen=True)
class Outcome:
    """``latency_s`` runs from the failure to the end of all ranks."""

    kind: str
    rank: int
    generation: int
    code: int
    latency_s: float
    named: bool
    orphans: int
    resumed_on: int
    equal: bool
    stderr: str


def start(folder: Path, words: list[str], fault: str = "") -> tuple[int, str, int]:
    """Run a command to its end: exit code, stderr, number of processes that outlived it."""
    mark = uuid.uuid4().hex
    extra = {**OPEN_MPI, "ESMETA_TEST_JOB": mark, "OMP_NUM_THREADS": "1"}
    env = environment(extra | ({VARIABLE: fault} if fault else {}))
    env["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'tests'}"
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
        )
    finally:
        left = kill_leftovers(mark, grace=30)
    return done.returncode, done.stderr, len(left)


def on_ranks(ranks: int, *words: str) -> list[str]:
    """The command of a training run on several ranks."""
    return [str(find_mpirun()), "-n", str(ranks), sys.executable, "-m", "esmeta.train", *words]


def here(folder: Path, *words: object) -> None:
    """A training run in this process, without what it prints."""
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        assert run_here(*words) == 0


def uninterrupted(folder: Path) -> str:
    """The hash of theta after all generations, on one process."""
    here(folder, "bandit-openes", *OPTIONS, "--out", "whole")
    return final_hash(folder / "whole")


def fail_and_resume(
    folder: Path, kind: str, rank: int, generation: int, ranks: int, resume_on: int, expected: str
) -> Outcome:
    """Let ``rank`` of ``ranks`` fail, then go on with ``resume_on`` ranks."""
    name = f"{kind}-{uuid.uuid4().hex[:8]}"
    moment = folder / f"{name}.moment"
    words = on_ranks(ranks, "bandit-openes", *OPTIONS, "--out", name)
    if kind == "kill":
        # A rank that is killed says nothing; what started it does.
        launch = [sys.executable, "-m", "esmeta.launch", "-n", str(ranks), "--max-restarts", "0"]
        words = [*launch, "--", *words[words.index("esmeta.train") + 1 :]]
    code, err, orphans = start(folder, words, f"{kind}:{rank}:{generation}:{moment}")
    # kill_leftovers waits for stragglers only, so this is when the last process was gone.
    latency = time.time() - moment.stat().st_mtime
    named = NAMED[kind].format(rank=rank, generation=generation) in err
    if resume_on == 1:
        here(folder, "--resume", name)
    else:
        again, more, left = start(folder, on_ranks(resume_on, "--resume", name))
        assert again == 0 and left == 0, more
    equal = final_hash(folder / name) == expected
    return Outcome(kind, rank, generation, code, latency, named, orphans, resume_on, equal, err)
