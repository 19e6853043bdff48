"""Train, and count what goes over the wire: bytes by operation, pickled calls. Under mpirun."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch

from esmeta.ranks import comm as comm_module
from esmeta.ranks.transport import Messages
from esmeta.run import train


class Spy:
    """An mpi4py communicator that counts the calls of its methods."""

    def __init__(self, inner: Any, calls: Counter[str]) -> None:
        self._inner, self._calls = inner, calls

    def __getattr__(self, name: str) -> Any:
        self._calls[name] += 1
        return getattr(self._inner, name)


class CountingComm(comm_module.MPIComm):
    """``bytes`` of every collective since :meth:`clear`, by operation, sent as messages.

    Bytes are those of the result: all rows that are gathered, one vector that is summed.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        super().__init__(timeout_s)
        self.calls: Counter[str] = Counter()
        self._transport = Messages(self._mpi, Spy(self._world, self.calls), self._wait)
        self._last_words = Spy(self._last_words, self.calls)
        self.clear()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes: Counter[str] = Counter()

    @property
    def pickled(self) -> list[str]:
        """mpi4py's methods in lower case are those that pickle."""
        return sorted(name for name in self.calls if name[0].islower())

    def gather_rows(self, local: torch.Tensor, counts: list[int]) -> torch.Tensor:
        return self._count("gather_rows", super().gather_rows(local, counts))

    def sum_exact(self, value: torch.Tensor) -> torch.Tensor:
        return self._count("sum_exact", super().sum_exact(value))

    def sum_ordered(self, value: torch.Tensor) -> torch.Tensor:
        return self._count("sum_ordered", super().sum_ordered(value))

    def bcast(self, value: torch.Tensor) -> torch.Tensor:
        return self._count("bcast", super().bcast(value))

    def same(self, digest: bytes) -> bool:
        self.bytes["same"] += 32 * self.size
        return super().same(digest)

    def _count(self, operation: str, result: torch.Tensor) -> torch.Tensor:
        self.bytes[operation] += result.nbytes
        return result


def count(argv: list[str]) -> tuple[CountingComm, list[dict[str, int]]]:
    """Train as a command line says; bytes of every generation after the first, by operation."""
    made: list[CountingComm] = []

    class Recording(CountingComm):
        def __init__(self, timeout_s: float = 60.0) -> None:
            super().__init__(timeout_s)
            made.append(self)

    seen: list[dict[str, int]] = []
    plain = train.Trainer._step

    def step(self: train.Trainer) -> Any:
        # From one step to the next: the decision to go on and what is logged are part of it.
        comm = made[0]
        if self.count.step > 0:
            seen.append(dict(comm.bytes))
        comm.clear()
        return plain(self)

    comm_module.MPIComm = Recording  # type: ignore[misc]
    train.Trainer._step = step  # type: ignore[method-assign]
    assert train.main(argv) == 0
    return made[0], seen


def main() -> None:
    """Rank 0 prints D, bytes by operation and the pickled calls of a generation."""
    import esmeta

    # Held-out scores come now and then, and are shared out as a generation is.
    sent, generations = count([*sys.argv[1:], "--set", "run.evaluate_every=1000"])
    assert all(one == generations[0] for one in generations), generations
    if sent.rank == 0:
        out = sys.argv[sys.argv.index("--out") + 1]
        _, params, _ = esmeta.load(out)
        size = sum(leaf.numel() for leaf in params.values())
        words = [f"{name}={number}" for name, number in sorted(generations[0].items())]
        buffered = sum(number for name, number in sent.calls.items() if name[0].isupper())
        print(f"traffic D={size}", *words, f"buffered={buffered}", f"pickled={sent.pickled}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
