"""Compile the CPU kernel once per size and machine, keep the machine code on disk, load it.

The compiler (``_compiler``, LLVM by llvmlite) runs in a process of its own and only for a size that
is not on disk yet. Loading takes no compiler where the code needs no linking, which is so on Linux
on x86-64. Ranks that miss the same size at the same time compile it once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import platform
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
_PROTOTYPE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
# Of the ELF format: a section of relocations, a section that is executable.
_RELOCATIONS, _EXECUTABLE = 4, 4
# What tells processors apart in /proc/cpuinfo.
_TELLING = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU ")
_LOADED: list[Any] = []  # code lives as long as what holds it


@functools.cache
def function(kind: str, *numbers: int) -> Callable[[int, int, int], None]:
    """A compiled function: table of addresses and sizes, first block, behind the last block.

    ``plastic`` n, S, alpha, linear (0 or 1); ``dense`` squash (0 or 1), the number of parts of the
    input, their widths and those of the layers. It runs without the interpreter lock.
    """
    code = _machine_code(kind, *numbers)
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


def _machine_code(kind: str, *numbers: int) -> bytes:
    words = [kind, *(str(int(number)) for number in (LANES, *numbers))]
    sources = [path.read_bytes() for path in sorted(_SOURCE.glob("*.py"))]
    facts = repr([version("llvmlite"), _processor(), *words, *sources])
    digest = hashlib.sha256(facts.encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"{'-'.join(words)}-{digest[:16]}.o"
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    with _alone(folder / "compiling.lock"):
        if not path.exists():
            _compile(path, words)
    return path.read_bytes()


def _processor() -> str:
    """What the code is compiled for: machines that share a cache folder may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:  # not on this system
        return platform.platform() + platform.processor()
    return platform.machine() + "\n".join(line for line in lines if line.startswith(_TELLING))


def _compile(path: Path, words: list[str]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    os.close(handle)
    try:
        done = subprocess.run(
            [sys.executable, str(_SOURCE), name, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(
                "the CPU kernel could not be compiled; `pip install --force-reinstall llvmlite` "
                f"may help. What the compiler said:\n{done.stderr[-2000:]}"
            )
        # Atomic: whoever finds the file finds all of it.
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Let one process of this machine at a time in, where files can be locked."""
    try:
        import fcntl
    except ImportError:  # not on this system: then ranks may compile the same twice
        yield
        return
    with open(lock, "w") as file:
        with contextlib.suppress(OSError):  # some network file systems cannot lock
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def cache_folder() -> Path:
    """Where machine code is kept: $ESMETA_CACHE, beside this file, or in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = os.environ.get("ESMETA_CACHE")
    for folder in (own, _SOURCE.parent / "__pycache__", Path(home) / "esmeta"):
        if folder is None:
            continue
        with contextlib.suppress(OSError):
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return Path(folder)
    return Path(tempfile.mkdtemp(prefix="esmeta-"))
