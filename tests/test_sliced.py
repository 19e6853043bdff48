"""The sliced searches against EvoTorch's; failures and options."""

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import environment
from numpy._core import _multiarray_umath as umath
from searches import (
    SLICED,
    Objective,
    RankComm,
    digest,
    ellipsoid,
    failing,
    flat_theta,
    on_ranks,
    run,
    solo,
    sphere,
    start,
)
from torch import Tensor

from esmeta.evolution.ascent import exact_norm, follow, zeros
from esmeta.evolution.noise import Noise
from esmeta.evolution.population import Generation
from esmeta.evolution.replicated import Sampled
from esmeta.evolution.shaping import aggregated, weighed
from esmeta.optimizers import cmaes, evotorch_pgpe, evotorch_snes, openes, pgpe, sepcma, snes
from esmeta.rng import Rng
from esmeta.types import Fitness, Params

torch.set_num_threads(1)


# --- agreement with EvoTorch -----------------------------------------------------------------


class Replay:
    """Scores of a random linear-quadratic function; keeps the members it is given."""

    def __init__(self) -> None:
        self.members: list[Tensor] = []

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        assert isinstance(params, Tensor)
        self.members.append(params.clone())
        value = ellipsoid(params.double()) + torch.sin(5 * params.double()).sum(dim=1)
        return Fitness(value.unsqueeze(1), torch.ones(len(params), 1, dtype=torch.int64))


def evotorch_centers(optimizer: Any, theirs: Any, theta: Params, steps: int) -> tuple[list, list]:
    """Centres (and sigmas) of a native search and of EvoTorch's with the same noise and fitness."""
    objective, comm = Replay(), solo()
    state = optimizer.init(theta, Rng(3))
    other, rule = theirs.init(theta, Rng(3)), theirs.rule()
    got, want = [], []
    for _ in range(steps):
        before = state
        state, _ = optimizer.step(state, objective, comm, Rng(3))
        members = objective.members.pop()
        fitness = Replay().fitness(members, 0).returns[:, 0]
        zs = Noise(before.shapes).draw(Rng(3), before.generation, np.arange(len(members)))
        sampled: Any = Sampled(torch.from_numpy(zs), members, fitness)
        utilities = rule.utilities(fitness).numpy()
        center, arrays = rule.update(other, utilities, Generation(sampled, sampled))
        other = dataclasses.replace(other, theta=center, arrays=arrays)
        sigma = arrays["sigma"] * arrays.get("factor", 1.0)
        got.append((state.theta.astype(float), optimizer.rule().spread(state)))
        want.append((center.astype(float), sigma.astype(float)))
    return got, want


