"""Terminals that cannot show a letter, readers that leave, streams that are closed, SIGHUP."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment, wait_for
from tiny_runs import overrides, run_here, summary, write_preset

from esmeta.run import terminal
from esmeta.run.record import load_checkpoint, read_metrics
from esmeta.run.watch import Stop

LESS = overrides("run.tensorboard=false", "budget.generations=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run called ``run``."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_here(write_preset(folder), "--out", folder / "run", *LESS) == 0
    return folder


def shell(folder: Path, script: str, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script of bash; ``$P`` is Python."""
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment({"P": sys.executable, **env}),
        capture_output=True,
        timeout=240,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize(
    ("encoding", "text", "seen"),
    [
        ("ascii", "1 ± 2 … ─ é", b"1 +- 2 ... ? ?\n"),
        ("cp1252", "1 ± 2 … ─ é", "1 ± 2 … ? é\n".encode("cp1252")),
        ("utf-8", "run\udcff ±", "run? ±\n".encode()),  # the name of a file
    ],
)
def test_spelling(encoding: str, text: str, seen: bytes) -> None:
    code = f"from esmeta.run.terminal import prepare_streams as p\np(); p(); print({text!r})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, env=environment({"PYTHONIOENCODING": encoding}), capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, seen, b"")


# What each of them prints and does, and a file that it has written in the end.
COMMANDS = {
    "train": ("train tiny.toml --out new-$N --set run.tensorboard=false", "new-$N/curve.png"),
    "list": ("train --list", "tiny.toml"),
    "evaluate": ("evaluate run --trials 8", "run/config.toml"),
    "report": ("report run --out page-$N", "page-$N/report.html"),
    "learn": (
        "learn ppo --task pendulum --steps 40 --set learner.period=20 --parts 2 --out learn-$N",
        "learn-$N",
    ),
    "launch": ("launch -n 1 --launcher 'env N={n}' -- tiny.toml --out launched-$N", "launched-$N"),
}


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "reader") for name in COMMANDS), ("train", "closed"), ("launch", "closed")],
)
def test_nobody_listens(finished: Path, name: str, how: str) -> None:
    command, file = COMMANDS[name]
    # The reader is gone before the first word: every write fails.
    how_it_ends = "| true; exit ${PIPESTATUS[0]}" if how == "reader" else ">&- 2>&-"
    ends = f"2>errors-{name} {how_it_ends}" if how == "reader" else how_it_ends
    code, out, err = shell(finished, f"$P -m esmeta.{command} {ends}", N=how)
    assert (code, out, err) == (0, "", "")
    assert (finished / file.replace("$N", how)).exists()
    if how == "reader":
        errors = (finished / f"errors-{name}").read_text()
        assert "Traceback" not in errors and "BrokenPipe" not in errors
    if name == "train":
        run = finished / f"new-{how}"
        assert summary(run)["stopped_by"] == "steps"
        assert [record["step"] for record in read_metrics(run)] == list(range(7))
        # Nothing that was printed is in a file that got the number of a closed stream.
        assert all(line.startswith("{") for line in open(run / "metrics.jsonl"))


def test_an_error_that_nobody_reads_keeps_its_code(finished: Path) -> None:
    assert shell(finished, "$P -m esmeta.evaluate nothing >&- 2>&-")[0] == 2
    assert shell(finished, "$P -m esmeta.train --wrong >&- 2>&-")[0] == 2
    assert shell(finished, "$P -m esmeta.train --wrong 2>&1 | true; exit ${PIPESTATUS[0]}")[0] == 2


def test_a_disk_that_is_full_is_told() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    code = "from esmeta.run.terminal import prepare_streams as p\np(); print(1, flush=True)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}"],
        env=environment(None),
        stdout=open("/dev/full", "wb"),  # noqa: SIM115
        stderr=subprocess.PIPE,
    )
    assert done.returncode != 0 and b"No space left" in done.stderr


def test_streams_of_tests_and_notebooks_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    other = io.StringIO()
    monkeypatch.setattr(sys, "stdout", other)
    monkeypatch.setattr(sys, "stderr", other)
    terminal.prepare_streams()
    assert sys.stdout is other and sys.stderr is other


# --- SIGHUP ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["train", "launch"])
def test_a_terminal_that_closes_costs_nothing(tmp_path: Path, module: str) -> None:
    words = [str(write_preset(tmp_path)), "--out", "run", *LESS[:2]]
    words += overrides("budget.generations=1000000")
    if module == "launch":
        words = ["-n", "1", "--launcher", "env N={n}", "--", *words]
    reader, writer = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", f"esmeta.{module}", *words],
        cwd=tmp_path,
        env=environment(None),
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    wait_for("step 3", lambda: len(read_metrics(tmp_path / "run")) > 3, process)
    os.close(reader)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 75
    saved = load_checkpoint(tmp_path / "run")
    assert saved is not None and saved.step == read_metrics(tmp_path / "run")[-1]["step"] >= 3
    assert summary(tmp_path / "run")["stopped_by"] == "signal"


def test_nohup_is_respected() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = Stop()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.wanted
    signal.raise_signal(signal.SIGTERM)
    assert stop.wanted
    stop.end(leaving=False)
