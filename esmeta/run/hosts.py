"""Machines and processes of a launch: which hosts answer, and that no process is left behind."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from esmeta.errors import UserError

_CONNECT_S = 5
_PROBE_S = 15.0
_LIBC = ctypes.CDLL(None)
_SET_PARENT_DEATH_SIGNAL = 1
_LINE = re.compile(r"([^\s:#]+)(?::(\d+))?((\s+\w+=\S+)*)")


@dataclass(frozen=True)
class Host:
    """A machine, how many ranks it takes, and its line for the launcher."""

    name: str
    slots: int
    line: str


def read_hosts(file: Path) -> tuple[Host, ...]:
    """The hosts of a file with one ``HOST`` or ``HOST:SLOTS`` per line (MPICH's format)."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--hosts {file} cannot be read ({error}); give a text file with lines HOST:SLOTS"
        ) from None
    hosts = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        slots = int(found[2] or 1) if found else 0
        if found is None or slots < 1 or "slots" in line:
            raise UserError(
                f"--hosts {file}: line {number} is {line!r}; write HOST or HOST:SLOTS, with at "
                "least one slot, for example node1:8"
            )
        hosts.append(Host(found[1], slots, line))
    if not hosts:
        raise UserError(f"--hosts {file} names no host; write a line HOST:SLOTS for each")
    return tuple(hosts)


def _is_here(name: str) -> bool:
    own = socket.gethostname()
    return name in {"localhost", "127.0.0.1", "::1", own, own.partition(".")[0], socket.getfqdn()}


def _answers(host: Host) -> bool:
    if _is_here(host.name):
        return True
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}"]
    try:
        done = subprocess.run(
            ["ssh", *options, host.name, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PROBE_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def answering(hosts: Sequence[Host]) -> tuple[Host, ...]:
    """Those of the hosts that answer ssh (or are this one), in their order; asked all at once."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = list(pool.map(_answers, hosts))
    return tuple(host for host, answer in zip(hosts, answers, strict=True) if answer)


def stop_with_parent() -> None:
    """In a new process: have it told to stop (SIGTERM) when its parent dies. Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _marked(mark: str) -> list[int]:
    """This machine's processes with ``NAME=VALUE`` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # not ours to read, or gone
        if mark.encode() in environment:
            found.append(int(folder.name))
    return found


def end_marked(mark: str, seconds: float = 10.0) -> None:
    """Kill what is left of this machine's processes with ``NAME=VALUE`` in their environment.

    Two starts of a run must never write to one directory.
    """
    end = time.monotonic() + seconds
    grace = time.monotonic() + 1.0
    while (found := _marked(mark)) and time.monotonic() < end:
        if time.monotonic() > grace:
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        time.sleep(0.05)
