"""The launcher: what it starts, what it starts again and where, and what it passes on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import ROOT, kill_leftovers
from fault_runs import OPTIONS, uninterrupted
from faulty import VARIABLE
from test_bad_input import command
from test_resume import Job
from tiny_runs import final_hash, overrides, run_here, summary, write_preset

from esmeta.errors import UserError
from esmeta.run import hosts, launch
from esmeta.run.record import load_checkpoint

# Stands for mpirun: notes how it was called, and ends as the next line of a file says.
FAKE = """
echo "$@" >> calls
echo $ESMETA_LAUNCH_START >> starts
code=$(head -1 codes); sed -i 1d codes
[ -e make ] && mkdir -p run && cp tiny.toml run/config.toml
exit $code
"""


Fake = Callable[..., "Launched"]
Launched = tuple[int, list[list[str]], str]
"""Exit code, arguments of every start, stderr."""


@pytest.fixture
def fake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Fake:
    """``fake(codes, *flags, words=...)``: launch here, with a stand-in for mpirun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_FIRST_PAUSE_S", 0.01)
    write_preset(tmp_path)
    (tmp_path / "mpi.sh").write_text(FAKE, encoding="utf-8")

    def start(codes: list[int], *flags: str, words: Sequence[str] = ()) -> Launched:
        (tmp_path / "calls").write_text("", encoding="utf-8")
        (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes), encoding="utf-8")
        launcher = "sh mpi.sh {n} {hosts}" if "--hosts" in flags else "sh mpi.sh {n}"
        train = words or ("tiny.toml", "--out", "run")
        code = launch.main(["--launcher", launcher, *flags, "--", *train])
        calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
        return code, calls, capfd.readouterr().err

    return start


@pytest.mark.parametrize("code", [0, 2, 75, 130])
def test_what_is_not_started_again(code: int, fake: Fake) -> None:
    assert sorted(launch.FINAL) == [0, 2, 75, 130]
    found, calls, err = fake([code], "-n", "4")
    assert found == code and len(calls) == 1 and err == ""
    ranks, python, *train = calls[0]
    assert (ranks, python) == ("4", sys.executable)
    assert train == ["-m", "esmeta.train", "tiny.toml", "--out", "run"]


def test_it_goes_on_until_it_is_done(tmp_path: Path, fake: Fake) -> None:
    (tmp_path / "make").touch()
    found, calls, err = fake([9, 0], "-n", "3")
    assert found == 0 and [call[0] for call in calls] == ["3", "3"]
    assert (tmp_path / "starts").read_text() == "0\n1\n"  # later ones take over the lock
    first, second = (call[2:] for call in calls)
    assert second == [*first, "--resume"]
    assert err == (
        "esmeta.launch: the ranks ended with exit code 9 at the start; "
        "restart 1 of 3, from the start on 3 ranks\n"
    )


def test_it_gives_up(fake: Fake) -> None:
    found, calls, err = fake([3, 7], "-n", "2", "--max-restarts", "1")
    assert found == 7 and len(calls) == 2
    # Nothing was made that could be resumed.
    assert calls[0] == calls[1] and "--resume" not in calls[1]
    assert err.splitlines()[-1] == (
        "esmeta.launch: the ranks ended with exit code 7 at the start; giving up after 1 restart"
    )


def test_a_run_directory_is_chosen_once(fake: Fake) -> None:
    found, calls, _ = fake([1, 0], "-n", "2", words=("tiny.toml", "--set", "run.seed=5"))
    outs = [call[call.index("--out") + 1] for call in calls]
    assert found == 0 and len(set(outs)) == 1 and outs[0].startswith("runs/out/tiny-5-")


