"""Agents that learn in one batch: each equals the same agent alone, and a loop written by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esmeta.agent.inner import inner_policy
from esmeta.agent.policy import Policy, PolicyConfig
from esmeta.errors import UserError
from esmeta.lives import AgentLives
from esmeta.objectives._loss_network import LossNetwork
from esmeta.policy import metods, rl2
from esmeta.rl.descent import Adams, descend
from esmeta.rl.losses import Data, Loss, Mixture, PolicyGradient, advantages
from esmeta.rl.on_policy import SegmentLearner, SegmentOptions, Statistics
from esmeta.rng import Rng
from esmeta.rollout import Trajectory
from esmeta.tasks import make_task
from esmeta.tree import size_of
from esmeta.types import Continuous, Discrete, Params, Spec, TimeStep

SPEC = Spec(obs_size=3, action=Continuous(2), horizon=100)
BUFFER, NEWEST, AGENTS = 48, 16, 5
EVERYTHING = frozenset({"value", "unit"})
MEMORIES: dict[str, PolicyConfig | None] = {
    "none": None,
    "gru": rl2.Config(neurons=5, hidden=(6,), head_hidden=5, std="learned"),
    "metods": metods.Config(
        neurons=5, hidden=(6,), head_hidden=5, std="learned", alpha_std=0.3, w0_std=0.3
    ),
}


def double(params: Params) -> Params:
    return {name: leaf.double() for name, leaf in params.items()}


def agents(spec: Spec = SPEC, count: int = AGENTS, memory: str = "none") -> tuple[Policy, Params]:
    """A policy and float64 parameters that differ between agents."""
    config = MEMORIES[memory]
    agent = inner_policy(spec, "epg", (8, 6), EVERYTHING, std=1.0, config=config)
    params = double(agent.init_at(Rng(3), torch.arange(count)))
    noise = {n: 0.3 * torch.randn(p.shape, generator=seeded(len(n)), dtype=p.dtype)
             for n, p in params.items()}  # fmt: skip
    return agent, {name: leaf + noise[name] for name, leaf in params.items()}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_data(
    spec: Spec = SPEC, filled: int = BUFFER, start: tuple[Policy, Params] | None = None
) -> Data:
    """Random steps in float64 with some ends of both kinds; ``start``: who has memories."""
    g, shape = seeded(7), (BUFFER + 1, AGENTS, 1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    if isinstance(spec.action, Discrete):
        action = torch.randint(0, spec.action.n, (BUFFER, *shape[1:]), generator=g)
        coded = F.one_hot(action, spec.action.n).double()
    else:
        action = coded = normal(BUFFER, *shape[1:], spec.action.size)
    ended = torch.rand(shape, generator=g) < 0.2
    terminated = ended & (torch.rand(shape, generator=g) < 0.5)
    past = torch.cat([torch.zeros_like(coded[:1]), coded])
    ts = TimeStep(
        normal(*shape, spec.obs_size), past, normal(*shape),
        terminated, ended & ~terminated, ended, torch.zeros_like(ended),
    )  # fmt: skip
    state = {} if start is None else start[0].initial_state(start[1], 1)
    trajectory = Trajectory(state, ts, action, torch.ones_like(ended[1:]), None, state)
    inside = (torch.arange(BUFFER) >= BUFFER - filled).expand(AGENTS, -1)
    scaled = 0.7 * coded[:, :, 0].transpose(0, 1)
    return Data(trajectory, {"inside": inside, "scaled_action": scaled}, NEWEST)


def one(tree: Any, p: int) -> Any:
    """Agent p alone, with the axis P kept."""
    if isinstance(tree, dict):
        return {name: leaf[p : p + 1] for name, leaf in tree.items()}
    whole = tree.trajectory
    ts = TimeStep(*(leaf[:, p : p + 1] for leaf in whole.ts))
    action, active = (leaf[:, p : p + 1] for leaf in (whole.action, whole.active))
    trajectory = Trajectory(one(whole.start, p), ts, action, active, None, one(whole.end, p))
    return Data(trajectory, one(tree.constants, p), tree.newest)


def newest(data: Data, p: int) -> tuple[Tensor, ...]:
    """Of agent p's newest steps: obs, action, reward, terminated, ended, and what followed."""
    last = data.trajectory.last(NEWEST)
    leaves = last.steps.obs, last.action, last.reward, last.terminated, last.ended
    return *(leaf[:, p, 0] for leaf in leaves), last.ts.obs[-1:, p, 0]


