"""What NaN fitness costs: every search with the worst tenth of its members failing, and without.

Sphere, D = 200, popsize 64, 100 generations, means over seeds. Prints the final values and the
difference relative to the run without failures.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os

os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")

import torch

from esmeta import names
from esmeta.ranks.comm import SelfComm
from esmeta.rng import Rng
from esmeta.types import Fitness, Params

SIZE, POPSIZE, GENERATIONS, SHARE = 200, 64, 100, 0.1


class Sphere:
    """Minus the squared distance from a point; the worst share of the members may fail."""

    def __init__(self, share: float) -> None:
        self.share = share
        self.target = torch.linspace(-1, 1, SIZE, dtype=torch.float64)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        return -((x.double() - self.target) ** 2).sum(dim=1)

    def fitness(self, params: Params | torch.Tensor, step: int | torch.Tensor) -> Fitness:
        assert isinstance(params, torch.Tensor)
        returns = self.value(params)
        failed = returns.argsort()[: round(self.share * len(returns))]
        returns = returns.index_fill(0, failed, math.nan).unsqueeze(1)
        return Fitness(returns, torch.ones_like(returns, dtype=torch.int64))


def final(name: str, share: float, seed: int) -> float:
    """Value of the centre at the end."""
    optimizer = importlib.import_module(f"esmeta.optimizers.{name}").Optimizer(
        popsize=POPSIZE, sigma=0.1
    )
    objective, rng = Sphere(share), Rng(seed)
    state = optimizer.init({"x": torch.zeros(1, SIZE)}, rng)
    for _ in range(GENERATIONS):
        state, _ = optimizer.step(state, objective, SelfComm(), rng)
    return float(objective.value(optimizer.theta(state)["x"]))


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    print(f"start {float(Sphere(0).value(torch.zeros(1, SIZE))):.2f}")
    # Gradients have no members, and windows need an objective with lives.
    others = {"a2c", "adam", "ppo", "nres", "pes"}
    for name in sorted(set(names.known("optimizer")) - others):
        clean, failing = (
            sum(final(name, share, seed) for seed in seeds) / len(seeds) for share in (0.0, SHARE)
        )
        change = abs(failing - clean) / abs(clean)
        print(f"{name:14} clean {clean:9.4f}  a tenth failing {failing:9.4f}  {change:6.2%}")


if __name__ == "__main__":
    main()
