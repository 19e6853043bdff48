"""How numbers get from rank to rank: MPI's messages, or memory that the ranks of a machine share.

MPI's non-blocking collectives pass data on in several turns, and every turn waits until the next
rank has a core. Where all ranks share memory, each copies its part into a window and reads the
others' from there: a generation's collectives over 60,000 parameters take a sixth of the time on
two ranks, and a twelfth on eight ranks of two cores (tests/bench/collectives.py).

Both transports wait through ``wait(ready)``, which returns once ``ready()`` is true, or raises.
After it has raised, no further collective is possible.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

Wait = Callable[[Callable[[], bool]], None]
Bytes = np.ndarray
"""Flat, contiguous uint8."""

_LINE = 64
"""Bytes of a cache line: counters that different ranks write stand apart."""
_SLOT_BYTES = 1 << 20
_WINDOW_BYTES = 1 << 25
_SPIN_S = 1e-3
_NAPS_S = (2e-5, 1e-3)
_yield_core = getattr(os, "sched_yield", lambda: time.sleep(0))


def poll(
    ready: Callable[[], bool],
    seconds: float,
    given_up: Callable[[], bool] = lambda: False,
    alert_s: float = 0.0,
) -> bool:
    """Whether ``ready()`` within ``seconds``; ``given_up()`` is asked when it takes long.

    Spins at first, as most waits end within microseconds, and lets whoever else wants the core go
    first. Then it leaves the core, with short naps for ``alert_s`` and ever longer ones after that.
    """
    start = time.monotonic()
    nap, longest = _NAPS_S
    while not ready():
        waited = time.monotonic() - start
        if waited > seconds or (nap == longest and given_up()):
            return False
        if waited < _SPIN_S:
            _yield_core()
            continue
        time.sleep(nap)
        if waited > alert_s:
            nap = min(2 * nap, longest)
    return True


class Transport(Protocol):
    """Collectives over flat contiguous arrays; every rank of the job calls them in one order."""

    def gather(self, own: Bytes, sizes: Sequence[int], out: Bytes) -> None:
        """Put the bytes of all ranks, ``sizes`` by rank, one after the other into ``out``."""
        ...

    def sum_int64(self, own: np.ndarray, out: np.ndarray) -> None:
        """Elementwise sum over ranks: exact, so in any order."""
        ...

    def sum_in_order(self, own: np.ndarray, out: np.ndarray) -> None:
        """Elementwise floating-point sum over ranks, added up in the order of ranks."""
        ...

    def bcast(self, value: Bytes) -> None:
        """Overwrite ``value`` with that of rank 0."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...


class Messages:
    """MPI's own collectives, non-blocking; ``world`` is a communicator that nobody else uses."""

    def __init__(self, mpi: Any, world: Any, wait: Wait) -> None:
        self._mpi, self._world, self._wait = mpi, world, wait
        self._abandoned: list[Any] = []

    def gather(self, own: Bytes, sizes: Sequence[int], out: Bytes) -> None:
        self._finish(self._world.Iallgatherv(own, [out, list(sizes)]), own, out)

    def sum_int64(self, own: np.ndarray, out: np.ndarray) -> None:
        self._finish(self._world.Iallreduce(own, out, op=self._mpi.SUM), own, out)

    def sum_in_order(self, own: np.ndarray, out: np.ndarray) -> None:
        rows = np.empty((self._world.Get_size(), len(own)), own.dtype)
        self._finish(self._world.Iallgather(own, rows), own, rows)
        out[:] = rows[0]
        for row in rows[1:]:
            out += row

    def bcast(self, value: Bytes) -> None:
        self._finish(self._world.Ibcast(value, root=0), value)

    def barrier(self) -> None:
        self._finish(self._world.Ibarrier())

    def _finish(self, request: Any, *buffers: np.ndarray) -> None:
        try:
            self._wait(request.Test)
        except BaseException:
            # MPI may still write here: the buffers have to outlive the request.
            self._abandoned += [request, *buffers]
            raise