def network(spec: Spec = SPEC, **options: Any) -> LossNetwork:
    return LossNetwork(spec, BUFFER, **options)


def eta(net: LossNetwork, count: int = AGENTS) -> Params:
    """A different loss for every agent, float64, biases included."""
    return {
        name: 0.4 * torch.randn(count, *shape, generator=seeded(i), dtype=torch.float64)
        for i, (name, shape) in enumerate(net.shapes.items())
    }


def loss_of(name: str, rows: slice = slice(None), spec: Spec = SPEC) -> Loss:
    net = network(spec, memory=True)
    learned = net.loss({k: v[rows] for k, v in eta(net).items()})
    hand: dict[str, Loss] = {
        "ppo": PolicyGradient(clip=0.2, kl_coef=0.5),
        "reinforce": PolicyGradient(clip=0.0),
        "learned": learned,
        "mixture": Mixture(learned, PolicyGradient(), 0.3),
    }
    return hand[name]


def gradient(loss: Loss, agent: Policy, params: Params, data: Data, moved: Params) -> Params:
    """Of the loss of ``moved`` parameters, prepared with ``params``, on all newest steps."""
    prepared = loss.prepare(agent, params, data)
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in moved.items()}
    total = loss(agent, leaves, prepared)
    assert total.shape == data.trajectory.active.shape[1:2]
    found = torch.autograd.grad(total.sum(), list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaves[n]) if g is None else g
            for n, g in zip(leaves, found, strict=True)}  # fmt: skip


# --- one agent equals P agents -----------------------------------------------------------------


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", ["ppo", "reinforce", "learned", "mixture"])
def test_gradients_of_a_batch_are_those_of_separate_agents(
    name: str, discrete: bool, memory: str
) -> None:
    spec = Spec(3, Discrete(4), 100) if discrete else SPEC
    agent, params = agents(spec, memory=memory)
    moved = {k: v + 0.05 for k, v in params.items()}
    data = some_data(spec, filled=40, start=(agent, params))
    together = gradient(loss_of(name, spec=spec), agent, params, data, moved)
    for p in range(AGENTS):
        own = loss_of(name, slice(p, p + 1), spec)
        alone = gradient(own, agent, one(params, p), one(data, p), one(moved, p))
        for leaf, value in alone.items():
            torch.testing.assert_close(together[leaf][p : p + 1], value, rtol=1e-9, atol=1e-12)
    assert any(bool(g.abs().max() > 1e-3) for g in together.values())
    assert memory == "none" or all(
        bool(g.abs().max() > 1e-5) for n, g in together.items() if n.startswith("memory.")
    )


# --- oracles -----------------------------------------------------------------------------------


def dense(params: Params, name: str, x: Tensor, p: int) -> Tensor:
    """One agent's network as torch's own layers compute it."""
    layers = sum(1 for leaf in params if leaf.startswith(f"{name}.") and leaf.endswith("weight"))
    for i in range(layers):
        x = F.linear(x, params[f"{name}.{i}.weight"][p].T, params[f"{name}.{i}.bias"][p])
        x = torch.tanh(x) if i < layers - 1 else x
    return x


def gae_by_hand(
    reward: Tensor, value: Tensor, terminated: Tensor, ended: Tensor, last: float
) -> list[float]:
    out, running = [0.0] * NEWEST, 0.0
    for t in reversed(range(NEWEST)):
        following = float(value[t + 1]) if t < NEWEST - 1 else last
        if ended[t]:
            following = float(value[t])  # what came next is not known
        alive = 0.0 if terminated[t] else 1.0
        delta = float(reward[t]) + 0.99 * following * alive - float(value[t])
        running = delta + 0.99 * 0.95 * (0.0 if ended[t] else 1.0) * running
        out[t] = running
    return out


