"""The lock of a run directory: one process writes to it at a time, here or on another machine.

``run.lock`` says who writes. It appears complete and at once, by a hard link to a file that was
written before, which also holds on network file systems; where there are no hard links it is made
exclusively. A lock that is left by a process of this machine that is dead is taken over, by one
process at a time. That of another machine is not: whether its process lives cannot be told from
here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

from esmeta.errors import UserError

NAME = "run.lock"

# Of ranks that esmeta.launch has started, and replaced by others, but that have not ended yet.
_GRACE_S = 30.0
_WRITE_S = 1.0
_EXITING = 4  # Linux's flag PF_EXITING of a process
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    ``host``, ``machine`` and ``space`` (of process numbers) say where ``pid`` means something;
    ``boot`` and ``began`` tell it from an earlier process of that number. ``launch`` and ``start``
    are those of :mod:`esmeta.launch`: its later starts follow on earlier ones.
    """

    host: str
    machine: str
    space: str
    boot: str
    pid: int
    began: str
    launch: str
    start: int
    token: str

    @classmethod
    def own(cls) -> Holder:
        """This process."""
        kernel = Path("/proc", "sys", "kernel", "random", "boot_id")
        try:
            space = os.readlink(Path("/proc", "self", "ns", "pid"))
        except OSError:  # not on this system
            space = ""
        start = os.environ.get("ESMETA_LAUNCH_START", "")
        return cls(
            host=socket.gethostname(),
            machine=_line(Path("/etc", "machine-id")),
            space=space,
            boot=_line(kernel),
            pid=os.getpid(),
            began=_state_and_begin(os.getpid())[1],
            launch=os.environ.get("ESMETA_LAUNCH", ""),
            start=int(start) if start.isdecimal() else 0,
            token=uuid.uuid4().hex,
        )

    def is_here(self, me: Holder) -> bool:
        """Whether this machine knows the process, or has been started anew since."""
        same = (self.host, self.machine) == (me.host, me.machine)
        return same and (self.boot != me.boot or self.space == me.space)

    def is_alive(self, me: Holder) -> bool:
        """Whether the process lives; it must be of this machine."""
        if self.boot != me.boot:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        state, began = _state_and_begin(self.pid)
        ended = state in ("Z", "X")
        return not ended and ("" in (began, self.began) or began == self.began)

    def is_earlier_start(self, me: Holder) -> bool:
        """Whether :mod:`esmeta.launch` has ended this one and started ``me`` instead."""
        return self.launch == me.launch != "" and self.start < me.start


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):  # not on this system
        return ""


def _state_and_begin(pid: int) -> tuple[str, str]:
    """State and time of start of a process as Linux has them; empty where that is not known."""
    words = _line(Path("/proc", str(pid), "stat")).rpartition(")")[2].split()
    if len(words) <= 19:
        return "", ""
    # One that was killed is at work for a while yet, as its memory is given back.
    return "X" if int(words[6]) & _EXITING else words[0], words[19]


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _holder(data: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None


class RunLock:
    """The lock of ``folder``, taken; a :class:`UserError` that says who holds it if it is not free.

    It is let go by :meth:`release`, or when nobody refers to it any more, or at the end of the
    process; a process that is killed leaves it, and the next one takes it over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = Holder.own()
        self._path = folder.absolute() / NAME
        self._data = json.dumps(asdict(self._me)).encode() + b"\n"
        self._take(self._path)
        self.release = weakref.finalize(self, _release, self._path, self._data, os.getpid())

    def check(self) -> None:
        """Refuse to go on where the folder is no longer this run's: removed, moved or replaced."""
        found = _bytes(self._path)
        if found != self._data:
            holder = None if found is None else _holder(found)
            now = "its lock is gone" if holder is None else f"{_named(holder)} writes to it now"
            raise UserError(
                f"{self._folder} was removed, moved or given to another run ({now}); this run ends "
                "here: go on from its last checkpoint with --resume, or give another --out"
            )

    def _take(self, path: Path) -> None:
        written = path.with_name(f"{path.name}.{self._me.token}")
        _write(written, self._data)
        try:
            self._take_by(path, written)
        finally:
            written.unlink(missing_ok=True)

    def _take_by(self, path: Path, written: Path) -> None:
        waited_until = time.monotonic() + _GRACE_S
        while not _linked(written, path, self._data):
            found = _bytes(path)
            if found is None:
                continue  # let go just now
            if self._is_held(found, path):
                holder = _holder(found)
                early = holder is not None and holder.is_earlier_start(self._me)
                if not early or time.monotonic() > waited_until:
                    raise self._refusal(holder, path)
                time.sleep(0.1)
                continue
            # Of several that find a dead one's lock, one replaces it: the one that holds the next.
            guard = path.with_name(f"{path.name}.next")
            self._take(guard)
            try:
                if _bytes(path) == found:
                    os.replace(written, path)
                    return
            finally:
                guard.unlink(missing_ok=True)

    def _is_held(self, data: bytes, path: Path) -> bool:
        end = time.monotonic() + _WRITE_S
        while (holder := _holder(data)) is None and time.monotonic() < end:
            time.sleep(0.05)  # without hard links it is seen while it is written
            data = _bytes(path) or data
        if holder is None:
            return True
        if not holder.is_here(self._me):
            return not holder.is_earlier_start(self._me)
        return holder.is_alive(self._me)

    def _refusal(self, holder: Holder | None, path: Path) -> UserError:
        if holder is None:
            why = f"has a lock that cannot be read; if nobody writes to it, delete {path}"
        elif holder.is_here(self._me):
            why = f"is in use by {_named(holder)}; stop that one or wait for its end"
        else:
            why = (
                f"is in use by {_named(holder)}, of which nothing is known on {self._me.host}; if "
                f"that job is dead, delete {path}"
            )
        return UserError(f"{self._folder} {why}, or give another --out")


def _named(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host}"


def _write(path: Path, data: bytes) -> None:
    """Make a file that did not exist, which all users may read, and sync it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        os.chmod(path, 0o644)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _linked(written: Path, path: Path, data: bytes) -> bool:
    """Whether ``path`` did not exist and now is the file ``written``, which holds ``data``."""
    try:
        os.link(written, path)
    except FileExistsError:
        # A network file system may have done it and lost the answer.
        return _bytes(path) == data
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            _write(path, data)
        except FileExistsError:
            return False
    return True


def _release(path: Path, data: bytes, pid: int) -> None:
    # A child that was forked does not let go of what its parent holds.
    with contextlib.suppress(OSError):  # then it is taken over
        if os.getpid() == pid and _bytes(path) == data:
            path.unlink(missing_ok=True)
