"""Agents of MetaGenRL and TD3 with a memory: they learn, and their memory is that of a snippet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lived import snippets
from torch import Tensor

from esmeta import names
from esmeta.agent import heads
from esmeta.agent.policy import PolicyConfig
from esmeta.learners import td3
from esmeta.lives import AgentLives
from esmeta.objectives._objective_network import ObjectiveNetwork, value_after
from esmeta.rl.losses import Data
from esmeta.rl.off_policy import ReplayLearner, state_values
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Params

AGENTS, STEPS = 6, 768
KINDS = pytest.mark.parametrize("kind", ["rl2", "metods"])


def described(kind: str) -> PolicyConfig:
    return names.make("policy", kind, {"neurons": 12, "hidden": (16,)})


def learner(kind: str, **options: Any) -> tuple[AgentLives, Any]:
    task = make_task("displacement", horizon=STEPS, episode_steps=32)
    sizes: dict[str, Any] = {
        "hidden": (32, 32), "period": 32, "batch": 8, "critic_batch": 64, "update_after": 192,
        "start": 192, "gamma": 0.9, "polyak": 0.98, "exploration": 0.3, "learning_rate": 5e-3,
        "snippet": 8,
    }  # fmt: skip
    made, loss = td3.Learner(**sizes | options).make(task.spec, STEPS, described(kind))
    return AgentLives(made, task, 0, torch.device("cpu"), test_episodes=4, test_steps=32), loss


@KINDS
def test_they_learn_by_their_critics(kind: str) -> None:
    """Episodes earn 0 at first, 3.2 at most."""
    lives, loss = learner(kind)
    life = lives.begin(torch.arange(AGENTS), "train")
    first = lives.score(life, "train")[0]
    for _ in range(lives.updates):
        life, _ = lives.advance(life, loss, "train")
    last = lives.score(life, "train")[0]
    assert abs(float(first.mean())) < 0.2
    assert float(last.mean()) > 1.0, last
    grown = {k: (v - lives.begin(life.numbers, "train").state.params[k]).abs().max()
             for k, v in life.state.params.items() if k.startswith("memory.")}  # fmt: skip
    assert grown and all(float(x) > 0 for x in grown.values()), "memory learns too"


@KINDS
def test_a_snippet_begins_memory_anew_and_critics_read_observations(kind: str) -> None:
    lives, loss = learner(kind)
    agent = lives.learner.agent
    params = agent.init_at(Rng(2), torch.tensor([3, 8]))
    params = {k: v + 0.1 * torch.sin(torch.arange(v.numel())).reshape(v.shape) for k, v in
              params.items()}  # fmt: skip
    g = torch.Generator().manual_seed(1)
    obs = torch.randn(2, 3, 7, 4, generator=g)
    action = torch.randn(2, 3, 6, 2, generator=g).clamp(-1, 1)
    reward, ended = torch.randn(2, 3, 6, generator=g), torch.zeros(2, 3, 6, dtype=torch.bool)
    ended[:, 1, 2] = True
    state = agent.initial_state(params, 3)

    def data(reward: Tensor) -> Data:
        made = snippets(obs, action, reward, ended & False, ended)
        return made._replace(trajectory=made.trajectory._replace(start=state))

    one = data(reward)
    steps, means = one.trajectory.steps, []
    memory = state
    for t in range(6):  # step by step, from the memory that a trial begins with
        now = type(steps)(*(leaf[t] for leaf in steps))
        out, memory = agent.step(params, memory, now, t)
        means.append(heads.mode(out))
    read = heads.mode(agent.read(params, state, steps)).unflatten(1, (3, 6)).movedim(2, 0)
    torch.testing.assert_close(read, torch.stack(means), rtol=1e-5, atol=1e-6)
    # What was earned before reaches later actions, but nothing behind the end of an episode.
    changed = reward.clone()
    changed[:, :2, 1] += 3.0
    two = data(changed)
    other = heads.mode(agent.read(params, state, two.trajectory.steps)).unflatten(1, (3, 6))
    moved = (other.movedim(2, 0) - read).abs().amax(dim=(1, 3)) > 1e-7  # [T, n]
    assert moved[:, 0].tolist() == [False] * 2 + [True] * 4
    assert moved[:, 1].tolist() == [False, False, True, False, False, False]
    assert not moved[:, 2].any()
    values = [state_values(agent, params, x.trajectory) for x in (one, two)]
    assert not torch.equal(values[0][2], values[1][2])
    # Q(s, a) is of what is seen and done, whatever was before.
    inputs = one.trajectory.steps.obs[2], one.trajectory.action[2]
    assert agent.critics["q1"].sizes[0] == 4 + 2
    assert agent.critic(params, "q1", *inputs).shape == (2, 3)


def test_their_length_of_snippets_is_what_critics_and_policies_draw() -> None:
    lives, loss = learner("rl2", snippet=5)
    made = lives.learner
    assert isinstance(made, ReplayLearner) and loss.snippet == 5
    assert replace(made.options, critic_batch=0).batch == 8
    with pytest.raises(ValueError, match="snippet = 0"):
        td3.Learner(snippet=0)


@KINDS
def test_the_meta_gradient_goes_through_a_memory(kind: str) -> None:
    """Finite differences of Q after the update, in alpha, in float64."""
    lives, _ = learner(kind)
    agent, network, index = lives.learner.agent, ObjectiveNetwork(6), torch.tensor([3, 8])
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    params = {k: v.double() for k, v in agent.init_at(Rng(2), index).items()}
    alpha = {k: v.double() + 0.1 * normal(2, *v.shape[1:]) for k, v in
             network.init(Rng(1)).items()}  # fmt: skip
    no = torch.zeros(2, 4, 6, dtype=torch.bool)
    data = snippets(normal(2, 4, 7, 4), normal(2, 4, 6, 2).clamp(-1, 1), normal(2, 4, 6), no, no)
    state = {k: v.double() for k, v in agent.initial_state(params, 4).items()}
    data = data._replace(trajectory=data.trajectory._replace(start=state))

    def value(alpha: Params) -> Tensor:
        loss = network.loss(alpha)
        return value_after(agent, params, loss, [data], data, rate=0.01, reduction="sum")

    leaves = {k: v.clone().requires_grad_() for k, v in alpha.items()}
    found = torch.autograd.grad(value(leaves).sum(), list(leaves.values()))
    along = {k: normal(*v.shape) / 15_497**0.5 for k, v in alpha.items()}  # of length 1
    exact = sum((x * along[k]).flatten(1).sum(1) for x, k in zip(found, alpha, strict=True))
    up, down = (value({k: v + s * 1e-6 * along[k] for k, v in alpha.items()}).detach()
                for s in (1, -1))  # fmt: skip
    assert float(exact.abs().min()) > 1e-6  # type: ignore[union-attr]
    torch.testing.assert_close(exact, (up - down) / 2e-6, rtol=1e-4, atol=1e-9)
