"""Learners from a replay: TD3 and off-policy REINFORCE against loops by hand in float64."""

from __future__ import annotations

import pytest
import torch
from lived import snippets, window
from torch import Tensor
from torch.nn import functional as F

from esmeta.agent.inner import inner_policy
from esmeta.agent.policy import Need, Policy
from esmeta.errors import UserError
from esmeta.rl.diary import Diary
from esmeta.rl.off_policy import (
    DeterministicGradient,
    OffPolicyReinforce,
    ReplayLearner,
    ReplayOptions,
)
from esmeta.rl.replay import Replay
from esmeta.rng import Rng
from esmeta.types import Continuous, Params, Spec

SPEC = Spec(obs_size=3, action=Continuous(2, -2.0, 2.0), horizon=100)
CRITICS: frozenset[Need] = frozenset({"critics"})
AGENTS, BATCH, LENGTH = 4, 6, 5


def agents() -> tuple[Policy, Params]:
    agent = inner_policy(SPEC, "metagenrl", (8, 6), CRITICS, std=0.1)
    params = agent.init_at(Rng(3), torch.arange(AGENTS))
    g = torch.Generator().manual_seed(1)
    return agent, {
        name: leaf.double() + 0.3 * torch.randn(leaf.shape, generator=g, dtype=torch.float64)
        for name, leaf in params.items()
    }


