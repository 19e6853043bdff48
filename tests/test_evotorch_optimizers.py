"""EvoTorch's searchers behind the optimizer contract: what only they have."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ROOT, environment
from searches import (
    EVOTORCH,
    Objective,
    RankComm,
    digest,
    flat_theta,
    on_ranks,
    run,
    sphere,
    start,
    target,
)
from torch import Tensor

from esmeta.errors import UserError
from esmeta.optimizers import cem, cmaes, evotorch_pgpe, evotorch_snes, xnes
from esmeta.rng import Rng

torch.set_num_threads(1)

MODULES = (evotorch_pgpe, evotorch_snes, cem, xnes, cmaes)


@pytest.mark.parametrize("make", list(EVOTORCH.values()), ids=list(EVOTORCH))
def test_weight_decay_takes_a_share_of_the_centre(make: Callable[..., Any]) -> None:
    plain, decayed = make(), make(weight_decay=0.25)
    free, held = (run(o, Objective(sphere), start(10, 2.0), 1)[0] for o in (plain, decayed))
    assert torch.equal(flat_theta(decayed, held), flat_theta(plain, free) * 0.75)
    state, _ = run(make(weight_decay=0.1), Objective(sphere), start(10), 250)
    assert flat_theta(decayed, state).norm() < 0.95 * target(10).norm()
    with pytest.raises(UserError, match="below 1"):
        make(weight_decay=1.0)


@pytest.mark.parametrize("make", list(EVOTORCH.values()), ids=list(EVOTORCH))
def test_a_rank_that_drifted_is_brought_back(make: Callable[..., Any]) -> None:
    def work(comm: RankComm) -> tuple[list[float], str]:
        optimizer = make()
        state = optimizer.init(start(5), Rng(0))
        if comm.rank == 1:
            state.theta[0] += 1e-3
        state, log = run(optimizer, Objective(sphere), {}, 3, comm, state=state)
        return [m["resync"] for m in log], digest(optimizer, state)

    (log, hash_0), (_, hash_1) = on_ranks(2, work)
    assert log == [1.0, 0.0, 0.0] and hash_0 == hash_1


# --- against EvoTorch itself ----------------------------------------------------------------


RATES = {"stdev_init": 0.1, "stdev_learning_rate": 0.1}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "evotorch_pgpe": ("PGPE", RATES | {"center_learning_rate": 0.05, "optimizer": "adam"}),
    "evotorch_pgpe-clipup": ("PGPE", RATES | {"center_learning_rate": 0.02, "optimizer": "clipup"}),
    "evotorch_snes": ("SNES", {"stdev_init": 0.3}),
    "cem": ("CEM", {"stdev_init": 0.5, "parenthood_ratio": 0.5, "stdev_max_change": 0.05}),
    "xnes": ("XNES", {"stdev_init": 0.3}),
    "cmaes": ("CMAES", {"stdev_init": 0.3}),
    "sepcmaes": ("CMAES", {"stdev_init": 0.3, "separable": True}),
}


@pytest.mark.parametrize("name", EVOTORCH)
def test_matches_evotorch_where_nothing_fails(name: str) -> None:
    optimizer, center = EVOTORCH[name](), torch.zeros(10)
    state, _ = run(optimizer, Objective(sphere), start(10), 10)

    from evotorch import Problem, algorithms

    value = Objective(sphere)
    problem = Problem(
        "max",
        lambda values: value.fitness(values.as_subclass(Tensor), 0).mean(),
        solution_length=10,
        initial_bounds=(-1.0, 1.0),
        dtype=torch.float32,
        eval_dtype=torch.float64,
        vectorized=True,
    )
    kind, options = THEIRS[name]
    search = getattr(algorithms, kind)(problem, popsize=50, center_init=center, **options)
    lazy = "cma" not in name  # the Gaussian family updates at the start of its next step
    for generation in range(10 + lazy):
        problem.manual_seed(Rng(0).fold("evotorch", generation).key % 2**63)
        search.step()
    want = search.status["center"].as_subclass(Tensor)
    assert torch.allclose(flat_theta(optimizer, state), want, rtol=1e-5, atol=1e-5)


def test_cem_ties_at_the_border_share_the_parents() -> None:
    # 2 of 8 succeed and 4 are parents: the 6 failures weigh 1/3 each, whatever their order.
    seen: list[Tensor] = []

    def value(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.tensor([0, 0, 1, 0, 0, 0, 1, 0], dtype=torch.float64)

    optimizer = cem.Optimizer(popsize=8)
    state, _ = run(optimizer, Objective(value), start(3), 1)
    share = torch.tensor([1 / 3, 1 / 3, 1, 1 / 3, 1 / 3, 1 / 3, 1, 1 / 3], dtype=torch.float64)
    assert torch.allclose(flat_theta(optimizer, state).double(), share @ seen[0] / 4, atol=1e-6)


def test_clipup_survives_a_zero_gradient() -> None:
    # A mirrored pair that ties has no centre gradient; here no pair has one, but pairs differ.
    optimizer = evotorch_pgpe.Optimizer(popsize=4, optimizer="clipup")
    even = Objective(lambda x: (x**2).sum(dim=1))
    state, log = run(optimizer, even, start(3), 1)
    assert log[0]["flat"] == 0.0 and torch.isfinite(flat_theta(optimizer, state)).all()


def test_evotorch_is_not_imported() -> None:
    code = (
        "import sys; from searches import *\n"
        "for make in EVOTORCH.values(): run(make(), Objective(sphere), start(4), 1)\n"
        "sys.exit('evotorch' in sys.modules or 'ray' in sys.modules)"
    )
    env = environment({"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])})
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0


# --- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        *[(m.Optimizer, {"popsize": 1}, "popsize = 1.*even") for m in MODULES],
        *[(m.Optimizer, {"popsize": 9}, "popsize = 9.*even") for m in MODULES],
        *[(m.Optimizer, {"sigma": 0.0}, "sigma = 0.0.*> 0") for m in MODULES],
        (evotorch_pgpe.Optimizer, {"learning_rate": math.nan}, "learning_rate = nan"),
        (evotorch_pgpe.Optimizer, {"stdev_max_change": 1.0}, "stdev_max_change = 1.0.*below 1"),
        (evotorch_pgpe.Optimizer, {"optimizer": "clipupp"}, "optimizer = 'clipupp'.*'clipup'"),
        (evotorch_snes.Optimizer, {"learning_rate": 0.0}, "learning_rate = 0.0"),
        (evotorch_snes.Optimizer, {"shaping": "rank"}, "shaping = 'rank'"),
        (xnes.Optimizer, {"learning_rate": math.inf}, "learning_rate = inf"),
        (cem.Optimizer, {"parenthood_ratio": 1.5}, "parenthood_ratio = 1.5.*at most 1"),
        (cem.Optimizer, {"popsize": 2}, "parenthood_ratio = 0.5.*at least 2 parents of 2"),
        (cem.Optimizer, {"stdev_min": -1.0}, "stdev_min = -1.0"),
        (cmaes.Optimizer, {"separable": "yes"}, "separable = 'yes'"),
    ],
)
def test_bad_options_are_refused(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**options)


def test_full_matrices_are_refused_for_large_policies() -> None:
    with pytest.raises(ValueError, match="xnes: the policy has 1501.*snes"):
        xnes.Optimizer().init(start(1501), Rng(0))
    with pytest.raises(ValueError, match="cmaes: the policy has 1501.*separable = true"):
        cmaes.Optimizer(separable=False).init(start(1501), Rng(0))
    state = cmaes.Optimizer(popsize=4).init(start(1501), Rng(0))
    assert state.arrays["covariance"].shape == (1501,)


def test_diverging_search_raises_and_names_the_generation() -> None:
    optimizer = xnes.Optimizer(popsize=4, learning_rate=1e4)
    with pytest.raises(FloatingPointError, match="generation [0-9]+"):
        run(optimizer, Objective(sphere), start(4), 50)


@pytest.mark.parametrize("kind", ["adam", "clipup", "sgd"])
def test_ascents_are_evotorchs_bit_for_bit(kind: str) -> None:
    from evotorch.optimizers import SGD, Adam, ClipUp

    options: Any = {"solution_length": 7, "dtype": torch.float32, "stepsize": 0.03}
    theirs: Any = {"adam": Adam, "clipup": ClipUp, "sgd": SGD}[kind](**options)
    draw, moments = torch.Generator().manual_seed(0), evotorch_pgpe.zeros(kind, torch.zeros(7))
    for count in range(50):
        gradient = torch.randn(7, generator=draw) * 10.0 ** (count % 5 - 2)
        step, moments = evotorch_pgpe.ascent(kind, moments, gradient, 0.03)
        assert torch.equal(step, theirs.ascent(gradient.clone()))
