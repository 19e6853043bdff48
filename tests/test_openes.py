"""OpenAI-ES: its gradient, its schedules and its units."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from searches import (
    Objective,
    RankComm,
    flat_theta,
    on_ranks,
    run,
    sphere,
    start,
)
from torch import Tensor

from esmeta.evolution.noise import pair_noise
from esmeta.optimizers import openes
from esmeta.rng import Rng
from esmeta.run import config as configs

torch.set_num_threads(1)


# --- the gradient ---------------------------------------------------------------------------


def test_raw_gradient_of_a_linear_function_is_the_closed_form() -> None:
    # u = c . (theta +- sigma eps): the estimate is (1/n) sum_pairs eps eps^T c, exactly.
    slope = np.linspace(-2, 3, 10)
    noise = pair_noise(Rng(0), 0, range(32), 10).astype(np.float64)
    want = noise.T @ (noise @ slope) / 32
    objective = Objective(lambda x: x @ torch.from_numpy(slope))
    follows = openes.Optimizer(
        popsize=64, sigma=0.5, shaping="raw", optimizer="sgd", learning_rate=1.0
    )
    state, _ = run(follows, objective, start(10), 1)
    assert np.abs(flat_theta(follows, state).numpy() - want).max() <= 1e-6 * np.abs(want).max()


def test_huge_raw_fitness_does_not_overflow() -> None:
    small = openes.Optimizer(popsize=32, shaping="raw")
    grown, _ = run(small, Objective(lambda x: 2.0**70 * sphere(x)), start(10), 1)
    plain, _ = run(small, Objective(sphere), start(10), 1)
    assert torch.allclose(flat_theta(small, grown), flat_theta(small, plain), atol=1e-6)


def reference_run(value: Callable[[Tensor], Tensor], theta: np.ndarray, steps: int) -> np.ndarray:
    """The OpenAI formula with Adam and L2, dense, in float64 (no ties occur here)."""
    popsize, sigma, rate, decay = 50, 0.1, 0.05, 0.005
    mean = square = np.zeros(len(theta))
    for t in range(steps):
        eps = pair_noise(Rng(0), t, range(popsize // 2), len(theta)).astype(np.float64)
        signed = np.stack([eps, -eps], axis=1).reshape(popsize, -1)
        fitness = value(torch.from_numpy(theta + sigma * signed)).numpy()
        shaped = np.argsort(np.argsort(fitness)) / (popsize - 1) - 0.5
        gradient = shaped @ signed / (popsize * sigma) - decay * theta
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        hat, hat2 = mean / (1 - 0.9 ** (t + 1)), square / (1 - 0.999 ** (t + 1))
        theta = theta + rate * hat / (np.sqrt(hat2) + 1e-8)
    return theta


def test_ten_generations_match_a_dense_float64_reference() -> None:
    optimizer = openes.Optimizer(popsize=50, sigma=0.1, learning_rate=0.05, weight_decay=0.005)
    state, _ = run(optimizer, Objective(sphere), start(12, 0.5), 10)
    want = reference_run(sphere, np.full(12, 0.5), 10)
    assert np.abs(flat_theta(optimizer, state).numpy() - want).max() < 2e-6


def epg_release(
    value: Callable[[Tensor], Tensor], eta: np.ndarray, sigma: float, rates: list[float]
) -> np.ndarray:
    """EPG's outer loop as released, one generation of 64 vectors per rate.

    https://github.com/openai/EPG, ``epg/evolution.py`` (``ES.train``) and ``epg/utils.py``
    (``relative_ranks``, ``Adam`` with beta1 = 0): the gradient is not divided by sigma, the L2
    factor is 0.001.
    """
    mean_square = np.zeros(len(eta))
    for t, rate in enumerate(rates):
        half = pair_noise(Rng(0), t, range(32), len(eta)).astype(np.float64)
        noise = np.stack([half, -half], axis=1).reshape(64, -1)
        returns = value(torch.from_numpy(eta + sigma * noise)).numpy()
        ranks = np.argsort(np.argsort(returns)) / 63 - 0.5
        gradient = ranks.dot(noise) / 64 - 0.001 * eta
        mean_square = 0.999 * mean_square + 0.001 * gradient**2
        step = rate * math.sqrt(1 - 0.999 ** (t + 1)) * gradient / (np.sqrt(mean_square) + 1e-8)
        eta = eta + step
    return eta


EPG_PRESETS = ["cheetah-hopper-epg", "cheetah-lunar-epg", "displacement-epg"]


@pytest.mark.parametrize("preset", EPG_PRESETS)
def test_the_search_of_an_epg_preset_is_that_of_the_release(preset: str) -> None:
    """Three generations agree, in units of search; weights are large, so that the decay shows."""
    table = configs.load(preset)["optimizer"]
    optimizer = openes.Optimizer(**{k: v for k, v in table.items() if k != "name"})
    blocks = optimizer.sigma_blocks
    units = {"a": 1.0} if isinstance(blocks, str) else blocks
    unit = np.repeat(list(units.values()), 4)
    first = np.linspace(-60, 60, len(unit))
    begin = torch.from_numpy((unit * first).astype(np.float32))
    theta = {name: begin[4 * k : 4 * k + 4][None] for k, name in enumerate(units)}
    value = Objective(lambda x: -((x / torch.from_numpy(unit) - 1) ** 4).sum(dim=1))
    state, _ = run(optimizer, value, theta, 3)
    got = flat_theta(optimizer, state).double().numpy() / unit
    low, fall = optimizer.learning_rate_min, optimizer.learning_rate - optimizer.learning_rate_min
    rates = [low + fall * (1 - t / optimizer.learning_rate_generations) for t in range(3)]
    want = epg_release(lambda x: -((x - 1) ** 4).sum(dim=1), first, optimizer.sigma, rates)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want - first).max()


# --- what it reaches, and what must not move it ---------------------------------------------


def test_schedules_decay_to_their_floors() -> None:
    optimizer = openes.Optimizer(popsize=4, sigma=0.4, sigma_decay=0.5, sigma_min=0.09)
    _, log = run(optimizer, Objective(sphere), start(4), 4)
    assert [m["sigma"] for m in log] == [0.4, 0.2, 0.1, 0.09]
    # Adam's first step is the learning rate in every coordinate.
    optimizer = openes.Optimizer(popsize=4, learning_rate=0.1, learning_rate_decay=0.5)
    state, log = run(optimizer, Objective(sphere), start(4), 1)
    assert log[0]["update_norm"] == pytest.approx(0.1 * 2, rel=1e-5)
    frozen = openes.Optimizer(popsize=4, learning_rate=0.1, learning_rate_decay=1e-12)
    _, log = run(frozen, Objective(sphere), start(4), 2)
    assert log[0]["update_norm"] > 0.1 > 1e-6 > log[1]["update_norm"]


# --- ranks, resume, global state ------------------------------------------------------------


def test_disagreeing_ranks_raise_and_name_the_generation() -> None:
    optimizer = openes.Optimizer(popsize=32)

    def work(comm: RankComm) -> None:
        run(optimizer, Objective(sphere), start(5, float(comm.rank)), 1, comm)

    with pytest.raises(RuntimeError, match="generation 0"):
        on_ranks(2, work)


def test_a_checkpoint_is_small_and_of_its_policy() -> None:
    optimizer = openes.Optimizer(popsize=50)
    saved = optimizer.state_dict(run(optimizer, Objective(sphere), start(9), 2)[0])
    assert sum(v.nbytes for v in saved.values() if isinstance(v, Tensor)) <= 20 * 9 + 64
    with pytest.raises(ValueError, match="9 parameters.*has 10"):
        optimizer.load_state_dict(saved, start(10))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"popsize": 0}, "popsize = 0"),
        ({"popsize": True}, "popsize = True"),
        ({"popsize": 4.0}, "popsize = 4.0"),
        ({"sigma": math.inf}, "sigma = inf"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"beta1": 1.0}, r"beta1 = 1.0.*\[0, 1\)"),
        ({"sigma_decay": 1.5}, r"sigma_decay = 1.5.*\(0, 1\]"),
        ({"shaping": "rank"}, "shaping = 'rank'.*centered"),
        ({"sigma_blocks": "on"}, "sigma_blocks = 'on'"),
        ({"sigma_blocks": {"a": 0.0}}, "sigma_blocks.a = 0.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        openes.Optimizer(**options)


def test_unknown_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match="no leaf is named 'z'.*a, b"):
        openes.Optimizer(sigma_blocks={"z": 1.0}).init(start(4), Rng(0))