def steps(*shape: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random steps ``[P, ..., L]``; observations have one more."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    ended = torch.rand(shape, generator=g) < 0.3
    terminated = ended & (torch.rand(shape, generator=g) < 0.5)
    obs = draw(*shape[:-1], shape[-1] + 1, 3)
    action, reward = draw(*shape, 2).clamp(-2, 2), draw(*shape)
    return {"obs": obs, "action": action, "reward": reward,
            "terminated": terminated, "ended": ended}  # fmt: skip


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
    options = ReplayOptions(capacity=50, update_after=50, gamma=0.9)
    learner = ReplayLearner(agent, options, twin=twin)
    target = {k: v + 0.1 for k, v in params.items()}
    drawn = steps(AGENTS, BATCH, 1)
    data, (obs, action, reward, terminated, ended) = snippets(**drawn), drawn.values()
    noise = 2.0 * torch.randn(AGENTS, BATCH, 2, generator=torch.Generator().manual_seed(0)).double()
    goal, weight = learner.td_target(target, data, noise)
    loss = learner.critic_loss(params, data, goal, weight)
    assert float((noise * 0.2).abs().max()) > 0.5, "nothing is clipped"
    for p in range(AGENTS):
        errors = []
        for n in range(BATCH):
            smooth = (noise[p, n] * 0.2).clamp(-0.5, 0.5) * 2.0
            now, after = obs[p, n]
            act = (pi(target, after, p) + smooth).clamp(-2.0, 2.0)
            values = [q(target, k, after, act, p) for k in ("q1", "q2")]
            following = min(values) if twin else values[0]
            y = reward[p, n, 0] + 0.9 * (0.0 if terminated[p, n] else 1.0) * following
            assert abs(float(y - goal[p, n])) < 1e-10
            if ended[p, n] and not terminated[p, n]:
                continue  # a time limit: the successor is not known
            used = ("q1", "q2") if twin else ("q1",)
            errors.append(sum((q(params, k, now, action[p, n, 0], p) - y) ** 2 for k in used))
        assert abs(float(loss[p] - sum(errors) / len(errors))) < 1e-10


def test_deterministic_gradient_moves_the_policy_alone() -> None:
    agent, params = agents()
    data, loss = snippets(**steps(AGENTS, BATCH, 1)), DeterministicGradient()
    found = loss(agent, params, data)
    for p in range(AGENTS):
        obs = data.trajectory.steps.obs[0, p]
        expected = -q(params, "q1", obs, pi(params, obs, p), p).mean()
        assert abs(float(found[p] - expected)) < 1e-10
    learner = ReplayLearner(agent, ReplayOptions(capacity=50, batch=8, update_after=20), start=0)
    state = learner.init(Rng(0), torch.arange(2))
    new = window(**steps(2, 30, dtype=torch.float32))
    state = state._replace(replay=state.replay.add(new))
    after = learner.policy_step(state, loss, Rng(1))
    for name, leaf in after.params.items():
        assert torch.equal(leaf, state.params[name]) != name.startswith("policy"), name
    after = learner.critic_step(state, Rng(1))
    for name, leaf in after.params.items():
        assert torch.equal(leaf, state.params[name]) != name.startswith(("q1", "q2")), name


def test_off_policy_reinforce_equals_a_loop_by_hand() -> None:
    agent, params = agents()
    drawn = steps(AGENTS, BATCH, LENGTH)
    data, (every, action, reward, terminated, ended) = snippets(**drawn), drawn.values()
    assert not data.constants["inside"].all()
    loss = OffPolicyReinforce(LENGTH, 0.9, 0.8)
    ready = loss.prepare(agent, params, data)
    assert not any(leaf.requires_grad for leaf in ready.constants.values())
    found = loss(agent, params, ready)
    for p in range(AGENTS):
        total, count = 0.0, 0
        for n in range(BATCH):
            obs = every[p, n]
            value = q(params, "q1", obs, pi(params, obs, p), p)
            running, advantage = torch.tensor(0.0), [torch.tensor(0.0)] * LENGTH
            for t in reversed(range(LENGTH)):
                after = value[t] if ended[p, n, t] else value[t + 1]
                alive = 0.0 if terminated[p, n, t] else 1.0
                delta = reward[p, n, t] + 0.9 * alive * after - value[t]
                running = delta + 0.72 * (0.0 if ended[p, n, t] else 1.0) * running
                advantage[t] = running
            for t in range(LENGTH):
                error = ((action[p, n, t] - pi(params, obs[t], p)) ** 2).mean()
                total, count = total + advantage[t] * error, count + 1
                if ended[p, n, t]:
                    break
        assert abs(float(found[p] - total / count)) < 1e-10


def test_a_replay_keeps_the_newest_and_snippets_stay_in_order() -> None:
    replay = Replay.empty(2, 10, SPEC, "cpu")
    counter = torch.arange(23.0)
    for first in range(0, 23, 4):
        part = counter[first : first + 4].expand(2, -1)
        new = steps(2, part.shape[1], dtype=torch.float32)
        new |= {"reward": part, "ended": part % 5 == 4, "terminated": part < 0}
        replay = replay.add(window(**new))
    assert replay.added == 23 and replay.size == 10

    def rewards(*index: int) -> tuple[Tensor, Tensor]:
        data = replay.draw(Rng(0), torch.tensor(index), 400, 4, SPEC)
        return data.trajectory.reward.movedim(0, 2), data.constants["inside"].unflatten(1, (-1, 4))

    reward, inside = rewards(3, 8)
    first = reward[..., 0]
    assert torch.equal(reward, first.unsqueeze(-1) + torch.arange(4))
    assert sorted(first.unique().tolist()) == list(range(13, 20)), "each start, none beyond"
    for row, mask in zip(reward[0], inside[0], strict=True):
        ends = [k for k, r in enumerate(row.tolist()) if r % 5 == 4]
        last = ends[0] if ends else 3
        assert mask.tolist() == [k <= last for k in range(4)]
    alone, _ = rewards(3, 3)
    assert torch.equal(alone[0], reward[0]), "addressed by the agent's number"
    assert not torch.equal(reward[0], reward[1])


def test_snippets_are_what_was_lived_through() -> None:
    """What a step led to is what the next one began with, over the edge of the rows too."""
    lived = steps(2, 23, dtype=torch.float32)
    ended = (torch.arange(23) == 16).expand(2, -1)
    lived |= {"reward": torch.arange(23.0).expand(2, -1), "ended": ended, "terminated": ended}
    replay = Replay.empty(2, 10, SPEC, "cpu")
    for low, high in ((0, 7), (7, 16), (16, 23)):
        part = {k: v[:, low : high + (k == "obs")] for k, v in lived.items()}
        replay = replay.add(window(**part))
    for again in (replay, Replay.empty(2, 10, SPEC, "cpu").filled(replay.kept(), replay.added)):
        data = again.draw(Rng(0), torch.arange(2), 50, 4, SPEC).trajectory
        number = data.reward.long()
        for p in range(2):
            assert torch.equal(data.steps.obs[:, p], lived["obs"][p][number[:, p]])
            assert torch.equal(data.after.obs[:, p], lived["obs"][p][number[:, p] + 1])
            assert torch.equal(data.action[:, p], lived["action"][p][number[:, p]])
            assert torch.equal(data.ts.prev_action[1:, p], data.action[:, p])
        assert data.steps.new_trial[0].all() and not data.steps.new_trial[1:].any()
        # The first step shows what led to it too, unless an episode begins there.
        first = data.ts.reward[0].long()
        assert torch.equal(data.ts.new_episode[0], number[0] == 17)
        assert torch.equal(first, torch.where(number[0] == 17, 0, number[0] - 1))
        assert (number[0] == 17).any() and (number[0] == 13).any()
        for p in range(2):
            led = lived["action"][p][first[p]] * (number[0, p] != 17).unsqueeze(-1)
            assert torch.equal(data.ts.prev_action[0, p], led)


def test_episode_returns_of_a_diary() -> None:
    diary = Diary()
    for first in (0, 3):
        reward = torch.arange(first, first + 3.0).expand(2, -1)
        ended = torch.tensor([[False, True, False], [False, False, True]])
        diary.add(window(**steps(2, 3) | {"reward": reward, "ended": ended}))
    one, two = diary.episodes()
    assert [leaf.tolist() for leaf in one] == [[2, 5], [1.0, 9.0]]
    assert [leaf.tolist() for leaf in two] == [[3, 6], [3.0, 12.0]]
    assert diary.curve(2).tolist() == [[1.0, 9.0], [3.0, 12.0]]
    assert torch.isnan(diary.curve(6)[0, 0])


def test_bad_replays_are_refused() -> None:
    agent, _ = agents()
    learner = ReplayLearner(agent, ReplayOptions(capacity=10, period=5, update_after=10))
    with pytest.raises(UserError, match="snippet = 20.*longer than the 10 steps.*update_after"):
        learner.check(OffPolicyReinforce(20))
    with pytest.raises(UserError, match="period = 50.*capacity = 10.*capacity = 1000"):
        small = ReplayOptions(capacity=10, update_after=30)
        ReplayLearner(agent, small).check(DeterministicGradient())
