"""MetaGenRL by numbers: the objective function, its gradient, and agents that do not mix."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lived import snippets
from torch import Tensor

from esmeta.agent import heads
from esmeta.agent.inner import inner_policy
from esmeta.agent.policy import Need, Policy
from esmeta.lives import AgentLives, Life
from esmeta.objectives._objective_network import LearnedObjective, ObjectiveNetwork, value_after
from esmeta.rl.diary import Scores
from esmeta.rl.losses import Data, excess
from esmeta.rl.off_policy import (
    DeterministicGradient,
    ReplayLearner,
    ReplayOptions,
    state_values,
)
from esmeta.rl.steppers import Adam
from esmeta.rng import Rng
from esmeta.rollout import Trajectory
from esmeta.tasks import make_task
from esmeta.tree import size_of
from esmeta.types import Continuous, Params, Spec

AGENTS, SNIPPETS, STEPS = 3, 4, 6
CRITICS: frozenset[Need] = frozenset({"critics"})


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


def networks(spec: Spec, *hidden: int) -> Policy:
    return inner_policy(spec, "metagenrl", hidden, CRITICS, std=0.1)


def an_agent(actions: int = 2, limit: float = 2.0) -> tuple[Policy, Params]:
    agent = networks(Spec(3, Continuous(actions, -limit, limit), 60), 6, 5)
    return agent, noisy(agent.init_at(Rng(5), torch.zeros(1, dtype=torch.int64)), AGENTS)


def some_steps(actions: int = 2, agents: int = AGENTS, count: int = SNIPPETS) -> dict[str, Tensor]:
    """Snippets of which agent 0's second one terminates after 3 steps, agent 1's first is cut."""
    shape = (agents, count, STEPS)
    ended, terminated = torch.zeros(shape).bool(), torch.zeros(shape).bool()
    ended[0, 1, 2] = terminated[0, 1, 2] = True
    ended[1 % agents, 0, 4] = True
    return {
        "obs": torch.cat([normal(*shape, 3, seed=1), normal(*shape, 3, seed=4)[:, :, -1:]], dim=2),
        "action": 2 * torch.tanh(normal(*shape, actions, seed=2)),
        "reward": normal(*shape, seed=3),
        "terminated": terminated,
        "ended": ended,
    }


def by_snippet(data: Data, leaf: Tensor) -> Tensor:
    """``[P, M, ...]``, or rows ``[T, P, n, ...]`` of the trajectory, as ``[P, n, L, ...]``."""
    length, agents, count = data.trajectory.active.shape
    if leaf.shape[:2] == (agents, count * length):
        return leaf.unflatten(1, (count, length))
    return leaf.movedim(0, 2)


def alphas(count: int = AGENTS, **options: Any) -> tuple[ObjectiveNetwork, Params]:
    network = ObjectiveNetwork(STEPS, **options)
    return network, noisy(network.init(Rng(1)), count)


def test_published_numbers_of_parameters() -> None:
    assert size_of(ObjectiveNetwork().shapes) == 15_497
    parts = {"action": 2400, "other": 1480, "lstm": 9344, "head": 2273}
    for part, count in parts.items():
        own = {k: v for k, v in ObjectiveNetwork().shapes.items() if k.startswith(part)}
        assert size_of(own) == count
    assert networks(Spec(8, Continuous(2), 1000), 350, 350).size == 385_004


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
    lived = some_steps()
    data, action, loss = snippets(**lived), lived["action"], network.loss(alpha)
    inside, told = (
        by_snippet(data, loss.prepare(agent, params, data).constants[name])
        for name in ("inside", "told")
    )
    now = torch.tanh(normal(*action.shape, seed=9))
    found = loss.steps(agent, action, now, told, inside)
    for p in range(AGENTS):
        own = {name: leaf[p] for name, leaf in alpha.items()}
        for n in range(SNIPPETS):
            length = int(inside[p, n].sum())  # a short snippet is a snippet of that length
            expected = by_hand(
                own, action[p, n, :length], now[p, n, :length], told[p, n, :length], 2.0
            )
            torch.testing.assert_close(
                found[p, n, :length], torch.stack(expected), rtol=1e-9, atol=1e-9
            )
    torch.set_rng_state(state)  # torch.nn.LSTM draws its first weights


@pytest.mark.parametrize("values", ["both", "now", "none"])
@pytest.mark.parametrize("time", ["snippet", "episode", "none"])
def test_what_it_is_told(values: Any, time: Any) -> None:
    agent, params = an_agent()
    lived = some_steps()
    data = snippets(**lived, time=torch.arange(STEPS).expand(AGENTS, SNIPPETS, STEPS) + 10)
    network, alpha = alphas(values=values, time=time)
    told = by_snippet(data, network.loss(alpha).prepare(agent, params, data).constants["told"])
    p = 1  # its first snippet is cut after 5 of 6 steps
    worth = by_snippet(data, state_values(agent, params, data.trajectory))[p]
    value, last = worth[:, :-1], worth[:, -1]
    inside = by_snippet(data, data.constants["inside"])[p]
    every = torch.cat([value[inside], last[1:]])  # of the first snippet the last one is outside
    mean, std = every.mean(), every.std(unbiased=False) + 1e-5
    reward = lived["reward"][p][inside]
    zeros = torch.zeros_like(value)
    following = torch.cat([value[:, 1:], last[:, None]], dim=1)
    following[0, 4] = value[0, 4]  # hidden by the time limit
    expected = [
        (lived["reward"][p] - reward.mean()) / (reward.std(unbiased=False) + 1e-5),
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
    loss, lived = network.loss(alpha), some_steps()
    inside = by_snippet(snippets(**lived), snippets(**lived).constants["inside"])
    outside = {"action": ~inside, "reward": ~inside,
               "obs": torch.cat([~inside[..., :1], ~inside], dim=-1)}  # fmt: skip
    # Of the last step inside, too, what came next is not known (or worth nothing).
    over = torch.cat([~inside[..., :1], lived["ended"] & inside], dim=-1)
    for where in (outside, outside | {"obs": outside["obs"] | over}):
        other = dict(lived)
        for name, mask in where.items():
            leaf = lived[name]
            other[name] = torch.where(mask.reshape(*mask.shape, *[1] * (leaf.ndim - 3)), 7.0, leaf)
        values = [
            loss(agent, params, loss.prepare(agent, params, snippets(**steps)))
            for steps in (lived, other)
        ]
        torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)


def test_the_number_of_action_dimensions_does_not_matter() -> None:
    network, alpha = alphas()
    assert all("actions" not in str(shape) for shape in network.shapes.values())
    single, _ = an_agent(actions=1)
    lived = some_steps(actions=1)
    data, loss = snippets(**lived), network.loss(alpha)
    inside, action = by_snippet(data, data.constants["inside"]), lived["action"]
    told, now = normal(*inside.shape, 4, seed=7), torch.tanh(normal(*action.shape, seed=8))
    one = loss.steps(single, action, now, told, inside)
    # The same dimension five times over says the same, and their order nothing.
    five = loss.steps(single, action.expand(-1, -1, -1, 5), now.expand(-1, -1, -1, 5), told, inside)
    torch.testing.assert_close(five, one, rtol=1e-12, atol=1e-12)
    wide = normal(*inside.shape, 4, seed=10)
    order = torch.tensor([2, 0, 3, 1])
    first = loss.steps(single, wide, torch.tanh(wide), told, inside)
    second = loss.steps(single, wide[..., order], torch.tanh(wide)[..., order], told, inside)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(first, one)


# --- gradients -------------------------------------------------------------------------------


def parts_of(k: int) -> tuple[list[Data], Data]:
    drawn = snippets(**some_steps(count=2 * k + 3))
    batches = [drawn.trials(2 * i, 2 * i + 2) for i in range(k)]
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

    prepared: list[Data] = []

    class Held(LearnedObjective):
        """V of an updated policy depends on alpha, but is a constant: it is held at alpha's."""

        def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
            number = next(i for i, own in enumerate(batches) if own is data)
            if number == len(prepared):
                prepared.append(super().prepare(agent, params, data))
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
    phi = {k: v.clone().requires_grad_() for k, v in params.items() if k.startswith("policy.")}
    ready = loss.prepare(agent, params, batches[0])
    mean = loss(agent, {**params, **phi}, ready)
    total = (mean * ready.constants["inside"].sum(dim=1)).sum()
    steps = torch.autograd.grad(total, list(phi.values()))
    moved = {k: v - 0.05 * g for (k, v), g in zip(phi.items(), steps, strict=True)}
    seen = where.trajectory.steps
    obs, weight = by_snippet(where, seen.obs).flatten(1, 2), where.constants["inside"].double()
    action = heads.mode(agent.read({**params, **moved}, {}, seen))
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
    network, alpha = alphas()
    pulling, _ = alphas(saturation=0.7)
    far = {k: v * (40.0 if k.startswith("policy.2") else 1.0) for k, v in params.items()}
    data = network.loss(alpha).prepare(agent, far, snippets(**some_steps()))
    steps, weight = data.trajectory.steps, data.constants["inside"].double()
    action = heads.mode(agent.read(far, {}, steps))
    raw = torch.atanh((action / 2.0).clamp(-1 + 1e-12, 1 - 1e-12))
    inside = raw.abs() < 8  # where tanh can be undone
    assert bool((raw.abs() > 1).any()) and bool(inside.any())
    found = excess(agent.raw(far, {}, steps))
    expected = (raw.abs() - 1).clamp_min(0).square()
    torch.testing.assert_close(
        found[inside.all(-1)], expected.sum(-1)[inside.all(-1)], rtol=1e-6, atol=1e-9
    )
    without, with_it = (net.loss(alpha, 0.4)(agent, far, data) for net in (network, pulling))
    mean = (found * weight).sum(1) / weight.sum(1)
    torch.testing.assert_close(with_it - without, 0.7 * mean, rtol=1e-9, atol=1e-9)


