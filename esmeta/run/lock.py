"""The lock of a run directory: one process writes to it at a time, here or on another machine.

``run.lock`` says who writes, and is locked (flock) for as long as that process lives. So one that
is left by a process of this machine that is dead is free, whoever has its number now. One that
another machine has left is not, unless by an earlier start of the same launch: not every file
system tells its locks to other machines.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

from esmeta.errors import UserError

NAME = "run.lock"

# Of ranks that esmeta.launch has started, and replaced by others, but that have not ended yet.
_GRACE_S = 30.0
# A process that was killed gives its memory back first, and then its files with their locks.
_MOMENT_S = 2.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock: ``pid`` on the machine ``machine``, which others call ``host``.

    ``launch`` and ``start`` are those of :mod:`esmeta.launch`: its later starts follow on earlier
    ones.
    """

    host: str
    machine: str
    pid: int
    launch: str
    start: int

    @classmethod
    def own(cls) -> Holder:
        """This process."""
        start = os.environ.get("ESMETA_LAUNCH_START", "")
        machine = ""
        with contextlib.suppress(OSError, UnicodeDecodeError):  # not on this system
            machine = Path("/etc", "machine-id").read_text(encoding="utf-8").strip()
        launch = os.environ.get("ESMETA_LAUNCH", "")
        number = int(start) if start.isdecimal() else 0
        return cls(socket.gethostname(), machine, os.getpid(), launch, number)

    @classmethod
    def of(cls, data: bytes) -> Holder | None:
        """Who wrote ``data``; None where they cannot be read. Older locks say more."""
        try:
            told = json.loads(data)
            return cls(**{name: told[name] for name in cls.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            return None

    def is_here(self, me: Holder) -> bool:
        """Whether this machine knows the process."""
        return (self.host, self.machine) == (me.host, me.machine)

    def is_earlier_start(self, me: Holder) -> bool:
        """Whether :mod:`esmeta.launch` has ended this one and started ``me`` instead."""
        return self.launch == me.launch != "" and self.start < me.start


class RunLock:
    """The lock of ``folder``, taken; a :class:`UserError` that says who holds it if it is not free.

    It is let go by :meth:`release`, or when nobody refers to it any more, or at the end of the
    process; a process that is killed leaves it, and the next one takes it over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._me = Holder.own()
        self._path = folder.absolute() / NAME
        self._file = self._take()
        _HELD.add(self._file)
        self.release = weakref.finalize(self, _release, self._path, self._file, self._me)

    def check(self) -> None:
        """Refuse to go on where the folder is no longer this run's: removed, moved or replaced."""
        found = _holder_at(self._path)
        # Where locks do not reach, a later start of the launch has written to this very file.
        if found != self._me or not _is_at(self._file, self._path):
            now = "its lock is gone" if found is None else f"{_named(found)} writes to it now"
            raise UserError(
                f"{self._folder} was removed, moved or given to another run ({now}); this run ends "
                "here: go on from its last checkpoint with --resume, or give another --out"
            )

    def _take(self) -> int:
        """The descriptor of the lock, which is held while it is open."""
        began = time.monotonic()
        while True:
            file = _open(self._path)
            locked, data = _lock(file), os.pread(file, 1 << 16, 0)
            holder = Holder.of(data)
            early = holder is not None and holder.is_earlier_start(self._me)
            dead = locked is True and holder is not None and holder.is_here(self._me)
            free = locked is not False and (dead or early or not data)
            if free and _is_at(file, self._path):
                try:
                    _write(file, json.dumps(asdict(self._me)).encode() + b"\n")
                    return file
                except PermissionError:  # left by another user of the group
                    if not data:
                        raise
                    self._path.unlink()
            os.close(file)
            if free:
                continue  # let go just now
            patience = _GRACE_S if early else _MOMENT_S if locked is False else 0.0
            if time.monotonic() - began >= patience:
                raise self._refusal(data, holder, locked)
            time.sleep(0.1)

    def _refusal(self, data: bytes, holder: Holder | None, locked: bool | None) -> UserError:
        if holder is None:
            who = "has a lock that cannot be read" if data else "is in use by another process"
            why = f"{who}; if nobody writes to it, delete {self._path}"
        elif locked is False and holder.is_here(self._me):
            why = f"is in use by {_named(holder)}; stop that one or wait for its end"
        else:
            why = (
                f"is in use by {_named(holder)}, of which nothing is known on {self._me.host}; if "
                f"that job is dead, delete {self._path}"
            )
        return UserError(f"{self._folder} {why}, or give another --out")


_HELD: set[int] = set()  # descriptors


def _let_parent_alone_hold() -> None:
    """A child that was forked must not hold the lock after its parent has been killed."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_parent_alone_hold)


def _named(holder: Holder) -> str:
    return f"process {holder.pid} on {holder.host}"


def _holder_at(path: Path) -> Holder | None:
    try:
        return Holder.of(path.read_bytes())
    except FileNotFoundError:
        return None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except PermissionError:
        if not path.exists():  # the folder cannot be written
            raise
        return os.open(path, os.O_RDONLY)  # another user's, to say whose


def _lock(file: int) -> bool | None:
    """Whether the file is locked by this process now; None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is the one that lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _write(file: int, data: bytes) -> None:
    """Replace what is in a file, which all users may read, and sync it."""
    os.fchmod(file, 0o644)
    os.ftruncate(file, 0)
    os.pwrite(file, data, 0)
    os.fsync(file)


def _release(path: Path, file: int, me: Holder) -> None:
    if os.getpid() == me.pid:  # a child that was forked does not let go of what its parent holds
        with contextlib.suppress(OSError):  # then it is taken over
            if _is_at(file, path) and _holder_at(path) == me:
                path.unlink()
        _HELD.discard(file)
        os.close(file)
