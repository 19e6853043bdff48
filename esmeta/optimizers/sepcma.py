"""Separable CMA-ES with active weights, sliced over ranks.

Ros & Hansen, "A simple modification in CMA-ES achieving linear time and space complexity", PPSN
2008, https://doi.org/10.1007/978-3-540-87700-4_30; names and equations of Hansen, "The CMA
evolution strategy: a tutorial", 2016, https://arxiv.org/abs/1604.00772, with the learning rates of
EvoTorch's CMAES, which ``cmaes`` with ``separable = true`` runs as it is. What differs: each rank
draws and sums only its own members, exactly; tied members share the average of their weights; see
:mod:`openes` for failures and flat generations.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from esmeta.errors import UserError
from esmeta.evolution.ascent import exact_norm
from esmeta.evolution.population import Generation
from esmeta.evolution.search import Rule, Sliced
from esmeta.evolution.shaping import rank_weighted
from esmeta.evolution.state import Arrays, SearchState
from esmeta.options import options_class


@dataclass(frozen=True)
class Rates:
    """What follows from popsize and D; the names are the tutorial's."""

    weights: list[float]
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float
    mu_eff: float
    expected_norm: float
    """Of a standard normal vector, approximately."""
    keep: int
    """Generations between two updates of the standard deviations from the variances."""


@functools.cache
def rates(popsize: int, size: int) -> Rates:
    """Learning rates and recombination weights (best first; the positive ones sum to 1)."""
    raw = [math.log((popsize + 1) / 2) - math.log(k) for k in range(1, popsize + 1)]
    better, worse = raw[: popsize // 2], raw[popsize // 2 :]
    mu_eff, mu_eff_minus = (
        math.fsum(w) ** 2 / math.fsum(v * v for v in w) for w in (better, worse)
    )
    c_sigma = (mu_eff + 2) / (size + mu_eff + 3)
    d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (size + 1)) - 1) + c_sigma
    c_c = (1 + (1 + mu_eff) / size) / (math.sqrt(size) + (1 + 2 * mu_eff) / size)
    c_1 = 1 / (size + 2 * math.sqrt(size) + mu_eff / size)
    c_mu = (0.25 + mu_eff + 1 / mu_eff - 2) / (size + 4 * math.sqrt(size) + mu_eff / 2)
    alpha = min(
        1 + c_1 / c_mu,
        1 + 2 * mu_eff_minus / (mu_eff + 2),
        (1 - c_mu - c_1) / (size * c_mu),
    )
    up, down = math.fsum(better), math.fsum(abs(w) for w in worse)
    weights = [w / up for w in better] + [alpha * w / down for w in worse]
    norm = math.sqrt(size) * (1 - 1 / (4 * size) + 1 / (21 * size**2))
    keep = max(1, math.floor(1 / (10 * size * (c_1 + c_mu))))
    return Rates(weights, c_sigma, d_sigma, c_c, c_1, c_mu, mu_eff, norm, keep)


@options_class
class Optimizer(Sliced):
    """Separable CMA-ES; all learning rates follow from popsize and D."""

    mirrored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interactions:
            raise UserError(
                "interactions: sepcma's learning rates belong to one popsize; leave it out, or "
                "write optimizer.name = 'openes'"
            )

    def rule(self) -> Rule:
        """The equations of the tutorial."""
        return self.sliced(
            first=self._first,
            spread=lambda state: float(state.arrays["sigma"]) * state.arrays["stdev"],
            # Only tells whether there is information; the weights are made in the update.
            shaping="centered",
            update=self._update,
        )

    def _first(self, unit: np.ndarray) -> Arrays:
        return {
            "sigma": np.array(self.sigma),
            "variance": unit * unit,
            "stdev": unit.copy(),
            "path_sigma": np.zeros(len(unit)),
            "path_c": np.zeros(len(unit)),
            "updates": np.array(0),
        }

    def _update(
        self, state: SearchState, utilities: np.ndarray, generation: Generation
    ) -> tuple[np.ndarray, Arrays]:
        fitness, draws = generation.scores.fitness, generation.drawn
        size, old = len(state.theta), state.arrays
        r = rates(self.popsize, size)
        # A tie across the border of the parents averages the two parts apart.
        positive = [max(0.0, weight) for weight in r.weights]
        parents = rank_weighted(fitness, positive).numpy()
        ranked = rank_weighted(fitness, r.weights).numpy()
        norms = draws.square_norms()
        active = np.where(ranked > 0, ranked, size * ranked / norms)
        local, squares = draws.sums(parents, active)
        sigma, stdev, updates = float(old["sigma"]), old["stdev"], int(old["updates"])
        moved = stdev * local
        theta = state.theta.astype(np.float64) + sigma * moved
        path_sigma = (1 - r.c_sigma) * old["path_sigma"]
        path_sigma = path_sigma + math.sqrt(r.c_sigma * (2 - r.c_sigma) * r.mu_eff) * local
        length = exact_norm(path_sigma)
        sigma *= math.exp(r.c_sigma / r.d_sigma * (length / r.expected_norm - 1))
        # The rank-one update pauses while the step size grows fast. The tutorial's exponent is
        # 2 (updates + 1); EvoTorch's is kept, which pauses a little more in the first updates.
        settled = 1 - (1 - r.c_sigma) ** (2 * updates + 1)
        going = float(length**2 / size / settled - 1 < 1 + 4 / (size + 1))
        path_c = (1 - r.c_c) * old["path_c"]
        path_c = path_c + going * math.sqrt(r.c_c * (2 - r.c_c) * r.mu_eff) * moved
        rank_one = r.c_1 * (1 - (1 - going) * r.c_c * (2 - r.c_c))
        variance = old["variance"]
        change = rank_one * (path_c * path_c - variance)
        change += r.c_mu * (stdev * stdev * squares - math.fsum(active.tolist()) * variance)
        variance = variance + change
        if (updates + 1) % r.keep == 0:
            stdev = np.sqrt(variance)
        return theta, {
            "sigma": np.array(sigma),
            "variance": variance,
            "stdev": stdev,
            "path_sigma": path_sigma,
            "path_c": path_c,
            "updates": np.array(updates + 1),
        }