@pytest.mark.parametrize("clip", [0.2, 0.0])
def test_ppo_and_reinforce_equal_a_loop_by_hand(clip: float) -> None:
    agent, params = agents()
    data = some_data()
    loss = PolicyGradient(clip=clip, kl_coef=0.5 if clip else 0.0, value_coef=0.7)
    moved = {k: v + 0.1 * torch.sign(v) for k, v in params.items()}
    rows = torch.tensor([[3, 0, 15, 7]]).expand(AGENTS, -1)
    found = loss(agent, moved, loss.prepare(agent, params, data), rows)
    for p in range(AGENTS):
        obs, action, reward, terminated, ended, after = newest(data, p)
        value = dense(params, "value", obs, p)[:, 0]
        last = float(dense(params, "value", after, p))
        raw = torch.tensor(gae_by_hand(reward, value, terminated, ended, last), dtype=torch.float64)
        advantage = (raw - raw.mean()) / (raw.std(unbiased=False) + 1e-8)
        old = torch.distributions.Normal(
            dense(params, "policy", obs, p), params["log_std"][p].exp()
        )
        new = torch.distributions.Normal(dense(moved, "policy", obs, p), moved["log_std"][p].exp())
        log_new = new.log_prob(action).sum(-1)
        if clip:
            ratio = (log_new - old.log_prob(action).sum(-1)).exp()
            cut = ratio.clamp(0.8, 1.2)
            assert (cut != ratio).any(), "nothing is clipped, so nothing would be tested"
            gain = -torch.minimum(ratio * advantage, cut * advantage)
            gain = gain + 0.5 * torch.distributions.kl_divergence(old, new).sum(-1)
        else:
            gain = -log_new * advantage
        error = (dense(moved, "value", obs, p)[:, 0] - raw - value) ** 2
        expected = (gain + 0.7 * error)[rows[p]].mean()
        assert abs(float(found[p] - expected)) < 1e-10


def test_ppo_of_discrete_actions_equals_categorical() -> None:
    spec = Spec(3, Discrete(4), 100)
    agent, params = agents(spec)
    data = some_data(spec)
    moved = {k: v + 0.1 for k, v in params.items()}
    loss = PolicyGradient(value_coef=0.0, kl_coef=0.1)
    prepared = loss.prepare(agent, params, data)
    found = loss(agent, moved, prepared)
    for p in range(AGENTS):
        obs, chosen = newest(data, p)[:2]
        old, new = (
            torch.distributions.Categorical(logits=dense(x, "policy", obs, p))
            for x in (params, moved)
        )
        ratio = (new.log_prob(chosen) - old.log_prob(chosen)).exp()
        a = prepared.constants["advantage"][p]
        gain = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        expected = (gain + 0.1 * torch.distributions.kl_divergence(old, new)).mean()
        assert abs(float(found[p] - expected)) < 1e-10


def test_advantages_of_a_terminal_a_time_limit_and_the_end_of_the_batch() -> None:
    rows, no = torch.ones(5, 1, 1, dtype=torch.float64), torch.zeros(5, 1, 1, dtype=torch.bool)
    terminated, truncated = no.clone(), no.clone()
    terminated[2], truncated[3] = True, True
    ts = TimeStep(rows, rows, rows, terminated, truncated, terminated | truncated, no)
    steps = Trajectory({}, ts, rows[1:], ~no[1:], None, {})
    value = torch.full_like(rows[1:], 2.0)
    found = advantages(steps, value, value[0], gamma=0.5, lambda_=0.5)
    # terminal: 1 - 2; time limit: 1 + 0.5 * 2 - 2 = 0, and so at the end of the batch;
    # the first: 1 + 0.5 * 2 - 2 + 0.25 * (1 - 2)
    expected = torch.tensor([-0.25, -1.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), expected)


