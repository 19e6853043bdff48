"""Utilities against numbers computed by hand."""

import math

import pytest
import torch

from esmeta.evolution.noise import pair_noise
from esmeta.evolution.shaping import SHAPINGS, rank_weighted, utilities
from esmeta.rng import Rng

NAN, INF = math.nan, math.inf


def shaped(values: list[float], kind: str) -> list[float]:
    return utilities(torch.tensor(values, dtype=torch.float64), kind).tolist()


def test_centered_ranks_by_hand() -> None:
    assert shaped([10.0, -3.0, 7.0, 0.0, 5.0], "centered") == [0.5, -0.5, 0.25, -0.25, 0.0]


def test_ties_share_the_average() -> None:
    # Sorted: -1 | 2 2 | 4 with ranks -1/2, (-1/6 + 1/6) / 2, 1/2.
    assert shaped([2.0, 4.0, 2.0, -1.0], "centered") == pytest.approx([0.0, 0.5, 0.0, -0.5])


def test_failed_members_share_the_lowest_rank() -> None:
    got = shaped([3.0, NAN, 1.0, INF, -INF], "centered")
    assert got == pytest.approx([0.5, -0.25, 0.25, -0.25, -0.25])


def test_nes_by_hand() -> None:
    # N = 4: max(0, ln 3 - ln k) = ln 3, ln 1.5, 0, 0 (ln 3 - ln 3 = 0 for the third).
    total = math.log(3) + math.log(1.5)
    want = [math.log(1.5) / total - 0.25, -0.25, math.log(3) / total - 0.25, -0.25]
    got = shaped([3.0, 1.0, 9.0, 2.0], "nes")
    assert got == pytest.approx(want, abs=1e-15)
    assert sum(got) == pytest.approx(0.0, abs=1e-15)


def test_nes_ties_keep_the_sum() -> None:
    total = math.log(3) + math.log(1.5)
    best = 0.5 - 0.25  # the two best share (ln 3 + ln 1.5) / total, half each
    assert total > 0
    assert shaped([5.0, 5.0, 1.0, NAN], "nes") == pytest.approx([best, best, -0.25, -0.25])


def test_zscore_by_hand_and_failed_as_worst() -> None:
    # Mean 2, population variance (1 + 1) / 2 = 1; the failure counts as 1.
    assert shaped([1.0, 3.0, NAN, 3.0], "zscore") == pytest.approx([-1.0, 1.0, -1.0, 1.0])


def test_raw_is_unchanged_except_failures() -> None:
    assert shaped([1.5, -2.0, NAN], "raw") == [1.5, -2.0, -2.0]


@pytest.mark.parametrize("kind", SHAPINGS)
@pytest.mark.parametrize("values", [[4.0] * 6, [NAN] * 4, [INF, -INF], [0.1] * 2, [1e300] * 2])
def test_no_information_gives_exact_zeros(kind: str, values: list[float]) -> None:
    assert shaped(values, kind) == [0.0] * len(values)


@pytest.mark.parametrize("kind", SHAPINGS)
def test_order_of_members_does_not_matter(kind: str) -> None:
    values = torch.randn(33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values[5] = values[7]
    values[3] = NAN
    order = torch.randperm(33, generator=torch.Generator().manual_seed(2))
    assert torch.equal(utilities(values, kind)[order], utilities(values[order], kind))


def test_zscore_survives_huge_returns() -> None:
    assert shaped([1e307, -1e307], "zscore") == pytest.approx([1.0, -1.0])


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="shaping = 'ranks'.*centered"):
        utilities(torch.zeros(2, dtype=torch.float64), "ranks")


def test_rank_weighted_averages_over_ties() -> None:
    fitness = torch.tensor([1.0, 5.0, 1.0, NAN], dtype=torch.float64)
    assert rank_weighted(fitness, [1.0, 1.0, 0.0, 0.0]).tolist() == [0.5, 1.0, 0.5, 0.0]


def test_noise_of_a_pair_does_not_depend_on_the_others() -> None:
    rng = Rng(3)
    together = pair_noise(rng, 4, range(12), 7)
    assert (pair_noise(rng, 4, [11, 2], 7) == together[[11, 2]]).all()
    assert (pair_noise(rng, 5, [2], 7) != together[2]).all()
    assert (pair_noise(Rng(4), 4, [2], 7) != together[2]).all()


def test_noise_is_standard_normal() -> None:
    noise = pair_noise(Rng(0), 0, range(200), 1000).astype("float64")
    assert abs(noise.mean()) < 5 / math.sqrt(noise.size)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / noise.size)
    mates = (noise[0::2] * noise[1::2]).mean()
    assert abs(mates) < 5 / math.sqrt(noise.size / 2)
