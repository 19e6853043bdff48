"""Every collective against values that any rank can compute by itself. Run under mpirun.

Argument: the number of ranks. By the transport of one machine, and then by that of several.
"""

from __future__ import annotations

import hashlib
import sys
import time

import torch

from esmeta.ranks import transport
from esmeta.ranks.comm import MPIComm, install_excepthook, make_comm
from esmeta.ranks.launched import local_rank
from esmeta.ranks.wire import share


def check_gather(comm: MPIComm) -> None:
    for counts, width in (([3, 0, 5, 2][: comm.size], 4), ([0] * comm.size, 2)):
        start = sum(counts[: comm.rank])
        everything = torch.arange(sum(counts) * width, dtype=torch.float64).reshape(-1, width)
        everything[::3] = float("nan")
        local = everything[start : start + counts[comm.rank]]
        got = comm.gather_rows(local, counts)
        assert got.shape == everything.shape and torch.equal(
            got.view(torch.int64), everything.view(torch.int64)
        ), got


def check_sums(comm: MPIComm) -> None:
    big = torch.tensor([2**62 // comm.size, -comm.rank, comm.rank], dtype=torch.int64)
    total = comm.size * (comm.size - 1) // 2
    expected = [2**62 // comm.size * comm.size, -total, total]
    assert comm.sum_exact(big).tolist() == expected
    assert comm.sum_exact(torch.tensor(comm.rank)).item() == total
    assert comm.sum_exact(torch.ones(2, 3, 4, dtype=torch.int64)[:, 1]).eq(comm.size).all()
    for dtype in (torch.float32, torch.float64):
        rows = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1), dtype=dtype)
        rows *= torch.tensor([1e8, 1.0, -1e8, 1e-3], dtype=dtype)[:, None]
        expected_sum = rows[0].clone()
        for row in rows[1 : comm.size]:
            expected_sum += row
        got = comm.sum_ordered(rows[comm.rank].requires_grad_(dtype == torch.float32))
        assert torch.equal(got, expected_sum) and not got.requires_grad


def check_large(comm: MPIComm) -> None:
    """More than fits into the slot of a rank, and in the end more pieces than slots."""
    for length in (2**17 - 1, 2**17 + 3, 700_001):
        counts = [max(0, length - 50_000 * rank) for rank in range(comm.size)]
        rows = torch.arange(counts[comm.rank], dtype=torch.float64)[:, None] + comm.rank
        got = comm.gather_rows(rows, counts)[:, 0]
        assert torch.equal(
            got, torch.cat([torch.arange(n, dtype=torch.float64) + r for r, n in enumerate(counts)])
        )
        value = torch.arange(length, dtype=torch.int64)
        total = comm.size * (comm.size - 1) // 2
        assert torch.equal(comm.sum_exact(value + comm.rank), value * comm.size + total)
        assert torch.equal(comm.bcast(value + comm.rank), value)


def check_turns(comm: MPIComm) -> None:
    """Nobody reads what a faster rank has written for a later turn."""
    for turn in range(300):
        if (turn + comm.rank) % 7 == 0:
            time.sleep(0.0005)
        rows = torch.full((2, 1), float(turn * 10 + comm.rank), dtype=torch.float64)
        want = [turn * 10 + rank for rank in range(comm.size) for _ in range(2)]
        assert comm.gather_rows(rows, [2] * comm.size)[:, 0].tolist() == want
        assert comm.sum_exact(torch.tensor([turn, comm.rank])).tolist()[0] == turn * comm.size
        assert comm.bcast(torch.tensor(turn + comm.rank)).item() == turn


def check_bcast_and_same(comm: MPIComm) -> None:
    for value in (
        torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8),
        torch.empty(0),
    ):
        mine = value if comm.rank == 0 else torch.zeros_like(value)
        before = mine.clone()
        got = comm.bcast(mine)
        assert torch.equal(got, value) and got.dtype == value.dtype
        assert torch.equal(mine, before), "bcast must not write into its argument"
    digest = hashlib.sha256(b"x").digest()
    assert comm.same(digest) and comm.same(b"short") and comm.same(digest + bytes([comm.rank]))
    last = comm.size - 1
    assert not comm.same(digest if comm.rank < last else hashlib.sha256(b"y").digest())
    assert not comm.same(digest if comm.rank < last else digest[:31] + b"\0")


def check_share(comm: MPIComm) -> None:
    payload = {"theta": torch.arange(1000.0), "bytes": b"\x00\xff", "none": None, "n": 2**63}
    got = share(comm, payload if comm.rank == 0 else {"ignored": 1})
    assert got is not None and torch.equal(got.pop("theta"), payload["theta"])
    assert got == {"bytes": b"\x00\xff", "none": None, "n": 2**63}
    assert share(comm, None if comm.rank == 0 else {"ignored": 1}) is None


def latency(comm: MPIComm) -> float:
    comm.barrier()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        comm.sum_exact(torch.ones(8, dtype=torch.int64))
        times.append(time.perf_counter() - start)
    return sorted(times)[100]


def check_all(comm: MPIComm) -> None:
    assert comm.size == int(sys.argv[1])
    # Launchers number the ranks of a machine as they like, but all of them.
    own = torch.tensor([[float(local_rank())]], dtype=torch.float64)
    local = comm.gather_rows(own, [1] * comm.size).flatten().tolist()
    assert sorted(local) == list(range(comm.size)), local
    check_gather(comm)
    check_sums(comm)
    check_large(comm)
    check_turns(comm)
    check_bcast_and_same(comm)
    check_share(comm)
    median = latency(comm)
    comm.barrier()
    if comm.rank == 0:
        name = type(comm._transport).__name__
        print(f"ok {comm.size} by {name}, median {1e6 * median:.0f} us")


def main() -> None:
    for kind in (transport.SharedMemory, transport.Messages):
        transport.SharedMemory = kind  # type: ignore[misc, assignment]
        comm = make_comm(timeout_s=600)
        install_excepthook(comm)
        assert isinstance(comm, MPIComm) and type(comm._transport) is kind
        check_all(comm)


main()
