"""Known optima in 200 dimensions: in how many of ten seeds a search reaches them.

    python tests/bench/optima.py --seeds 10

Sphere, ellipsoid (axes from 1 to 1000) and Rosenbrock's valley, popsize 100. Targets are shares of
the first value: 1e-3 for the sphere and the ellipsoid, and for Rosenbrock's function 0.3 %, which
is the floor of the valley (from -1, -1, ... it starts at 80,396). Prints, for every search, seeds
that reached the target and the median number of generations they took.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
from collections.abc import Callable

os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from esmeta.ranks.comm import SelfComm
from esmeta.rng import Rng
from esmeta.types import Fitness, Params

SIZE, POPSIZE = 200, 100
NATIVE = ("openes", "pgpe", "snes", "sepcma")
EVOTORCH = ("evotorch_pgpe", "evotorch_snes", "cem", "xnes", "cmaes")
OPTIONS = {
    "openes": {"learning_rate": 0.05, "learning_rate_decay": 0.998, "sigma": 0.1},
    "pgpe": {"learning_rate": 0.05, "sigma": 0.1},
    "evotorch_pgpe": {"learning_rate": 0.05, "sigma": 0.1},
}


def sphere(x: Tensor) -> Tensor:
    """Squared distance from points between -1 and 1."""
    return ((x - torch.linspace(-1, 1, SIZE, dtype=x.dtype)) ** 2).sum(-1)


def ellipsoid(x: Tensor) -> Tensor:
    """The same with axes weighted from 1 to 1000."""
    weights = torch.logspace(0, 3, SIZE, dtype=x.dtype)
    return (weights * (x - torch.linspace(-1, 1, SIZE, dtype=x.dtype)) ** 2).sum(-1)


def rosenbrock(x: Tensor) -> Tensor:
    """Rosenbrock's function from (-1, -1, ...), shifted so that this is the origin."""
    x = x - 1
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(-1)


TARGETS = {sphere: 1e-3, ellipsoid: 1e-3, rosenbrock: 3e-3}


class Minus:
    """The negative of a function as an objective without tasks."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        assert isinstance(params, Tensor)
        returns = -self.function(params.double()).unsqueeze(1)
        return Fitness(returns, torch.ones_like(returns, dtype=torch.int64))


def generations(
    name: str, function: Callable[[Tensor], Tensor], seed: int, limit: int
) -> int | None:
    """Generations until the centre reaches the target; None if it does not."""
    options = {"popsize": POPSIZE, "sigma": 0.3} | OPTIONS.get(name, {})
    optimizer = importlib.import_module(f"esmeta.optimizers.{name}").Optimizer(**options)
    objective, rng = Minus(function), Rng(seed)
    state = optimizer.init({"x": torch.zeros(1, SIZE)}, rng)
    goal = TARGETS[function] * float(function(torch.zeros(SIZE, dtype=torch.float64)))
    for generation in range(1, limit + 1):
        state, _ = optimizer.step(state, objective, SelfComm(), rng)
        if float(function(optimizer.theta(state)["x"].double())) <= goal:
            return generation
    return None


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--generations", type=int, default=3000)
    parser.add_argument("--evotorch", action="store_true", help="EvoTorch's searches as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in NATIVE + (EVOTORCH if options.evotorch else ()):
        for function in TARGETS:
            taken = [
                generations(name, function, seed, options.generations)
                for seed in range(options.seeds)
            ]
            reached = [count for count in taken if count is not None]
            middle = f"{statistics.median(reached):6.0f}" if reached else "     -"
            print(
                f"{name:14} {function.__name__:10} {len(reached):3} of {options.seeds} seeds, "
                f"median {middle} generations",
                flush=True,
            )


if __name__ == "__main__":
    main()