class SharedMemory:
    """A window over the ranks of ``world``, all of one machine.

    Every rank has two slots, used in turn: who comes to an exchange has read all that the one
    before brought, so a slot is free again after the next exchange.
    """

    def __init__(self, mpi: Any, world: Any, wait: Wait) -> None:
        self._rank, size = world.Get_rank(), world.Get_size()
        self._slot_bytes = min(_SLOT_BYTES, _WINDOW_BYTES // (2 * size)) // _LINE * _LINE
        self._window = mpi.Win.Allocate_shared(_LINE + 2 * self._slot_bytes, 1, comm=world)
        parts = [np.asarray(self._window.Shared_query(rank)[0]) for rank in range(size)]
        self._arrived = [part[:8].data.cast("q") for part in parts]
        ends = [(start, start + self._slot_bytes) for start in (_LINE, _LINE + self._slot_bytes)]
        self._slots = [[part[start:end] for part in parts] for start, end in ends]
        self._wait = wait
        self._number = 0
        self._arrived[self._rank][0] = 0
        # An access epoch for as long as the window lives: `Sync` is allowed inside one only, and
        # is what orders the reads and writes of this rank on processors that reorder them.
        self._window.Lock_all(mpi.MODE_NOCHECK)
        self._window.Sync()
        world.Barrier()

    def gather(self, own: Bytes, sizes: Sequence[int], out: Bytes) -> None:
        starts = [0, *itertools.accumulate(sizes)]
        for begin in range(0, max(sizes), self._slot_bytes):
            shown = self._exchange(own[begin : begin + self._slot_bytes])
            for start, size, part in zip(starts, sizes, shown, strict=False):
                length = max(0, min(self._slot_bytes, size - begin))
                out[start + begin : start + begin + length] = part[:length]

    def sum_int64(self, own: np.ndarray, out: np.ndarray) -> None:
        self.sum_in_order(own, out)

    def sum_in_order(self, own: np.ndarray, out: np.ndarray) -> None:
        """Every rank adds up its own share of the elements, and reads the others' sums."""
        step = self._slot_bytes // own.itemsize
        ranks = len(self._arrived)
        for begin in range(0, len(own), step):
            piece = own[begin : begin + step]
            bounds = [len(piece) * rank // ranks for rank in range(ranks + 1)]
            low, high = bounds[self._rank : self._rank + 2]
            shown = self._exchange(piece.view(np.uint8))
            total = shown[0].view(own.dtype)[low:high].copy()
            for part in shown[1:]:
                total += part.view(own.dtype)[low:high]
            sums = self._exchange(total.view(np.uint8))
            for (low, high), part in zip(itertools.pairwise(bounds), sums, strict=True):
                out[begin + low : begin + high] = part.view(own.dtype)[: high - low]

    def bcast(self, value: Bytes) -> None:
        for begin in range(0, len(value), self._slot_bytes):
            piece = value[begin : begin + self._slot_bytes]
            shown = self._exchange(piece if self._rank == 0 else piece[:0])
            piece[:] = shown[0][: len(piece)]

    def barrier(self) -> None:
        self._exchange(np.empty(0, np.uint8))

    def _exchange(self, own: Bytes) -> list[Bytes]:
        """Show ``own``, at most a slot, to all ranks; returns the slots of all, by rank.

        What is in them stays until the exchange after the next.
        """
        self._number += 1
        slots = self._slots[self._number % 2]
        slots[self._rank][: len(own)] = own
        self._window.Sync()
        self._arrived[self._rank][0] = self._number
        self._wait(self._all_here)
        self._window.Sync()
        return slots

    def _all_here(self) -> bool:
        return all(at[0] >= self._number for at in self._arrived)


def connect(mpi: Any, world: Any, wait: Wait) -> Transport:
    """Shared memory where all ranks of ``world`` have one machine, messages elsewhere."""
    node = world.Split_type(mpi.COMM_TYPE_SHARED)
    one_machine = node.Get_size() == world.Get_size()
    node.Free()
    return (SharedMemory if one_machine else Messages)(mpi, world, wait)
