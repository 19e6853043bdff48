"""Compile the CPU kernel once per size and machine, keep the machine code on disk, load it.

The compiler (``_compiler``, LLVM by llvmlite) runs in a process of its own and only for a size that
is not on disk yet. Loading takes no compiler where the code needs no linking, which is so on Linux
on x86-64. Ranks that miss the same size at the same time compile it once.

Code on disk is run only if it is whole, is for this size and machine, and nobody but this user or
root can have written it; else it is compiled again. Where nothing can be kept, every process
compiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import platform
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from esmeta.kernels._cpu_run import LANES

_SOURCE = Path(__file__).with_name("_compiler")
_NAME = "esmeta_kernel"
BEGIN = b"\nesmeta machine code\n"
"""What the compiler says before it writes the code to its stdout."""
_USER = os.geteuid()
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
# Of the ELF format: a section of relocations, a section that is executable.
_RELOCATIONS, _EXECUTABLE = 4, 4
# What tells processors apart in /proc/cpuinfo.
_TELLING = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
_LOADED: list[Any] = []  # code lives as long as what holds it


Function = Callable[[int, int, int], None]
"""Of a table of addresses and sizes, the first block, and the one behind the last."""


@functools.cache
def function(kind: str, *words: int | str) -> Function:
    """A compiled function, which runs without the interpreter lock.

    ``plastic`` and ``backward``: n, S, alpha (0 or 1), the name of the write rule; ``dense``:
    squash (0 or 1), the number of parts of the input, their widths and those of the layers.
    """
    code = _machine_code(kind, *words)
    direct = sys.platform == "linux" and platform.machine() == "x86_64"
    text = _text(code) if direct else None
    return _PROTOTYPE(_linked(code) if text is None else _placed(text))


def _text(code: bytes) -> bytes | None:
    """The instructions of an ELF object that defines one function; None if they need linking."""
    table, size, count = (
        *struct.unpack_from("<Q", code, 0x28),
        *struct.unpack_from("<HH", code, 0x3A),
    )
    found = None
    for start in range(table, table + count * size, size):
        _, kind, flags, _, offset, length = struct.unpack_from("<IIQQQQ", code, start)
        if kind == _RELOCATIONS and length:
            return None
        if flags & _EXECUTABLE and length:
            if found is not None:
                return None
            found = code[offset : offset + length]
    return found


def _placed(text: bytes) -> int:
    """The address of instructions, in memory that is no longer written to."""
    memory = mmap.mmap(-1, len(text))
    memory.write(text)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    pages = ctypes.c_size_t(-(-len(text) // mmap.PAGESIZE) * mmap.PAGESIZE)
    if protect(ctypes.c_void_p(address), pages, mmap.PROT_READ | mmap.PROT_EXEC):
        why = os.strerror(ctypes.get_errno())
        raise RuntimeError(f"this system does not let compiled code run: {why}")
    _LOADED.append(memory)
    return address


def _linked(code: bytes) -> int:
    """The address of the function, linked by LLVM."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _LOADED.append(engine)
    return engine.get_function_address(_NAME)


def _machine_code(kind: str, *given: int | str) -> bytes:
    words = [kind, str(LANES), *(str(word) for word in given)]
    sources = [path.read_bytes() for path in sorted(_SOURCE.glob("*.py"))]
    facts = repr([version("llvmlite"), _processor(), *words, *sources])
    key = hashlib.sha256(facts.encode()).hexdigest()
    stem = f"{'-'.join(words)}-{key[:16]}"
    folders = cache_folders()
    found = _stored(folders, stem, key)
    if found is not None:
        return found
    with _alone(folders):
        found = _stored(folders, stem, key)
        if found is None:
            found = _compiled(words)
            _store(folders, stem, key, found)
    return found


def _header(key: str, code: bytes) -> bytes:
    """What stands before machine code: what it is for, and that it is whole."""
    return f"esmeta {key} {len(code)} {hashlib.sha256(code).hexdigest()}\n".encode()


