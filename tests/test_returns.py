"""Advantages: by hand, and against the double sum of their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esmeta.rl.returns import gae


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flags(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


NONE = flags(0, 0, 0)
LAST = flags(0, 0, 1)
R, V, NEXT = f64(1, 2, 4), f64(10, 20, 30), f64(20, 30, 40)


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        # delta: 1 + 10 - 10 = 1, 2 + 15 - 20 = -3, 4 + 20 - 30 = -6 where nothing ends; the
        # weight of the next advantage is 0.5 * 0.5 = 1/4.
        (NONE, NONE, [1 - 3 / 4 - 6 / 16, -3 - 6 / 4, -6]),
        # Termination: the last delta loses its bootstrap, 4 - 30 = -26.
        (LAST, NONE, [1 - 3 / 4 - 26 / 16, -3 - 26 / 4, -26]),
        # Truncation: the last delta keeps it.
        (NONE, LAST, [1 - 3 / 4 - 6 / 16, -3 - 6 / 4, -6]),
        # A cut in the middle: nothing that follows comes back over it.
        (flags(0, 1, 0), NONE, [1 - 18 / 4, 2 - 20, -6]),
        (NONE, flags(0, 1, 0), [1 - 3 / 4, -3, -6]),
        (flags(1, 0, 0), flags(0, 1, 0), [1 - 10, -3, -6]),
        (flags(1, 1, 1), NONE, [-9, -18, -26]),
    ],
)
def test_advantages_by_hand(terminated: Tensor, truncated: Tensor, expected: list[float]) -> None:
    got = gae(R, V, NEXT, terminated, truncated, gamma=0.5, lambda_=0.5)
    assert got.tolist() == expected


def test_a_trial_of_two_episodes_is_one_sum() -> None:
    # The first episode ends after step 1, the trial after step 3: only the latter is passed.
    reward, value = f64(0, 1, 0, 1), f64(0, 0, 0, 0)
    trial_end = flags(0, 0, 0, 1)
    none = flags(0, 0, 0, 0)
    over = gae(reward, value, f64(0, 0, 0, 7), trial_end, none, gamma=0.5, lambda_=1.0)
    assert over.tolist() == [0.5 + 0.125, 1 + 0.25, 0.5, 1.0]
    episode_end = flags(0, 1, 0, 1)
    cut = gae(reward, value, f64(0, 0, 0, 7), episode_end, none, gamma=0.5, lambda_=1.0)
    assert cut.tolist() == [0.5, 1.0, 0.5, 1.0]
    horizon = gae(reward, value, f64(0, 0, 0, 7), none, trial_end, gamma=0.5, lambda_=1.0)
    assert horizon.tolist() == [0.625 + 7 / 16, 1.25 + 7 / 8, 0.5 + 7 / 4, 1 + 7 / 2]


def by_definition(
    d: dict[str, Any], gamma: float, lambda_: float, at: tuple[int, ...]
) -> list[float]:
    """``A_t = sum_k (gamma lambda)^k delta_{t+k}`` up to and with the first end, in O(T^2)."""
    r, v, nv, term, trunc = (d[k][(slice(None), *at)].tolist() for k in d)
    result = []
    for t in range(len(r)):
        total = 0.0
        for k in range(len(r) - t):
            s = t + k
            total += (gamma * lambda_) ** k * (r[s] + (0.0 if term[s] else gamma * nv[s]) - v[s])
            if term[s] or trunc[s]:
                break
        result.append(total)
    return result


@pytest.mark.parametrize(("gamma", "lambda_"), [(0.9, 1.0), (0.99, 0.95), (0.5, 0.0), (0.0, 1.0)])
def test_against_the_definition(gamma: float, lambda_: float) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = (25, 2, 4)

    def normal() -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    data = {"r": normal(), "v": normal(), "nv": normal()}
    data["term"] = torch.rand(shape, generator=draw) < 0.1
    data["trunc"] = torch.rand(shape, generator=draw) < 0.1
    got = gae(*data.values(), gamma=gamma, lambda_=lambda_)
    single = gae(
        *(x.float() if x.dtype == torch.float64 else x for x in data.values()),
        gamma=gamma,
        lambda_=lambda_,
    )
    for at in [(p, b) for p in range(2) for b in range(4)]:
        want = torch.tensor(by_definition(data, gamma, lambda_, at), dtype=torch.float64)
        assert torch.allclose(got[(slice(None), *at)], want, rtol=1e-12, atol=1e-12)
    assert single.dtype == torch.float32 and torch.allclose(single.double(), got, atol=1e-4)
