"""A run directory has one writer: who comes second is told, and who is dead is followed."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, wait_for
from test_record import make_config, saved_run, theta
from tiny_runs import files, run_here, write_preset

from esmeta.errors import UserError
from esmeta.run import lock as locks
from esmeta.run.lock import Holder, RunLock
from esmeta.run.record import RunDir, read_metrics

# Says when it has the lock, and does what it is told by the next line or the end of its stdin.
HOLD = """
import sys
from pathlib import Path
from esmeta.run.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("taken", flush=True)
{}
"""


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_MOMENT_S", 0.0)


def holder(folder: Path, then: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """Another process that has taken the lock of ``folder``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(None),
    )
    assert process.stdout is not None and process.stdout.readline() == "taken\n"
    return process


def left(folder: Path, name: str = "run.lock", **changes: Any) -> bytes:
    """A lock like one of this process, with changes, that nobody lets go of."""
    data = json.dumps(dataclasses.asdict(dataclasses.replace(Holder.own(), **changes))).encode()
    (folder / name).write_bytes(data)
    return data


def refused(folder: Path) -> str:
    before = files(folder)
    with pytest.raises(UserError) as caught:
        RunLock(folder)
    assert files(folder) == before
    return str(caught.value)


def taken(folder: Path) -> None:
    """The lock can be taken, is ours then, and leaves nothing."""
    lock = RunLock(folder)
    assert json.loads((folder / "run.lock").read_bytes())["pid"] == os.getpid()
    assert os.listdir(folder) == ["run.lock"]
    lock.check()
    lock.release()
    assert os.listdir(folder) == []


