"""Any memory in any role: its start is learned, and agents with one learn inside their lives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lived import snippets
from test_epg import SMALL
from torch import Tensor

from esmeta import names
from esmeta.agent import heads
from esmeta.agent.policy import PolicyConfig
from esmeta.agent.recurrent import Gru
from esmeta.learners import ppo as by_ppo
from esmeta.learners import td3
from esmeta.lives import AgentLives
from esmeta.objectives._objective_network import ObjectiveNetwork, value_after
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import a2c, ppo
from esmeta.options import options_class
from esmeta.policy import metods, rl2
from esmeta.ranks.comm import SelfComm
from esmeta.rl.losses import Data
from esmeta.rl.off_policy import state_values
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import train
from esmeta.tasks import make_task
from esmeta.types import Params, State


class Begun(Gru):
    """A GRU whose first state is a parameter, ``first [n]``."""

    def init(self, rng: Rng) -> Params:
        return super().init(rng) | {"first": torch.linspace(-0.5, 0.5, self.size)}

    def prepare(self, params: Params) -> Any:
        return super().prepare(params), params["first"].unsqueeze(1)

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State:
        return {"h": params["first"].unsqueeze(1).expand(-1, batch, -1).contiguous()}

    def reset(self, prepared: Any, state: State, new_trial: Tensor) -> State:
        return {"h": torch.where(new_trial.unsqueeze(-1), prepared[1], state["h"])}

    def step(self, prepared: Any, state: State, x: Tensor, *, in_place: bool = False) -> Any:
        return super().step(prepared[0], state, x)

    def scan(self, prepared: Any, state: State, x: Tensor, new_trial: Tensor | None) -> Any:
        outputs = []
        for t, row in enumerate(x):
            if new_trial is not None:
                state = self.reset(prepared, state, new_trial[t])
            y, state = self.step(prepared, state, row)
            outputs.append(y)
        return torch.stack(outputs), state


@options_class
class BegunConfig(rl2.Config):
    """Options of every recurrent policy."""

    def memory(self) -> Begun:
        return Begun(self.hidden[-1], self.neurons)


SHAPE: dict[str, Any] = {"neurons": 6, "hidden": (8,), "head_hidden": 8}
FIRST: dict[str, PolicyConfig] = {
    "memory.first": BegunConfig(**SHAPE),
    "memory.W0": metods.Config(**SHAPE, alpha_std=0.3, w0_std=0.3),
}


@pytest.mark.parametrize("optimizer", [ppo.Optimizer(), a2c.Optimizer()], ids=["ppo", "a2c"])
@pytest.mark.parametrize("leaf", FIRST)
def test_gradients_reach_what_a_memory_starts_from(leaf: str, optimizer: Any) -> None:
    task = make_task("bandit", horizon=8)
    policy = FIRST[leaf].make(task.spec, value=True)
    objective = ReturnObjective(policy, task, trials=6, seed=0, device="cpu")
    theta = {name: value.double() for name, value in policy.init(1).items()}
    data, _ = optimizer.collect(theta, 0, objective, SelfComm())
    count, coef = torch.tensor(48.0), torch.tensor(0.02)

    def loss(first: Tensor) -> Tensor:
        return optimizer.loss(policy, theta | {leaf: first}, data, count, coef)[0].sum()

    first = theta[leaf].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(first), first)
    for number in range(0, found.numel(), 5):
        step = torch.zeros_like(found).flatten()
        step[number] = 1e-5
        step = step.reshape(found.shape)
        with torch.no_grad():
            slope = float(loss(theta[leaf] + step) - loss(theta[leaf] - step)) / 2e-5
        assert float(found.flatten()[number]) == pytest.approx(slope, rel=1e-5, abs=1e-9)
        assert abs(slope) > 1e-7
    state, _ = optimizer.step(optimizer.init(theta, Rng(0)), objective, SelfComm(), Rng(0))
    moved = (optimizer.theta(state)[leaf] - theta[leaf]).abs()
    assert float(moved.min()) > 1e-5, "it is trained like all else"


INNER = {
    "gru": rl2.Config(**SHAPE, std="learned", std_value=0.5),
    "metods": metods.Config(**SHAPE, std="learned", std_value=0.5),
    "first": BegunConfig(**SHAPE, std="learned", std_value=0.5),
}


def inner(memory: str, horizon: int, **options: Any) -> tuple[AgentLives, Any, Any]:
    """Lives by PPO, its loss, and four agents at their beginning."""
    task = make_task("displacement", horizon=horizon, episode_steps=32, reward_scale=10.0)
    learner, loss = by_ppo.Learner(period=128, minibatch=128, learning_rate=0.01, **options).make(
        task.spec, horizon, policy=INNER[memory]
    )
    lives = AgentLives(learner, task, 3, torch.device("cpu"), test_episodes=4, test_steps=32)
    return lives, loss, lives.begin(torch.arange(4), "train")


@pytest.mark.parametrize("memory", ["gru", "metods"])
def test_ppo_trains_agents_with_a_memory(memory: str) -> None:
    """A whole episode in its direction is worth 32; what is untrained earns 0."""
    lives, loss, life = inner(memory, 1024, epochs=8)
    untrained, _ = lives.score(life, "train")
    for _ in range(lives.updates):
        life, _ = lives.advance(life, loss, "train")
    score, _ = lives.score(life, "train")
    assert float(untrained.abs().max()) < 5.0 and float(score.min()) > 15.0


@pytest.mark.parametrize(("memory", "leaf"), [("first", "memory.first"), ("metods", "memory.W0")])
def test_agents_learn_what_their_memory_starts_from(memory: str, leaf: str) -> None:
    lives, loss, life = inner(memory, 256, epochs=2)
    before = life.state.params
    for _ in range(2):
        life, _ = lives.advance(life, loss, "train")
    moved = (life.state.params[leaf] - before[leaf]).abs()
    # Four steps of Adam, of 0.01 each at most.
    assert float(moved.min()) > 0 and 5e-3 < float(moved.mean()) < 0.05


def test_passes_of_v_alone_leave_what_acts() -> None:
    found = []
    for value_epochs in (1, 4):
        lives, loss, life = inner("gru", 256, epochs=1, value_epochs=value_epochs)
        found.append(lives.advance(life, loss, "train")[0].state.params)
    agent = lives.learner.agent
    for leaf, value in found[0].items():
        assert torch.equal(value, found[1][leaf]) == (agent.group(leaf) == "actor"), leaf


@pytest.mark.parametrize("name", ["rl2", "metods"])
def test_agents_of_epg_with_a_memory_learn(name: str) -> None:
    """In the first generation by PPO alone; the learned loss then moves all that acts."""
    policy = {"name": name, "std": "learned", "std_value": 0.5, "neurons": 6, "hidden": [8]}
    life = {"period": 128, "buffer": 128, "minibatch": 128, "epochs": 8, "learning_rate": 0.01}
    test = {"test_steps": 32, "test_episodes": 4}
    task = {"train": "all", "horizon": 1024, "episode_steps": 32, "reward_scale": 10.0}
    tables = {"policy": policy, "objective": life | test, "task": task}
    more = [f"{table}.{key}={value}" for table, row in tables.items() for key, value in row.items()]
    config = configs.resolve(configs.load("displacement-epg"), [*SMALL, *more])
    objective: Any = train.build(config).objective
    eta = objective.init(0)
    assert float(objective.fitness(eta, 0).returns.min()) > 15.0
    agent, lives = objective.learner.agent, objective.lives
    life = lives.begin(torch.arange(2), "train")
    after, _ = lives.advance(life, objective.loss(eta, 0.0), "train")
    for leaf, value in agent.part(life.state.params, "actor").items():
        assert not torch.equal(after.state.params[leaf], value), leaf
    assert any(leaf.startswith("memory.") for leaf in after.state.params)


# --- agents that learn from a replay -----------------------------------------------------------

AGENTS, STEPS = 6, 768
KINDS = pytest.mark.parametrize("kind", ["rl2", "metods"])


def learner(kind: str) -> tuple[AgentLives, Any]:
    task = make_task("displacement", horizon=STEPS, episode_steps=32)
    sizes: dict[str, Any] = {
        "hidden": (32, 32), "period": 32, "batch": 8, "critic_batch": 64, "update_after": 192,
        "start": 192, "gamma": 0.9, "polyak": 0.98, "exploration": 0.3, "learning_rate": 5e-3,
        "snippet": 8,
    }  # fmt: skip
    policy = names.make("policy", kind, {"neurons": 12, "hidden": (16,)})
    made, loss = td3.Learner(**sizes).make(task.spec, STEPS, policy)
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
