"""PPO and REINFORCE as Spinning Up has them: passes that stop, V by itself, the first spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_bad_input import assert_says
from torch import Tensor

from esmeta.errors import UserError
from esmeta.learners import ppo, reinforce
from esmeta.rl.on_policy import OnPolicy
from esmeta.rng import Rng
from esmeta.rollout import Trajectory
from esmeta.types import Continuous, Params, Spec, TimeStep

SPEC = Spec(3, Continuous(2), 64)
PERIOD, AGENTS = 32, 3


def experience(last_ends: bool = True, terminal: bool = False) -> Trajectory:
    """Episodes of eight steps; observations far from 0."""
    draws = Rng(1).normal(torch.arange(AGENTS), (PERIOD + 1) * 6).float()
    draws = draws.reshape(AGENTS, PERIOD + 1, 1, 6).transpose(0, 1)
    ended = (torch.arange(PERIOD + 1) % 8 == 0).reshape(-1, 1, 1).expand(-1, AGENTS, 1).clone()
    ended[0], ended[-1], no = False, last_ends, torch.zeros_like(ended)
    over = ended if terminal else no
    ts = TimeStep(3 * draws[..., :3] + 5, draws[..., 3:5], draws[..., 5], over, ended & ~over,
                  ended, no)  # fmt: skip
    return Trajectory({}, ts, draws[1:, ..., 3:5], ~no[1:], None, {})


def learned(
    kind: Any = ppo, steps: Trajectory | None = None, **options: Any
) -> tuple[OnPolicy, OnPolicy]:
    """Fresh agents, and what one update makes of them."""
    full = {"period": PERIOD, "minibatch": PERIOD, "hidden": (6,), "learning_rate": 0.02, **options}
    learner, loss = kind.Learner(**full).make(SPEC, 64)
    before = learner.init(Rng(3), torch.arange(AGENTS))
    return before, learner.update(before, steps or experience(), loss, Rng(4))


def reward_to_go(reward: Tensor, over: Tensor, after: float, gamma: float) -> Tensor:
    """Discounted sums of rewards ``[T]`` to the end of each episode; ``after`` follows the last."""
    sums, running = torch.zeros_like(reward), after
    for t in reversed(range(len(reward))):
        running = float(reward[t]) + gamma * (0.0 if over[t] else running)
        sums[t] = running
    return sums


@pytest.mark.parametrize("kind", [ppo, reinforce])
def test_an_update_is_that_of_spinning_up(kind: Any) -> None:
    """``update`` of its ``ppo.py`` and ``vpg.py``, on torch's own modules and Adam, per agent.

    Observations as they are; V learns rewards-to-go, which begin with V where the batch ends.
    """
    recipe: dict[str, Any] = {
        "normalize": False, "value_target": "reward_to_go", "gae_lambda": 0.9, "gamma": 0.95,
        "value_epochs": 7, "value_learning_rate": 0.01, "log_std": -0.5,
    }  # fmt: skip
    policy_steps = 1
    if kind is ppo:
        policy_steps = 12
        recipe |= {"epochs": policy_steps, "kl_stop": 0.02}
    steps = experience(last_ends=False, terminal=True)  # the last one is cut by the update
    before, after = learned(kind, steps=steps, **recipe)
    stopped = []
    for p in range(AGENTS):
        policy, value = (module(before.params, name, p) for name in ("policy", "value"))
        log_std = torch.nn.Parameter(before.params["log_std"][p].clone())
        leaves = steps.steps.obs, steps.action, steps.reward, steps.terminated
        obs, act, reward, over = (leaf[:, p, 0] for leaf in leaves)
        with torch.no_grad():
            v = value(obs)[:, 0]
            last = float(value(steps.ts.obs[-1, p, 0]))
            following = torch.cat([v[1:], torch.tensor([last])]) * ~over
            delta = reward + 0.95 * following - v
            advantage = reward_to_go(delta, over, 0.0, 0.95 * 0.9)
            target = reward_to_go(reward, over, last, 0.95)
            advantage = (advantage - advantage.mean()) / advantage.std(correction=0)

        def log_prob(mean: Tensor, act: Tensor = act, log_std: Tensor = log_std) -> Tensor:
            return torch.distributions.Normal(mean, log_std.exp()).log_prob(act).sum(-1)

        old = log_prob(policy(obs)).detach()
        adam = torch.optim.Adam([*policy.parameters(), log_std], lr=0.02)
        count = 0
        for _ in range(policy_steps):
            new = log_prob(policy(obs))
            if kind is ppo and float((old - new.detach()).mean()) > 0.02:
                break
            ratio = torch.exp(new - old)
            clipped = ratio.clamp(0.8, 1.2) * advantage
            loss = torch.min(ratio * advantage, clipped) if kind is ppo else new * advantage
            adam.zero_grad()
            (-loss.mean()).backward()
            adam.step()
            count += 1
        stopped.append(count)
        adam = torch.optim.Adam(value.parameters(), lr=0.01)
        for _ in range(7):
            adam.zero_grad()
            (value(obs)[:, 0] - target).square().mean().backward()
            adam.step()
        for name, net in (("policy", policy), ("value", value)):
            learnt = module(after.params, name, p).parameters()
            for got, want in zip(learnt, net.parameters(), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(after.params["log_std"][p], log_std.data, rtol=1e-4, atol=2e-5)
    assert kind is reinforce or min(stopped) < policy_steps, stopped


def module(params: Params, name: str, p: int) -> torch.nn.Sequential:
    """Network ``name`` of agent ``p`` as a module of torch."""
    layers: list[torch.nn.Module] = []
    for i in range(2):
        weight, bias = params[f"{name}.{i}.weight"][p], params[f"{name}.{i}.bias"][p]
        layer = torch.nn.Linear(weight.shape[0], weight.shape[1])
        layer.weight.data, layer.bias.data = weight.T.clone(), bias.clone()
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1])


def test_what_v_learns_and_what_networks_see_is_told() -> None:
    """The options have an effect of their own, and other words are refused."""
    for kind in (ppo, reinforce):
        more = {"value_epochs": 3}
        found = [
            learned(kind, **more, **options)[1].params
            for options in ({}, {"value_target": "reward_to_go"}, {"normalize": False})
        ]
        assert torch.equal(found[0]["policy.0.weight"], found[1]["policy.0.weight"])
        assert not torch.equal(found[0]["value.0.weight"], found[1]["value.0.weight"])
        assert not torch.equal(found[0]["policy.0.weight"], found[2]["policy.0.weight"])
        steps = experience().steps
        for normalize in (False, True):  # agents act on what they learned from
            state = learned(kind, normalize=normalize)[1]
            learner, _ = kind.Learner(hidden=(6,), normalize=normalize).make(SPEC, 64)
            out, _ = learner.agent.unroll(learner.acting(state), {}, steps)
            plain, _ = learner.agent.unroll(state.params, {}, steps)
            assert torch.equal(out.mean, plain.mean) != normalize
        with pytest.raises(UserError, match="value_target = 'td'.*gae, reward_to_go"):
            kind.Learner(value_target="td")


def passes(state: OnPolicy, part: str = "actor") -> list[int]:
    return state.adams.parts[part].updates.tolist()


def test_v_learns_by_itself_at_its_own_rate() -> None:
    before, after = learned(epochs=2, value_epochs=5, value_learning_rate=1e-3)
    assert passes(after) == [2] * AGENTS
    assert passes(after, "value") == [5] * AGENTS
    change = (after.params["value.0.weight"] - before.params["value.0.weight"]).abs().max()
    assert 0 < float(change) <= 5.1e-3, "at most five steps of Adam"
    _, parted = learned(value_epochs=5, minibatch=PERIOD // 4)
    assert passes(parted, "value") == [5 * 4] * AGENTS
    _, joint = learned(epochs=2)
    assert passes(joint, "value") == [2] * AGENTS


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
