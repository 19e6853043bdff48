"""Task ``mixed``: a trial is its part's own whoever it is batched with; learners take it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input import assert_says
from test_env_gym import needs_box2d
from test_epg import AGENTS
from tiny_runs import overrides, run_here

import esmeta
from esmeta.errors import UserError
from esmeta.ranks.comm import SelfComm
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import evaluate, train
from esmeta.tasks import displacement  # pyright: ignore[reportAttributeAccessIssue]
from esmeta.tasks.mixed import Task
from esmeta.tree import leaves_of, ravel, with_leaves
from esmeta.types import Continuous, Hosted, Tasks

H = 14
CHEAP = (
    {"name": "pendulum", "episode_steps": 5},
    {"name": "displacement", "episode_steps": 7, "factor": 10.0},
    {"name": "double_integrator", "episode_steps": 7, "label": "mass"},
)
BODIES = ({"name": "half_cheetah"}, {"name": "hopper", "episodes": 2, "factor": 0.5})
HOSTED = ({"name": "gym", "id": "Pendulum-v1", "label": "swing"}, {"name": "hopper"})
RENEWED = (
    {"name": "hopper", "episode_steps": 5},
    {"name": "gym", "id": "Pendulum-v1", "label": "swing", "episode_steps": 6},
)


def mixture(parts: tuple[dict[str, Any], ...] = CHEAP, **options: Any) -> Task:
    task = esmeta.make_task("mixed", **{"parts": parts, "horizon": H, **options})
    assert isinstance(task, Task)
    return task


def drawn(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 3 - 1.5


def play(task: Any, tasks: Tasks, actions: torch.Tensor, rng: Rng) -> tuple[list[Any], Any, Any]:
    env = task.make_env("cpu")
    state, ts = env.reset(tasks, rng, actions.shape[1])
    steps = [ts]
    for action in actions:
        state, ts = env.step(state, action)
        steps.append(ts)
    return steps, env.metrics(state), (env, state)


# --- what a trial is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        CHEAP,
        BODIES,
        HOSTED,
        RENEWED,
        pytest.param(
            ({"name": "gym", "id": "LunarLanderContinuous-v3", "label": "lunar"}, *BODIES),
            marks=needs_box2d,
        ),
    ],
)
def test_a_trial_is_its_parts_own(parts: tuple[dict[str, Any], ...]) -> None:
    """Trial k is trial k div n of part k mod n: the same bits, padded, rewards scaled."""
    task, n, rng = mixture(parts), len(parts), Rng(7)
    numbers = torch.arange(3 * n)
    actions = drawn(H, 2, 3 * n, task.spec.action.size)
    steps, scores, _ = play(task, task.sample(numbers, "test", Rng(5)), actions, rng)
    for k, table in enumerate(parts):
        name, factor = table["name"], table.get("factor", 1.0)
        options = {key: v for key, v in table.items() if key not in ("name", "label", "factor")}
        plain = esmeta.make_task(name, horizon=H, **options)
        own = plain.sample(numbers // n, "test", Rng(5).fold("part", k))
        own = Tasks(numbers.unsqueeze(0), own.data)
        mine = actions[..., : plain.spec.action.size]
        alone, known, _ = play(plain, own, mine, rng.fold("part", k))
        paid = torch.zeros(2, 3, dtype=torch.float64)
        for ts, expected in zip(steps, alone, strict=True):
            got, want = (
                {key: leaf[:, k::n] for key, leaf in x._asdict().items()} for x in (ts, expected)
            )
            wide = plain.spec.obs_size
            assert torch.equal(got["obs"][..., :wide], want["obs"])
            assert not got["obs"][..., wide:].any()
            wide = plain.spec.action.size
            assert torch.equal(got["prev_action"][..., :wide], want["prev_action"])
            assert torch.equal(got["reward"], want["reward"] * factor)
            for key in ("terminated", "truncated", "new_episode", "new_trial"):
                assert torch.equal(got[key], want[key]), key
            paid += want["reward"]
        label = table.get("label", name)
        assert torch.equal(scores[f"return_{label}"][:, k::n], paid.float())
        for key, values in known.items():
            found = scores[f"{key}_{label}"]
            assert torch.equal(found[:, k::n].nan_to_num(-7), values[:, k::n].nan_to_num(-7)), key
        others = torch.ones(3 * n, dtype=torch.bool)
        others[k::n] = False
        assert bool(scores[f"return_{label}"][:, others].isnan().all())


def test_numbers_of_an_action_that_a_part_has_not_do_nothing() -> None:
    task, actions = mixture(), drawn(H, 1, 3, 2)
    tasks = task.sample(3, "train", Rng(0))
    changed = actions.clone()
    changed[:, :, 0, 1] = 9.0  # the pendulum has one torque
    first, second = (play(task, tasks, x, Rng(1))[0] for x in (actions, changed))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.obs, two.obs) and torch.equal(one.reward, two.reward)
    assert float(second[1].prev_action[0, 0, 1]) == 9.0, "the agent sees what it did"


@pytest.mark.parametrize("parts", [CHEAP, BODIES], ids=["cheap", "bodies"])
def test_members_may_have_trials_of_other_parts(parts: tuple[dict[str, Any], ...]) -> None:
    """As agents of a learned loss: data ``[P, ...]``; also a batch of one part alone."""
    task = mixture(parts)
    numbers = torch.tensor([[0, 3], [1, 2], [2, 2], [7, 1]])
    found = task.sample(numbers.flatten(), "train", Rng(0))
    data = {name: leaf[0].unflatten(0, numbers.shape) for name, leaf in found.data.items()}
    actions = drawn(H, 4, 2, task.spec.action.size)
    steps, scores, _ = play(task, Tasks(numbers, data), actions, Rng(1))
    for p, row in enumerate(numbers):
        alone, own, _ = play(task, task.sample(row, "train", Rng(0)), actions[:, p : p + 1], Rng(1))
        for got, want in zip(steps, alone, strict=True):
            for leaf, expected in zip(got, want, strict=True):
                assert torch.equal(leaf[p : p + 1], expected)
        for name, values in own.items():
            assert torch.equal(scores[name][p : p + 1].nan_to_num(-7), values.nan_to_num(-7))


def test_an_old_state_or_a_copy_can_be_gone_on_with() -> None:
    task, actions = mixture(BODIES), drawn(H, 2, 5, 6)
    env = task.make_env("cpu")
    assert not isinstance(env, Hosted)
    first, _ = env.reset(task.sample(5, "train", Rng(0)), Rng(1), 2)
    assert all(x.ndim == 0 or x.shape[:2] == (2, 5) for x in leaves_of(first.inner)), "to be stored"
    middle, _ = env.step(first, actions[0])
    after, expected = env.step(middle, actions[1])
    env.step(first, actions[2])
    copy = with_leaves(middle, [leaf.clone() for leaf in leaves_of(middle)])
    for state in (middle, copy):
        again, ts = env.step(state, actions[1])
        for got, want in zip(leaves_of((again, ts)), leaves_of((after, expected)), strict=True):
            assert torch.equal(got.nan_to_num(-7), want.nan_to_num(-7))
        scores = env.metrics(again)
        for name, values in env.metrics(after).items():
            assert torch.equal(scores[name].nan_to_num(-7), values.nan_to_num(-7)), name


def test_only_worlds_of_the_part_are_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    env = mixture().make_env("cpu")
    seen: dict[str, list[int]] = {}
    for part in env._parts:

        def spy(state: Any, action: Any, part: Any = part, plain: Any = part.env.step) -> Any:
            seen.setdefault(part.label, []).append(action.shape[:2].numel())
            return plain(state, action)

        monkeypatch.setattr(part.env, "step", spy)
    state, _ = env.reset(mixture().sample(torch.tensor([0, 1, 3, 6]), "train", Rng(0)), Rng(1), 2)
    for _ in range(3):
        state, _ = env.step(state, torch.zeros(2, 4, 2))
    assert seen == {"pendulum": [6, 6, 6], "displacement": [2, 2, 2]}


def test_splits_and_parts_of_their_own() -> None:
    task = mixture(CHEAP[:2], test_parts=(CHEAP[2], CHEAP[0]))
    assert task.spec.obs_size == 4 and task.spec.action == Continuous(2, -2.0, 2.0)
    assert task.sample(5, "train", Rng(0)).data["part"].tolist() == [[0, 1, 0, 1, 0]]
    assert task.sample(5, "test", Rng(0)).data["part"].tolist() == [[2, 0, 2, 0, 2]]
    train_seeds, test_seeds = (task.sample(4, s, Rng(0)).data["0.seed"] for s in ("train", "test"))
    assert set(train_seeds.flatten().tolist()).isdisjoint(test_seeds.flatten().tolist())
    known = [esmeta.make_task(t["name"], horizon=H, episode_steps=t["episode_steps"]).reference
             for t in (CHEAP[2], CHEAP[0])]  # fmt: skip
    mean = sum(r.random for r in known) / 2
    assert task.reference.random == pytest.approx(mean)
    scaled = mixture(({**CHEAP[0], "factor": 0.1},)).reference
    assert scaled.best == pytest.approx(0.1 * known[1].best)


@dataclass(frozen=True)
class Renewed(displacement.Task):
    """One that can be told to have a single episode; simulated bodies are such tasks."""

    def single(self, steps: int) -> Renewed:
        return replace(self, horizon=steps, episode_steps=steps)


def test_one_episode_alone_where_parts_can() -> None:
    alone = mixture(RENEWED).single(5)
    assert [part.task.spec.horizon for part in alone._all] == [5, 5]
    assert mixture().single(5).spec == mixture().spec, "no part can"
    own = {"name": f"{__name__}:Renewed", "label": "renewed", "episode_steps": 7}
    task = mixture((CHEAP[0], own))
    one = task.single(5)
    assert (task.spec.horizon, one.spec.horizon) == (H, 5)
    assert one.reference.best == pytest.approx(task.reference.best * 5 / H)
    tasks = task.sample(2, "train", Rng(0))
    steps, _, _ = play(one, tasks, drawn(5, 1, 2, 2), Rng(1))
    assert steps[5].new_trial.tolist() == [[False, True]]


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"parts": ()}, ["parts is ()", "at least one", 'write parts = [{name = "half_cheetah"}']),
    ({"parts": ("hopper",)}, ["('hopper',)", "must be a table"]),
    ({"parts": ({"size": 8},)}, ["'size'", "has no name", 'parts = [{name = "half_cheetah"}']),
    ({"parts": ({"name": "hoper"},)}, ["'hoper'", "did you mean 'hopper'"]),
    ({"parts": ({"name": "hopper", "episods": 2},)}, ["task.parts.episods", "mean 'episodes'"]),
    ({"parts": ({"name": "hopper", "horizon": 9},)}, ["have one", "horizon = 9 of the task"]),
    ({"parts": ({"name": "maze"},)}, ["'maze'", "4 discrete actions", "continuous"]),
    ({"parts": ({"name": "hopper"}, {"name": "hopper", "episodes": 2})},
     ["two are called 'hopper'", 'label = "hopper_2"']),
    ({"parts": ({"name": "hopper", "label": "my hopper"},)}, ["'my hopper'", 'label = "mine"']),
    ({"parts": ({"name": "hopper", "factor": 0},)}, ["factor = 0", "> 0"]),
    ({"parts": ({"name": "hopper"},), "obs_size": 5}, ["obs_size is 5", "has 11", "obs_size = 11"]),
    ({"action_size": 2}, ["action_size is 2", "has 6", "action_size = 6", "or 0"]),
    ({"horizon": 0}, ["horizon is 0", "horizon=1"]),
    ({"parts": ({"name": "hopper"},), "action_size": 1}, ["action_size is 1", "action_size = 3"]),
    ({"parts": ({"name": "hopper", "episodes": 3},)}, ["horizon is 14", "3 episodes"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda x: str(x)[:50])
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        mixture(**{"parts": ({"name": "half_cheetah"}, {"name": "hopper"}), **options})
    assert_says(str(caught.value), *words)


# --- learners -------------------------------------------------------------------------------

SMALL = (
    "task.trials=4",
    f"task.horizon={H}",
    "task.parts=[{name='pendulum', episode_steps=5}, {name='displacement', episode_steps=7}]",
    "policy.neurons=5",
    "policy.hidden=[4]",
    "policy.head_hidden=4",
    "run.tensorboard=false",
    "run.evaluate_trials=4",
)


def built(preset: str, *changes: str) -> Any:
    return train.build(configs.resolve(configs.load(preset), ["task.name=mixed", *changes]))


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("bandit-openes", ["optimizer.popsize=6"]),
        ("bandit-openes", ["optimizer.popsize=6", "optimizer.tasks=per_pair", "task.trials=3"]),
        ("bandit-nres", ["optimizer.popsize=6", "optimizer.window=5"]),
        ("bandit-ppo", ["optimizer.minibatches=2"]),
        ("bandit-gru-ppo", ["optimizer.minibatches=2"]),
    ],
)
def test_optimizers_take_steps_and_report_the_parts(preset: str, more: list[str]) -> None:
    parts = built(preset, *SMALL, *more)
    before, state = ravel(parts.theta), parts.state
    for _ in range(2):
        state, metrics = parts.optimizer.step(state, parts.objective, SelfComm(), parts.rng)
    after = ravel(parts.optimizer.theta(state))
    assert bool(torch.isfinite(after).all()) and not torch.equal(before, after)
    assert metrics["env_steps"] > 0
    held = parts.objective.heldout(parts.optimizer.theta(state), 4)
    assert held.metrics["return_pendulum"].isnan().tolist() == [[False, True, False, True]]
    assert held.metrics["return_displacement"].isnan().tolist() == [[True, False, True, False]]


def test_simulators_make_the_mixture_one_that_cannot_be_left() -> None:
    task = mixture(HOSTED)
    env = task.make_env("cpu")
    assert isinstance(env, Hosted) and env.most_worlds == 256
    table = "task.parts=[{name='gym', id='Pendulum-v1'}, {name='pendulum', episode_steps=7}]"
    with pytest.raises(UserError, match="MixedEnv cannot be left and gone back to"):
        parts = built("bandit-nres", *SMALL, table)
        parts.optimizer.check(parts.objective, 1)
    state, _ = env.reset(task.sample(2, "train", Rng(0)), Rng(0))
    env.step(state, torch.zeros(1, 2, 3))
    with pytest.raises(RuntimeError, match="were left"):
        env.step(state, torch.zeros(1, 2, 3))


EPG = (
    "task.horizon=48",
    "task.parts=[{name='pendulum', episode_steps=16}, {name='displacement', episode_steps=24},"
    "{name='double_integrator', episode_steps=16}]",
    "task.trials=3",
    *AGENTS,
)


def members(of: Any, count: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    size = ravel(of.init(0)).shape[1]
    return ravel(of.init(0)) + 0.3 * torch.randn(count, size, generator=draw)


@pytest.mark.parametrize("twins", [1, 2])
def test_lives_of_a_learned_loss_have_the_same_bits_in_any_batch(twins: int) -> None:
    """Agents are rows with one trial each; batches of two hold some parts and not others."""
    change = f"objective.twins={twins}"
    whole, parts = (built("displacement-epg", *EPG, change, f"objective.chunk={n}").objective
                    for n in (64, 2))  # fmt: skip
    thetas = members(whole, 4)
    found = whole.fitness(thetas, 2)
    assert torch.equal(parts.fitness(thetas, 2).returns, found.returns)
    assert torch.equal(whole.fitness(thetas[2:], 2).returns, found.returns[2:])
    # Also in the episodes after the life, whose numbers are others: pendulum, displacement.
    assert bool((found.returns[:, 0] < -2).all() and (found.returns[:, 1].abs() < 1.6).all())
    held = whole.heldout(thetas[:1], 5)
    assert torch.equal(whole.heldout(thetas[:1], 5, first=3).returns, held.returns[:, 3:])


# Windows before and after. Tables that follow from the tasks: the pendulum's state has some.
STORED: dict[str, tuple[str, tuple[str, ...], int, int]] = {
    "one batch of agents": ("displacement-epg", (*EPG, "objective.chunk=64"), 1, 2),
    "batches of two agents": ("displacement-epg", (*EPG, "objective.chunk=2"), 1, 2),
    "trials": ("bandit-nres", (*SMALL, "optimizer.popsize=6"), 6, 8),
}


@pytest.mark.parametrize("case", STORED)
def test_what_lives_in_windows_can_be_stored(case: str) -> None:
    preset, changes, before, after = STORED[case]
    made = built(preset, *changes).objective
    thetas = members(made, 4)
    lives, _ = made.advance(made.begin(thetas, 6), thetas, before)
    saved = made.save(lives)
    assert all(leaf.shape[0] == 4 for leaf in saved.values())
    _, expected = made.advance(lives, thetas, after)
    for rows in ([0, 1, 2, 3], [3, 1]):
        chosen = made.restore({name: leaf[rows] for name, leaf in saved.items()})
        _, found = made.advance(chosen, thetas[rows], after)
        assert torch.equal(found.returns, expected.returns[rows])


def test_agents_with_critics_can_be_stored() -> None:
    table = "task.parts=[{name='double_integrator', episode_steps=16}, {name='displacement'}]"
    small = (table, "task.horizon=48", "objective.agents=3", "objective.period=8",
             "objective.batch=3", "objective.snippet=4", "objective.extra=2",
             "objective.hidden=[8]", "objective.update_after=16", "objective.random=16",
             "objective.critic_batch=8", "objective.capacity=64", "objective.more_tasks=[]",
             "objective.policy_lifetime=0")  # fmt: skip
    made = built("pendulum-metagenrl", *small).objective
    alpha = {name: leaf.expand(3, *leaf.shape[1:]) for name, leaf in made.init(0).items()}
    agents, _, _ = made.loss(alpha, made.start(0, 1))
    again = made.restore(made.save(agents), 0, 1)
    for _ in range(5):  # into the next steps of the environments
        agents, expected, _ = made.loss(alpha, agents)
        again, found, _ = made.loss(alpha, again)
        assert torch.equal(found, expected)


def test_a_run_is_evaluated_on_another_environment(tmp_path: Path) -> None:
    """Meta-trained on one mixture, meta-tested on what was not in it."""
    path = tmp_path / "run"
    changes = ["task.name=mixed", *SMALL, "optimizer.popsize=4", "budget.generations=2"]
    assert run_here("bandit-openes", *overrides(*changes), "--out", path) == 0
    table = "{name='double_integrator', episode_steps=7, factor=0.5}"
    objective, params, _ = evaluate.open_run(path, [f"task.test_parts=[{table}]"])
    fitness = objective.heldout(params, 3)
    torch.testing.assert_close(fitness.metrics["return_double_integrator"] * 0.5, fitness.returns)
    assert bool(fitness.metrics["return_pendulum"].isnan().all())
    with pytest.raises(UserError, match="may not change the sizes"):
        evaluate.open_run(path, ["task.test_parts=[{name='hopper'}]"])
