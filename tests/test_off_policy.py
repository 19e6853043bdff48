"""Learners from a replay: TD3 and off-policy REINFORCE against loops by hand in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esmeta.errors import UserError
from esmeta.learners._agent import Agent
from esmeta.learners._experience import Experience
from esmeta.learners._life import Lives
from esmeta.learners._loss import Batch
from esmeta.learners._off_policy_losses import DeterministicGradient, OffPolicyReinforce
from esmeta.learners._record import Diary
from esmeta.learners._replay import Replay, ReplayLearner
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Continuous, Params, Spec

SPEC = Spec(obs_size=3, action=Continuous(2, -2.0, 2.0), horizon=100)
AGENTS, BATCH, LENGTH = 4, 6, 5


def agents() -> tuple[Agent, Params]:
    agent = Agent(SPEC, (8, 6), style="relu", heads=frozenset({"critics"}), std=0.1)
    params = agent.init(Rng(3), torch.arange(AGENTS))
    g = torch.Generator().manual_seed(1)
    return agent, {
        name: leaf.double() + 0.3 * torch.randn(leaf.shape, generator=g, dtype=torch.float64)
        for name, leaf in params.items()
    }


def experience(*shape: int) -> Experience:
    g = torch.Generator().manual_seed(5)

    def draw(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=g, dtype=torch.float64)

    ended = torch.rand(shape, generator=g) < 0.3
    terminated = ended & (torch.rand(shape, generator=g) < 0.5)
    return Experience(draw(3), draw(2).clamp(-2, 2), draw(), draw(3), terminated, ended)


def single(steps: Experience) -> Experience:
    return Experience(*(x.float() if x.is_floating_point() else x for x in steps))


def dense(params: Params, name: str, x: Tensor, p: int) -> Tensor:
    for i in range(3):
        x = F.linear(x, params[f"{name}.{i}.weight"][p].T, params[f"{name}.{i}.bias"][p])
        if i < 2:
            gain, shift = params[f"{name}.{i}.gain"][p], params[f"{name}.{i}.shift"][p]
            x = F.layer_norm(F.relu(x), x.shape[-1:], gain, shift)
    return x


def q(params: Params, name: str, obs: Tensor, action: Tensor, p: int) -> Tensor:
    return dense(params, name, torch.cat([obs, action / 2.0], -1), p)[..., 0]


def pi(params: Params, obs: Tensor, p: int) -> Tensor:
    return 2.0 * torch.tanh(dense(params, "policy", obs, p))


@pytest.mark.parametrize("twin", [True, False])
def test_targets_and_critic_loss_equal_a_loop_by_hand(twin: bool) -> None:
    agent, params = agents()
    learner = ReplayLearner(agent, capacity=50, update_after=50, twin=twin, gamma=0.9)
    target = {k: v + 0.1 for k, v in params.items()}
    steps = experience(AGENTS, BATCH)
    noise = 2.0 * torch.randn(AGENTS, BATCH, 2, generator=torch.Generator().manual_seed(0)).double()
    goal = learner.td_target(target, steps, noise)
    loss = learner.critic_loss(params, steps, goal)
    assert float((noise * 0.2).abs().max()) > 0.5, "nothing is clipped"
    for p in range(AGENTS):
        errors = []
        for t in range(BATCH):
            smooth = (noise[p, t] * 0.2).clamp(-0.5, 0.5) * 2.0
            action = (pi(target, steps.next_obs[p, t], p) + smooth).clamp(-2.0, 2.0)
            values = [q(target, k, steps.next_obs[p, t], action, p) for k in ("q1", "q2")]
            following = min(values) if twin else values[0]
            alive = 0.0 if steps.terminated[p, t] else 1.0
            y = steps.reward[p, t] + 0.9 * alive * following
            assert abs(float(y - goal[p, t])) < 1e-10
            if steps.ended[p, t] and not steps.terminated[p, t]:
                continue  # a time limit: the successor is not known
            used = ("q1", "q2") if twin else ("q1",)
            both = [(q(params, k, steps.obs[p, t], steps.action[p, t], p) - y) ** 2 for k in used]
            errors.append(sum(both))
        assert abs(float(loss[p] - sum(errors) / len(errors))) < 1e-10


def test_deterministic_gradient_moves_the_policy_alone() -> None:
    agent, params = agents()
    batch = Batch(experience(AGENTS, BATCH, 1), torch.zeros(0), torch.ones(0), BATCH)
    rows = torch.arange(BATCH).expand(AGENTS, -1)
    loss = DeterministicGradient()
    found = loss(agent, params, batch, {}, rows)
    for p in range(AGENTS):
        obs = batch.steps.obs[p, :, 0]
        expected = -q(params, "q1", obs, pi(params, obs, p), p).mean()
        assert abs(float(found[p] - expected)) < 1e-10
    learner = ReplayLearner(agent, capacity=50, batch=8, update_after=20, start=0)
    state = learner.init(Rng(0), torch.arange(2))
    new = single(experience(2, 30))
    state = state._replace(replay=state.replay.add(new))
    after = learner.policy_step(state, loss, Rng(1))
    for name, leaf in after.params.items():
        assert torch.equal(leaf, state.params[name]) != name.startswith("policy"), name
    after = learner.critic_step(state, Rng(1))
    for name, leaf in after.params.items():
        assert torch.equal(leaf, state.params[name]) != name.startswith(("q1", "q2")), name


def test_off_policy_reinforce_equals_a_loop_by_hand() -> None:
    agent, params = agents()
    steps = experience(AGENTS, BATCH, LENGTH)
    over = steps.ended.long().cumsum(-1) - steps.ended.long()
    batch = Batch(steps, steps.action, over == 0, BATCH)
    assert not batch.inside.all()
    loss = OffPolicyReinforce(LENGTH, 0.9, 0.8)
    prepared = loss.prepare(agent, params, batch)
    assert not any(leaf.requires_grad for leaf in prepared.values())
    rows = torch.arange(BATCH).expand(AGENTS, -1)
    found = loss(agent, params, batch, prepared, rows)
    for p in range(AGENTS):
        total, count = 0.0, 0
        for n in range(BATCH):
            obs = steps.obs[p, n]
            value = q(params, "q1", obs, pi(params, obs, p), p)
            last = steps.next_obs[p, n, -1]
            following = [*value[1:], q(params, "q1", last, pi(params, last, p), p)]
            running, advantage = torch.tensor(0.0), [torch.tensor(0.0)] * LENGTH
            for t in reversed(range(LENGTH)):
                after = value[t] if steps.ended[p, n, t] else following[t]
                alive = 0.0 if steps.terminated[p, n, t] else 1.0
                delta = steps.reward[p, n, t] + 0.9 * alive * after - value[t]
                running = delta + 0.72 * (0.0 if steps.ended[p, n, t] else 1.0) * running
                advantage[t] = running
            for t in range(LENGTH):
                error = ((steps.action[p, n, t] - pi(params, obs[t], p)) ** 2).mean()
                total, count = total + advantage[t] * error, count + 1
                if steps.ended[p, n, t]:
                    break
        assert abs(float(found[p] - total / count)) < 1e-10


def test_values_are_constants() -> None:
    agent, params = agents()
    steps = experience(AGENTS, BATCH, LENGTH)
    batch = Batch(steps, steps.action, torch.ones(AGENTS, BATCH, LENGTH, dtype=torch.bool), BATCH)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    loss = OffPolicyReinforce(LENGTH)
    rows = torch.arange(BATCH).expand(AGENTS, -1)
    with torch.no_grad():
        prepared = loss.prepare(agent, leaves, batch)
    total = loss(agent, leaves, batch, prepared, rows).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        assert (gradient is None) == name.startswith("q"), name


def test_a_replay_keeps_the_newest_and_snippets_stay_in_order() -> None:
    replay = Replay.empty(2, 10, SPEC, "cpu")
    counter = torch.arange(23.0)
    for first in range(0, 23, 4):
        part = counter[first : first + 4]
        new = single(experience(2, len(part)))
        new = new._replace(
            reward=part.expand(2, -1), ended=(part % 5 == 4).expand(2, -1),
            terminated=torch.zeros(2, len(part), dtype=torch.bool),
        )  # fmt: skip
        replay = replay.add(new)
    assert replay.count == 23 and replay.size == 10
    assert sorted(replay.steps.reward[0].tolist()) == list(range(13, 23))
    steps, inside = replay.snippets(Rng(0), torch.tensor([3, 8]), 400, 4)
    first = steps.reward[..., 0]
    assert torch.equal(steps.reward, first.unsqueeze(-1) + torch.arange(4))
    assert sorted(first.unique().tolist()) == list(range(13, 20)), "each start, none beyond"
    for reward, mask in zip(steps.reward[0], inside[0], strict=True):
        ends = [k for k, r in enumerate(reward.tolist()) if r % 5 == 4]
        last = ends[0] if ends else 3
        assert mask.tolist() == [k <= last for k in range(4)]
    alone, _ = replay.snippets(Rng(0), torch.tensor([3, 3]), 400, 4)
    assert torch.equal(alone.reward[0], steps.reward[0]), "addressed by the agent's number"
    assert not torch.equal(steps.reward[0], steps.reward[1])


def runner(**options: Any) -> Lives:
    task = make_task("pendulum", horizon=60, episode_steps=20, gravity=(7.0, 13.0))
    agent = Agent(task.spec, (8,), style="relu", heads=frozenset({"critics"}))
    learner = ReplayLearner(agent, period=10, capacity=60, batch=8, start=20, update_after=20)
    return Lives(learner, task, 1, torch.device("cpu"), test_steps=20, **options)


def live(lives: Lives, index: Tensor) -> tuple[Any, Tensor, Tensor]:
    life, rewards, actions = lives.begin(index, "train"), [], []
    for _ in range(lives.updates):
        life, new = lives.advance(life, DeterministicGradient(), "train")
        rewards.append(new.reward)
        actions.append(new.action)
    return life, torch.cat(rewards, 1), torch.cat(actions, 1)


def test_lives_repeat_and_do_not_see_each_other() -> None:
    lives = runner()
    life, rewards, actions = live(lives, torch.tensor([3, 7, 3]))
    again, same, _ = live(lives, torch.tensor([7, 5]))
    assert torch.equal(rewards[1], same[0]) and torch.equal(rewards[0], rewards[2])
    for name, leaf in life.state.params.items():
        assert torch.equal(leaf[1], again.state.params[name][0]), name
    assert life.state.updates.tolist() == [50, 50, 50]
    assert float(actions.abs().max()) <= 2.0
    first = actions[:2, :20].flatten() / 4.0 + 0.5  # uniform over the limits at first
    assert 0.3 < float(first.mean()) < 0.7 and float(first.std()) > 0.2
    assert not torch.equal(rewards[0], rewards[1])


def test_episode_returns_of_a_diary() -> None:
    diary = Diary()
    for first in (0, 3):
        reward = torch.arange(first, first + 3.0).expand(2, -1)
        ended = torch.tensor([[False, True, False], [False, False, True]])
        blank = experience(2, 3)
        diary.add(blank._replace(reward=reward, ended=ended))
    one, two = diary.episodes()
    assert one.end.tolist() == [2, 5] and one.returns.tolist() == [1.0, 9.0]
    assert one.length.tolist() == [2, 3]
    assert two.end.tolist() == [3, 6] and two.returns.tolist() == [3.0, 12.0]
    assert diary.curve(2).tolist() == [[1.0, 9.0], [3.0, 12.0]]
    assert torch.isnan(diary.curve(6)[0, 0])


def test_bad_replays_are_refused() -> None:
    agent, _ = agents()
    learner = ReplayLearner(agent, capacity=10, period=5, update_after=10)
    with pytest.raises(UserError, match="snippet = 20.*longer than the 10 steps.*update_after"):
        learner.check(OffPolicyReinforce(20))
    with pytest.raises(UserError, match="period = 50.*capacity = 10.*capacity = 1000"):
        ReplayLearner(agent, capacity=10, update_after=30).check(DeterministicGradient())