def test_the_loss_network_equals_torch_layers() -> None:
    agent, params = agents()
    net = network(memory=True)
    leaves, data = eta(net), some_data(filled=40)
    loss = net.loss(leaves)
    rows = torch.tensor([[1, 5, 15]]).expand(AGENTS, -1)
    found = loss(agent, params, loss.prepare(agent, params, data), rows)
    steps, inside = data.trajectory, data.constants["inside"]
    for p in range(AGENTS):
        filled, obs = inside[p].double()[:, None], steps.steps.obs[:, p, 0]
        reward, ended = steps.reward[:, p], steps.ended[:, p]
        scaled = data.constants["scaled_action"][p]
        x = torch.cat([obs, scaled, reward * filled, filled, ended * filled], dim=1)
        mean = dense(params, "policy", obs, p)
        policy = torch.cat([mean, params["log_std"][p].expand_as(mean)], dim=1)
        memory = torch.tanh(params["unit.weight"][p].sum(0) + params["unit.bias"][p])
        features = torch.cat([x, policy, memory.expand(BUFFER, -1)], dim=1)
        y = features.T[None]
        for i, (width, stride) in enumerate(((6, 5), (4, 2))):
            kernel = leaves[f"loss.conv.{i}.weight"][p].reshape(width, y.shape[1], -1)
            kernel = kernel.permute(2, 1, 0)
            y = F.leaky_relu(F.conv1d(y, kernel, leaves[f"loss.conv.{i}.bias"][p], stride), 0.2)
        context = y[0].mean(1) @ leaves["loss.context.weight"][p] + leaves["loss.context.bias"][p]
        total = 0.0
        for row in (BUFFER - NEWEST + rows[p]).tolist():
            z = torch.cat([x[row], context, policy[row], memory])
            z = F.leaky_relu(
                z @ leaves["loss.head.0.weight"][p] + leaves["loss.head.0.bias"][p], 0.2
            )
            total += float(z @ leaves["loss.head.1.weight"][p] + leaves["loss.head.1.bias"][p])
        assert abs(float(found[p]) - total / 3) < 1e-10


def test_adam_and_clipping_equal_torchs() -> None:
    agent, params = agents()
    params = agent.part(params, "actor")
    adams, mine = Adams.zeros(agent, params), params
    theirs = [{k: v[p].clone().requires_grad_() for k, v in params.items()} for p in range(AGENTS)]
    searches = [torch.optim.Adam(list(tree.values()), lr=0.03) for tree in theirs]
    for step in range(4):
        gradients = {
            k: torch.randn(v.shape, generator=seeded(step), dtype=v.dtype) * 5
            for k, v in params.items()
        }

        def loss(given: Params, gradients: Params = gradients) -> Tensor:
            return torch.stack(
                [(leaf * gradients[k]).flatten(1).sum(1) for k, leaf in given.items()]
            ).sum(0)

        mine, adams = descend(agent, loss, mine, adams, 0.03, clip=1.0)
        for p, (tree, search) in enumerate(zip(theirs, searches, strict=True)):
            for name, leaf in tree.items():
                leaf.grad = gradients[name][p].clone()
            torch.nn.utils.clip_grad_norm_(list(tree.values()), 1.0)
            search.step()
    for p, tree in enumerate(theirs):
        for name, leaf in tree.items():
            torch.testing.assert_close(mine[name][p], leaf.detach(), rtol=1e-6, atol=1e-9)


def test_statistics_see_every_step_once() -> None:
    parts = [torch.randn(2, 7, 3, generator=seeded(k)) * 3 + 1 for k in range(4)]
    found = Statistics.fresh(2, 3, "cpu")
    for part in parts:
        found = found.add(part)
    x = np.concatenate([part.numpy() for part in parts], axis=1)
    mean, std = found.mean_std()
    np.testing.assert_allclose(mean.numpy(), x.mean(1), atol=2e-3)
    np.testing.assert_allclose(std.numpy(), x.std(1), rtol=2e-3)
    flat = Statistics.fresh(1, 1, "cpu").add(torch.full((1, 500, 1), 5.0)).mean_std()[1]
    assert float(flat) == pytest.approx(0.1, rel=0.2)


# --- what may and what may not carry a gradient -------------------------------------------------


def test_sizes_of_the_paper() -> None:
    hopper = Spec(11, Continuous(3), 8192)
    net = LossNetwork(hopper, 512)
    assert net.features == 55 and net.positions == [102, 50]
    assert size_of(net.shapes) == 9857
    by_layer = [size_of({k: v for k, v in net.shapes.items() if f".{name}" in k})
                for name in ("conv.0", "conv.1", "context", "head.0", "head.1")]  # fmt: skip
    assert by_layer == [5296, 2080, 1056, 1408, 17]


