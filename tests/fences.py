"""Tensors between two pages that may not be touched: who leaves them ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
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
