"""Tensors between two pages that may not be touched: who leaves them ends the process."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys

import torch
from conftest import environment
from torch import Tensor

_LIBC = ctypes.CDLL(None)
_HELD: list[mmap.mmap] = []


def fenced(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy as near as can be to the page behind it (``at_end``), else to the one before it."""
    tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    pages = -(-max(size, 1) // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    _HELD.append(memory)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        place = ctypes.c_void_p(start + page * mmap.PAGESIZE)
        assert _LIBC.mprotect(place, mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE + (pages * mmap.PAGESIZE - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor)


def stays_inside(code: str, *words: object) -> None:
    """Assert that a script ends by itself, and that a fence ends it when it does one block more.

    Its last word is how many blocks (programs) too many it is to run.
    """
    env = environment({"PYTHONPATH": os.pathsep.join(sys.path)})

    def run(more: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *map(str, words), str(more)]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    done = run(0)
    assert done.stdout == "inside\n", done.stderr
    assert run(1).returncode == -signal.SIGSEGV