def test_first_parameters() -> None:
    agent = inner_policy(SPEC, "epg", (64, 64), EVERYTHING, std=1.0)
    params = agent.init_at(Rng(0), torch.tensor([4, 9, 4]))
    for name, norm in (("policy.0", 1.0), ("policy.1", 1.0), ("policy.2", 0.01), ("unit", 0.01)):
        norms = params[f"{name}.weight"].norm(dim=2)
        torch.testing.assert_close(norms, torch.full_like(norms, norm))
    assert not params["log_std"].any() and not params["policy.1.bias"].any()


def test_the_learned_loss_reaches_the_policy_and_only_what_it_should() -> None:
    agent, params = agents()
    data = some_data()
    net = network(memory=True)
    found = gradient(net.loss(eta(net)), agent, params, data, params)
    for name, leaf in found.items():
        moves = name.startswith(("policy", "log_std", "unit"))
        assert bool(leaf.abs().amax(dim=tuple(range(1, leaf.ndim))).min() > 0) == moves, name
    off = network(memory=False)
    still = gradient(off.loss(eta(off)), agent, params, data, params)
    assert not still["unit.weight"].any() and still["policy.0.weight"].any()


def test_the_context_carries_a_gradient_to_the_policy_but_not_to_memory() -> None:
    agent, params = agents()
    data, net = some_data(), network(memory=True)
    leaves = eta(net)
    # The head reads the context alone: whatever moves, moves through it.
    own = torch.zeros(net.features + 32, 1, dtype=torch.float64)
    x_width = SPEC.obs_size + 2 + 3  # then comes the context, then the policy and memory
    own[x_width : x_width + 32] = 1.0
    leaves["loss.head.0.weight"] = leaves["loss.head.0.weight"] * own
    found = gradient(net.loss(leaves), agent, params, data, params)
    assert found["policy.0.weight"].abs().amax() > 1e-6
    assert not found["unit.weight"].any()


def test_the_loss_reads_the_newest_steps() -> None:
    agent, params = agents()
    data, net = some_data(), network()
    leaves = eta(net)
    leaves["loss.context.weight"] = torch.zeros_like(leaves["loss.context.weight"])
    loss = net.loss(leaves)
    whole, ts = data.trajectory, data.trajectory.ts

    def value(changed: Data) -> Tensor:
        return loss(agent, params, loss.prepare(agent, params, changed))

    for place, matters in ((0, False), (NEWEST - 1, False), (BUFFER - NEWEST, True), (-1, True)):
        reward = ts.reward.clone()
        reward[1:][place] += 1.0
        changed = data._replace(trajectory=whole._replace(ts=ts._replace(reward=reward)))
        assert bool((value(changed) != value(data)).all()) == matters, place


def test_no_reward_means_no_reward() -> None:
    agent, params = agents()
    data = some_data()
    whole, ts = data.trajectory, data.trajectory.ts
    more = whole._replace(ts=ts._replace(reward=ts.reward + 1.0))
    for reward in (True, False):
        net = network(reward=reward)
        loss = net.loss(eta(net))
        first, second = (
            loss(agent, params, loss.prepare(agent, params, data._replace(trajectory=x)))
            for x in (whole, more)
        )
        assert torch.equal(first, second) != reward


