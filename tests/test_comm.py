"""Communicators: one process here, several under mpirun with the scripts in tests/mpi."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, find_mpirun
from tiny_runs import overrides, write_preset

from esmeta.errors import UserError
from esmeta.ranks import comm as comm_module
from esmeta.ranks.comm import SelfComm, make_comm
from esmeta.ranks.launched import launched_ranks, local_rank, speaks


def clean_env() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "SLURM"))}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def mpirun(ranks: int, script: str, *arguments: str) -> tuple[int, str, str]:
    command = [
        str(find_mpirun()),
        "-n",
        str(ranks),
        sys.executable,
        str(ROOT / "tests/mpi" / script),
    ]
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=240, env=clean_env()
    )
    return done.returncode, done.stdout, done.stderr


NEVER = "100000"
"""A limit (seconds) of ranks that no test lives to see: what ends the job is something else."""


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_collectives(ranks: int) -> None:
    code, out, err = mpirun(ranks, "collectives.py", str(ranks))
    assert code == 0, err
    said = [line.partition(",")[0] for line in out.splitlines()]
    assert said == [f"ok {ranks} by {name}" for name in ("SharedMemory", "Messages")], out


@pytest.mark.mpi
def test_a_generation_sends_little_and_pickles_nothing(tmp_path: Path) -> None:
    members, trials, ranks = 50, 3, 2
    sizes = overrides(f"optimizer.popsize={members}", "optimizer.name=snes")
    preset, out = write_preset(tmp_path), tmp_path / "run"
    code, printed, err = mpirun(ranks, "traffic.py", str(preset), *sizes, "--out", str(out))
    assert code == 0, err
    (line,) = [line for line in printed.splitlines() if line.startswith("traffic ")]
    sent = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}
    size = sent.pop("D")
    assert sent.pop("buffered") >= 4 and line.endswith(" pickled=[]"), line
    # Returns and steps of all members, and the idle share of all ranks; two sums over theta, and
    # five reasons to stop; a hash from every rank.
    assert sent["gather_rows"] == 8 * members * (trials + 1) + 8 * ranks
    assert sent["sum_exact"] == 8 * 2 * size + 8 * 6
    assert sent["same"] == 32 * ranks
    assert sum(sent.values()) <= 8 * members * trials + 16 * size + 9 * members + 256


@pytest.mark.mpi
def test_an_exception_on_one_rank_ends_the_job_at_once() -> None:
    code, out, err = mpirun(2, "failure.py", "raise", NEVER)
    assert code == comm_module.EXIT_EXCEPTION and "finished" not in out
    assert "rank 1: exception at generation 12" in err
    assert "RuntimeError: a bug on one rank" in err and "failure.py" in err


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("mode", "transport"),
    [("exit", "SharedMemory"), ("hang", "Messages")],
)
def test_a_rank_that_does_not_come_is_a_timeout(mode: str, transport: str) -> None:
    code, out, err = mpirun(3, "failure.py", mode, "2", transport)
    assert code == comm_module.EXIT_EXCEPTION and "finished" not in out
    # The rank that did not come is named, once, and not the other one that waits.
    assert "TimeoutError: rank 0 of 3: gather_rows waited 2 s at generation 12 for rank 2 (" in err
    assert err.count("TimeoutError: ") == 1


@pytest.mark.mpi
def test_a_killed_rank_ends_the_job() -> None:
    code, out, _ = mpirun(2, "failure.py", "kill", NEVER)
    assert code != 0 and "finished" not in out


@pytest.mark.mpi
def test_abort_says_why_and_sets_the_exit_code() -> None:
    code, _, err = mpirun(2, "failure.py", "abort", NEVER)
    assert code == 7 and "esmeta: rank 1: enough" in err


@pytest.mark.mpi
def test_the_same_user_error_everywhere_is_one_line() -> None:
    code, _, err = mpirun(3, "failure.py", "user-error-everywhere", NEVER)
    assert code == comm_module.EXIT_USER_ERROR
    line = "esmeta: error: run.seed = -1: must be an integer >= 0; write for example 0"
    assert err.strip() == line


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("mode", "message"),
    [("user-error-on-first", "only at the root"), ("user-error-on-last", "only here")],
)
def test_a_user_error_on_one_rank_ends_the_job(mode: str, message: str) -> None:
    code, out, err = mpirun(2, "failure.py", mode, NEVER)
    assert code == comm_module.EXIT_USER_ERROR and "finished" not in out
    assert f"error: {message}" in err and "Traceback" not in err


def test_one_process_exits_with_the_same_codes() -> None:
    script = str(ROOT / "tests/mpi/failure.py")
    for mode, code, message in (
        ("user-error-on-first", 2, "esmeta: error: only at the root\n"),
        ("raise", 3, "RuntimeError: a bug on one rank"),
    ):
        done = subprocess.run(
            [sys.executable, script, mode, "1"], capture_output=True, text=True, env=clean_env()
        )
        assert done.returncode == code and message in done.stderr, done.stderr


STEP = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({}, 1),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, 4),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "3", "PMIX_RANK": "2"}, 3),
        ({"OMPI_COMM_WORLD_SIZE": "3", "PMI_SIZE": "1"}, 3),  # a launcher below another one
        ({"MV2_COMM_WORLD_SIZE": "2"}, 2),
        ({"SLURM_NTASKS": "8"}, 1),  # a batch script, not a rank
        ({"SLURM_NTASKS": "8", "PMIX_RANK": "3"}, 8),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "1"}, 2),
        ({"PMIX_RANK": "0"}, 0),
        ({"PMI_SIZE": "many"}, 1),
        # A batch script and a shell of salloc, with and without a step of its own.
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", **STEP}, 1),
        # Tasks of srun that speak no PMI.
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4", **STEP}, 4),
        ({"SLURM_NTASKS": "8", **STEP}, 8),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, 8),
        # An mpirun inside of a step knows better; the user knows best.
        ({"SLURM_STEP_NUM_TASKS": "4", **STEP, "PMI_SIZE": "1"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "4", **STEP, "ESMETA_RANKS": "1"}, 1),
        ({"PMI_SIZE": "4", "ESMETA_RANKS": "1"}, 1),
    ],
)
def test_launched_ranks(env: dict[str, str], ranks: int) -> None:
    assert launched_ranks(env) == ranks


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, {0: True, 1: False}),
        ({"PMI_SIZE": "2", "ESMETA_RANKS": "1"}, {0: True, 1: True}),
    ],
)
def test_one_rank_speaks_for_all(env: dict[str, str], said: dict[int, bool]) -> None:
    names = ("SLURM_PROCID", "PMI_RANK")
    found = {rank: speaks(env | dict.fromkeys(names, str(rank))) for rank in said}
    assert found == said
    # The first of an unknown number may be the only one.
    assert [speaks({"PALS_RANKID": str(rank)}) for rank in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    "env",
    [
        {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
        {"PMI_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_see_no_mpi_do_not_train_the_same_run(
    tmp_path: Path, env: dict[str, str], rank: int
) -> None:
    """Also without mpi4py: a module that cannot be imported stands before it."""
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no MPI here')", encoding="utf-8")
    numbers = ("SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
    clean = clean_env() | env | dict.fromkeys(numbers, str(rank))
    clean["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT}"
    words = [sys.executable, "-m", "esmeta.train", "bandit-openes", "--out", "run"]
    done = subprocess.run(words, env=clean, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    told = re.fullmatch(r"esmeta: error: this .* one of 2 ranks.*ESMETA_RANKS=1 .*\n", done.stderr)
    assert told if rank == 0 else done.stderr == ""


def test_a_rank_that_knows_of_others_is_not_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        size = 1

        def __init__(self, timeout_s: float) -> None: ...

        def library(self) -> str:
            return "Some MPI 1.0"

    monkeypatch.setattr(comm_module, "MPIComm", Fake)
    monkeypatch.setenv("PALS_RANKID", "0")
    assert isinstance(make_comm(), SelfComm)
    monkeypatch.setenv("PALS_RANKID", "3")
    with pytest.raises(UserError, match="rank 3 of several.*sees 1"):
        make_comm()


def test_local_rank() -> None:
    assert local_rank({}) == 0
    assert local_rank({"MPI_LOCALRANKID": "3"}) == 3
    assert local_rank({"OMPI_COMM_WORLD_LOCAL_RANK": "2", "SLURM_LOCALID": "1"}) == 2
    assert local_rank({"SLURM_LOCALID": "1"}) == 1


def test_one_process_needs_no_mpi4py() -> None:
    code = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "from esmeta.ranks.comm import make_comm, SelfComm\n"
        "assert isinstance(make_comm(), SelfComm)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=clean_env())


def test_a_launcher_without_mpi4py_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match="pip install mpi4py"):
        make_comm()


@pytest.mark.parametrize(("size_seen", "launched", "fails"), [(1, "2", True), (2, "2", False)])
def test_a_launcher_of_another_mpi_is_refused(
    monkeypatch: pytest.MonkeyPatch, size_seen: int, launched: str, fails: bool
) -> None:
    class Fake:
        size = size_seen

        def __init__(self, timeout_s: float) -> None: ...

        def library(self) -> str:
            return "Some MPI 1.0"

    monkeypatch.setenv("PMI_SIZE", launched)
    monkeypatch.setattr(comm_module, "MPIComm", Fake)
    if fails:
        with pytest.raises(UserError, match=r"of 2 ranks.*Some MPI 1\.0.*sees 1.*ESMETA_RANKS=1"):
            make_comm()
    else:
        assert isinstance(make_comm(), Fake)


def test_the_last_words_are_read_before_the_job_is_aborted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    now, naps, read_at = 0.0, [], 7

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        naps.append(seconds)
        if len(naps) == read_at:
            os.read(reader, 100)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    with os.fdopen(writer, "w") as stream:
        print("why", file=stream, flush=True)
        comm_module.wait_until_read(stream, 20.0)
        assert len(naps) == read_at + 1, "and a moment for the reader to pass it on"
        print("nobody reads this", file=stream, flush=True)
        now, read_at = 0.0, 0
        comm_module.wait_until_read(stream, 0.1)
        assert 0.1 <= now < 0.2
    os.close(reader)
    comm_module.wait_until_read(io.StringIO(), 20.0)


def test_self_comm_is_the_identity(capsys: pytest.CaptureFixture[str]) -> None:
    comm = SelfComm()
    rows = torch.ones(3, 2, dtype=torch.float64)
    assert torch.equal(comm.gather_rows(rows, [3]), rows)
    assert comm.sum_exact(torch.tensor([3])).item() == 3
    assert torch.equal(comm.sum_ordered(rows), rows) and torch.equal(comm.bcast(rows), rows)
    assert comm.same(b"x") and (comm.rank, comm.size) == (0, 1)
    comm.barrier()
    with pytest.raises(AssertionError, match="counts"):
        comm.gather_rows(rows, [2])
    with pytest.raises(AssertionError, match="int64"):
        comm.sum_exact(rows)
    with pytest.raises(SystemExit) as caught:
        comm.abort(4, "over")
    assert caught.value.code == 4 and "over" in capsys.readouterr().err
