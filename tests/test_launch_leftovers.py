"""What a launch leaves behind: no process and no file; and whom it leaves alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import environment, wait_for
from tiny_runs import write_preset

from esmeta.run import hosts, launch

# Stands for mpirun: notes which of the processes that earlier starts left are still there, leaves
# two more (one deaf to SIGTERM; one that is done in a moment), and ends as a file says.
LEAVES = """
import pathlib, psutil, subprocess, sys
here = pathlib.Path()
pids, seen = here / "pids", here / "seen"
old = pids.read_text().split() if pids.exists() else []
def alive(pid):
    try:
        return psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
seen.write_text(seen.read_text() + "".join(p + " " for p in old if alive(p)) + ".")
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
slow = "import time; time.sleep(0.2); open('saved', 'a').write('x')"
for code in (deaf, slow):
    child = subprocess.Popen([sys.executable, "-c", code], stdin=-3, stdout=-3, stderr=-3)
    with pids.open("a") as file:
        file.write(f"{child.pid} ")
codes = (here / "codes").read_text().split()
(here / "codes").write_text(" ".join(codes[1:]))
sys.exit(int(codes[0]))
"""


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Clock:
    """Time that goes by where it is looked at, and hardly so before ``due()``."""

    def __init__(self, due: Callable[[], bool]) -> None:
        self._due, self._now = due, 0.0

    def monotonic(self) -> float:
        self._now += 0.05 if self._due() else 1e-6
        return self._now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A rank of another launch on this machine."""
    process = subprocess.Popen(["sleep", "300"], env=os.environ | {"ESMETA_LAUNCH": "another"})
    yield process
    process.kill()
    process.wait()


def test_no_process_of_a_start_lives_into_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bystander: subprocess.Popen[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_FIRST_PAUSE_S", 0.01)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "mpi.py").write_text(LEAVES, encoding="utf-8")
    (tmp_path / "codes").write_text("9 0", encoding="utf-8")
    (tmp_path / "seen").touch()
    write_preset(tmp_path)

    (tmp_path / "saved").touch()
    (tmp_path / "pids").touch()

    def all_have_saved() -> bool:
        """Of the two processes of every start, the one that ends by itself."""
        started = (tmp_path / "pids").read_text().split()
        return len(started) == 2 * len((tmp_path / "saved").read_text())

    monkeypatch.setattr(hosts, "time", Clock(all_have_saved))
    words = ["--launcher", f"{sys.executable} mpi.py {{n}}", "-n", "1", "--", "tiny.toml"]
    assert launch.main([*words, "--out", "run"]) == 0
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4 and (tmp_path / "seen").read_text() == ".."
    # Also those of the last start, which went well; those that end by themselves are let.
    assert all(gone(pid) for pid in pids) and (tmp_path / "saved").read_text() == "xx"
    assert bystander.poll() is None
    assert not list((tmp_path / "temporary").iterdir())


# --- the launcher as a process ------------------------------------------------------------------

# Stands for mpirun: counts what it is told, and ends soon after the first signal.
COUNTS = """
import pathlib, signal, sys, time
here = pathlib.Path()
def note(number, _):
    with open("signals", "a") as file:
        file.write(f"{number} ")
if "deaf" not in sys.argv:
    signal.signal(signal.SIGINT, note)
(here / "started").write_text(str(__import__("os").getpid()))
while not (here / "signals").exists():
    time.sleep(0.02)
time.sleep(0.3)
sys.exit(1)
"""


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """``launched(*words)``: a launcher as the leader of a session, as a terminal starts it."""
    write_preset(tmp_path)
    (tmp_path / "mpi.py").write_text(COUNTS, encoding="utf-8")
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        own = ["--launcher", f"{sys.executable} mpi.py {{n}} {' '.join(words)}", "-n", "1"]
        command = [sys.executable, "-m", "esmeta.launch", *own, "--", "tiny.toml", "--out", "run"]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment(None), start_new_session=True,
            stdin=-3, stdout=-3, stderr=-3,
        )  # fmt: skip
        started.append(process)
        file = tmp_path / "started"
        wait_for("the ranks", lambda: file.exists() and file.read_text(), process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
    if (tmp_path / "started").exists() and not gone(int((tmp_path / "started").read_text())):
        os.kill(int((tmp_path / "started").read_text()), signal.SIGKILL)


def test_ctrl_c_reaches_the_ranks_once(
    tmp_path: Path, launched: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = launched()
    os.killpg(process.pid, signal.SIGINT)  # a terminal's Ctrl-C: to all of its foreground group
    assert process.wait() == 130
    assert (tmp_path / "signals").read_text() == f"{signal.SIGINT:d} "


def test_ranks_do_not_outlive_a_launcher_that_is_killed(
    tmp_path: Path, launched: Callable[..., subprocess.Popen[bytes]]
) -> None:
    launched("deaf").kill()
    rank = int((tmp_path / "started").read_text())
    wait_for("the end", lambda: gone(rank))