def test_the_penalty_is_on_means_beyond_the_limits_alone() -> None:
    spec = Spec(obs_size=3, action=Continuous(2, low=-2.0, high=4.0), horizon=100)
    agent, params = agents(spec)
    params["policy.2.bias"] = torch.tensor([[1.0, 1.0], [9.0, 1.0], [1.0, -8.0], [9.0, 9.0]] * 2)[
        :AGENTS
    ].double()
    data, rows = some_data(spec), torch.tensor([[0, 3, 5]]).expand(AGENTS, -1)
    plain, held = network(spec), network(spec, saturation=0.5)
    leaves = eta(plain)
    prepared = plain.loss(leaves).prepare(agent, params, data)
    before, after = (net.loss(leaves)(agent, params, prepared, rows) for net in (plain, held))
    mean = agent.read(params, {}, data.trajectory.steps).mean
    assert mean is not None
    mean = mean[:, -NEWEST:]
    beyond = (mean[:, [0, 3, 5]] - 4).clamp_min(0) + (-2 - mean[:, [0, 3, 5]]).clamp_min(0)
    expected = 0.5 * (beyond / 3.0).square().sum(-1).mean(-1)
    assert torch.allclose(after - before, expected, rtol=1e-9, atol=1e-12)
    assert (expected > 0).tolist() == [False, True, True, True, False]
    with pytest.raises(UserError, match="saturation = 0.5.*4 discrete actions.*saturation = 0"):
        LossNetwork(Spec(3, Discrete(4), 10), BUFFER, saturation=0.5)


def test_an_unfilled_buffer_is_zero_in_front() -> None:
    agent = inner_policy(SPEC, "epg", (4,), EVERYTHING, std=1.0)
    learner = SegmentLearner(agent, SegmentOptions(period=8), 24)
    state = learner.init(Rng(0), torch.arange(2))
    g, flags = seeded(0), torch.ones(9, 2, 1, dtype=torch.bool)
    obs, action = torch.randn(9, 2, 1, 3, generator=g) + 4, torch.randn(8, 2, 1, 2, generator=g)
    ts = TimeStep(obs, obs[..., :2], torch.ones(9, 2, 1), ~flags, flags, flags, ~flags)
    new = Trajectory({}, ts, action, flags[1:], None, {})
    data = learner.data(state._replace(
        buffer=state.buffer.then(new).last(24), updates=state.updates + 1,
        statistics=state.statistics.add(torch.cat([obs[:-1], action], -1)[:, :, 0].transpose(0, 1)),
    ))  # fmt: skip
    seen, made = data.trajectory.steps.obs, data.constants
    assert not seen[:16].any() and not made["scaled_action"][:, :16].any()
    assert made["inside"].sum(1).tolist() == [8, 8] and bool(made["inside"][:, 16:].all())
    assert float(seen[16:].mean().abs()) < 0.1
    net = LossNetwork(SPEC, 24)
    x = net.loss({}).prepare(agent, state.params, data).constants["x"]
    assert not x[:, :16].any()
    assert bool((x[:, 16:, -3:] == 1.0).all()), "reward, aux and end of the newest steps are 1"


def test_a_weight_of_zero_is_not_computed() -> None:
    agent, params = agents()
    data, net = some_data(), network()
    learned = net.loss(eta(net))

    class Poison(PolicyGradient):
        def prepare(self, *_: Any) -> Data:
            raise AssertionError("computed")

    alone = gradient(learned, agent, params, data, params)
    mixed = gradient(Mixture(learned, Poison(), 0.0), agent, params, data, params)
    assert all(torch.equal(mixed[name], alone[name]) for name in alone)
    assert not mixed["value.0.weight"].any()


def test_leaves_without_a_gradient_stay() -> None:
    agent, params = agents()
    data, net = some_data(), network()
    loss = net.loss(eta(net))
    prepared = loss.prepare(agent, params, data)

    def learned(given: Params) -> Tensor:
        return loss(agent, given, prepared)

    after, adams = descend(agent, learned, params, Adams.zeros(agent, params), 0.1)
    for name in params:
        stays = name.startswith(("value", "unit"))
        assert torch.equal(after[name], params[name]) == stays, name
    updates = {part: adam.updates.tolist() for part, adam in adams.parts.items()}
    assert updates == {"actor": [1] * AGENTS, "value": [0] * AGENTS, "unit": [0] * AGENTS}
    assert list(after) == list(params)


# --- lives -------------------------------------------------------------------------------------


def lives(task: Any = None, memory: str = "none", **options: Any) -> AgentLives:
    task = task or make_task("displacement", horizon=64, episode_steps=16)
    config = MEMORIES[memory]
    agent = inner_policy(task.spec, "epg", (8,), EVERYTHING, std=1.0, config=config)
    how = SegmentOptions(period=16, epochs=1, minibatch=8, learning_rate=0.01)
    return AgentLives(
        SegmentLearner(agent, how, 32), task, 5, torch.device("cpu"), test_steps=16, **options
    )


