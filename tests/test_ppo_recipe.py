"""PPO and REINFORCE as Spinning Up has them: passes that stop, V by itself, the first spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bad_input import assert_says

from esmeta.errors import UserError
from esmeta.learners import ppo, reinforce
from esmeta.learners._experience import Experience
from esmeta.learners._segments import Segments
from esmeta.rng import Rng
from esmeta.types import Continuous, Spec

SPEC = Spec(3, Continuous(2), 64)
PERIOD, AGENTS = 32, 3


def experience() -> Experience:
    draws = Rng(1).normal(torch.arange(AGENTS), PERIOD * 9).float().reshape(AGENTS, PERIOD, 9)
    ended = torch.arange(PERIOD).expand(AGENTS, -1) % 8 == 7
    return Experience(
        draws[..., :3], draws[..., 3:5], draws[..., 5], draws[..., 6:9], ended & False, ended
    )


def learned(kind: Any = ppo, **options: Any) -> tuple[Segments, Segments]:
    """Fresh agents, and what one update makes of them."""
    full = {"period": PERIOD, "minibatch": PERIOD, "hidden": (6,), "learning_rate": 0.02, **options}
    learner, loss = kind.Learner(**full).make(SPEC, 64)
    before = learner.init(Rng(3), torch.arange(AGENTS))
    return before, learner.update(before, experience(), loss, Rng(4))


def passes(state: Segments) -> list[int]:
    return state.adam.updates["policy.0.weight"].tolist()


def test_passes_of_each_agent_stop_where_its_policy_has_moved_too_far() -> None:
    _, stopped = learned(epochs=30, kl_stop=0.008)
    counts = passes(stopped)
    assert len(set(counts)) > 1 and 0 < min(counts) and max(counts) < 30, counts
    learner, loss = ppo.Learner(period=PERIOD, minibatch=PERIOD, hidden=(6,)).make(SPEC, 64)
    far = {}
    for number in range(1, max(counts) + 1):
        before, whole = learned(epochs=number)
        batch = learner.batch(experience(), whole.statistics, whole.updates)
        prepared = loss.prepare(learner.agent, before.params, batch)
        moved = loss.moved(learner.agent, whole.params, batch, prepared)  # type: ignore[attr-defined]
        for p in range(AGENTS):
            far[p, number] = float(moved[p]) > 0.008
            if counts[p] == number:  # bit for bit what so many passes make of it
                for name, leaf in stopped.params.items():
                    assert torch.equal(leaf[p], whole.params[name][p]), name
    for p, count in enumerate(counts):
        assert far[p, count] and not any(far[p, number] for number in range(1, count))
    assert passes(learned(epochs=30)[1]) == [30] * AGENTS


def test_the_estimate_of_the_divergence_is_that_of_the_actions_taken() -> None:
    learner, loss = ppo.Learner(period=PERIOD, minibatch=PERIOD, hidden=(6,)).make(SPEC, 64)
    before, after = learned(epochs=3)
    batch = learner.batch(experience(), after.statistics, after.updates)
    prepared = loss.prepare(learner.agent, before.params, batch)
    found = loss.moved(learner.agent, after.params, batch, prepared)  # type: ignore[attr-defined]
    logs = []
    for params in (before.params, after.params):
        out = learner.agent.policy(params, batch.steps.obs)
        assert out.mean is not None and out.std is not None
        logs.append(torch.distributions.Normal(out.mean, out.std).log_prob(batch.steps.action))
    torch.testing.assert_close(found, (logs[0] - logs[1]).sum(-1).mean(1), rtol=1e-4, atol=1e-6)


def test_v_learns_by_itself_at_its_own_rate() -> None:
    before, after = learned(epochs=2, value_epochs=5, value_learning_rate=1e-3)
    assert passes(after) == [2] * AGENTS
    assert after.adam.updates["value.0.weight"].tolist() == [5] * AGENTS
    change = (after.params["value.0.weight"] - before.params["value.0.weight"]).abs().max()
    assert 0 < float(change) <= 5.1e-3, "at most five steps of Adam"
    _, joint = learned(epochs=2)
    assert joint.adam.updates["value.0.weight"].tolist() == [2] * AGENTS


@pytest.mark.parametrize("kind", [ppo, reinforce])
def test_the_first_spread_of_actions(kind: Any) -> None:
    options = {} if kind is ppo else {"value_epochs": 1}
    before, _ = learned(kind, log_std=-0.5, **options)
    assert before.params["log_std"].eq(-0.5).all()
    assert learned(kind, **options)[0].params["log_std"].eq(0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kl_stop": -1.0}, ["kl_stop = -1.0", ">= 0", "0.015"]),
        ({"value_epochs": -1}, ["value_epochs = -1", ">= 0", "80"]),
        ({"value_learning_rate": 0.0}, ["value_learning_rate = 0.0", "> 0", "0.001"]),
        ({"log_std": float("nan")}, ["log_std = nan", "finite", "-0.5"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        ppo.Learner(**options)
    assert_says(str(caught.value), *words)
