"""What the tests of searches share: the searches, functions with known optima, ranks as threads."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esmeta.optimizers import (
    cem,
    cmaes,
    evotorch_pgpe,
    evotorch_snes,
    openes,
    pgpe,
    sepcma,
    snes,
    xnes,
)
from esmeta.rng import Rng
from esmeta.types import Fitness, Metrics, Params, State

torch.set_num_threads(1)


def search(module: Any, **usual: Any) -> Callable[..., Any]:
    """Make one kind of search, with its usual options or others."""
    return lambda **options: module.Optimizer(**{"popsize": 50, **usual, **options})


# popsize 50 is not a multiple of 3 or 4 ranks; sigma and rates suit a start one unit away.
SLICED = {
    "openes": search(openes, sigma=0.1, learning_rate=0.05),
    "lowrank": search(openes, sigma=0.1, learning_rate=0.05, noise="lowrank:1"),
    "pgpe": search(pgpe, sigma=0.1, learning_rate=0.05),
    "snes": search(snes, sigma=0.3),
    "sepcma": search(sepcma, sigma=0.3),
}

EVOTORCH = {
    "evotorch_pgpe": search(evotorch_pgpe, sigma=0.1, learning_rate=0.05),
    "evotorch_pgpe-clipup": search(evotorch_pgpe, sigma=0.1, optimizer="clipup"),
    "evotorch_snes": search(evotorch_snes, sigma=0.3),
    "cem": search(cem, sigma=0.5, stdev_max_change=0.05),
    "xnes": search(xnes, sigma=0.3),
    "cmaes": search(cmaes, sigma=0.3),
    "sepcmaes": search(cmaes, sigma=0.3, separable=True),
}


class Objective:
    """Scores vectors by ``value`` on 3 trials that differ by a constant; 5 steps per trial."""

    def __init__(self, value: Callable[[Tensor], Tensor]) -> None:
        self.value = value
        self.rows = 0

    def fitness(self, params: Params | Tensor, step: int) -> Fitness:
        assert isinstance(params, Tensor) and params.dtype == torch.float32
        self.rows += len(params)
        value = self.value(params.double()).unsqueeze(1)
        returns = value + torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
        return Fitness(returns, torch.full(returns.shape, 5))


class Ranks:
    """Ranks as threads of this process, with the semantics of a real communicator."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def comm(self, rank: int) -> RankComm:
        return RankComm(self, rank)


class RankComm:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.size = ranks, rank, ranks.size
        self.timeout_s, self.label, self.waited_s = 0.0, "", 0.0

    def _all(self, value: Any) -> list[Any]:
        self.ranks.slots[self.rank] = value
        self.ranks.barrier.wait(30)
        values = list(self.ranks.slots)
        self.ranks.barrier.wait(30)
        return values

    def gather_rows(self, local: Tensor, counts: list[int]) -> Tensor:
        assert local.dtype == torch.float64 and local.shape[0] == counts[self.rank]
        return torch.cat([part.clone() for part in self._all(local)])

    def sum_exact(self, value: Tensor) -> Tensor:
        assert value.dtype == torch.int64
        return torch.stack(self._all(value)).sum(dim=0)

    def sum_ordered(self, value: Tensor) -> Tensor:
        values = [v.clone() for v in self._all(value)]
        assert all(v.shape == value.shape and v.dtype == value.dtype for v in values)
        return functools.reduce(torch.add, values)

    def barrier(self) -> None:
        self._all(None)

    def bcast(self, value: Tensor) -> Tensor:
        values = self._all(value.clone())
        assert all(v.shape == values[0].shape and v.dtype == values[0].dtype for v in values)
        return values[0].clone()

    def same(self, digest: bytes) -> bool:
        return len(set(self._all(digest))) == 1

    def abort(self, code: int, message: str) -> None:
        self.ranks.barrier.abort()


def on_ranks(size: int, work: Callable[[RankComm], Any]) -> list[Any]:
    """The results of ``work`` on every rank; the first exception is raised."""
    ranks, results, errors = Ranks(size), [None] * size, []

    def main(rank: int) -> None:
        try:
            results[rank] = work(ranks.comm(rank))
        except BaseException as error:
            errors.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=main, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError))
    return results


def solo() -> RankComm:
    return Ranks(1).comm(0)


def start(size: int, value: float = 0.0) -> Params:
    half = size // 2
    return {"a": torch.full((1, half), value), "b": torch.full((1, 1, size - half), value)}


def target(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def sphere(x: Tensor) -> Tensor:
    return -((x - target(x.shape[1])) ** 2).sum(dim=1)


def ellipsoid(x: Tensor) -> Tensor:
    weights = torch.logspace(0, 2, x.shape[1], dtype=torch.float64)
    return -(weights * (x - target(x.shape[1])) ** 2).sum(dim=1)


class Windows:
    """Scores ``value`` of members divided by ``unit``, at once or in two windows of a life."""

    life_steps = 4

    def __init__(self, unit: Tensor | float = 1.0, value: Callable[[Tensor], Tensor] = sphere):
        self.unit, self.value = unit, value
        self.members: list[Tensor] = []

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        assert isinstance(params, Tensor)
        self.members.append(params.clone())
        value = self.value(params.double() / self.unit)[:, None]
        return Fitness(value, torch.ones(value.shape, dtype=torch.int64))

    def begin(self, params: Params | Tensor, life: int) -> State:
        return {"t": torch.zeros(len(params), dtype=torch.int64)}

    def advance(self, lives: State, params: Params | Tensor, steps: int) -> tuple[State, Fitness]:
        scored = self.fitness(params, 0)
        late = 1.0 + lives["t"].double()[:, None]
        return {"t": lives["t"] + steps}, Fitness(scored.returns * late, scored.steps)

    def save(self, lives: State) -> State:
        return lives

    def restore(self, saved: State) -> State:
        return dict(saved)


def run(
    optimizer: Any,
    objective: Objective,
    theta: Params,
    generations: int,
    comm: RankComm | None = None,
    seed: int = 0,
    state: Any = None,
) -> tuple[Any, list[Metrics]]:
    comm = comm or solo()
    state = optimizer.init(theta, Rng(seed)) if state is None else state
    log = []
    for _ in range(generations):
        state, metrics = optimizer.step(state, objective, comm, Rng(seed))
        log.append(metrics)
    return state, log


def flat_theta(optimizer: Any, state: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in optimizer.theta(state).values()])


def digest(optimizer: Any, state: Any) -> str:
    return hashlib.sha256(flat_theta(optimizer, state).numpy().tobytes()).hexdigest()


def same_saved(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(v, two[k]) if isinstance(v, Tensor) else v == two[k] for k, v in one.items()
    )


def failing(bad: float) -> Callable[[Tensor], Tensor]:
    def value(x: Tensor) -> Tensor:
        plain = sphere(x)
        worst = plain.argsort()[: max(1, len(plain) // 10)]
        return plain.index_fill(0, worst, bad)

    return value
