"""Ranks: buffer collectives with a time limit, and an end for the whole job when one rank fails.

No collective blocks: each is polled (:mod:`esmeta.ranks.transport`), so a rank that hangs or left
early becomes a ``TimeoutError`` on the others instead of a job that never ends. The ranks that
wait then call the roll, so that the error names the ranks that did not come. mpi4py is imported
only when an MPI launcher started more than one process.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError, keep_traceback
from esmeta.ranks.launched import ALONE, launched_rank, launched_ranks
from esmeta.ranks.transport import connect, poll

EXIT_USER_ERROR = 2
EXIT_EXCEPTION = 3

_ROLL_SECONDS = 1.0
_ROLL_TAG = 1


def _check_rows(local: Tensor, counts: list[int], rank: int, size: int) -> None:
    assert len(counts) == size, f"counts for {len(counts)} ranks, but there are {size}"
    assert local.dtype == torch.float64, f"gather_rows wants float64, got {local.dtype}"
    assert local.shape[0] == counts[rank], f"{local.shape[0]} rows, counts say {counts[rank]}"


class SelfComm:
    """The communicator of a single process: every collective is the identity."""

    rank = 0
    size = 1
    waited_s = 0.0

    def __init__(self, timeout_s: float = 60.0) -> None:
        self.timeout_s = timeout_s
        self.label = "start"

    def gather_rows(self, local: Tensor, counts: list[int]) -> Tensor:
        """The rows themselves, ``[counts[0], ...]``."""
        _check_rows(local, counts, 0, 1)
        return local

    def sum_exact(self, value: Tensor) -> Tensor:
        """The int64 value itself."""
        assert value.dtype == torch.int64, f"sum_exact wants int64, got {value.dtype}"
        return value

    def sum_ordered(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def bcast(self, value: Tensor) -> Tensor:
        """The value itself."""
        return value

    def same(self, digest: bytes) -> bool:
        """Always true."""
        return True

    def barrier(self) -> None:
        """Nothing to wait for."""

    def abort(self, code: int, message: str) -> NoReturn:
        """Say why on stderr and end the process with ``code``."""
        print(f"esmeta: {message}", file=sys.stderr, flush=True)
        raise SystemExit(code)


class MPIComm:
    """Collectives over the ranks of ``MPI_COMM_WORLD``; results stand on the input's device.

    ``timeout_s`` (seconds) and ``label`` (where the run is, for messages) may be set at any time;
    ``waited_s`` adds up the seconds that this rank spent in collectives. After a ``TimeoutError``
    no further collective is possible: the job has to end. ``over``: a communicator of mpi4py with
    some of the ranks; ``names`` are their numbers in ``MPI_COMM_WORLD``, which messages use.
    """

    def __init__(self, timeout_s: float = 60.0, over: Any = None) -> None:
        # MPI starts at this import, never at the import of esmeta.
        from mpi4py import MPI

        self._mpi = MPI
        over = MPI.COMM_WORLD if over is None else over
        # Copies: no other user's messages get in between, nor do the last words of a failed rank.
        self._world = over.Dup()
        self._last_words = over.Dup()
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        everybody = MPI.COMM_WORLD.Get_group()
        self.names: list[int] = list(over.Get_group().Translate_ranks(None, everybody))
        self.timeout_s = timeout_s
        self.label = "start"
        self.waited_s = 0.0
        # Of waits so far: the same on all ranks that wait for the same thing.
        self._number = 0
        self._operation = "start"
        self._present: set[int] = set()
        self._abandoned: list[Any] = []
        self._transport = connect(MPI, self._world, self._wait)

    def gather_rows(self, local: Tensor, counts: list[int]) -> Tensor:
        """Concatenate float64 blocks ``[counts[r], ...]`` of all ranks in rank order."""
        _check_rows(local, counts, self.rank, self.size)
        self._operation = "gather_rows"
        out = torch.empty((sum(counts), *local.shape[1:]), dtype=torch.float64, device="cpu")
        width = out.element_size() * local.shape[1:].numel()
        self._transport.gather(_bytes(local), [width * count for count in counts], _bytes(out))
        return _like(out, local)

    def sum_exact(self, value: Tensor) -> Tensor:
        """Elementwise int64 sum over ranks: exact, whatever the number of ranks."""
        assert value.dtype == torch.int64, f"sum_exact wants int64, got {value.dtype}"
        self._operation = "sum_exact"
        out = torch.empty(value.shape, dtype=torch.int64, device="cpu")
        self._transport.sum_int64(_flat(value), _flat(out))
        return _like(out, value)

    def sum_ordered(self, value: Tensor) -> Tensor:
        """Elementwise float sum in rank order: the same bits on every rank and in every run.

        The bits do depend on the number of ranks; :meth:`sum_exact` is for what must not.
        """
        self._operation = "sum_ordered"
        out = torch.empty(value.shape, dtype=value.dtype, device="cpu")
        self._transport.sum_in_order(_flat(value), _flat(out))
        return _like(out, value)

    def bcast(self, value: Tensor) -> Tensor:
        """Rank 0's tensor on every rank (shape and dtype must agree)."""
        self._operation = "bcast"
        out = value.detach().cpu().contiguous().clone()
        self._transport.bcast(_bytes(out))
        return _like(out, value)

    def same(self, digest: bytes) -> bool:
        """Whether all ranks passed the same bytes (compared by their first 32)."""
        self._operation = "same"
        own = np.frombuffer(digest[:32].ljust(32, b"\0"), np.uint8)
        everybody = np.empty(32 * self.size, np.uint8)
        self._transport.gather(own, [32] * self.size, everybody)
        return everybody.tobytes() == own.tobytes() * self.size

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self._operation = "barrier"
        self._transport.barrier()

    def abort(self, code: int, message: str) -> NoReturn:
        """Say why on stderr with the rank, and end the whole job with ``code``."""
        name = self.names[self.rank]
        print(f"esmeta: rank {name}: {message}", file=sys.stderr, flush=True)
        # The launcher drops what it has not read when the job is aborted.
        wait_until_read(sys.stderr, 2.0)
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)

    def library(self) -> str:
        """Name and version of the MPI library."""
        return self._mpi.Get_library_version().strip("\0").split("\n")[0].strip()

    def meet_to_leave(self, seconds: float) -> bool:
        """Whether all ranks get here within ``seconds``: then each may exit by itself."""
        request = self._last_words.Ibarrier()
        self._abandoned.append(request)
        return poll(request.Test, seconds)

    def _wait(self, ready: Callable[[], bool]) -> None:
        self._number += 1
        start = time.monotonic()
        done = poll(ready, self.timeout_s, self._roll_is_called)
        waited = time.monotonic() - start
        self.waited_s += waited
        if done:
            return
        raise self.too_late(self._operation, waited, self._call_the_roll())

    def too_late(self, operation: str, waited_s: float, missing: list[int]) -> TimeoutError:
        """The error that names the ranks (their numbers in here) that did not come."""
        names = [self.names[rank] for rank in missing]
        named = f"rank{'s' * (len(names) > 1)} {_numbers(names)}" if names else "other ranks"
        cause = "hangs, is gone or is much slower" if names else "all of them wait elsewhere"
        return TimeoutError(
            f"rank {self.names[self.rank]} of {self.size}: {operation} waited {waited_s:.0f} s at "
            f"{self.label} for {named} ({cause}; the limit is run.rank_timeout)"
        )

    def of_this_machine(self) -> MPIComm:
        """The ranks that share this one's memory, in order; all ranks must call it."""
        shared = self._world.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)
        return MPIComm(self.timeout_s, shared)

    def among(self, member: bool) -> MPIComm | None:
        """The ranks that call this with True, in order; None on the others; all must call it."""
        part = self._world.Split(0 if member else self._mpi.UNDEFINED, key=self.rank)
        return MPIComm(self.timeout_s, part) if member else None

    def shared_memory(self, size: int) -> tuple[memoryview, Callable[[], None]]:
        """Memory of ``size`` bytes for all ranks of one machine, zero at first, until the job ends.

        Also: what makes writes before it visible to reads after it. All ranks must call this.
        """
        window = self._mpi.Win.Allocate_shared(size if self.rank == 0 else 0, 1, comm=self._world)
        window.Lock_all()
        whole: Any = window.Shared_query(0)[0]
        memory = memoryview(whole)[:size]
        if self.rank == 0:
            memory[:] = bytes(size)
        window.Sync()
        self.barrier()
        window.Sync()
        self._abandoned.append(window)
        return memory, window.Sync

    def _roll_is_called(self) -> bool:
        """Whether another rank has waited too long for this collective, or for a later one."""
        status = self._mpi.Status()
        while self._last_words.Iprobe(self._mpi.ANY_SOURCE, _ROLL_TAG, status):
            number = bytearray(8)
            self._last_words.Recv(number, status.Get_source(), _ROLL_TAG)
            if int.from_bytes(number, "little") >= self._number:
                self._present.add(status.Get_source())
        return bool(self._present)

    def _call_the_roll(self) -> list[int]:
        """Tell all ranks that this one waits; returns those that do not say the same.

        Only one rank goes on at once to report what all of them know.
        """
        call = bytearray(self._number.to_bytes(8, "little"))
        others = [rank for rank in range(self.size) if rank != self.rank]
        sent = [self._last_words.Isend(call, rank, _ROLL_TAG) for rank in others]
        self._abandoned += [call, *sent]
        end = time.monotonic() + _ROLL_SECONDS
        while time.monotonic() < end and len(self._present) < len(others):
            self._roll_is_called()
            time.sleep(1e-3)
        if min(self._present, default=self.rank) < self.rank:
            time.sleep(2 * _ROLL_SECONDS)
        return [rank for rank in others if rank not in self._present]


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def _flat(value: Tensor) -> np.ndarray:
    return value.detach().cpu().contiguous().view(-1).numpy()


