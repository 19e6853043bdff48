"""MetaGenRL by numbers: the objective function, its gradient, and agents that do not mix."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from esmeta.learners._agent import Agent
from esmeta.learners._experience import Experience
from esmeta.learners._loss import Batch
from esmeta.learners._off_policy_losses import DeterministicGradient, state_values
from esmeta.learners._replay import ReplayLearner
from esmeta.learners._training import Training
from esmeta.objectives._objective_network import LearnedObjective, ObjectiveNetwork, value_after
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.tree import leaves_of, size_of, with_leaves
from esmeta.types import Continuous, Params, Spec

AGENTS, SNIPPETS, STEPS = 3, 4, 6
CRITICS = frozenset({"critics"})


@pytest.fixture(autouse=True)
def no_global_randomness() -> Any:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(params: Params, count: int) -> Params:
    """Float64 leaves ``[count, ...]`` that differ between agents, biases and gains too."""
    return {
        name: leaf.double().expand(count, *leaf.shape[1:])
        + 0.2 * normal(count, *leaf.shape[1:], seed=len(name))
        for name, leaf in params.items()
    }


def an_agent(actions: int = 2, limit: float = 2.0) -> tuple[Agent, Params]:
    agent = Agent(Spec(3, Continuous(actions, -limit, limit), 60), (6, 5), "relu", CRITICS)
    return agent, noisy(agent.init(Rng(5), torch.zeros(1, dtype=torch.int64)), AGENTS)


def a_batch(
    actions: int = 2, agents: int = AGENTS, snippets: int = SNIPPETS, steps: int = STEPS
) -> Batch:
    """Snippets of which agent 0's second one terminates after 3 steps, agent 1's first is cut."""
    shape = (agents, snippets, steps)
    ended, terminated = torch.zeros(shape).bool(), torch.zeros(shape).bool()
    ended[0, 1, 2] = terminated[0, 1, 2] = True
    ended[1 % agents, 0, 4 % steps] = True
    inside = (ended.long().cumsum(-1) - ended.long()) == 0
    past = Experience(
        normal(*shape, 3, seed=1), 2 * torch.tanh(normal(*shape, actions, seed=2)),
        normal(*shape, seed=3), normal(*shape, 3, seed=4), terminated, ended,
    )  # fmt: skip
    # Inside a snippet what follows is the next step.
    following = torch.cat([past.obs[:, :, 1:], past.next_obs[:, :, -1:]], dim=2)
    return Batch(past._replace(next_obs=following), past.action, inside, snippets)


def all_rows(batch: Batch) -> Tensor:
    return torch.arange(batch.steps.reward.shape[1]).expand(len(batch.inside), -1)


def alphas(count: int = AGENTS, **options: Any) -> tuple[ObjectiveNetwork, Params]:
    network = ObjectiveNetwork(STEPS, **options)
    return network, noisy(network.init(Rng(1)), count)


def test_published_numbers_of_parameters() -> None:
    assert size_of(ObjectiveNetwork().shapes) == 15_497
    parts = {"action": 2400, "other": 1480, "lstm": 9344, "head": 2273}
    for part, count in parts.items():
        own = {k: v for k, v in ObjectiveNetwork().shapes.items() if k.startswith(part)}
        assert size_of(own) == count
    lunar = Agent(Spec(8, Continuous(2), 1000), (350, 350), "relu", CRITICS)
    params = lunar.init(Rng(0), torch.arange(1))
    assert sum(leaf[0].numel() for leaf in params.values()) == 385_004


def test_first_alpha() -> None:
    alpha = ObjectiveNetwork().init(Rng(0))
    bias = alpha["lstm.bias"][0]
    assert bias[32:64].eq(1).all() and bias.sum() == 32
    weight = alpha["lstm.weight"]
    assert float(weight.abs().max()) <= math.sqrt(6 / (72 + 128)) < 1.02 * float(weight.abs().max())
    assert alpha["action.0.gain"].eq(1).all() and alpha["head.2.bias"].eq(0).all()


# --- the function, against one written step by step ------------------------------------------


def scalar_dense(x: Tensor, alpha: Params, name: str, *, act: bool, norm: bool) -> Tensor:
    x = x @ alpha[f"{name}.weight"] + alpha[f"{name}.bias"]
    if act:
        x = torch.stack([max(v, 0 * v) if i < 16 else v * v for i, v in enumerate(x)])
    if norm:
        x = (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5)
        x = x * alpha[f"{name}.gain"] + alpha[f"{name}.shift"]
    return x


def by_hand(alpha: Params, action: Tensor, now: Tensor, told: Tensor, limit: float) -> list[Tensor]:
    """l_t of one snippet ``action [L, A]`` that is inside throughout, by loops."""
    lstm = torch.nn.LSTM(40, 32, dtype=torch.float64)
    inputs = []
    for a, p, other in zip(action, now, told, strict=True):
        dims = []
        for d in range(action.shape[1]):
            x = torch.stack([a[d] / limit, p[d] / limit])
            for i in range(3):
                x = scalar_dense(x, alpha, f"action.{i}", act=True, norm=True)
            dims.append(x)
        y = other
        for i in range(2):
            y = scalar_dense(y, alpha, f"other.{i}", act=True, norm=False)
        y = scalar_dense(y, alpha, "other.2", act=False, norm=False)
        inputs.append(torch.cat([sum(dims) / len(dims), y]))
    with torch.no_grad():  # torch's gates are in the same order: input, forget, cell, output
        lstm.weight_ih_l0.copy_(alpha["lstm.weight"][:40].T)
        lstm.weight_hh_l0.copy_(alpha["lstm.weight"][40:].T)
        lstm.bias_ih_l0.copy_(alpha["lstm.bias"])
        lstm.bias_hh_l0.zero_()
        hidden = lstm(torch.stack(inputs[::-1]))[0].flip(0)
    out = []
    for h in hidden:
        for i in range(2):
            h = scalar_dense(h, alpha, f"head.{i}", act=True, norm=True)
        raw = scalar_dense(h, alpha, "head.2", act=False, norm=False)
        out.append(3.0 * torch.tanh(raw / 3.0)[0])
    return out


def test_the_function_equals_loops() -> None:
    state = torch.get_rng_state()
    agent, params = an_agent()
    network, alpha = alphas(bound=3.0)
    batch = a_batch()
    loss = network.loss(alpha)
    told = loss.prepare(agent, params, batch)["told"]
    now = torch.tanh(normal(*batch.steps.action.shape, seed=9))
    found = loss.steps(agent, batch.steps.action, now, told, batch.inside)
    for p in range(AGENTS):
        own = {name: leaf[p] for name, leaf in alpha.items()}
        for n in range(SNIPPETS):
            length = int(batch.inside[p, n].sum())  # a short snippet is a snippet of that length
            expected = by_hand(
                own, batch.steps.action[p, n, :length], now[p, n, :length],
                told[p, n, :length], 2.0,
            )  # fmt: skip
            torch.testing.assert_close(
                found[p, n, :length], torch.stack(expected), rtol=1e-9, atol=1e-9
            )
    torch.set_rng_state(state)  # torch.nn.LSTM draws its first weights


@pytest.mark.parametrize("values", ["both", "now", "none"])
@pytest.mark.parametrize("time", ["snippet", "episode", "none"])
def test_what_it_is_told(values: Any, time: Any) -> None:
    agent, params = an_agent()
    batch = a_batch()._replace(time=torch.arange(STEPS).expand(AGENTS, SNIPPETS, STEPS) + 10)
    network, alpha = alphas(values=values, time=time)
    told = network.loss(alpha).prepare(agent, params, batch)["told"]
    steps, p = batch.steps, 1  # its first snippet is cut after 5 of 6 steps
    value = state_values(agent, params, steps.obs)[p]
    last = state_values(agent, params, steps.next_obs[:, :, -1:])[p, :, 0]
    inside = batch.inside[p]
    every = torch.cat([value[inside], last[1:]])  # of the first snippet the last one is outside
    mean, std = every.mean(), every.std(unbiased=False) + 1e-5
    reward = steps.reward[p][inside]
    zeros = torch.zeros_like(value)
    following = torch.cat([value[:, 1:], last[:, None]], dim=1)
    following[0, 4] = value[0, 4]  # hidden by the time limit
    expected = [
        (steps.reward[p] - reward.mean()) / (reward.std(unbiased=False) + 1e-5),
        {
            "snippet": torch.arange(STEPS).double() / STEPS,
            "episode": (10 + torch.arange(STEPS)).double() / 59,
            "none": torch.zeros(STEPS),
        }[time].expand(SNIPPETS, -1),
        (following - mean) / std if values == "both" else zeros,
        (value - mean) / std if values != "none" else zeros,
    ]
    for column, leaf in enumerate(expected):
        torch.testing.assert_close(
            told[p, ..., column], leaf.double() * inside, rtol=1e-9, atol=1e-9
        )
    ended = told[0, 1, 2]
    assert ended[2] == 0, "behind a terminal state V is nothing"
    assert ended[3] != 0 or values == "none"


def test_what_follows_the_end_of_an_episode_changes_nothing() -> None:
    agent, params = an_agent()
    network, alpha = alphas()
    loss, batch = network.loss(alpha), a_batch()
    junk = Experience(*(
        torch.where(
            batch.inside.reshape(*batch.inside.shape, *[1] * (leaf.ndim - 3)), leaf, leaf + 7
        ) if leaf.dtype == torch.float64 else leaf
        for leaf in batch.steps
    ))  # fmt: skip
    # Of the last step inside, too, what came next is not known (or worth nothing).
    for poisoned in (junk, junk._replace(next_obs=torch.where(
        (batch.steps.ended & batch.inside).unsqueeze(-1), 9.0, junk.next_obs))):  # fmt: skip
        other = batch._replace(steps=poisoned, scaled_action=poisoned.action)
        values = [
            loss(agent, params, b, loss.prepare(agent, params, b), all_rows(b))
            for b in (batch, other)
        ]
        torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)


def test_the_number_of_action_dimensions_does_not_matter() -> None:
    network, alpha = alphas()
    assert all("actions" not in str(shape) for shape in network.shapes.values())
    single, _ = an_agent(actions=1)
    batch = a_batch(actions=1)
    loss = network.loss(alpha)
    told = normal(*batch.inside.shape, 4, seed=7)
    action, now = batch.steps.action, torch.tanh(normal(*batch.steps.action.shape, seed=8))
    one = loss.steps(single, action, now, told, batch.inside)
    # The same dimension five times over says the same, and their order nothing.
    five = loss.steps(
        single, action.expand(-1, -1, -1, 5), now.expand(-1, -1, -1, 5), told, batch.inside
    )
    torch.testing.assert_close(five, one, rtol=1e-12, atol=1e-12)
    wide = normal(*batch.inside.shape, 4, seed=10)
    order = torch.tensor([2, 0, 3, 1])
    first = loss.steps(single, wide, torch.tanh(wide), told, batch.inside)
    second = loss.steps(single, wide[..., order], torch.tanh(wide)[..., order], told, batch.inside)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first, one)


# --- gradients -------------------------------------------------------------------------------


def parts_of(k: int) -> tuple[list[Batch], Batch]:
    drawn = a_batch(snippets=2 * k + 3)
    batches = [drawn.part(2 * i, 2 * i + 2) for i in range(k)]
    return batches, drawn


@pytest.mark.parametrize(
    ("k", "reduction", "clip", "saturation"),
    [(1, "sum", 0, 0), (1, "mean", 0, 0), (2, "sum", 0, 0), (1, "sum", 0.5, 0.3)],
)
def test_the_meta_gradient_equals_finite_differences(
    k: int, reduction: Any, clip: float, saturation: float
) -> None:
    agent, params = an_agent()
    network, alpha = alphas(saturation=saturation)
    batches, where = parts_of(k)

    prepared: list[Params] = []

    class Held(LearnedObjective):
        """V of an updated policy depends on alpha, but is a constant: it is held at alpha's."""

        def prepare(self, agent: Agent, params: Params, batch: Batch) -> Params:
            number = next(i for i, own in enumerate(batches) if own is batch)
            if number == len(prepared):
                prepared.append(super().prepare(agent, params, batch))
            return prepared[number]

    def value(alpha: Params) -> Tensor:
        return value_after(
            agent, params, Held(network, alpha), batches, where, rate=0.01, reduction=reduction,
            clip=clip,
        )  # fmt: skip

    leaves = {name: leaf.clone().requires_grad_() for name, leaf in alpha.items()}
    found = torch.autograd.grad(value(leaves).sum(), list(leaves.values()))
    gradient = dict(zip(leaves, found, strict=True))
    assert all(float(g.abs().max()) > 0 for g in found), "every leaf of alpha matters"
    h = 1e-6
    for seed in range(3):
        along = {
            name: normal(*leaf.shape, seed=100 * seed + i)
            for i, (name, leaf) in enumerate(alpha.items())
        }
        length = torch.stack([x.flatten(1).square().sum(1) for x in along.values()]).sum(0).sqrt()
        along = {k: x / length.reshape(-1, *[1] * (x.ndim - 1)) for k, x in along.items()}
        up, down = (
            value({name: alpha[name] + sign * h * along[name] for name in alpha}).detach()
            for sign in (1, -1)
        )
        numeric = (up - down) / (2 * h)
        exact = torch.stack(
            [(gradient[name] * along[name]).flatten(1).sum(1) for name in alpha]
        ).sum(0)
        torch.testing.assert_close(exact, numeric, rtol=1e-4, atol=1e-9)