AGREEING: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "pgpe": (pgpe, evotorch_pgpe, {}),
    "pgpe-clipup": (pgpe, evotorch_pgpe, {"optimizer": "clipup"}),
    "pgpe-sgd-nes": (
        pgpe, evotorch_pgpe, {"optimizer": "sgd", "shaping": "nes", "learning_rate": 100.0}
    ),
    "pgpe-raw": (pgpe, evotorch_pgpe, {"shaping": "raw", "stdev_max_change": 0.01}),
    "snes": (snes, evotorch_snes, {}),
    "snes-centered": (snes, evotorch_snes, {"shaping": "centered", "learning_rate": 0.3}),
    "sepcma": (sepcma, cmaes, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", AGREEING)
def test_ten_updates_agree_with_evotorch(case: str) -> None:
    native, theirs, more = AGREEING[case]
    options = {"popsize": 40, "sigma": 0.2} | more
    diagonal = {"separable": True} if theirs is cmaes else {}
    searches = native.Optimizer(**options), theirs.Optimizer(**options | diagonal)
    theta = {"a": torch.linspace(-1, 1, 30).unsqueeze(0)}
    got, want = evotorch_centers(*searches, theta, 10)
    for (center, spread), (their_center, their_spread) in zip(got, want, strict=True):
        assert np.abs(center - their_center).max() <= 1e-5 * np.abs(their_center).max()
        assert np.abs(spread - their_spread).max() <= 1e-5 * np.abs(their_spread).max()
    assert np.abs(got[-1][0] - got[0][0]).max() > 0.01
    assert np.abs(got[-1][1] - got[0][1]).max() > 1e-3


def test_exact_exp_is_exp() -> None:
    x = np.concatenate([np.linspace(-40, 40, 4001), [0.0, 1e-300, -690.0, 690.0]])
    assert np.abs(snes.exact_exp(x) / np.exp(x) - 1).max() < 1e-15


def test_ascents_by_hand() -> None:
    gradient = np.array([3.0, -4.0])
    step, moments = follow("clipup", zeros("clipup", 2), gradient)
    assert np.allclose(step, [0.6, -0.8])
    step, moments = follow("clipup", moments, np.zeros(2))
    assert np.allclose(step, [0.54, -0.72])
    for _ in range(60):
        step, moments = follow("clipup", moments, gradient)
    assert exact_norm(step) == pytest.approx(2.0)
    assert (follow("sgd", {}, gradient)[0] == gradient).all()


# --- low rank ---------------------------------------------------------------------------------


def test_low_rank_noise_is_what_it_says() -> None:
    noise = Noise({"w": (40, 30), "b": (50,), "small": (2, 2)}, rank=3)
    assert noise.size == 1254 and noise.width == 3 * 70 + 50 + 4
    kept = noise.draw(Rng(0), 0, np.arange(400))
    whole = noise.expand(kept)
    assert whole.shape == (400, 1254) and whole.dtype == np.float32
    matrix = whole[0, :1200].reshape(40, 30)
    assert np.linalg.matrix_rank(matrix) == 3
    left, right = kept[0, :120].reshape(3, 40), kept[0, 120:210].reshape(3, 30)
    assert np.allclose(matrix, left.T @ right / math.sqrt(3), atol=1e-5)
    assert (whole[:, 1200:] == kept[:, 210:]).all()
    # Unit variance of every entry: 400 draws, mean of the squares over the matrix.
    assert np.square(whole[:, :1200]).mean() == pytest.approx(1.0, abs=0.03)


# --- options ----------------------------------------------------------------------------------


class Indexed:
    """Remembers which step every member was scored on; 7 steps per trial."""

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        assert isinstance(params, Tensor)
        assert not isinstance(step, int) and len(step) == len(params)
        for row, own in zip(params, step.tolist(), strict=True):
            self.steps[hash(tuple(row.tolist()))] = own
        return Fitness(sphere(params.double())[:, None], torch.full((len(params), 1), 7))


@pytest.mark.parametrize("module", [openes, evotorch_pgpe])
def test_tasks_per_pair_are_shared_by_the_pair_alone(module: Any) -> None:
    objective = Indexed()
    optimizer = module.Optimizer(popsize=50, tasks="per_pair")
    _, (metrics,) = run(optimizer, objective, start(6), 1)
    counts = np.unique(list(objective.steps.values()), return_counts=True)
    assert (counts[0] == np.arange(25)).all() and (counts[1] == 2).all()
    state, _ = run(optimizer, objective, start(6), 2)
    assert max(objective.steps.values()) == 49
    assert metrics["env_steps"] == 350


@pytest.mark.parametrize(("limit", "members"), [(0, 120), (100, 80)])
def test_members_are_added_until_the_interactions_are_reached(limit: int, members: int) -> None:
    options = {"popsize": 40, "interactions": 1501, "popsize_max": limit}
    hashes = set()
    for size in (1, 3):

        def work(comm: RankComm) -> tuple[Any, ...]:
            optimizer = openes.Optimizer(**options)  # type: ignore[arg-type]
            state, log = run(optimizer, Objective(sphere), start(9), 5, comm)
            return digest(optimizer, state), log[-1]["popsize"], log[-1]["env_steps"]

        hashes |= set(on_ranks(size, work))
    assert len(hashes) == 1
    assert hashes.pop()[1:] == (members, members * 15)


def test_fitness_from_returns_by_hand() -> None:
    returns = torch.tensor(
        [[3.0, 1.0, 2.0, 6.0], [0.0, 0.0, math.nan, 0.0], [math.inf, 1.0, 1.0, 1.0]],
        dtype=torch.float64,
    )
    for kind, want in (("mean", 3.0), ("worst", 1.0), ("cvar:0.5", 1.5), ("cvar:0.6", 2.0)):
        fitness = aggregated(returns, kind)
        assert fitness[0].item() == want and fitness[1:].isnan().all()


def test_the_worst_task_decides() -> None:
    def fitness(params: Tensor) -> Tensor:
        return torch.stack([-(params**2).sum(1), -((params - 2) ** 2).sum(1) * 3], dim=1)

    class TwoTasks:
        def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
            assert isinstance(params, Tensor)
            returns = fitness(params.double())
            return Fitness(returns, torch.ones_like(returns, dtype=torch.int64))

    # Means are best at 1.5; the worst task is best where x^2 = 3 (x - 2)^2, x = 3 - sqrt(3).
    for kind, want in (("mean", 1.5), ("worst", 3 - math.sqrt(3))):
        optimizer = openes.Optimizer(
            popsize=64, aggregate=kind, learning_rate=0.05, learning_rate_decay=0.98
        )
        state, _ = run(optimizer, TwoTasks(), {"a": torch.zeros(1, 2)}, 300)  # type: ignore[arg-type]
        assert flat_theta(optimizer, state).tolist() == pytest.approx([want] * 2, abs=0.02)


def test_dropped_pairs_have_no_weight() -> None:
    fitness = torch.tensor([5.0, 1.0, math.nan, 9.0, 2.0, 3.0], dtype=torch.float64)
    weights = weighed(fitness, "centered", drop_pairs=True)
    assert weights.tolist() == pytest.approx([0.5, -0.5, 0, 0, -1 / 6, 1 / 6])
    assert weighed(fitness, "centered", drop_pairs=False)[2] == -0.5
    assert not weighed(torch.full((4,), math.nan), "centered", drop_pairs=True).any()


@pytest.mark.parametrize(
    "make",
    [SLICED["openes"], SLICED["snes"], evotorch_snes.Optimizer],
    ids=["openes", "snes", "evo"],
)
def test_failed_members_may_end_the_run(make: Callable[..., Any]) -> None:
    optimizer = make(failed="raise", popsize=50)
    with pytest.raises(FloatingPointError, match=r"generation 0: member .*\(5 members failed"):
        run(optimizer, Objective(failing(math.nan)), start(6), 1)


# --- members that raise -----------------------------------------------------------------------


def explosive(limit: float) -> Callable[[Tensor], Tensor]:
    def value(x: Tensor) -> Tensor:
        if (x[:, 0] > limit).any():
            raise ArithmeticError("simulator exploded")
        return sphere(x)

    return value


@pytest.mark.parametrize(
    "make", [SLICED["openes"], evotorch_snes.Optimizer], ids=["openes", "evotorch"]
)
def test_a_member_that_raises_is_marked_and_the_others_count(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = make(popsize=50, sigma=0.1)
    state, (metrics,) = run(optimizer, Objective(explosive(0.15)), start(6), 1)
    err = capsys.readouterr().err
    bad = metrics["nan_members"]
    assert 1 <= bad <= 5 and "simulator exploded" in err
    assert "generation 0: the evaluation of members [" in err
    # The same as if these members had returned NaN.
    quiet, _ = run(
        make(popsize=50, sigma=0.1),
        Objective(lambda x: sphere(x).masked_fill(x[:, 0] > 0.15, math.nan)),
        start(6),
        1,
    )
    assert torch.equal(flat_theta(optimizer, state), flat_theta(optimizer, quiet))


@pytest.mark.parametrize(("limit", "error"), [(0.0, RuntimeError), (-9.0, ArithmeticError)])
def test_many_members_that_raise_are_a_mistake(limit: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="generation 0.* of 50 members|exploded"):
        run(SLICED["openes"](), Objective(explosive(limit)), start(6), 1)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        ("openes", {"aggregate": "cvar:2"}, "aggregate = 'cvar:2'.*cvar:a"),
        ("openes", {"aggregate": "median"}, "aggregate = 'median'"),
        ("openes", {"failed": "ignore"}, "failed = 'ignore'.*worst"),
        ("snes", {"failed": "drop_pair"}, "no mirrored pairs"),
        ("openes", {"tasks": "own"}, "tasks = 'own'"),
        ("openes", {"interactions": -1}, "interactions = -1"),
        ("openes", {"popsize_max": 10}, "popsize_max = 10.*popsize = 50"),
        ("sepcma", {"interactions": 100}, "sepcma's learning rates"),
        ("openes", {"noise": "lowrank"}, "noise = 'lowrank'.*lowrank:r"),
        ("openes", {"noise": "lowrank:0"}, "noise = 'lowrank:0'"),
        ("pgpe", {"optimizer": "adamw"}, "optimizer = 'adamw'"),
        ("pgpe", {"weight_decay": -1.0}, "weight_decay = -1.0"),
        ("snes", {"learning_rate": 0.0}, "learning_rate = 0.0"),
    ],
)
def test_bad_options_are_refused(make: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SLICED[make](**options)


HASHES = """
import importlib, sys
import torch
from esmeta.ranks.comm import SelfComm
from esmeta.rng import Rng
from esmeta.tree import theta_sha256
from esmeta.types import Fitness
class Steps:
    def fitness(self, params, step):
        value = -(params.double().abs() * 4).floor().sum(1, keepdim=True)
        return Fitness(value, torch.ones_like(value, dtype=torch.int64))
for name in ("openes", "pgpe", "snes", "sepcma"):
    search = importlib.import_module(f"esmeta.optimizers.{name}").Optimizer(popsize=30, sigma=0.3)
    state = search.init({"a": torch.full((1, 5, 203), 2.0)}, Rng(0))
    for _ in range(20):
        state, _ = search.step(state, Steps(), SelfComm(), Rng(0))
    print(name, theta_sha256(search.theta(state)))
"""


def test_bits_do_not_depend_on_what_the_processor_offers_numpy() -> None:
    features = umath.__cpu_features__
    spare = [name for name in umath.__cpu_dispatch__ if features[name]]
    if not spare:
        pytest.skip("this processor has nothing beyond numpy's baseline")
    hashes = []
    for disabled in ("", " ".join(spare)):
        env = environment({"NPY_DISABLE_CPU_FEATURES": disabled})
        command = [sys.executable, "-c", HASHES]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        hashes.append(done.stdout)
    assert hashes[0] == hashes[1] and len(hashes[0].split()) == 8
