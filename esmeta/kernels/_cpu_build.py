"""Compile the CPU kernel once per size and machine, keep the machine code on disk, load it.

The compiler (numba) runs in a process of its own and only for a size that is not on disk yet, so
that ranks neither wait for its import nor hold its memory; loading takes llvmlite alone. Ranks that
miss the same size at the same time compile it once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import llvmlite.binding as llvm

_SOURCE = Path(__file__).with_name("_cpu_code.py")
_NAME = "esmeta_plastic"
# Every call writes "no result" and "no exception" here, so it has to stay.
_NOWHERE = ctypes.create_string_buffer(16)
# Addresses of the result, the exception and 14 arrays, 8 numbers.
_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 16, *[ctypes.c_int64] * 8)
_ENGINES: list[llvm.ExecutionEngine] = []


@functools.cache
def function(neurons: int, depth: int, alpha: bool, linear: bool) -> Callable[..., int]:
    """The compiled function of ``_cpu_code`` for one size; it runs without the interpreter lock."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine()
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    code = _machine_code(neurons, depth, alpha, linear)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)  # the code lives as long as its engine
    call = _PROTOTYPE(engine.get_function_address(_NAME))
    return functools.partial(call, ctypes.addressof(_NOWHERE), ctypes.addressof(_NOWHERE) + 8)


def _machine_code(*size: int) -> bytes:
    words = [str(int(value)) for value in size]
    facts = [version("numba"), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    digest = hashlib.sha256(_SOURCE.read_bytes() + repr([*facts, *words]).encode()).hexdigest()
    folder = cache_folder()
    path = folder / f"plastic-{'-'.join(words)}-{digest[:16]}.o"
    with contextlib.suppress(FileNotFoundError):
        return path.read_bytes()
    with _alone(folder / "plastic.lock"):
        if not path.exists():
            _compile(path, words)
    return path.read_bytes()


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
                "the CPU kernel could not be compiled; `pip install --force-reinstall numba` may "
                f"help. What the compiler said:\n{done.stderr[-2000:]}"
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
