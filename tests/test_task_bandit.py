"""Bandit: the closed form against brute force, a Bayesian agent, and agents without memory."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.tasks.bandit import Task


def dynamic_programming(p: float, horizon: int) -> float:
    """Best score of two dependent arms over all policies, by the posterior after each history."""

    @functools.cache
    def value(left: int, *counts: int) -> float:
        if left == 0:
            return 0.0
        wins0, losses0, wins1, losses1 = counts
        if_first = p ** (wins0 + losses1) * (1 - p) ** (losses0 + wins1)
        if_second = p ** (wins1 + losses0) * (1 - p) ** (losses1 + wins0)
        belief = if_first / (if_first + if_second)
        best = 0.0
        for arm, right in ((0, belief), (1, 1 - belief)):
            pays = right * p + (1 - right) * (1 - p)
            won, lost = list(counts), list(counts)
            won[2 * arm] += 1
            lost[2 * arm + 1] += 1
            score = pays * (1 + value(left - 1, *won)) + (1 - pays) * value(left - 1, *lost)
            best = max(best, score)
        return best

    return value(horizon, 0, 0, 0, 0)


@pytest.mark.parametrize(("p", "horizon"), [(0.8, 10), (0.6, 9), (0.95, 7), (0.8, 1)])
def test_two_arms_against_dynamic_programming(p: float, horizon: int) -> None:
    best = dynamic_programming(p, horizon)
    assert Task(reward_probability=p, horizon=horizon).optimum() == pytest.approx(best, abs=1e-9)


def test_default_optimum_is_the_known_number() -> None:
    assert make_task("bandit").reference.best == pytest.approx(dynamic_programming(0.8, 20))
    assert make_task("bandit").reference.best == pytest.approx(15.1707, abs=1e-4)


def search(left: int, unknown: int) -> float:
    """Best score of deterministic arms: try a new one, or waste the pull on a known failure."""
    if left == 0:
        return 0.0
    hit = 1 / unknown
    new = hit * left + (1 - hit) * search(left - 1, max(unknown - 1, 1))
    return max(new, search(left - 1, unknown))


@pytest.mark.parametrize(("arms", "horizon"), list(itertools.product((2, 3, 5), (1, 2, 4, 5, 8))))
def test_deterministic_arms_against_search(arms: int, horizon: int) -> None:
    task = Task(arms=arms, reward_probability=1.0, horizon=horizon)
    assert task.optimum() == pytest.approx(search(horizon, arms), abs=1e-12)


def without_memory(p: float, horizon: int, stay: tuple[float, float, float, float]) -> float:
    """Exact score of a policy that stays on its arm with a chance that depends on (arm, reward)."""
    total = 0.0
    for good in (0, 1):
        first = [0.5, 0.5]
        for _ in range(horizon):
            pays = [p if arm == good else 1 - p for arm in (0, 1)]
            total += 0.5 * sum(f * r for f, r in zip(first, pays, strict=True))
            stays = [pays[a] * stay[2 * a + 1] + (1 - pays[a]) * stay[2 * a] for a in (0, 1)]
            to0 = first[0] * stays[0] + first[1] * (1 - stays[1])
            first = [to0, 1 - to0]
    return total


def test_one_step_of_memory_is_not_enough() -> None:
    task = Task()
    chances = (0.0, 0.25, 0.5, 0.75, 1.0)
    scores = {stay: without_memory(0.8, 20, stay) for stay in itertools.product(chances, repeat=4)}
    best = max(scores, key=lambda stay: scores[stay])
    assert best == (0.0, 1.0, 0.0, 1.0)  # win-stay, lose-shift
    assert scores[best] == pytest.approx(0.5 + 19 * 0.68)
    assert scores[best] < 0.9 * task.optimum()
    assert f"{scores[best]:.2f}" in task.reference.note


@pytest.mark.parametrize(("arms", "p"), [(2, 0.8), (2, 1.0), (4, 1.0)])
def test_bayesian_agent_scores_the_optimum(arms: int, p: float) -> None:
    task, batch = Task(arms=arms, reward_probability=p), 4000
    env = task.make_env("cpu")
    tasks = task.sample(batch, "test", Rng(4))
    state, ts = env.reset(tasks, Rng(5))
    evidence = torch.zeros(1, batch, arms, dtype=torch.float64)
    total = torch.zeros(1, batch, dtype=torch.float64)
    right = torch.zeros(1, batch)
    for _ in range(task.horizon):
        action = evidence.argmax(-1)
        state, ts = env.step(state, action)
        assert torch.equal(ts.prev_action.argmax(-1), action)
        hint = torch.where(ts.reward > 0, 1.0, -1.0).double()
        evidence += ts.prev_action * hint.unsqueeze(-1)
        if arms == 2:
            evidence -= (1 - ts.prev_action) * hint.unsqueeze(-1)
        total += ts.reward
        right += action == tasks.data["good"]
    assert ts.terminated.all()
    error = float(total.std()) / batch**0.5
    assert abs(float(total.mean()) - task.optimum()) < 3 * error + 1e-9
    assert torch.allclose(env.metrics(state)["best_arm"], right / task.horizon)
