"""Tensors between two pages that may not be touched: who leaves them ends the process."""

from __future__ import annotations

import ctypes
import json
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


# Torch is loaded once, and every case runs in a process that is forked from there.
_EACH = """
import json, os, sys
import torch, test_kernels
code = compile(sys.argv[1], "fenced", "exec")
ends = []
for words in json.loads(sys.argv[2]):
    child = os.fork()
    if child == 0:
        sys.argv = ["fenced", *words]
        exec(code, {"__name__": "__main__"})
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


def stay_inside(code: str, *cases: tuple[object, ...]) -> None:
    """Assert that a script ends by itself, and that a fence ends it when it does one block more.

    It is run for each of ``cases``, its arguments, and then how many blocks (programs) too many it
    is to run.
    """
    env = environment({"PYTHONPATH": os.pathsep.join(sys.path)})
    words = [[*map(str, case), str(more)] for case in cases for more in (0, 1)]
    command = [sys.executable, "-c", _EACH, code, json.dumps(words)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ends = dict(zip(map(tuple, words), json.loads(done.stdout), strict=True))
    expected = {case: 0 if case[-1] == "0" else -signal.SIGSEGV for case in ends}
    assert ends == expected, done.stderr