def test_the_second_comer_is_told_who_is_there(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    message = refused(tmp_path)
    assert re.search(rf"in use by process {os.getpid()} on \S+; .*another --out", message)
    lock.release()
    taken(tmp_path)


def test_others_may_read_who_is_there_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        lock = RunLock(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "run.lock").stat().st_mode & 0o777 == 0o644
    lock.release()


def test_a_killed_process_is_followed_as_a_living_one_is_not(tmp_path: Path) -> None:
    process = holder(tmp_path)
    assert f"process {process.pid} on" in refused(tmp_path)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    lock = RunLock(tmp_path)  # although the dead one has a number still
    lock.release()
    process.wait()
    taken(tmp_path)


@pytest.mark.parametrize("changes", [{"host": "node7"}, {"machine": "another"}])
def test_what_cannot_be_known_from_here_is_not_stolen(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    left(tmp_path, pid=2**22 + 1, **changes)
    message = refused(tmp_path)
    where = changes.get("host", Holder.own().host)
    assert f"process {2**22 + 1} on {where}" in message
    assert f"if that job is dead, delete {tmp_path / 'run.lock'}" in message
    (tmp_path / "run.lock").unlink()
    taken(tmp_path)


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"pid": 3}', b"\xff"])
def test_a_lock_that_cannot_be_read_is_not_stolen(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.lock").write_bytes(data)
    assert f"delete {tmp_path / 'run.lock'}" in refused(tmp_path)


def test_a_lock_that_was_never_written_is_free(tmp_path: Path) -> None:
    (tmp_path / "run.lock").touch()
    taken(tmp_path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock = RunLock(tmp_path)
    assert f"if that job is dead, delete {tmp_path / 'run.lock'}" in refused(tmp_path)
    lock.release()
    taken(tmp_path)


def test_a_later_start_is_noticed_and_left_alone_where_nothing_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv("ESMETA_LAUNCH", "a")
    monkeypatch.setenv("ESMETA_LAUNCH_START", "1")
    early = RunLock(tmp_path)
    monkeypatch.setenv("ESMETA_LAUNCH_START", "2")
    late = RunLock(tmp_path)
    with pytest.raises(UserError, match="given to another run"):
        early.check()
    early.release()
    late.check()
    late.release()
    assert os.listdir(tmp_path) == []


def test_children_keep_their_files_when_a_lock_is_let_go_before(tmp_path: Path) -> None:
    """Those of children as well: the number of a lock's file is given to other files then."""

    def writes() -> int:
        with open(tmp_path / "mine", "w") as file:
            child = fork(lambda: 0 if os.fstat(file.fileno()) else 1)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    lock = RunLock(tmp_path)
    child = fork(writes)  # in which the lock is closed, and its number free
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lock.release()
    assert writes() == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(PermissionError):
        RunLock(tmp_path)


def test_a_dead_colleagues_lock_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the folder may go on, but not write to what another user has left."""
    left(tmp_path, pid=1)
    theirs, plain = os.open(tmp_path / "run.lock", os.O_RDONLY), os.fchmod

    def fchmod(file: int, mode: int) -> None:
        if os.path.sameopenfile(file, theirs):
            raise PermissionError(errno.EPERM, "not yours")
        plain(file, mode)

    monkeypatch.setattr(os, "fchmod", fchmod)
    lock = RunLock(tmp_path)
    assert os.fstat(theirs).st_nlink == 0
    lock.check()
    os.close(theirs)


def test_an_older_lock_is_read(tmp_path: Path) -> None:
    older = dataclasses.asdict(Holder.own()) | {"boot": "x", "space": "y", "began": "1"}
    (tmp_path / "run.lock").write_text(json.dumps(older | {"token": "z"}))
    taken(tmp_path)


def test_one_of_many_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where everybody has opened the dead one's lock before anybody has taken it."""
    takers, lock = 6, locks._lock
    together: Path | None = None  # a folder in which all wait for each other once

    def after_all_have_opened(file: int) -> bool | None:
        nonlocal together
        if together is not None:
            gather(together, takers)
            together = None
        time.sleep(0.002 * (os.getpid() % takers))
        return lock(file)

    monkeypatch.setattr(locks, "_lock", after_all_have_opened)
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        left(folder, pid=2**22 + 1)
        together = tmp_path / f"{attempt}-opened" if attempt < 2 else None
        children = [fork(lambda folder=folder: try_to_take(folder, takers)) for _ in range(takers)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0] + [2] * (takers - 1)
        assert os.listdir(folder) == []


def test_a_lock_that_is_let_go_while_another_one_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, lock = RunLock(tmp_path), locks._lock

    def after_it_is_let_go(file: int) -> bool | None:
        first.release()
        return lock(file)

    monkeypatch.setattr(locks, "_lock", after_it_is_let_go)
    taken(tmp_path)


def fork(body: Callable[[], int]) -> int:
    child = os.fork()
    if child == 0:
        code = 3
        signal.alarm(280)  # none of those that wait for others outlives the test
        try:
            code = body()
        finally:
            os._exit(code)
    return child


def try_to_take(folder: Path, takers: int) -> int:
    code = 0
    lock = None
    try:
        lock = RunLock(folder)
    except UserError:
        code = 2
    # Others may take what is let go, so that is when all have tried.
    gather(folder.with_name(f"{folder.name}-tried"), takers)
    if lock is not None:
        lock.check()
    return code


def gather(folder: Path, count: int) -> None:
    """Wait until ``count`` processes are here."""
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).touch()
    wait_for("all are here", lambda: len(os.listdir(folder)) == count)


@pytest.mark.parametrize(
    "then", ["", "sys.exit(3)", "raise RuntimeError", "del lock; print(); sys.stdin.read()"]
)
def test_it_is_let_go_at_every_way_out(tmp_path: Path, then: str) -> None:
    process = holder(tmp_path, then)
    if "del" in then:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        assert os.listdir(tmp_path) == [] and process.poll() is None
        process.kill()
    process.wait()
    assert os.listdir(tmp_path) == []


def test_a_forked_child_does_not_let_go(tmp_path: Path) -> None:
    process = holder(
        tmp_path, "import os\nif os.fork() == 0: sys.exit()\nos.wait(); lock.check(); os._exit(0)"
    )
    assert process.wait() == 0
    assert os.listdir(tmp_path) == ["run.lock"]


def test_a_forked_child_does_not_hold_what_its_parent_left(tmp_path: Path) -> None:
    then = "import os\nif os.fork() == 0: print('child', flush=True)\nsys.stdin.read()"
    process = holder(tmp_path, then)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "child\n"
    assert f"process {process.pid} on" in refused(tmp_path)
    process.kill()
    process.wait()
    taken(tmp_path)
    process.stdin.close()  # the end of the child


def test_a_process_that_is_dying_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_MOMENT_S", 250.0)
    first, lock = RunLock(tmp_path), locks._lock
    seen: list[bool | None] = []

    def while_it_dies(file: int) -> bool | None:
        if len(seen) == 2:
            first.release()
        seen.append(lock(file))
        return seen[-1]

    monkeypatch.setattr(locks, "_lock", while_it_dies)
    taken(tmp_path)
    assert seen[:2] == [False, False] and seen[-1]


# --- starts of esmeta.launch -------------------------------------------------------------------


def test_a_later_start_follows_on_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESMETA_LAUNCH", "abc")
    monkeypatch.setenv("ESMETA_LAUNCH_START", "1")
    left(tmp_path, host="node7", start=0)
    taken(tmp_path)
    others: list[dict[str, Any]] = [{"start": 1}, {"start": 2}, {"start": 0, "launch": "xyz"}]
    for other in others:
        left(tmp_path, host="node7", **other)
        assert "node7" in refused(tmp_path)


def test_a_later_start_waits_for_ranks_that_are_dying(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESMETA_LAUNCH", "abc")
    process = holder(tmp_path)
    monkeypatch.setenv("ESMETA_LAUNCH_START", "1")
    now, naps = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        naps.append(seconds)
        now += seconds
        if patient and len(naps) == 5:
            process.kill()
            process.wait()

    monkeypatch.setattr(locks.time, "monotonic", lambda: now)
    monkeypatch.setattr(locks.time, "sleep", sleep)
    patient = False
    assert f"process {process.pid} on" in refused(tmp_path)
    assert sum(naps) == pytest.approx(locks._GRACE_S, abs=0.2)
    patient, naps = True, []
    lock = RunLock(tmp_path)
    assert len(naps) == 5
    lock.release()


# --- runs --------------------------------------------------------------------------------------


def test_a_run_in_use_is_not_touched(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(UserError, match="run is in use by process"):
        run_here("--resume", tmp_path / "run")
    assert files(tmp_path) == before
    run.log(3, {"x": 1})
    run.close()
    assert [record["step"] for record in read_metrics(tmp_path / "run")][-1] == 3
    RunDir.create(tmp_path / "run", make_config(), resume=True).close()


def test_a_new_run_in_a_folder_that_another_one_has_just_made(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(UserError, match="run is in use by process"):
        run_here(write_preset(tmp_path), "--out", tmp_path / "run")
    assert files(tmp_path) == before | files(tmp_path)
    assert set(files(tmp_path / "run")) == {"run.lock"}
    lock.release()
    assert run_here(tmp_path / "tiny.toml", "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run" / "run.lock").exists()


def test_the_lock_is_held_until_all_is_written_and_gone_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def fails(*_: Any) -> None:
        held.append((tmp_path / "run" / "run.lock").exists())
        raise RuntimeError("in the middle")

    preset = write_preset(tmp_path)
    for name in ("report", "Trainer._step"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="in the middle"):
            patch.setattr(f"esmeta.run.train.{name}", fails)
            run_here(preset, "--out", tmp_path / "run")
        assert held[-1] and not (tmp_path / "run" / "run.lock").exists()
        shutil.rmtree(tmp_path / "run")
    assert len(held) == 2


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
@pytest.mark.parametrize("what", ["log", "save_checkpoint", "save_best", "finish"])
def test_a_writer_whose_folder_is_gone_says_so(tmp_path: Path, how: str, what: str) -> None:
    run = saved_run(tmp_path / "run")
    if how == "moved":
        (tmp_path / "run").rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(tmp_path / "run")
    new = saved_run(tmp_path / "run") if how == "replaced" else None
    before = files(tmp_path)
    writes: dict[str, Callable[[], None]] = {
        "log": lambda: run.log(3, {"x": 1}),
        "save_checkpoint": lambda: run.save_checkpoint(3, theta(3), {}),
        "save_best": lambda: run.save_best(3, theta(3), 1.0),
        "finish": lambda: run.finish(3, theta(3), env_steps=1, ranks=1, stopped_by="steps"),
    }
    with pytest.raises(UserError, match=r"run was removed, moved or given .*--resume"):
        writes[what]()
    run.close()
    assert files(tmp_path) == before
    if new is not None:
        new.log(3, {"x": 1})
        new.close()
