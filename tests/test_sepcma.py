"""Separable CMA-ES by its equations: ties, pauses of the rank-one update, ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from searches import Objective, RankComm, on_ranks, sphere
from torch import Tensor

from esmeta.evolution.noise import pair_noise
from esmeta.optimizers import sepcma
from esmeta.rng import Rng

# Three blocks of members: two ranks get them out of order.
POPSIZE, SIZE, SIGMA = 40, 7, 0.3


def by_all_orders(fitness: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weights by rank, best first, averaged over every order in which ties could be broken."""
    given = np.zeros(len(fitness))
    place = 0
    for level in sorted(set(fitness.tolist()), reverse=True):
        tied = np.flatnonzero(fitness == level)
        for member in tied:
            given[member] = weights[place : place + len(tied)].mean()
        place += len(tied)
    return given


class Reference:
    """The equations of Hansen's tutorial with a diagonal C, dense and in float64.

    ``paused`` counts the updates whose rank-one part waited, ``split`` those in which a tie lay
    across the border of the parents.
    """

    def __init__(self, theta: np.ndarray) -> None:
        self.mean, self.sigma, self.t = theta.astype(float), SIGMA, 0
        self.c = np.ones(SIZE)
        self.p_sigma, self.p_c = np.zeros(SIZE), np.zeros(SIZE)
        self.paused = self.split = 0
        raw = np.log((POPSIZE + 1) / 2) - np.log(np.arange(1, POPSIZE + 1))
        up, down = raw[: POPSIZE // 2], raw[POPSIZE // 2 :]
        self.mu_eff = up.sum() ** 2 / (up**2).sum()
        minus = down.sum() ** 2 / (down**2).sum()
        n = SIZE
        self.c_1 = 1 / (n + 2 * math.sqrt(n) + self.mu_eff / n)
        self.c_mu = (0.25 + self.mu_eff + 1 / self.mu_eff - 2) / (
            n + 4 * math.sqrt(n) + self.mu_eff / 2
        )
        alpha = min(
            1 + self.c_1 / self.c_mu,
            1 + 2 * minus / (self.mu_eff + 2),
            (1 - self.c_1 - self.c_mu) / (n * self.c_mu),
        )
        self.w = np.where(raw > 0, raw / up.sum(), alpha * raw / np.abs(down).sum())

    def step(self, z: np.ndarray, fitness: np.ndarray) -> None:
        """One update from directions ``[N, D]`` and fitness ``[N]``, larger is better."""
        n, mu_eff = SIZE, self.mu_eff
        parents = by_all_orders(fitness, np.maximum(self.w, 0))
        ranked = by_all_orders(fitness, self.w)
        order = np.sort(fitness)[::-1]
        self.split += order[POPSIZE // 2 - 1] == order[POPSIZE // 2]
        stdev = np.sqrt(self.c)
        y, z_w = z * stdev, parents @ z
        y_w = parents @ y
        self.mean = self.mean + self.sigma * y_w
        c_sigma = (mu_eff + 2) / (n + mu_eff + 3)
        d_sigma = 1 + 2 * max(0.0, math.sqrt((mu_eff - 1) / (n + 1)) - 1) + c_sigma
        self.p_sigma = (1 - c_sigma) * self.p_sigma + math.sqrt(
            c_sigma * (2 - c_sigma) * mu_eff
        ) * z_w
        length = np.linalg.norm(self.p_sigma)
        usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        self.sigma *= math.exp(c_sigma / d_sigma * (length / usual - 1))
        # As in pycma and EvoTorch: squares, and 2 t + 1 where the tutorial has 2 (t + 1).
        norm2 = length**2 / (1 - (1 - c_sigma) ** (2 * self.t + 1)) / n
        h = float(norm2 < 2 + 4 / (n + 1))
        self.paused += h == 0
        c_c = (1 + (1 + mu_eff) / n) / (math.sqrt(n) + (1 + 2 * mu_eff) / n)
        self.p_c = (1 - c_c) * self.p_c + h * math.sqrt(c_c * (2 - c_c) * mu_eff) * y_w
        w_o = np.where(ranked > 0, ranked, ranked * n / (z**2).sum(1))
        lost = (1 - h) * self.c_1 * c_c * (2 - c_c)
        self.c = (
            (1 + lost - self.c_1 - self.c_mu * w_o.sum()) * self.c
            - lost * self.p_c**2
            + self.c_1 * self.p_c**2
            + self.c_mu * (w_o @ y**2)
        )
        self.t += 1


def steep(x: Tensor) -> Tensor:
    """A slope of steps: whole numbers, so that members tie, and nothing ever stops the growth."""
    return (2 * x.sum(dim=1)).floor()


def coarse(x: Tensor) -> Tensor:
    """Only a few members of a generation are better than all others, which tie."""
    return (x[:, 0] * 3).floor().clamp(min=-3.0)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("value", [steep, coarse, sphere])
def test_updates_are_those_of_the_equations(value: Callable[[Tensor], Tensor], ranks: int) -> None:
    optimizer: Any = sepcma.Optimizer(popsize=POPSIZE, sigma=SIGMA)
    first = torch.linspace(-1, 1, SIZE)
    steps = 25

    def work(comm: RankComm) -> tuple[list[np.ndarray], list[np.ndarray], list[float]]:
        state = optimizer.init({"a": first[None]}, Rng(4))
        thetas, spreads, flat = [], [], []
        for _ in range(steps):
            state, metrics = optimizer.step(state, Objective(value), comm, Rng(4))
            thetas.append(state.theta.astype(float))
            spreads.append(optimizer.rule().spread(state))
            flat.append(metrics["flat"])
        return thetas, spreads, flat

    thetas, spreads, flat = on_ranks(ranks, work)[0]
    reference = Reference(first.numpy())
    for t in range(steps):
        z = pair_noise(Rng(4), t, range(POPSIZE), SIZE).astype(float)
        center = first.numpy() if t == 0 else thetas[t - 1]
        spread = (SIGMA if t == 0 else spreads[t - 1]) * np.ones(SIZE)
        members = torch.from_numpy((center + spread.astype(np.float32) * z).astype(np.float32))
        fitness = value(members.double()).numpy()
        assert flat[t] == float(len(set(fitness.tolist())) == 1)
        if not flat[t]:
            reference.step(z, fitness)
        assert np.abs(thetas[t] - reference.mean).max() < 1e-5 * max(1, np.abs(thetas[t]).max())
        want = reference.sigma * np.sqrt(reference.c)
        assert np.abs(spreads[t] / want - 1).max() < 1e-5
    assert value is sphere or reference.split > 3
    assert value is not steep or reference.paused > 0
    assert reference.t > 10