def live(runner: AgentLives, index: Tensor, loss: Loss) -> tuple[Any, Tensor]:
    life = runner.begin(index, "train")
    rewards = []
    for _ in range(runner.updates):
        life, new = runner.advance(life, loss, "train")
        rewards.append(new.reward[..., 0].T)
    return life, torch.cat(rewards, dim=1)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["ppo", "learned"])
def test_two_identical_lives_have_identical_bits(name: str, memory: str) -> None:
    runner = lives(memory=memory)
    net = LossNetwork(runner.task.spec, 32, memory=True)
    loss = PolicyGradient() if name == "ppo" else net.loss(net.init(Rng(1)))
    index = torch.tensor([3, 11, 3, 4])
    first, rewards = live(runner, index, loss)
    live(runner, torch.tensor([5, 6]), loss)  # nothing of it may be left behind
    again, same = live(runner, index, loss)
    # Gradients of a memory are sums that torch rounds by where they lie in a batch.
    close = 0.0 if memory == "none" else 1e-6
    assert torch.equal(rewards, same) and float((rewards[0] - rewards[2]).abs().max()) <= close
    for leaf, value in first.state.params.items():
        assert torch.equal(value, again.state.params[leaf]), leaf
        assert float((value[0] - value[2]).abs().max()) <= close, leaf
    mates, others = live(runner, torch.tensor([4, 99]), loss)
    assert float((others[0] - rewards[3]).abs().max()) <= close
    for leaf, value in mates.state.params.items():
        assert float((value[0] - first.state.params[leaf][3]).abs().max()) <= close, leaf
    assert not torch.equal(rewards[0], rewards[1]), "streams of their own"
    fresh = runner.begin(index, "train").state.params
    actor = runner.learner.agent.part(fresh, "actor")
    assert not any(torch.equal(first.state.params[leaf], actor[leaf]) for leaf in actor), "learned"


def test_scores_are_returns_of_one_episode() -> None:
    runner = lives(test_episodes=2)
    life = runner.begin(torch.arange(3), "train")
    params = {k: torch.zeros_like(v) for k, v in life.state.params.items()}
    params["log_std"] = params["log_std"] - 20.0  # (nearly) deterministic: 1e-3
    direction = life.tasks.data["direction"][:, 0]
    params["policy.1.bias"] = direction * 2.0
    score, steps = runner.score(life._replace(state=life.state._replace(params=params)), "train")
    torch.testing.assert_close(score, torch.full((3,), 1.6, dtype=torch.float64), rtol=1e-3, atol=0)
    assert steps.tolist() == [32, 32, 32]


def test_bad_lives_are_refused() -> None:
    for horizon, period, words in ((8, 16, "task.horizon = 16"), (40, 16, "task.horizon = 32")):
        task = make_task("displacement", horizon=horizon)
        agent = inner_policy(task.spec, "epg", (8,), EVERYTHING, std=1.0)
        learner = SegmentLearner(agent, SegmentOptions(period=period), 32)
        with pytest.raises(UserError, match=f"period = {period}.*{horizon} steps.*{words}"):
            AgentLives(learner, task, 0, torch.device("cpu")).check_length()
    with pytest.raises(UserError, match="4 discrete actions.*continuous.*ppo"):
        inner_policy(Spec(3, Discrete(4), 10), "metagenrl", (8,), frozenset({"critics"}), std=0.1)
    with pytest.raises(UserError, match="buffer = 20.*at least buffer = 21"):
        LossNetwork(SPEC, 20)
    assert LossNetwork(SPEC, 21).positions == [4, 1]


def test_observations_without_bound_are_refused() -> None:
    class Endless(type(make_task("displacement"))):
        def make_env(self, device: Any) -> Any:
            env = super().make_env(device)
            start = env.reset

            def reset(*args: Any) -> Any:
                state, ts = start(*args)
                return state, ts._replace(obs=ts.obs + math.inf)

            env.reset = reset
            return env

    with pytest.raises(UserError, match="not finite.*bounded"):
        lives(Endless(horizon=64)).begin(torch.arange(2), "train")
