"""Random numbers by address: uniform, independent, and the same for any split of a batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from esmeta.rng import Rng

COUNT = 100_000
KNOWN_KEY = 2123140448054114935
KNOWN_NORMAL = [-0.651182452980442, -0.3846545482190229]
KNOWN_BITS = [
    [-796752479651457739, -4834612654133581049],
    [-3668286840332030664, -3417960079783806513],
    [4022958445256245342, -1930334223232819707],
]


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_uniform_draws_are_uniform(seed: int) -> None:
    u = Rng(seed).uniform(torch.arange(COUNT // 4), 4)
    assert u.shape == (COUNT // 4, 4) and u.dtype == torch.float64
    assert 0.0 <= float(u.min()) and float(u.max()) < 1.0
    seen = torch.histc(u, 50, 0, 1)
    chi = float(((seen - COUNT / 50) ** 2 / (COUNT / 50)).sum())
    assert 15 < chi < 100  # 49 degrees of freedom: mean 49, standard deviation 10
    for column in range(4):
        mean = float(u[:, column].mean())
        assert abs(mean - 0.5) < 5 * (1 / 12 / (COUNT // 4)) ** 0.5


def test_every_bit_is_a_fair_coin() -> None:
    bits = Rng(3).bits(torch.arange(COUNT // 2), 2).flatten()
    for k in range(64):
        share = float(((bits >> k) & 1).double().mean())
        assert abs(share - 0.5) < 5 * 0.5 / COUNT**0.5, k
    assert len(bits.unique()) == COUNT


def test_normal_draws_are_normal() -> None:
    x = Rng(4).normal(torch.arange(COUNT // 4), 4).flatten()
    moments = [float((x**k).mean()) for k in (1, 2, 3, 4)]
    error = [(v / COUNT) ** 0.5 for v in (1, 2, 15, 96)]
    for got, want, scale in zip(moments, (0, 1, 0, 3), error, strict=True):
        assert abs(got - want) < 5 * scale
    tail = float((x.abs() > 3).double().mean())
    assert abs(tail - 0.0027) < 5 * (0.0027 / COUNT) ** 0.5


def test_integers_cover_their_range_evenly() -> None:
    k = Rng(5).integers(torch.arange(COUNT), 1, 7)
    assert k.dtype == torch.int64
    seen = torch.bincount(k.flatten(), minlength=7)
    assert len(seen) == 7
    assert ((seen - COUNT / 7).abs() < 5 * (COUNT / 7) ** 0.5).all()


def test_neighbours_are_not_correlated() -> None:
    limit = 5 / COUNT**0.5
    index = torch.arange(COUNT)
    u = Rng(7).uniform(index, 3)
    pairs = {
        "next counter": (u[:, 0], u[:, 1]),
        "next index": (u[:-1, 0], u[1:, 0]),
        "diagonal": (u[:-1, 1], u[1:, 0]),
        "next seed": (u[:, 0], Rng(8).uniform(index, 1)),
        "next name": (Rng(7).fold(1).uniform(index, 1), Rng(7).fold(2).uniform(index, 1)),
        "parent": (u[:, 0], Rng(7).fold("a").uniform(index, 1)),
        "lowest bits": (Rng(7).bits(index, 2)[:, 0] & 255, Rng(7).bits(index, 2)[:, 1] & 255),
    }
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < limit, name


def test_draws_do_not_depend_on_the_batch() -> None:
    rng = Rng(9).fold("x")
    index = torch.arange(60).reshape(3, 20) * 7 - 50
    for draw in (rng.bits, rng.uniform, rng.normal):
        whole = draw(index, 5)
        assert whole.shape == (3, 20, 5)
        some = draw(index[1:, [4, 19, 2]], 5)
        assert torch.equal(some, whole[1:, [4, 19, 2]])
        assert torch.equal(draw(index[2, 3], 5), whole[2, 3])
    # More draws per address begin with the same ones.
    assert torch.equal(rng.bits(index, 9)[..., :5], rng.bits(index, 5))
    assert torch.equal(rng.integers(index, 5, 10), (10 * rng.uniform(index, 5)).long())


def test_names_give_streams_of_their_own() -> None:
    names: list[tuple[int | str, ...]] = [(i,) for i in range(200)]
    names += [(str(i),) for i in range(50)] + [(-1,), (2**40,), ("",), ("a",), ("b",), ("ab",)]
    names += list(itertools.product(("a", "b", 0, 1), repeat=2))
    names += list(itertools.product((0, 1, "a"), repeat=3))
    keys = {Rng(seed).fold(*name).key for seed in range(3) for name in names}
    assert len(keys) == 3 * len(names)
    assert Rng(0).fold("a", 1).key == Rng(0).fold("a", 1).key
    assert Rng(1).fold().key not in keys | {1}
    assert all(0 <= key < 2**64 for key in keys)


def test_known_bits() -> None:
    """Frozen: another value here changes every task, every trial and every published number."""
    assert Rng(0).fold("tasks", 3).key == KNOWN_KEY
    assert Rng(12345).bits(torch.tensor([0, 7, -1]), 2).tolist() == KNOWN_BITS
    normal = Rng(12345).normal(torch.tensor([7]), 2)[0].tolist()
    assert normal == pytest.approx(KNOWN_NORMAL, rel=1e-12)


def test_numpy_generator_is_a_function_of_the_key() -> None:
    one, two = Rng(3).fold("x").numpy(), Rng(3).fold("x").numpy()
    first = one.standard_normal(100)
    assert (first == two.standard_normal(100)).all()
    assert (first != Rng(4).fold("x").numpy().standard_normal(100)).all()
