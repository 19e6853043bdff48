"""What every evolution search keeps, native or EvoTorch's."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from searches import (
    EVOTORCH,
    SLICED,
    Objective,
    RankComm,
    digest,
    ellipsoid,
    failing,
    flat_theta,
    on_ranks,
    run,
    same_saved,
    solo,
    sphere,
)
from torch import Tensor

from esmeta.evolution.noise import Noise
from esmeta.rng import Rng
from esmeta.types import Params

MAKE = SLICED | EVOTORCH
every = pytest.mark.parametrize("make", list(MAKE.values()), ids=list(MAKE))
each = pytest.mark.parametrize("name", list(MAKE))


def start(size: int, value: float = 0.0) -> Params:
    """One matrix, for which low-rank noise is smaller than full noise."""
    rows = next(n for n in (5, 3, 2) if size % n == 0)
    theta = {"a": torch.full((1, rows, size // rows), value)}
    assert Noise({"a": theta["a"].shape[1:]}, 1).width < size
    return theta


@each
@pytest.mark.parametrize("value", [sphere, ellipsoid])
def test_reaches_the_optimum(name: str, value: Callable[[Tensor], Tensor]) -> None:
    optimizer = MAKE[name]()
    begin = value(torch.zeros(1, 10, dtype=torch.float64)).item()
    state, _ = run(optimizer, Objective(value), start(10), 250)
    # ClipUp's steps have a fixed length, those of openes shrink slowly: both hover.
    hovers = name in SLICED or name.endswith("clipup")
    end = value(flat_theta(optimizer, state).double()[None]).item()
    assert end > begin * (1e-2 if hovers else 1e-3)


@each
@pytest.mark.parametrize("constant", [0.25, math.nan, math.inf])
def test_flat_generations_change_nothing(name: str, constant: float) -> None:
    decays = name in EVOTORCH or name in ("openes", "pgpe")
    optimizer = MAKE[name](**({"weight_decay": 0.1} if decays else {}))
    moved, _ = run(optimizer, Objective(sphere), start(6, 1.0), 3)
    before = optimizer.state_dict(moved)
    nothing = Objective(lambda x: torch.full((len(x),), constant, dtype=torch.float64))
    state, log = run(optimizer, nothing, {}, 100, state=moved)
    after = optimizer.state_dict(state)
    assert after.pop("generation") == 103 and before.pop("generation") == 3
    assert same_saved(before, after)
    assert all(m["flat"] == 1.0 and m["update_norm"] == 0.0 for m in log)


@every
def test_nan_is_as_bad_as_minus_1e30(make: Callable[..., Any]) -> None:
    ends = []
    for bad in (math.nan, -1e30):
        optimizer = make()
        state, log = run(optimizer, Objective(failing(bad)), start(10), 60)
        assert log[0]["nan_members"] == (5.0 if math.isnan(bad) else 0.0)
        ends.append(sphere(flat_theta(optimizer, state).double()[None]).item())
    assert ends[0] == pytest.approx(ends[1], rel=0.02)


@every
def test_200_generations_of_random_failures_stay_finite(make: Callable[..., Any]) -> None:
    draws = np.random.Generator(np.random.PCG64(0))

    def value(x: Tensor) -> Tensor:
        bad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0], dtype=torch.float64)
        return bad[torch.from_numpy(draws.integers(0, 5, len(x)))]

    optimizer = make(popsize=8, sigma=0.01)
    state, _ = run(optimizer, Objective(value), start(6), 200)
    assert torch.isfinite(flat_theta(optimizer, state)).all()


@each
@pytest.mark.parametrize("popsize", [4, 50, 64])
def test_same_bits_for_any_number_of_ranks(name: str, popsize: int) -> None:
    hashes = set()
    for size in (1, 2, 3, 5):
        objectives = [Objective(sphere) for _ in range(size)]

        def work(comm: RankComm, objectives: list[Objective] = objectives) -> tuple[Any, ...]:
            optimizer = MAKE[name](popsize=popsize)
            state, log = run(optimizer, objectives[comm.rank], start(40), 8, comm)
            return digest(optimizer, state), log[-1]["env_steps"], log[-1].get("resync", 0.0)

        results = on_ranks(size, work)
        assert len(set(results)) == 1 and results[0][1:] == (popsize * 15.0, 0.0)
        assert sum(o.rows for o in objectives) == 8 * popsize
        hashes |= {r[0] for r in results}
    assert len(hashes) == 1


@every
def test_resume_is_exact_and_small(make: Callable[..., Any]) -> None:
    optimizer = make()
    whole, _ = run(optimizer, Objective(sphere), start(9), 12)
    half, _ = run(optimizer, Objective(sphere), start(9), 6)
    saved = optimizer.state_dict(half)
    run(optimizer, Objective(sphere), {}, 3, state=half)  # must not write to what was saved
    loaded = make().load_state_dict(saved, start(9))
    resumed, _ = run(make(), Objective(sphere), {}, 6, state=loaded)
    assert same_saved(optimizer.state_dict(resumed), optimizer.state_dict(whole))
    assert all(isinstance(v, Tensor | int) for v in saved.values())
    assert all(v.numel() <= 81 for v in saved.values() if isinstance(v, Tensor))


@pytest.mark.parametrize("name", list(EVOTORCH))
def test_checkpoints_of_before_go_on(name: str) -> None:
    """EvoTorch's searches once had a centre and no units."""
    optimizer = EVOTORCH[name]()
    whole, _ = run(optimizer, Objective(sphere), start(9), 6)
    half, _ = run(optimizer, Objective(sphere), start(9), 3)
    saved = optimizer.state_dict(half)
    old = {"center": saved.pop("theta"), **saved}
    del old["unit"]
    loaded = optimizer.load_state_dict(old, start(9))
    resumed, _ = run(optimizer, Objective(sphere), {}, 3, state=loaded)
    assert same_saved(optimizer.state_dict(resumed), optimizer.state_dict(whole))


@every
def test_a_state_can_be_stepped_twice(make: Callable[..., Any]) -> None:
    optimizer = make()
    state, _ = run(optimizer, Objective(sphere), start(6), 4)
    once, _ = optimizer.step(state, Objective(sphere), solo(), Rng(0))
    again, _ = optimizer.step(state, Objective(sphere), solo(), Rng(0))
    assert same_saved(optimizer.state_dict(once), optimizer.state_dict(again))


@every
def test_global_generators_are_neither_read_nor_moved(make: Callable[..., Any]) -> None:
    hashes = set()
    for poison in (1, 2):
        optimizer = make()
        torch.manual_seed(poison)
        np.random.seed(poison)
        before = torch.get_rng_state(), np.random.get_state()[1]
        hashes.add(digest(optimizer, run(optimizer, Objective(sphere), start(6), 5)[0]))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    assert len(hashes) == 1
