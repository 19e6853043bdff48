"""One thread, no display, and the two ways to start esmeta: a process, or several ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Before torch and matplotlib are imported by anything.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import psutil
import pytest
import torch

torch.set_num_threads(1)

# Processes inherit what is ignored here: by whoever started the tests (nohup, a shell's background)
# or by a test that trained in this process.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)
for number in SIGNALS:
    if signal.getsignal(number) is signal.SIG_IGN:
        usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, usual)
HANDLERS = {number: signal.getsignal(number) for number in SIGNALS}

ROOT = Path(__file__).resolve().parents[1]
RunFunction = Callable[..., "subprocess.CompletedProcess[str]"]
# Open MPI refuses root and more ranks than cores unless told; MPICH ignores these.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ranks need the cores for themselves: of the tests that start some, one at a time."""
    why = "no mpirun: pip install 'esmeta[mpi]' or put a cluster's MPI on PATH"
    for item in items:
        if item.get_closest_marker("mpi"):
            item.add_marker(pytest.mark.xdist_group("mpi"))
            item.add_marker(pytest.mark.skipif(find_mpirun() is None, reason=why))


def environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """This process's environment, in which the checkout can be imported from any directory."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(extra or {})}


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """No test has signals ignored, or handled by what another test or a fixture made."""
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in its own folder: MuJoCo writes its warnings to a file where it is."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run_cli(tmp_path: Path) -> RunFunction:
    """``run_cli(*args)``: python -m esmeta.train (or another module) in ``tmp_path``."""

    def run(
        *args: object,
        module: str = "esmeta.train",
        timeout: float = 240,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, *map(str, args)]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=environment(env),
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def wait_for(what: str, found: Callable[[], object], process: Any = None) -> None:
    """Wait until ``found()``, however slow the machine is; ``process`` must live until then.

    What never comes is ended by the limit of the test itself.
    """
    while not found():
        assert process is None or process.poll() is None or found(), f"ended before {what}"
        time.sleep(0.005)


def find_mpirun() -> str | None:
    """The mpirun that came with this environment (the mpich wheel), else the one on PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def marked(mark: str) -> list[psutil.Process]:
    """Living processes whose environment carries ``mark``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("ESMETA_TEST_JOB") == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # not ours to read, or gone
    return found


def kill_leftovers(mark: str, grace: float) -> list[str]:
    """Command lines of the processes of a job that outlived it by ``grace`` seconds; kills them."""
    deadline = time.monotonic() + grace
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    names = []
    for process in marked(mark):
        try:
            names.append(" ".join(process.cmdline()))
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return names


@pytest.fixture
def mpirun(tmp_path: Path) -> RunFunction:
    """``mpirun(n, *args)``: ``python args`` on n ranks; fails if a process outlives the job."""

    def run(
        n: int, *args: object, timeout: float = 240, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        mark = uuid.uuid4().hex
        job = subprocess.Popen(
            [str(find_mpirun()), "-n", str(n), sys.executable, *map(str, args)],
            cwd=tmp_path,
            env=environment({**OPEN_MPI, **(env or {}), "ESMETA_TEST_JOB": mark}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            out, err = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_leftovers(mark, grace=0)
            out, err = job.communicate()
            pytest.fail(f"mpirun -n {n} took over {timeout} s\n{out}\n{err}")
        leftover = kill_leftovers(mark, grace=5)
        assert not leftover, f"processes outlived mpirun: {leftover}\n{out}\n{err}"
        return subprocess.CompletedProcess(job.args, job.returncode, out, err)

    return run
