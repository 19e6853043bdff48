"""What all compiled CPU functions are run with: constants, addresses, threads."""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from esmeta.errors import UserError

# Rows of matrices are padded to a multiple of LANES columns: then all of them begin where a vector
# register's worth of memory does. TOGETHER as in what is compiled, _compiler/block.py.
LANES = 16 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 8
TOGETHER = 4
# tanh(x) = x P(x^2) / Q(x^2) on |x| <= 9.02, where it rounds to 1: a fit of our own, relative
# error 2.1e-8, in float32 arithmetic 3.0e-7. The bounds of x, the lower one of tanh, then P and Q
# from the highest power on; the last 1 is also the upper bound of tanh.
_P = (1.331889531996922e-08, 2.058343306998722e-05, 0.003494035685434937, 0.1337971985340118, 1.0)
_Q = (7.761969982311712e-07, 0.000328309164615348, 0.02587108127772808, 0.4671303629875183, 1.0)
CONSTANTS = torch.tensor([-9.02, 9.02, -1.0, *_P, *_Q], dtype=torch.float32, device="cpu")
_CPU = torch.device("cpu")
# Fewer multiply-adds than this are not worth handing to another thread.
_THREAD_WORK = 500_000


def address(tensor: Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    if tensor is None:
        return 0
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise UserError(
            f"a {type(tensor).__name__} of shape {tuple(tensor.shape)} holds no numbers that "
            "compiled code could read; pass an ordinary torch.Tensor"
        )
    return place


def blank(*shape: int) -> Tensor:
    """New float32 memory on the CPU, whatever a caller's defaults are."""
    return torch.empty(shape, dtype=torch.float32, device=_CPU)


def zeros(*shape: int) -> Tensor:
    """The same, filled with 0."""
    return torch.zeros(shape, dtype=torch.float32, device=_CPU)


def plain(tensor: Tensor) -> Tensor:
    """Contiguous, without history, in memory as its values are."""
    return tensor.detach().resolve_neg().contiguous()


def run_blocks(
    call: Callable[[int, int, int], None], table: array[int], blocks: int, work: int, room: int = 0
) -> None:
    """Run all blocks of a compiled function over ``torch.get_num_threads()`` threads.

    ``work`` is the number of multiply-adds of them all. A function that needs ``room``, so many
    numbers that are 0, gets it for every thread; its address then comes first in the table.
    """
    threads = max(1, min(torch.get_num_threads(), blocks, work // _THREAD_WORK))
    tables = [table] * threads
    if room:
        rooms = zeros(threads, room)
        tables = [array("q", (address(own), *table)) for own in rooms]
    places = [own.buffer_info()[0] for own in tables]
    if threads == 1:
        call(places[0], 0, blocks)
        return
    cuts = [blocks * i // threads for i in range(threads + 1)]
    for done in _pool(threads, os.getpid()).map(call, places, cuts[:-1], cuts[1:]):
        assert done is None


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # A forked process has the pools of its parent, but not their threads.
    return ThreadPoolExecutor(threads, thread_name_prefix="esmeta-kernels")
