"""Units of search: a leaf that is searched in units of u is, divided by u, a leaf without units."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from searches import (
    EVOTORCH,
    SLICED,
    RankComm,
    Windows,
    flat_theta,
    on_ranks,
    run,
    same_saved,
    search,
)

from esmeta.evolution.noise import Noise
from esmeta.optimizers import nres, pes
from esmeta.rng import Rng
from esmeta.types import Params

# Powers of two, so that to divide by a unit is exact: the same bits must come out.
WIDE = {"a": 0.5, "b": 4.0, "c": 1.0}


def leaves(units: dict[str, float]) -> Params:
    """Leaves whose standard deviations are exactly ``units``, around means that are not zero."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
    shapes = {"a": (1, 6), "b": (1, 2, 3), "c": (1, 6)}
    return {name: units[name] * (signs + 0.5).reshape(shapes[name]) for name in units}


NATIVE = SLICED | {
    "nres": search(nres, sigma=0.1, learning_rate=0.05, window=2),
    "pes": search(pes, sigma=0.1, learning_rate=0.05, window=2),
}
DECAYS = ("openes", "lowrank", "pgpe", "nres", "pes")
CASES = [(name, {}) for name in NATIVE]
CASES += [(name, {"weight_decay": 0.3}) for name in DECAYS]
CASES += [
    (name, {"weight_decay": 0.3, "optimizer": kind})
    for name in ("openes", "pgpe")
    for kind in ("sgd", "clipup")
]
CASES += [("openes", {"sigma_decay": 0.8, "sigma_min": 0.05}), ("nres", {"sigma_decay": 0.8})]
CASES += [("pgpe", {"stdev_max_change": 0.01})]


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value))
@pytest.mark.parametrize("blocks", ["scaled", {"b": 4.0, "a": 0.5}], ids=["scaled", "table"])
def test_units_are_a_change_of_coordinates(name: str, options: dict[str, Any], blocks: Any) -> None:
    unit = torch.tensor([WIDE[leaf] for leaf in WIDE for _ in range(6)], dtype=torch.float64)
    plain, united = NATIVE[name](**options), NATIVE[name](sigma_blocks=blocks, **options)
    theta, small = leaves(WIDE), leaves(dict.fromkeys(WIDE, 1.0))
    want, _ = run(plain, Windows(), small, 7)  # type: ignore[arg-type]
    got, _ = run(united, Windows(unit), theta, 7)  # type: ignore[arg-type]
    moved = flat_theta(united, got).double() / unit
    assert torch.equal(moved, flat_theta(plain, want).double())
    assert (moved - torch.cat([leaf.flatten() for leaf in small.values()])).abs().max() > 0.01
    spread = united.rule().spread(got) / unit.numpy()
    assert np.array_equal(spread, plain.rule().spread(want))
    # The units are those of the first theta: a run that goes on does not measure them again,
    # neither on where it is nor on what it is given for the shapes.
    half, _ = run(united, Windows(unit), theta, 3)  # type: ignore[arg-type]
    loaded = united.load_state_dict(united.state_dict(half), small)
    again, _ = run(united, Windows(unit), {}, 4, state=loaded)  # type: ignore[arg-type]
    assert same_saved(united.state_dict(again), united.state_dict(got))


@pytest.mark.parametrize("name", NATIVE)
def test_members_are_spread_by_units(name: str) -> None:
    # Standard deviations 1 and 7; the constant leaf takes their root mean square, 5.
    theta = leaves({"a": 1.0, "b": 7.0}) | {"c": torch.full((1, 9), 3.0)}
    spread = {"scaled": (1.0, 7.0, 5.0), "off": (1.0, 1.0, 1.0), "table": (1.0, 0.25, 1.0)}
    for blocks, units in spread.items():
        given: Any = {"b": 0.25} if blocks == "table" else blocks
        optimizer, objective = NATIVE[name](sigma_blocks=given), Windows()
        run(optimizer, objective, theta, 1)  # type: ignore[arg-type]
        members = torch.cat(objective.members)[:: 2 if optimizer.mirrored else 1]
        # One half of the pairs of nres and pes begins a life in the first generation.
        noise = Noise(optimizer.init(theta, Rng(0)).shapes, int(name == "lowrank"))
        drawn = torch.from_numpy(noise.expand(noise.draw(Rng(0), 0, np.arange(len(members)))))
        unit = torch.tensor(units, dtype=torch.float64).repeat_interleave(torch.tensor([6, 6, 9]))
        center = torch.cat([leaf.flatten() for leaf in theta.values()])
        want = center + optimizer.sigma * unit * drawn
        assert (members - want).abs().max() < 1e-5


def test_where_all_leaves_are_constant_units_are_one() -> None:
    state = NATIVE["openes"](sigma_blocks="scaled").init({"a": torch.full((1, 4), 9.0)}, Rng(0))
    assert (state.unit == 1.0).all()


@pytest.mark.parametrize("name", NATIVE)
def test_ranks_with_other_units_are_found_out(name: str) -> None:
    def work(comm: RankComm) -> None:
        optimizer = NATIVE[name](sigma_blocks={"b": 1.0 + comm.rank})
        # Nothing moves and nothing else differs.
        flat = Windows(value=lambda x: torch.zeros(len(x), dtype=torch.float64))
        run(optimizer, flat, leaves(WIDE), 1, comm)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match="ranks disagree"):
        on_ranks(2, work)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", EVOTORCH)
def test_a_common_unit_of_evotorchs_searchers(name: str, decay: float) -> None:
    # Sigma and (where steps have a length of their own) the learning rate carry the unit.
    given = {
        "evotorch_pgpe": {"learning_rate": 0.05},
        "evotorch_pgpe-clipup": {"learning_rate": 0.02},
    }
    plain = EVOTORCH[name](sigma=0.2, weight_decay=decay, **given.get(name, {}))
    rates = {key: 8 * rate for key, rate in given.get(name, {}).items()}
    united = EVOTORCH[name](sigma=1.6, weight_decay=decay, **rates)
    small = leaves(dict.fromkeys(WIDE, 1.0))
    want, _ = run(plain, Windows(), small, 5)  # type: ignore[arg-type]
    got, log = run(united, Windows(8.0), leaves(dict.fromkeys(WIDE, 8.0)), 5)  # type: ignore[arg-type]
    assert log[0]["sigma"] == pytest.approx(1.6)
    moved = flat_theta(united, got).double() / 8
    assert (moved - flat_theta(plain, want).double()).abs().max() < 1e-5
    assert (moved - flat_theta(plain, plain.init(small, Rng(0)))).abs().max() > 0.05
