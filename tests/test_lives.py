"""Trials in windows are the trials at once, and lives survive being stored: bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esmeta import make_policy, make_task, ravel, task_names
from esmeta import rollout as loop
from esmeta.objectives.return_ import ReturnObjective
from esmeta.rng import Rng
from esmeta.tree import leaves_of
from esmeta.types import Fitness, Lifetimes, Params

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "metods": ("metods", {"w0": "learned", "alpha_std": 0.3}),
    "metods-sampled": ("metods", {"variant": "linear", "w0": "sampled", "alpha_std": 0.3}),
    "metods-time": ("metods", {"extra": "time", "alpha_std": 0.3}),
    "rl2": ("rl2", {}),
    "lstm": ("lstm", {}),
    "mlp": ("mlp", {}),
}
# Harlow trials end early here: 2 presentations take about 25 of the 60 steps.
TASKS: dict[str, dict[str, Any]] = {
    "bandit": {"horizon": 14},
    "displacement": {"horizon": 24, "episode_steps": 7},
    "harlow": {"horizon": 60, "presentations": 2},
    "maze": {"size": 4, "horizon": 24},
    "navigation": {"horizon": 20, "episodes": 2},
    "point": {"horizon": 20, "episodes": 2, "start": "square"},
    "pendulum": {"horizon": 24, "episode_steps": 9},
}
# Their worlds cannot be left and gone back to (types.Hosted): tests/test_env_gym.py.
NO_LIVES = {"gym"}
# All others simulate bodies, slowly; they meet one policy each.
BODIES = {
    name: {"horizon": 12} for name in task_names() if name not in TASKS and name not in NO_LIVES
}
CASES = [(task, policy) for task in TASKS for policy in POLICIES]
CASES += [(task, next(iter(POLICIES))) for task in BODIES]
POPULATION, TRIALS, SEED = 5, 3, 4


def make(task_name: str, policy_name: str = "metods") -> tuple[ReturnObjective, Params]:
    task = make_task(task_name, **(TASKS | BODIES).get(task_name, {}))
    name, options = POLICIES[policy_name]
    policy = make_policy(name, task.spec, neurons=6, **options)
    draw = torch.Generator().manual_seed(0)
    params = {
        name: leaf + 0.3 * torch.randn(leaf.shape, generator=draw)
        for name, leaf in policy.init(0, POPULATION).items()
    }
    return ReturnObjective(policy, task, trials=TRIALS, seed=SEED, device="cpu"), params


def windows(objective: Any, lives: Any, params: Any, lengths: list[int]) -> tuple[Any, Any]:
    scores = []
    for steps in lengths:
        lives, fitness = objective.advance(lives, params, steps)
        scores.append(fitness)
    return lives, scores


def total(scores: list[Fitness]) -> Fitness:
    returns = torch.stack([f.returns for f in scores]).sum(0)
    return Fitness(returns, torch.stack([f.steps for f in scores]).sum(0))


def assert_same(one: Fitness, two: Fitness) -> None:
    assert torch.equal(one.returns, two.returns)
    assert torch.equal(one.steps, two.steps)


def test_returns_have_lives() -> None:
    assert isinstance(make("bandit")[0], Lifetimes)


# --- the loop -------------------------------------------------------------------------------


def ends_in(length: int, task_name: str, policy_name: str) -> tuple[list[Tensor], loop.Returns]:
    """All that a trial leaves behind, when run in windows of ``length`` steps."""
    objective, params = make(task_name, policy_name)
    policy, task = objective.policy, objective.task
    env = task.make_env("cpu")
    begin = loop.start(policy, params, env, task.sample(8, "train", Rng(1)), Rng(2))
    kept = loop.Returns(*begin.ts.reward.shape, device="cpu")
    noise = begin.noise
    with torch.no_grad():
        end = loop.rollout(policy, env, begin, kept, until=length)
        for until in range(2 * length, task.spec.horizon + length, length):
            begin = loop.go_on(policy, params, end, noise)
            end = loop.rollout(policy, env, begin, kept, until=until)
    everything = leaves_of([end.state, end.env_state, end.ts, torch.tensor(end.t), end.active])
    return everything, kept


@pytest.mark.parametrize(("task_name", "policy_name"), CASES)
def test_windows_are_the_whole_trial(task_name: str, policy_name: str) -> None:
    whole, kept = ends_in(1000, task_name, policy_name)
    assert len(kept.returns.unique()) > 2, "returns must differ for this to say anything"
    for length in (1, 5, 7, 12):
        parts, scores = ends_in(length, task_name, policy_name)
        for a, b in zip(parts, whole, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert torch.equal(scores.returns, kept.returns) and torch.equal(scores.steps, kept.steps)


# --- lives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task_name", TASKS)
def test_a_life_is_worth_its_trial(task_name: str) -> None:
    objective, params = make(task_name)
    life = 3
    whole = objective.fitness(params, life)
    begun = objective.begin(ravel(params), life)
    for steps in (1, 5, objective.life_steps):
        lengths = [steps] * -(-objective.life_steps // steps)
        lives, scores = windows(objective, begun, ravel(params), lengths)
        # Rewards are small multiples of 0.1: their sums differ in the last bit at most.
        torch.testing.assert_close(total(scores).returns, whole.returns, rtol=0, atol=1e-12)
        assert torch.equal(total(scores).steps, whole.steps)
        assert lives.step == objective.life_steps
        _, after = objective.advance(lives, params, 5)
        assert not after.returns.any() and not after.steps.any(), "nothing follows the end"
    assert begun.step == 0, "advance leaves what it was given as it was"


@pytest.mark.parametrize("policy_name", POLICIES)
@pytest.mark.parametrize("task_name", TASKS)
def test_lives_can_be_stored_anywhere(task_name: str, policy_name: str) -> None:
    """Save, pick members, restore into other batches, and go on: the same bits."""
    objective, params = make(task_name, policy_name)
    objective.evaluator.chunk = 3
    rest = [9, objective.life_steps]
    for first in (0, 6, 11, objective.life_steps - 1):
        lives, _ = windows(objective, objective.begin(params, 2), params, [first])
        _, expected = windows(objective, lives, params, rest)
        saved = objective.save(lives)
        assert all(len(leaf) == POPULATION for leaf in saved.values())
        copied = {name: torch.from_numpy(leaf.numpy().copy()) for name, leaf in saved.items()}
        for members in ([0, 1, 2, 3, 4], [4, 2], [1]):
            chosen = {name: leaf[members] for name, leaf in copied.items()}
            some = {name: leaf[members] for name, leaf in params.items()}
            objective.evaluator.chunk = 2
            again = objective.restore(chosen)
            _, got = windows(objective, again, some, rest)
            for a, b in zip(got, expected, strict=True):
                assert_same(a, Fitness(b.returns[members], b.steps[members]))
            twice = objective.save(again)
            assert twice.keys() == saved.keys()
            for name, leaf in twice.items():
                assert torch.equal(leaf, chosen[name]) or leaf.ndim == 1, name  # 1: clocks


def test_what_is_stored_is_what_lives() -> None:
    objective, params = make("harlow")
    lives, _ = windows(objective, objective.begin(params, 2), params, [9])
    saved = objective.save(lives)
    # The tables of all transitions are made from the tasks again; three leaves of the state live.
    assert {k for k in saved if k.startswith("env.")} == {"env.0", "env.1", "env.2"}
    assert saved["memory.W"].shape == (POPULATION, 8, 6, 6)
    assert saved["life"].tolist() == [2] * POPULATION and saved["step"].tolist() == [9] * POPULATION
    mixed = {name: torch.cat([leaf, leaf]) for name, leaf in saved.items()}
    mixed["step"] = mixed["step"] + torch.arange(2 * POPULATION)
    with pytest.raises(ValueError, match="restored together must have one step"):
        objective.restore(mixed)