def _stored(folders: list[Path], stem: str, key: str) -> bytes | None:
    """Machine code that this user or root has stored; None where there is none to be trusted.

    A checksum tells damage, not who wrote: whoever can write a file can write its checksum. So the
    file must belong to this user or to root, and nobody else may write to it; a file is asked after
    it was opened, so that it cannot be another one then.
    """
    for folder in folders:
        for owner in dict.fromkeys((_USER, 0)):
            try:
                handle = os.open(folder / f"{stem}-{owner}.o", os.O_RDONLY | os.O_NOFOLLOW)
                with open(handle, "rb") as file:
                    facts = os.fstat(handle)
                    if not (stat.S_ISREG(facts.st_mode) and facts.st_uid in (_USER, 0)):
                        continue
                    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                        continue
                    first, _, code = file.read().partition(b"\n")
            except OSError:  # absent, or not ours to read
                continue
            if first + b"\n" == _header(key, code):
                return code
    return None


def _store(folders: list[Path], stem: str, key: str, code: bytes) -> None:
    """Keep machine code where that is possible; who cannot keep it compiles it again."""
    for folder in folders:
        name = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder, suffix=".part")
            with open(handle, "wb") as file:
                file.write(_header(key, code) + code)
                os.fchmod(handle, 0o644)
            # Atomic: whoever finds the file finds all of it.
            os.replace(name, folder / f"{stem}-{_USER}.o")
            return
        except OSError:  # read-only, full, not a folder: then the next one
            if name:
                with contextlib.suppress(OSError):
                    os.unlink(name)


def _processor() -> str:
    """What the code is compiled for: machines that share a cache folder may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not on this system
        return platform.platform() + platform.processor() + platform.node()
    return platform.machine() + "\n".join(line for line in lines if line.startswith(_TELLING))


def _compiled(words: list[str]) -> bytes:
    done = subprocess.run(
        [sys.executable, str(_SOURCE), *words], stdin=subprocess.DEVNULL, capture_output=True
    )
    _, begun, code = done.stdout.partition(BEGIN)
    if done.returncode or not begun:
        said = done.stderr.decode(errors="replace")
        raise RuntimeError(
            f"the CPU kernel could not be compiled: the compiler {_ended(done.returncode)}; `pip "
            "install --force-reinstall llvmlite` may help. What it said:\n"
            f"{said[-2000:] or '(nothing)'}"
        )
    return code


def _ended(code: int) -> str:
    """How a process ended, by what :mod:`subprocess` calls its return code."""
    if code >= 0:
        return f"ended with exit code {code}" + ("" if code else ", but gave no code")
    memory = " (as when memory runs out)" if code == -signal.SIGKILL else ""
    return f"was ended by signal {-code}, {signal.strsignal(-code)}{memory}"


@contextlib.contextmanager
def _alone(folders: list[Path]) -> Iterator[None]:
    """Let one process of this user and machine at a time in, where files can be locked."""
    with contextlib.ExitStack() as stack:
        for folder in folders:
            try:
                import fcntl

                folder.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                handle = os.open(folder / f"compiling-{_USER}.lock", flags, 0o600)
            except (ImportError, OSError):  # then ranks may compile the same twice
                continue
            stack.callback(os.close, handle)
            # One that another user has made could be held for ever. Some file systems cannot lock.
            if os.fstat(handle).st_uid == _USER:
                with contextlib.suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_EX)
            break
        yield


def cache_folders() -> list[Path]:
    """Where machine code is looked for, and kept in the first that can be written.

    $ESMETA_CACHE, beside this file, and the user's cache. They may be shared: see :func:`_stored`.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = os.environ.get("ESMETA_CACHE")
    user = [Path(home) / "esmeta"] if os.path.isabs(home) else []  # no home: "~" stays as it is
    return [*([Path(own)] if own else []), _SOURCE.parent / "__pycache__", *user]