def test_values_carry_no_gradient_and_critics_are_frozen() -> None:
    agent, params = an_agent()
    network, alpha = alphas()
    loss = network.loss(alpha)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    ready = loss.prepare(agent, leaves, snippets(**some_steps()))
    assert not ready.constants["told"].requires_grad
    total = loss(agent, leaves, ready).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for name, gradient in zip(leaves, found, strict=True):
        assert (gradient is None) == name.startswith("q"), name
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
    never = torch.zeros(AGENTS, SNIPPETS, STEPS, dtype=torch.bool)
    data = snippets(**some_steps() | {"ended": never, "terminated": never})
    ready = network.loss(alpha).prepare(agent, params, data)
    critic = DeterministicGradient()(agent, params, data)
    learned = network.loss(alpha)(agent, params, ready)
    for share in (0.0, 0.25, 1.0):
        mixed = network.loss(alpha, share)(agent, params, ready)
        torch.testing.assert_close(
            mixed, share * learned + (1 - share) * critic, rtol=1e-12, atol=1e-12
        )


# --- agents in training ----------------------------------------------------------------------


def training(
    policy_rate: float = 0.0, bonus: float = 0.0, **options: Any
) -> AgentLives[ReplayLearner]:
    task = make_task("pendulum", horizon=40, episode_steps=16, gravity=(7.0, 13.0))
    sizes = ReplayOptions(
        period=8, capacity=64, batch=4, critic_batch=16, update_after=24, clip=1.0
    )
    learner = ReplayLearner(
        networks(task.spec, 8), sizes, start=16, policy_rate=policy_rate, terminal_bonus=bonus
    )
    return AgentLives(learner, task, 3, torch.device("cpu"), endless=True, **options)