def _bytes(value: Tensor) -> np.ndarray:
    return _flat(value).view(np.uint8)


def _like(result: Tensor, model: Tensor) -> Tensor:
    return result if model.device.type == "cpu" else model.new_empty(result.shape).copy_(result)


def wait_until_read(stream: Any, seconds: float) -> None:
    """Wait, at most ``seconds``, until the reader of a pipe has taken all that was written to it.

    Returns at once where this cannot be asked: no pipe, no file descriptor, not Linux.
    """
    with contextlib.suppress(OSError, ValueError, ImportError, AttributeError):
        import fcntl
        import termios

        pipe = stream.fileno()
        if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
            return
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4))[0] == 0:
                # Read is not yet passed on: the reader needs a moment for its own write.
                time.sleep(0.05)
                return
            time.sleep(0.002)


def make_comm(timeout_s: float = 60.0) -> SelfComm | MPIComm:
    """The communicator this process was launched for; without a launcher mpi4py is not needed."""
    ranks = launched_ranks(os.environ)
    if ranks == 1:
        return SelfComm(timeout_s)
    number = launched_rank(os.environ)
    place = f"one of {ranks} ranks" if ranks else f"rank {number} of several"
    alone = f"if it is to be a run of its own, with its own --out, write {ALONE}=1 before python"
    try:
        comm = MPIComm(timeout_s)
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"this process was started as {place}, but mpi4py cannot be loaded ({error}); install "
            f"it with: pip install mpi4py mpich, or start without mpirun or srun; {alone}"
        ) from error
    if comm.size > 1:
        return comm
    if ranks > 1 or number > 0:
        # Otherwise every process would take itself for the only one and write the same files.
        raise UserError(
            f"the launcher started this process as {place}, but the MPI library of mpi4py "
            f"({comm.library()}) sees 1; use the mpirun of that library (with pip's mpich, the "
            f"one beside python), or an srun --mpi=TYPE that it speaks; {alone}"
        )
    return SelfComm(timeout_s)


def install_excepthook(comm: SelfComm | MPIComm) -> None:
    """Let an uncaught exception on any rank end the whole job at once.

    ``UserError``: one line from rank 0 and exit code 2. Anything else: the traceback with the
    rank and exit code 3. ``sys.exit`` on one rank only does not pass here: the other ranks run
    into the time limit of their next collective.
    """

    def leave_by_user_error(error: UserError) -> NoReturn:
        keep_traceback(error)
        # As a rule all ranks meet the same mistake; leaving together spares MPI's abort banner.
        if isinstance(comm, MPIComm) and not comm.meet_to_leave(2.0):
            comm.abort(EXIT_USER_ERROR, f"error: {error}")
        if comm.rank == 0:
            print(f"esmeta: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, UserError):
            leave_by_user_error(error)
        text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        if isinstance(error, KeyboardInterrupt):
            comm.abort(130, f"interrupted at {comm.label}")
        comm.abort(EXIT_EXCEPTION, f"exception at {comm.label}\n{text}")

    sys.excepthook = hook
