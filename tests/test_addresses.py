"""Every random number has an address of its own: no two trials, agents, updates, ranks share one.

Except where it is said: members face the same trials, twins share all but their tasks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lived import window
from probe import Probe
from test_metagenrl_runs import after, parts
from torch import Tensor

from esmeta import make_policy, make_task
from esmeta.agent.inner import inner_policy
from esmeta.agent.policy import Need, Policy
from esmeta.envs.bodies import Noise
from esmeta.lives import AgentLives
from esmeta.objectives import metagenrl
from esmeta.objectives.epg import Objective as Epg
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import ppo
from esmeta.ranks.comm import SelfComm
from esmeta.rl.losses import Data
from esmeta.rl.off_policy import ReplayLearner, ReplayOptions
from esmeta.rl.on_policy import SegmentLearner, SegmentOptions
from esmeta.rng import Rng
from esmeta.types import Params

SPLITS = ("train", "validation", "test")
CPU = torch.device("cpu")


def disjoint(sets: list[set[float]]) -> bool:
    return all(sets) and all(a.isdisjoint(b) for a, b in itertools.combinations(sets, 2))


def rows_of(leaves: list[Tensor]) -> list[tuple[float, ...]]:
    """Every row of leaves ``[n, ...]`` as numbers, to be compared whole."""
    return [tuple(row.flatten().tolist()) for leaf in leaves for row in leaf]


def all_differ(leaves: list[Tensor]) -> bool:
    rows = rows_of(leaves)
    return len(rows) > 1 and len(set(rows)) == len(rows)


def returns(**options: Any) -> tuple[ReturnObjective, Probe]:
    task = Probe(**options)
    policy = make_policy("mlp", task.spec, neurons=4, value=True)
    return ReturnObjective(policy, task, trials=4, seed=3, device="cpu"), task


# --- trials ------------------------------------------------------------------------------------


def test_generations_updates_ranks_and_members_have_their_trials() -> None:
    objective, task = returns()
    params = objective.init(0)
    trials = [task.began(lambda k=k: objective.fitness(params, k)) for k in range(4)]
    assert disjoint(trials) and all(len(some) == objective.trials for some in trials)
    for k in (0, 3):
        ranks = [
            task.began(lambda r=r, k=k: objective.trajectories(params, k, r, 2)) for r in (0, 1)
        ]
        assert disjoint(ranks) and ranks[0] | ranks[1] == trials[k]
        assert task.began(lambda k=k: objective.begin(params, k)) == trials[k], "a life's"
    two = {name: torch.cat([leaf, leaf]) for name, leaf in params.items()}
    own = task.began(lambda: objective.fitness(two, torch.tensor([1, 3])))
    assert own == trials[1] | trials[3]


def test_splits_and_seeds_have_their_trials() -> None:
    objective, task = returns()
    params = objective.init(0)

    def held(split: str, seed: int | None, first: int = 0) -> set[float]:
        return task.began(lambda: objective.heldout(params, 12, seed, first, split))

    found = [held(split, seed) for split in SPLITS for seed in (None, 8)]
    assert disjoint(found) and all(len(some) == 12 for some in found)
    assert held("test", objective.seed) == held("test", None)
    assert held("test", None, first=5) < held("test", None)


def test_every_action_is_drawn_anew() -> None:
    objective, task = returns(horizon=5)
    still = {name: torch.zeros_like(leaf) for name, leaf in objective.init(0).items()}
    for split in SPLITS:
        objective.heldout(still, 8, split=split)
    numbers = torch.cat([action[0] for action in task.actions]).flatten().tolist()
    assert len(set(numbers)) == len(numbers) == 3 * 5 * 8


# --- agents that learn -------------------------------------------------------------------------


def test_networks_of_agents() -> None:
    needs: frozenset[Need] = frozenset({"critics", "value"})
    agent = inner_policy(Probe().spec, "metagenrl", (5,), needs, std=0.1)
    index = torch.tensor([4, 9, 4])
    params = agent.init_at(Rng(0), index)
    same_shape = [params[f"{name}.0.weight"][:2] for name in ("policy", "value")]
    assert all_differ(same_shape) and all_differ([params[f"q{k}.0.weight"][:2] for k in (1, 2)])
    assert all(torch.equal(leaf[0], leaf[2]) for leaf in params.values())
    other = agent.init_at(Rng(1), index)
    assert all_differ([params["q1.1.weight"][:2], other["q1.1.weight"][:2]])


@dataclass
class Rows:
    """A loss that writes down which steps it is given, of every gradient step ``[P, m]``."""

    needs: frozenset[Need] = frozenset()
    context = snippet = 0
    found: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        self.steps.append(data.trajectory.reward.movedim(0, 2).flatten(1))
        return data

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        if rows is not None:
            self.found.append(rows)
        return params["policy.0.weight"].square().sum((1, 2))


def lives(task: Probe, **options: Any) -> AgentLives:
    agent = inner_policy(task.spec, "epg", (4,), frozenset(), std=1.0)
    sizes = SegmentOptions(period=8, epochs=3, minibatch=4, learning_rate=0.01)
    return AgentLives(
        SegmentLearner(agent, sizes, 8), task, 5, CPU, test_episodes=3, test_steps=8, **options
    )


def test_minibatches_of_updates_epochs_and_agents() -> None:
    runner, loss = lives(Probe(horizon=24)), Rows()
    life = runner.begin(torch.tensor([0, 1, 7, 0]), "train")
    for _ in range(3):
        life, _ = runner.advance(life, loss, "train")
    orders = [torch.cat(loss.found[k : k + 2], dim=1) for k in range(0, len(loss.found), 2)]
    assert len(orders) == 9
    for order in orders:
        assert torch.equal(order.sort(dim=1).values, torch.arange(8).expand(4, -1))
        assert torch.equal(order[0], order[3])
    assert all_differ([order[:3] for order in orders])


@pytest.mark.parametrize("own", [False, True])
def test_lives_and_what_their_policies_are_tested_on(own: bool) -> None:
    task = Probe(horizon=24, own=own)
    runner, index = lives(task), torch.arange(2)
    found, first = [], []
    for split in SPLITS:
        life = runner.begin(index, split)
        first.append(life.state.params["policy.0.weight"])
        found.append(task.began(lambda s=split: runner.begin(index, s)))
        tests = task.began(lambda life=life, s=split: runner.score(life, s))
        assert len(tests) == 2 * runner.test_episodes, "every episode has its own"
        found.append(tests)
    assert disjoint(found), "no luck of training in the test"
    assert all_differ(first)


def test_noise_of_test_episodes_is_not_that_of_the_life() -> None:
    task = Probe(horizon=8)
    runner = lives(task)
    life = runner.begin(torch.arange(2), "train")
    still = {name: torch.zeros_like(leaf) for name, leaf in life.state.params.items()}
    life = life._replace(state=life.state._replace(params=still))
    runner.advance(life, Rows(), "train")
    runner.score(life, "train")
    numbers = torch.cat([action.flatten() for action in task.actions]).tolist()
    assert len(set(numbers)) == len(numbers) == 8 * 2 + 8 * 2 * 3


def test_epg_has_its_lives() -> None:
    task = Probe(horizon=16)
    config = Epg(period=8, buffer=24, minibatch=8, hidden=(4,), test_episodes=1, test_steps=4)
    objective = config.make(None, task, trials=3, seed=2, device="cpu")
    params = objective.init(0)

    def first(run: Any) -> set[float]:
        task.began(run)
        return {float(number) for number in task.starts[0].flatten()}  # the lives', not the tests'

    trials = [first(lambda k=k: objective.fitness(params, k)) for k in range(3)]
    assert disjoint(trials) and all(len(some) == 3 for some in trials)
    for k in range(3):
        assert first(lambda k=k: objective.begin(params, k)) == trials[k]
        begun = objective.save(objective.begin(params, k))
        assert first(lambda saved=begun: objective.restore(saved)) == trials[k]


# --- replays -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(ReplayLearner):
    """Writes down which transitions critics are given, and the noise of their targets."""

    drawn: list[Tensor] = field(default_factory=list, compare=False)
    noise: list[Tensor] = field(default_factory=list, compare=False)

    def td_target(self, target: Params, data: Data, noise: Tensor) -> tuple[Tensor, Tensor]:
        self.drawn.append(data.trajectory.reward[0])
        self.noise.append(noise)
        return super().td_target(target, data, noise)


def watched(task: Probe) -> Watched:
    agent = inner_policy(task.spec, "metagenrl", (4,), frozenset({"critics"}), std=0.1)
    options = ReplayOptions(period=4, capacity=64, batch=6, update_after=64, delay=1)
    return Watched(agent, options, start=0)


def test_draws_from_a_replay() -> None:
    task, loss = Probe(), Rows()
    learner = watched(task)
    state = learner.init(Rng(0), torch.tensor([0, 1, 6]))
    # The same 64 steps for all agents, told apart by their rewards.
    number = torch.arange(65.0).expand(3, -1)
    wide = torch.stack([number, number], dim=-1) / 64
    no = torch.zeros(3, 64, dtype=torch.bool)
    replay = state.replay.add(window(wide, wide[:, :-1, :1], number[:, :-1], no, no))
    state = learner.rounds(state._replace(replay=replay), loss, Rng(4), 3)
    learner.rounds(state, loss, Rng(5), 1)
    assert len(learner.drawn) == len(loss.steps) == 4
    assert all_differ([*learner.drawn, *loss.steps]), "critics and policies, rounds, agents"
    assert all_differ(learner.noise)


def test_training_has_its_trials_windows_agents_and_splits() -> None:
    task = Probe(horizon=8)
    learner = watched(task)
    begun, actions, first = [], [], []
    for split in SPLITS:
        runner = AgentLives(learner, task, 7, CPU, endless=True)
        task.starts.clear()
        life = runner.begin(torch.tensor([0, 5]), split)
        still = {name: torch.zeros_like(leaf) for name, leaf in life.state.params.items()}
        first.append(life.state.params["policy.0.weight"])
        life = life._replace(state=life.state._replace(params=still))
        for _ in range(6):
            life, new = runner.act(life, split)
            life = life._replace(state=learner.keep(life.state, new))
            actions.append(new.action.transpose(0, 1))
        begun += [float(x) for starts in task.starts for x in starts.flatten()]
    assert len(begun) == 3 * 3 * 2 == len(set(begun)), "split, trial, agent"
    assert all_differ(actions) and all_differ(first)


# --- PPO's minibatches -------------------------------------------------------------------------


class Rank(SelfComm):
    """One of two ranks, which hears nothing of the other."""

    size = 2

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank


def test_ppo_shuffles_anew_for_every_update_epoch_and_rank(monkeypatch: Any) -> None:
    task = Probe(horizon=2)
    policy = make_policy("mlp", task.spec, neurons=4, value=True)
    objective = ReturnObjective(policy, task, trials=16, seed=3, device="cpu")
    optimizer, chosen = ppo.Optimizer(epochs=2, minibatches=2), []

    def step(self: Any, state: Any, of: Any, data: Any, comm: Any) -> Any:
        chosen.append(data.trajectory.ts.obs[0, 0, :, 0])
        return state, torch.zeros(5), 0.0

    monkeypatch.setattr(ppo.Optimizer, "_step", step)
    orders = []
    for rank in range(2):
        state = optimizer.init(objective.init(0), Rng(0))
        for _ in range(3):
            chosen.clear()
            task.starts.clear()
            state, _ = optimizer.step(state, objective, Rank(rank), Rng(9))
            known = task.starts[0].float().flatten().tolist()
            for epoch in range(2):
                seen = torch.cat(chosen[2 * epoch : 2 * epoch + 2]).tolist()
                orders.append(torch.tensor([known.index(start) for start in seen]))
                assert sorted(orders[-1].tolist()) == list(range(8))
    assert len(orders) == 12 and all_differ([torch.stack(orders)])


# --- MetaGenRL ---------------------------------------------------------------------------------


def test_meta_steps_have_their_snippets_and_environments_their_agents(monkeypatch: Any) -> None:
    twin = "objective.more_tasks=[{name='pendulum', horizon=64, episode_steps=16}]"
    built, drawn, learned = parts(twin, "objective.inner_steps=2"), [], []
    plain = metagenrl.value_after

    def value_after(agent: Any, params: Any, loss: Any, batches: Any, where: Data, **how: Any):
        drawn.append(where.trajectory.ts.obs.transpose(0, 1).flatten(1))
        learned.extend(data.trajectory.ts.obs.transpose(0, 1).flatten(1) for data in batches)
        return plain(agent, params, loss, batches, where, **how)

    monkeypatch.setattr(metagenrl, "value_after", value_after)
    state = after(built, 5)
    one, two = (group.life.state for group in state.agents)
    for name in ("policy.0.weight", "q1.0.weight"):
        assert all_differ([one.params[name], two.params[name]])
    assert all_differ([one.replay.obs[:, 0], two.replay.obs[:, 0]])
    assert len(drawn) == 10 and all_differ(drawn)
    assert len(learned) == 20 and all_differ(learned)


@pytest.mark.parametrize("option", ["policy_lifetime", "lifetime"])
def test_new_policies_and_new_agents_are_new(option: str, monkeypatch: Any) -> None:
    kinds = {
        "policy_lifetime": (ReplayLearner, "with_fresh_policies"),
        "lifetime": (AgentLives, "begin"),
    }
    cls, name = kinds[option]
    plain, found = getattr(cls, name), []

    def made(self: Any, *args: Any) -> Any:
        result = plain(self, *args)
        found.append(getattr(result, "state", result).params["policy.0.weight"])
        return result

    monkeypatch.setattr(cls, name, made)
    after(parts(f"objective.{option}=24"), 30)
    assert len(found) >= 2 and all_differ(found)


# --- bodies and mixtures -----------------------------------------------------------------------


def test_positions_velocities_and_episodes_of_bodies_have_their_noise() -> None:
    draw = Noise("normal", 1.0, "normal", 1.0).draw(Rng(0), torch.arange(3), 4, 2, 2)
    assert draw.unique().numel() == 3 * 4 * 4
    task = make_task("hopper", horizon=4, episodes=2)
    tasks = task.sample(2, "train", Rng(1))
    same = type(tasks)(tasks.index * 0, tasks.data)
    obs = [task.make_env("cpu").reset(some, Rng(2))[1].obs[0] for some in (tasks, same)]
    assert ("start" in tasks.data) == torch.equal(*obs)
    assert all_differ([obs[0]])


def test_motors_fail_by_trial_and_parts_of_a_mixture_have_their_tasks() -> None:
    task = make_task("ant_dir", horizon=4, impaired="random")
    working = task.sample(16, "train", Rng(0)).data["working"]
    assert len(working[0].unique(dim=0)) > 3
    table = {"name": "cheetah_vel", "label": "a"}
    mixture = make_task("mixed", parts=(table, table | {"label": "b"}), horizon=8)
    data = mixture.sample(8, "train", Rng(0)).data
    assert torch.tensor([data["0.speed"].tolist(), data["1.speed"].tolist()]).unique().numel() == 8