def act(runner: AgentLives, life: Life, windows: int) -> tuple[Life, list[Trajectory]]:
    """Agents that act, without learning, and what they live through."""
    seen = []
    for _ in range(windows):
        life, new = runner.act(life, "train")
        seen.append(new)
        life = life._replace(state=runner.learner.keep(life.state, runner.taught(new)))
    return life, seen


def in_double(tree: Any) -> Any:
    """Float64 networks and replay: what is left of differences is not rounding."""
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {name: in_double(leaf) for name, leaf in tree.items()}
    if isinstance(tree, tuple) and not isinstance(tree, Adam):
        return type(tree)(*map(in_double, tree))
    return Adam(*map(in_double, tree)) if isinstance(tree, Adam) else tree


def lived(numbers: list[int], windows: int = 4) -> tuple[AgentLives[ReplayLearner], Life]:
    """Agents that have acted, with float64 networks from there on."""
    runner = training()
    life, _ = act(runner, runner.begin(torch.tensor(numbers), "train"), windows)
    return runner, life._replace(state=in_double(life.state))


def learned(runner: AgentLives, life: Life, alpha: Params) -> tuple[Params, Params]:
    """Networks after six update rounds, and the meta-gradients of alpha there."""
    network, learner, rng = ObjectiveNetwork(5), runner.learner, runner.learning("train")
    assert isinstance(learner, ReplayLearner)
    state = learner.rounds(life.state, network.loss(alpha, 0.5), rng, 6)
    leaves = {k: v.clone().requires_grad_() for k, v in alpha.items()}
    drawn = learner.draw(state, rng.fold("meta"), 3, 5)
    value = value_after(
        learner.agent, state.params, network.loss(leaves), [drawn], drawn,
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


def test_replays_know_the_time_in_the_episode() -> None:
    runner = training()
    # A trial of 40 steps in episodes of 16, 16 and 8, then 16 of the next one.
    life, _ = act(runner, runner.begin(torch.tensor([0, 1]), "train"), 7)
    times = [*range(16), *range(16), *range(8), *range(16)]
    assert life.trial == 1 and life.end.t == 16
    assert life.state.replay.kept()[5][:, :56].tolist() == [times, times]
    life, _ = act(runner, life, 2)  # over the oldest rows
    assert life.state.replay.kept()[5][0, :64].tolist() == [*times[8:], *range(16)]
    made = life.state.replay.draw(Rng(0), torch.arange(2), 20, 5, runner.task.spec).constants
    time, inside = (made[name].unflatten(1, (20, 5)) for name in ("time", "inside"))
    assert ((time[..., 1:] - time[..., :-1])[inside[..., 1:]] == 1).all()
    assert (~inside).any()


def test_first_actions_are_uniform_whatever_the_policy() -> None:
    runner = training()
    life = runner.begin(torch.arange(2), "train")
    far = {name: leaf + 9.0 for name, leaf in life.state.params.items()}
    _, seen = act(runner, life._replace(state=life.state._replace(params=far)), 3)
    first, later = torch.cat([seen[0].action, seen[1].action]), seen[2].action
    shares = torch.histc(first, 4, -2, 2)
    assert shares.sum() == 32 and shares.min() >= 4
    assert float(later.abs().min()) > 1.5, "by the policy, which is at a limit"


def test_scores_are_those_of_whole_episodes() -> None:
    runner = training()
    _, seen = act(runner, runner.begin(torch.tensor([0, 1]), "train"), 8)
    scores = Scores.none(2, 2, "cpu")
    for new in seen:
        scores = scores.then(new)
    whole = torch.cat([new.reward[..., 0] for new in seen]).T.double()
    parts = [whole[:, a:b].sum(1) for a, b in ((0, 16), (16, 32), (32, 40), (40, 56))]
    assert scores.episodes.tolist() == [4, 4]
    torch.testing.assert_close(scores.first, parts[0])
    torch.testing.assert_close(scores.recent, torch.stack([parts[3], parts[2]], dim=1))
    torch.testing.assert_close(scores.total, sum(parts))  # type: ignore[arg-type]
    torch.testing.assert_close(scores.earned, whole[:, 56:].sum(1))
    again = scores.then(seen[0])  # the first window of a trial: what was unfinished is cut
    torch.testing.assert_close(again.earned, seen[0].reward[..., 0].double().sum(0))


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
    life, seen = act(runner, runner.begin(torch.tensor([0, 1]), "train"), 3)
    assert life.trial == 1, "all begin a new trial"
    scores = Scores.none(2, 2, "cpu")
    for new in seen[:2]:
        scores = scores.then(new)
    assert scores.episodes.tolist() == [1, 1]
    replay = life.state.replay
    assert replay.terminated[0].nonzero().flatten().tolist() == [11]
    assert not replay.terminated[1].any()
    assert replay.ended[0, 11:16].all() and replay.ended[1, 15], "cut where the trials began anew"
    usable = (~replay.ended | replay.terminated)[:, :24]
    assert usable[0].nonzero().flatten().tolist() == [*range(12), *range(16, 24)]


def test_the_policies_rate_is_theirs_alone() -> None:
    alpha = noisy(ObjectiveNetwork(5).init(Rng(1)), 3)
    network, before = ObjectiveNetwork(5), lived([0, 4, 7])[1].state.params
    moves = {}
    for rate in (0.0, 1e-3, 1e-4):  # two rounds: the first step of Adam on policies, delay is 2
        (_, life), runner = lived([0, 4, 7]), training(policy_rate=rate)
        learner, rng = runner.learner, runner.learning("train")
        assert isinstance(learner, ReplayLearner)
        after = learner.rounds(life.state, network.loss(alpha), rng, 2).params
        moves[rate] = {name: after[name] - before[name] for name in before}
    for name in before:
        small = 0.1 if name.startswith("policy") else 1.0
        assert torch.equal(moves[0.0][name], moves[1e-3][name])
        torch.testing.assert_close(moves[1e-4][name], small * moves[1e-3][name])


def test_flags_of_the_release() -> None:
    learner = training(bonus=1.0).learner
    assert isinstance(learner, ReplayLearner)
    target = learner.init(Rng(0), torch.arange(2)).target
    steps = some_steps(actions=1, agents=2, count=2)
    steps = {k: v.float() if v.is_floating_point() else v for k, v in steps.items()}
    steps["terminated"] = steps["ended"] = steps["ended"] | (torch.arange(STEPS) == 5)
    data, noise = snippets(**steps), torch.zeros(2, 2 * STEPS, 1)
    bonus, _ = learner.td_target(target, data, noise)
    without, weight = replace(learner, terminal_bonus=0.0).td_target(target, data, noise)
    ended, reward = steps["ended"].flatten(1), steps["reward"].flatten(1)
    inside = weight > 0
    assert (ended & inside).any()
    torch.testing.assert_close((bonus - without)[inside], ended[inside].float())
    torch.testing.assert_close(without[ended & inside], reward[ended & inside])
    for flag in (True, False):
        runner = training(timeout_is_terminal=flag)
        life, _ = act(runner, runner.begin(torch.tensor([0]), "train"), 2)
        replay = life.state.replay
        assert replay.ended.any() and torch.equal(replay.terminated, replay.ended & flag)


@pytest.mark.parametrize("windows", [2, 4, 5])
def test_stored_agents_go_on_bit_for_bit(windows: int) -> None:
    runner, network = training(), ObjectiveNetwork(5)
    loss = network.loss(network.init(Rng(1)))

    def on(life: Life, count: int) -> Life:
        for _ in range(count):
            life, _ = runner.advance(life, loss, "train")
        return life

    life = on(runner.begin(torch.arange(3), "train"), windows)
    saved = runner.save(life, "train")
    assert all(len(leaf) == 3 for leaf in saved.values())
    again = runner.restore(runner.begin(torch.arange(3), "train"), saved, "train")
    again = runner.save(on(again, 6), "train")
    expected = runner.save(on(life, 6), "train")
    assert list(again) == list(expected)
    for name, leaf in expected.items():
        assert torch.equal(again[name], leaf), name