def test_one_inner_step_is_plain_descent_on_the_sum() -> None:
    agent, params = an_agent()
    network, alpha = alphas()
    loss, (batches, where) = network.loss(alpha), parts_of(1)
    batch = batches[0]
    phi = {k: v.clone().requires_grad_() for k, v in params.items() if k.startswith("policy.")}
    prepared = loss.prepare(agent, params, batch)
    mean = loss(agent, {**params, **phi}, batch, prepared, all_rows(batch))
    total = (mean * batch.inside.sum(dim=(1, 2))).sum()
    steps = torch.autograd.grad(total, list(phi.values()))
    moved = {k: v - 0.05 * g for (k, v), g in zip(phi.items(), steps, strict=True)}
    obs = where.steps.obs.flatten(1, 2)
    weight = where.inside.flatten(1).double()
    action = agent.policy({**params, **moved}, obs).mean
    assert action is not None
    worth = agent.critic(params, "q1", obs, action)
    expected = (worth * weight).sum(1) / weight.sum(1)
    found = value_after(agent, params, loss, batches, where, rate=0.05, reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    still = value_after(agent, params, loss, batches, where, rate=0.0, reduction="sum")
    assert not torch.allclose(found, still)


def test_a_limit_cuts_inner_steps_that_are_longer() -> None:
    agent, params = an_agent()
    network, alpha = alphas()
    batches, where = parts_of(1)

    def after(rate: float, clip: float) -> Tensor:
        return value_after(
            agent, params, network.loss(alpha), batches, where, rate=rate, reduction="sum",
            clip=clip,
        )  # fmt: skip

    torch.testing.assert_close(after(0.05, 1e6), after(0.05, 0.0), rtol=0, atol=0)
    # Cut to a norm far below its own, only rate * clip counts.
    torch.testing.assert_close(after(1.0, 1e-3), after(1e-2, 1e-1), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(after(1.0, 1e-3), after(1.0, 2e-3), rtol=1e-6, atol=0)


def test_saturated_policies_are_pulled_back() -> None:
    agent, params = an_agent()
    batch = a_batch()
    rows, weight = all_rows(batch), batch.inside.flatten(1).double()
    network, alpha = alphas()
    pulling, _ = alphas(saturation=0.7)
    far = {k: v * (40.0 if k.startswith("policy.2") else 1.0) for k, v in params.items()}
    obs = batch.steps.obs.flatten(1, 2)
    action = agent.policy(far, obs).mean
    assert action is not None
    limit = agent.spec.action.high
    raw = torch.atanh((action / limit).clamp(-1 + 1e-12, 1 - 1e-12))
    inside = raw.abs() < 8  # where tanh can be undone
    assert bool((raw.abs() > 1).any()) and bool(inside.any())
    excess = agent.saturation(agent.network(far, "policy", obs))
    expected = (raw.abs() - 1).clamp_min(0).square()
    torch.testing.assert_close(
        excess[inside.all(-1)], expected.sum(-1)[inside.all(-1)], rtol=1e-6, atol=1e-9
    )
    prepared = network.loss(alpha).prepare(agent, far, batch)
    without, with_it = (
        net.loss(alpha, share)(agent, far, batch, prepared, rows)
        for net, share in ((network, 0.4), (pulling, 0.4))
    )
    mean = (excess * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(with_it - without, 0.7 * mean, rtol=1e-9, atol=1e-9)


def test_values_carry_no_gradient_and_critics_are_frozen() -> None:
    agent, params = an_agent()
    network, alpha = alphas()
    loss, batch = network.loss(alpha), a_batch()
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    prepared = loss.prepare(agent, leaves, batch)
    assert not prepared["told"].requires_grad
    total = loss(agent, leaves, batch, prepared, all_rows(batch)).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        assert (gradient is None) == name.startswith("q"), name
    # The gradient is that through pi(s) alone: finite differences with `told` held.
    h = 1e-6
    along = {k: normal(*v.shape, seed=len(k)) for k, v in params.items() if k[0] == "p"}
    up, down = (
        loss(
            agent, {**params, **{k: params[k] + s * h * v for k, v in along.items()}},
            batch, prepared, all_rows(batch),
        )
        for s in (1, -1)
    )  # fmt: skip
    exact = sum((g * along[k]).sum() for k, g in zip(leaves, found, strict=True) if g is not None)
    torch.testing.assert_close(
        torch.as_tensor(exact), ((up - down) / (2 * h)).sum(), rtol=1e-5, atol=1e-8
    )
    moving = {k: v.clone().requires_grad_() for k, v in params.items()}
    changing = {k: v.clone().requires_grad_() for k, v in alpha.items()}
    batches, where = parts_of(1)
    value = value_after(
        agent, moving, network.loss(changing), batches, where, rate=0.05, reduction="sum"
    ).sum()
    assert torch.autograd.grad(value, list(moving.values()), allow_unused=True) == (None,) * len(
        moving
    )


def test_annealing_goes_from_the_critic_to_the_learned_loss() -> None:
    agent, params = an_agent()
    network, alpha = alphas()
    batch = a_batch()
    batch = batch._replace(inside=torch.ones_like(batch.inside))
    rows, prepared = all_rows(batch), network.loss(alpha).prepare(agent, params, batch)
    whole = torch.arange(SNIPPETS * STEPS).expand(AGENTS, -1)
    critic = DeterministicGradient()(agent, params, batch, {}, whole)
    learned = network.loss(alpha)(agent, params, batch, prepared, rows)
    for share in (0.0, 0.25, 1.0):
        mixed = network.loss(alpha, share)(agent, params, batch, prepared, rows)
        torch.testing.assert_close(
            mixed, share * learned + (1 - share) * critic, rtol=1e-12, atol=1e-12
        )


def test_meta_steps_make_learning_worth_it() -> None:
    """On a fixed batch and critic, Q after the update rises from about Q before it."""
    agent, params = an_agent()
    network = ObjectiveNetwork(STEPS)
    alpha = {k: v.double().expand(AGENTS, *v.shape[1:]) for k, v in network.init(Rng(2)).items()}
    batches, where = parts_of(1)
    before = value_after(
        agent, params, network.loss(alpha), [], where, rate=0.0, reduction="sum"
    ).detach()
    gains = []
    for _ in range(60):
        leaves = {k: v.detach().requires_grad_() for k, v in alpha.items()}
        value = value_after(
            agent, params, network.loss(leaves), batches, where, rate=1e-3, reduction="sum"
        )
        gains.append((value - before).detach())
        found = torch.autograd.grad(value.sum(), list(leaves.values()))
        norm = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0).sqrt()
        alpha = {
            k: v + 0.1 * g / norm.reshape(-1, *[1] * (g.ndim - 1))
            for (k, v), g in zip(leaves.items(), found, strict=True)
        }
    assert float(gains[0].abs().max()) < 0.01
    assert float(gains[-1].min()) > 0.01 and float(gains[-1].mean()) > 0.05


# --- agents in training ----------------------------------------------------------------------


def training(**options: Any) -> Training:
    task = make_task("pendulum", horizon=40, episode_steps=16, gravity=(7.0, 13.0))
    agent = Agent(task.spec, (8,), "relu", CRITICS)
    learner = ReplayLearner(
        agent, period=8, capacity=64, batch=4, critic_batch=16, start=16, update_after=24,
        clip=1.0, **options,
    )  # fmt: skip
    return Training(learner, task, 3, "train", torch.device("cpu"), 2)


def doubled(agents: Any) -> Any:
    """Float64 networks and replay: what is left of differences is not rounding."""
    state = agents.state
    tree = (state.params, state.target, state.adam, tuple(state.replay.steps))
    leaves = [leaf.double() if leaf.is_floating_point() else leaf for leaf in leaves_of(tree)]
    params, target, adam, steps = with_leaves(tree, leaves)
    replay = state.replay._replace(steps=Experience(*steps))
    return agents._replace(
        state=state._replace(params=params, target=target, adam=adam, replay=replay)
    )


def lived(numbers: list[int], windows: int = 4) -> tuple[Training, Any]:
    """Agents that have acted, with float64 networks from there on."""
    runner = training()
    agents = runner.begin(torch.tensor(numbers))
    for _ in range(windows):
        agents, new = runner.act(agents)
        replay = agents.state.replay.add(new)
        agents = agents._replace(state=agents.state._replace(replay=replay))
    return runner, doubled(agents)


def learned(runner: Training, agents: Any, alpha: Params) -> tuple[Params, Params]:
    """Networks after six update rounds, and the meta-gradients of alpha there."""
    network = ObjectiveNetwork(5)
    state = runner.learner.rounds(agents.state, network.loss(alpha, 0.5), runner.rng(), 6)
    leaves = {k: v.clone().requires_grad_() for k, v in alpha.items()}
    drawn = state.replay.sample(runner.rng().fold("meta"), state.index, 3, 5)
    value = value_after(
        runner.learner.agent, state.params, network.loss(leaves), [drawn], drawn,
        rate=1e-2, reduction="sum",
    )  # fmt: skip
    found = torch.autograd.grad(value.sum(), list(leaves.values()))
    return state.params, dict(zip(leaves, found, strict=True))


def test_agents_of_a_batch_equal_agents_alone() -> None:
    numbers = [0, 4, 7]
    alpha = noisy(ObjectiveNetwork(5).init(Rng(1)), 3)
    params, gradients = learned(*lived(numbers), alpha)
    for p, number in enumerate(numbers):
        own = {k: v[p : p + 1] for k, v in alpha.items()}
        alone, single = learned(*lived([number]), own)
        for name in params:
            torch.testing.assert_close(params[name][p : p + 1], alone[name], rtol=1e-6, atol=1e-6)
        for name in gradients:
            torch.testing.assert_close(
                gradients[name][p : p + 1], single[name], rtol=1e-6, atol=1e-6
            )
    assert not torch.allclose(params["policy.0.weight"][0], params["policy.0.weight"][1])


def test_no_agent_sees_anothers_data_or_random_numbers() -> None:
    alpha = noisy(ObjectiveNetwork(5).init(Rng(1)), 3)
    expected, gradients = learned(*lived([0, 4, 7]), alpha)
    runner, agents = lived([0, 4, 7])
    steps = agents.state.replay.steps
    steps.reward[1] += 100.0
    steps.obs[1] *= -3.0
    runner_changed = learned(runner, agents, alpha)
    for found in (runner_changed, learned(*lived([0, 5, 7]), alpha)):
        for name in expected:
            for p in (0, 2):
                assert torch.equal(found[0][name][p], expected[name][p]), name
        for name in gradients:
            assert torch.equal(found[1][name][[0, 2]], gradients[name][[0, 2]]), name
        assert not torch.equal(found[0]["q1.0.weight"][1], expected["q1.0.weight"][1])
    twins, _ = learned(*lived([4, 4, 7]), {k: v[[1, 1, 2]] for k, v in alpha.items()})
    assert torch.equal(twins["policy.0.weight"][0], twins["policy.0.weight"][1])


def test_replays_know_the_time_in_the_episode() -> None:
    runner = training()
    agents = runner.begin(torch.tensor([0, 1]))
    for _ in range(7):  # a trial of 40 steps in episodes of 16, 16 and 8, then 16 of the next one
        agents, new = runner.act(agents)
        replay = agents.state.replay.add(new)
        agents = agents._replace(state=agents.state._replace(replay=replay))
    times = [*range(16), *range(16), *range(8), *range(16)]
    assert agents.trial == 1 and agents.t == 16
    assert agents.state.replay.time[:, :56].tolist() == [times, times]
    for _ in range(2):  # over the oldest rows
        agents, new = runner.act(agents)
        agents = agents._replace(state=agents.state._replace(replay=agents.state.replay.add(new)))
    assert agents.state.replay.time[0].tolist() == [*range(8, 16), *times[8:], *range(8)]
    batch = agents.state.replay.sample(Rng(0), torch.arange(2), 20, 5)
    assert batch.time is not None
    assert ((batch.time[..., 1:] - batch.time[..., :-1])[batch.inside[..., 1:]] == 1).all()
    assert (~batch.inside).any()


def test_scores_are_those_of_whole_episodes() -> None:
    runner = training()
    agents = runner.begin(torch.tensor([0, 1]))
    rewards = []
    for _ in range(8):
        agents, new = runner.act(agents)
        rewards.append(new.reward)
        replay = agents.state.replay.add(new)
        agents = agents._replace(state=agents.state._replace(replay=replay))
    whole = torch.cat(rewards, dim=1).double()
    parts = [whole[:, a:b].sum(1) for a, b in ((0, 16), (16, 32), (32, 40), (40, 56))]
    scores = agents.scores
    assert scores.episodes.tolist() == [4, 4]
    torch.testing.assert_close(scores.first, parts[0])
    torch.testing.assert_close(scores.recent, torch.stack([parts[3], parts[2]], dim=1))
    torch.testing.assert_close(scores.total, sum(parts))  # type: ignore[arg-type]
    torch.testing.assert_close(scores.earned, whole[:, 56:].sum(1))


def test_steps_behind_the_end_of_a_trial_are_no_episodes_and_teach_nothing() -> None:
    class Early(type(make_task("pendulum"))):
        """The trial of task 0 is over after 12 of 40 steps, by a terminal state."""

        def make_env(self, device: Any) -> Any:
            env = super().make_env(device)
            step = env.step

            def early(state: Any, action: Tensor) -> Any:
                state, ts = step(state, action)
                dead = torch.zeros_like(ts.new_trial)
                dead[0] = state.time > 12
                last = torch.zeros_like(dead)
                last[0] = state.time == 12
                return state, ts._replace(
                    reward=ts.reward * ~dead, terminated=last, truncated=ts.truncated & ~dead,
                    new_trial=ts.new_trial | dead | last, new_episode=ts.new_episode | dead | last,
                )  # fmt: skip

            env.step = early
            return env

    runner = replace(training(), task=Early(horizon=40, episode_steps=16))
    agents = runner.begin(torch.tensor([0, 1]))
    for _ in range(3):
        agents, new = runner.act(agents)
        replay = agents.state.replay.add(new)
        agents = agents._replace(state=agents.state._replace(replay=replay))
    assert agents.trial == 1, "all begin a new trial"
    steps = agents.state.replay.steps
    assert agents.scores.episodes.tolist() == [1, 1]
    assert steps.terminated[0, :24].nonzero().flatten().tolist() == [11]
    assert not steps.terminated[1].any()
    assert steps.ended[0, 11:16].all() and steps.ended[1, 15], "cut where the trials began anew"
    usable = (steps.known | steps.terminated)[:, :24]
    assert usable[0].nonzero().flatten().tolist() == [*range(12), *range(16, 24)]


def test_the_policies_rate_is_theirs_alone() -> None:
    alpha = noisy(ObjectiveNetwork(5).init(Rng(1)), 3)
    _, agents = lived([0, 4, 7])
    network, before = ObjectiveNetwork(5), agents.state.params
    moves = {}
    for rate in (0.0, 1e-3, 1e-4):  # two rounds: the first step of Adam on policies, delay is 2
        runner = training(policy_rate=rate)
        _, agents = lived([0, 4, 7])
        after = runner.learner.rounds(agents.state, network.loss(alpha), runner.rng(), 2).params
        moves[rate] = {name: after[name] - before[name] for name in before}
    for name in before:
        small = 0.1 if name.startswith("policy") else 1.0
        assert torch.equal(moves[0.0][name], moves[1e-3][name])
        torch.testing.assert_close(moves[1e-4][name], small * moves[1e-3][name])


def test_flags_of_the_release() -> None:
    runner = training(terminal_bonus=1.0)
    agents = runner.begin(torch.tensor([0, 1]))
    steps = a_batch(actions=1, agents=2, snippets=2).steps
    flat = Experience(*(leaf[:, 1].float() if leaf.is_floating_point() else leaf[:, 1]
                        for leaf in steps))  # fmt: skip
    flat = flat._replace(terminated=flat.ended | (torch.arange(STEPS) == 1))
    noise = torch.zeros(2, STEPS, 1)
    bonus = runner.learner.td_target(agents.state.target, flat, noise)
    plain = replace(runner.learner, terminal_bonus=0.0)
    without = plain.td_target(agents.state.target, flat, noise)
    torch.testing.assert_close(bonus - without, flat.terminated.float())
    torch.testing.assert_close(without[flat.terminated], flat.reward[flat.terminated])
    _, new = replace(runner, timeout_is_terminal=True).act(runner.begin(torch.tensor([0])))
    assert torch.equal(new.terminated, new.ended)
    _, new = runner.act(runner.begin(torch.tensor([0])))
    assert not new.terminated.any()


@pytest.mark.parametrize("windows", [2, 4, 5])
def test_stored_agents_go_on_bit_for_bit(windows: int) -> None:
    runner, network = training(), ObjectiveNetwork(5)
    loss = network.loss(network.init(Rng(1)))

    def on(agents: Any, count: int) -> Any:
        for _ in range(count):
            agents, new = runner.act(agents)
            state = runner.learner.update(agents.state, new, loss, runner.rng())
            agents = agents._replace(state=state)
        return agents

    agents = on(runner.begin(torch.arange(3)), windows)
    saved = runner.save(agents)
    assert all(len(leaf) == 3 for leaf in saved.values())
    again = runner.save(on(runner.restore(saved), 6))
    expected = runner.save(on(agents, 6))
    for name, leaf in expected.items():
        assert torch.equal(again[name].nan_to_num(-7), leaf.nan_to_num(-7)), name