def test_a_run_that_was_to_be_resumed_is_resumed_again(tmp_path: Path, fake: Fake) -> None:
    (tmp_path / "run").mkdir()
    write_preset(tmp_path / "run", "config.toml")
    found, calls, _ = fake([1, 0], "-n", "2", words=("--resume", "run"))
    assert found == 0 and calls[0] == calls[1] and calls[0][-2:] == ["--resume", "run"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-n", "4", "bandit-openes"], "write -- between"),
        (["--", "bandit-openes"], "the number of ranks is missing; write -n 4"),
        (["-n", "0", "--", "bandit-openes"], "-n = 0: must be an integer >= 1"),
        (["-n", "two", "--", "bandit-openes"], "argument -n/--ranks: invalid int value: 'two'"),
        (["-n", "2", "--max-restarts", "-1", "--", "x.toml"], "--max-restarts = -1"),
        (["-n", "2", "--max-restart", "1", "--restarts", "1", "--", "x"], "did you mean"),
        (["-n", "2", "--", "bandit-opnes"], "did you mean 'bandit-openes'"),
        (["-n", "2", "--", "bandit-openes", "--oputimizer", "snes"], "did you mean '--optimizer'"),
        (["-n", "2", "--launcher", "srun", "--", "bandit-openes"], "does not say where {n} goes"),
        (["-n", "2", "--launcher", "no-mpi {n}", "--", "bandit-openes"], "no command 'no-mpi'"),
        (["--hosts", "none", "--", "bandit-openes"], "--hosts none cannot be read"),
        (["--hosts", "bad", "--", "bandit-openes"], "line 2 is 'node2 slots=4'; write HOST"),
        (["-n", "2", "--", "--resume"], "write --resume RUN"),
    ],
)
def test_bad_input(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").write_text("node1:4\nnode2 slots=4\n", encoding="utf-8")
    try:
        code = launch.main(args)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and words in err
    assert err.startswith("esmeta: error: ") and err.count("\n") == 1, err


def test_train_names_the_launcher(tmp_path: Path) -> None:
    code, out, err = command(tmp_path, "bandit-openes", "--max-restarts", "3")
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert err == (
        "esmeta: error: --max-restarts is an option of esmeta.launch; write: "
        "python -m esmeta.launch -n RANKS --max-restarts K -- PRESET ...\n"
    )


# --- hosts -----------------------------------------------------------------------------------

# Stands for ssh: runs the command here unless the host is marked as down.
SSH = """#!/bin/sh
while :; do case "$1" in -o) shift 2;; -*) shift;; *) break;; esac; done
host=$1; shift
[ -e "$ESMETA_TEST_DOWN/$host" ] && exit 255
exec sh -c "$*"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a file named like a host takes it down."""
    for name in ("bin", "down"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH, encoding="utf-8")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("ESMETA_TEST_DOWN", str(tmp_path / "down"))
    return tmp_path / "down"


def test_hosts_that_answer(tmp_path: Path, ssh: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# all\nnode1:4\n\nnode2\nnode-3.x:2 binding=core # new\n", encoding="utf-8")
    found = hosts.read_hosts(file)
    assert [(host.name, host.slots) for host in found] == [
        ("node1", 4),
        ("node2", 1),
        ("node-3.x", 2),
    ]
    assert found[2].line == "node-3.x:2 binding=core"
    assert hosts.answering(found) == found
    (ssh / "node2").touch()
    assert [host.name for host in hosts.answering(found)] == ["node1", "node-3.x"]
    file.write_text("localhost:2\n127.0.0.1\nnode1\n", encoding="utf-8")
    (ssh / "localhost").touch()
    (ssh / "127.0.0.1").touch()
    assert len(hosts.answering(hosts.read_hosts(file))) == 3, "this machine needs no ssh"
    for text in ("", "node1:0", "node1:x", "a b:3"):
        file.write_text(f"{text}\n", encoding="utf-8")
        with pytest.raises(UserError, match="HOST:SLOTS"):
            hosts.read_hosts(file)


def test_ranks_follow_the_hosts(tmp_path: Path, ssh: Path, fake: Fake) -> None:
    (tmp_path / "hosts").write_text("node1:4\nnode2:3\n", encoding="utf-8")
    (ssh / "node1").touch()
    code, calls, err = fake([0], "--hosts", "hosts", "-n", "6")
    assert code == 0 and calls[0][0] == "3"
    assert err == "esmeta.launch: node1 did not answer, starting on 3 ranks\n"
    (ssh / "node2").touch()
    code, calls, err = fake([0], "--hosts", "hosts", "--max-restarts", "0")
    assert code == launch.EXIT_LOST == 3 and not calls
    assert err == ("esmeta.launch: no host answered at the start; giving up after 0 restarts\n")


@pytest.mark.mpi
@pytest.mark.slow
def test_a_lost_host_costs_its_ranks_only(
    tmp_path: Path, ssh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 2 of 4 is killed and its host does not come back: the run ends on the other host."""
    (tmp_path / "hosts").write_text("node1:2\nnode2:2\n", encoding="utf-8")
    monkeypatch.setenv(VARIABLE, f"kill:2:9:{ssh / 'node2'}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    train = ["bandit-openes", *OPTIONS, "--out", "run"]
    code, _, err = command(tmp_path, "--hosts", "hosts", "--", *train, module="esmeta.launch")
    assert code == 0, err
    assert "restart 1 of 3, node2 did not answer, from step 8 on 2 ranks\n" in err
    assert summary(tmp_path / "run")["ranks"] == 2
    monkeypatch.delenv(VARIABLE)
    assert final_hash(tmp_path / "run") == uninterrupted(tmp_path)


# --- real ranks -----------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGTERM", 75),
        pytest.param("SIGUSR1", 75, marks=pytest.mark.slow),
        pytest.param("SIGINT", 130, marks=pytest.mark.slow),
        pytest.param("SIGKILL", -9, marks=pytest.mark.slow),
    ],
)
def test_signals_reach_the_ranks(tmp_path: Path, name: str, code: int) -> None:
    run = tmp_path / "run"
    long = overrides("budget.generations=100000", "run.evaluate_every=0", "run.checkpoint_every=0")
    words = ["-n", "2", "--", write_preset(tmp_path), "--out", run, *long]
    job = Job(tmp_path, 1, *words, module="esmeta.launch")
    job.wait_for_step(run, 5)
    job.process.send_signal(getattr(signal, name))
    assert job.process.wait() == code
    assert not kill_leftovers(job.mark, grace=120)
    if code == 75:
        checkpoint = load_checkpoint(run)
        assert checkpoint is not None and checkpoint.step >= 5
        assert summary(run)["stopped_by"] == "signal"


@pytest.mark.mpi
def test_a_killed_rank_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f"kill:1:9:{tmp_path / 'once'}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    train = ["bandit-openes", *OPTIONS, "--out", "run"]
    code, _, err = command(tmp_path, "-n", "2", "--", *train, module="esmeta.launch")
    assert code == 0, err
    said = " ended by Killed (signal 9) at generation 9; restart 1 of 3, from step 8 on 2 ranks\n"
    assert "esmeta.launch: a rank on " in err and said in err
    monkeypatch.delenv(VARIABLE)
    assert final_hash(tmp_path / "run") == uninterrupted(tmp_path)


# --- killed before anything was written ----------------------------------------------------------


def test_a_folder_that_a_kill_left_empty(tmp_path: Path) -> None:
    preset = write_preset(tmp_path)
    less = overrides("budget.generations=1", "run.evaluate_every=0")
    for name, resume in (("a", []), ("b", ["--resume"])):
        run = tmp_path / name
        (run / "checkpoint").mkdir(parents=True)
        (run / "config.toml.tmp").write_text("[ta", encoding="utf-8")
        assert run_here(preset, "--out", run, *less, *resume) == 0
    assert final_hash(tmp_path / "a") == final_hash(tmp_path / "b")
    (tmp_path / "c" / "checkpoint").mkdir(parents=True)
    (tmp_path / "c" / "checkpoint" / "thesis.ckpt").touch()
    with pytest.raises(UserError, match="c exists; pass --resume"):
        run_here(preset, "--out", tmp_path / "c", *less)
