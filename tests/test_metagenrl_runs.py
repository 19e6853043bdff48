"""MetaGenRL in runs: the meta-step, killed runs, ranks, several environments, bad input."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_bad_input import assert_says
from tiny_runs import final_hash, overrides, run_here

from esmeta.analysis import objectives
from esmeta.errors import UserError
from esmeta.objectives.metagenrl import MetaGenRLObjective
from esmeta.ranks.comm import SelfComm
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import train
from esmeta.run.record import load_theta
from esmeta.tree import ravel

SMALL = (
    "task.trials=2",
    "task.horizon=64",
    "task.episode_steps=16",
    "objective.agents=3",
    "objective.hidden=[6]",
    "objective.steps=48",
    "objective.period=8",
    "objective.batch=3",
    "objective.extra=2",
    "objective.snippet=5",
    "objective.critic_batch=8",
    "objective.random=8",
    "objective.update_after=16",
    "objective.capacity=40",
    "objective.anneal_after=0",
    "objective.anneal=24",
    "objective.test_episodes=2",
    "objective.policy_lifetime=0",
    "budget.updates=9",
    "run.evaluate_every=0",
    "run.evaluate_trials=2",
    "run.metrics_every=1",
    "run.tensorboard=false",
)
TWO = (
    "objective.more_tasks=[{name='double_integrator', horizon=32, episode_steps=16, "
    "mass=[1.0, 2.0]}]"
)


def parts(*more: str) -> train.Parts:
    return train.build(configs.resolve(configs.load("pendulum-metagenrl"), [*SMALL, *more]))


def objective(*more: str) -> MetaGenRLObjective:
    made = parts(*more).objective
    assert isinstance(made, MetaGenRLObjective)
    return made


def after(built: train.Parts, updates: int, state: Any = None) -> Any:
    state = built.state if state is None else state
    for _ in range(updates):
        state, _ = built.optimizer.step(state, built.objective, SelfComm(), built.rng)
    return state


def test_the_meta_step_is_adam_on_the_mean_of_clipped_gradients() -> None:
    built = parts("optimizer.max_grad_norm=0.5", "optimizer.learning_rate=0.01")
    made = built.objective
    theta = built.optimizer.theta(built.state)
    leaves = {k: v.expand(3, *v.shape[1:]).clone().requires_grad_() for k, v in theta.items()}
    _, loss, _ = made.loss(leaves, made.start(0, 1))
    assert loss.shape == (3,)
    # Each agent's gradient alone: it depends on its own copy of theta and nothing else.
    total = 0.0
    for p in range(3):
        own = torch.autograd.grad(loss[p], list(leaves.values()), retain_graph=True)
        assert all(not bool(g[[q for q in range(3) if q != p]].any()) for g in own)
        flat = torch.cat([g[p].reshape(-1) for g in own])
        assert float(flat.norm()) > 0
        total = total + flat * min(1.0, 0.5 / (float(flat.norm()) + 1e-6))
    mean = total / 3
    expected = ravel(theta)[0] - 0.01 * mean / (mean.abs() + 1e-8)  # Adam's first step
    state, metrics = built.optimizer.step(built.state, made, SelfComm(), built.rng)
    torch.testing.assert_close(ravel(built.optimizer.theta(state))[0], expected, rtol=0, atol=2e-6)
    assert metrics["env_steps"] == 3 * 16
    again, metrics = built.optimizer.step(state, made, SelfComm(), built.rng)
    assert metrics["env_steps"] == 0 and again.update == 2


def test_the_learning_rate_falls_in_a_line() -> None:
    falling = ("optimizer.learning_rate_final=0.001", "optimizer.schedule_updates=4")
    built = parts("optimizer.learning_rate=0.01", *falling)
    rates = [built.optimizer.rate_at(update) for update in range(7)]
    assert rates == pytest.approx([0.01, 0.00775, 0.0055, 0.00325, 0.001, 0.001, 0.001])
    plain = parts("optimizer.learning_rate=0.01", "optimizer.schedule_updates=0")
    assert plain.optimizer.rate_at(99) == 0.01
    # The second step is by the second rate: Adam's own, with both moments known.
    one, other = after(built, 1), after(plain, 1)
    first = ravel(built.optimizer.theta(one))[0].clone()
    torch.testing.assert_close(first, ravel(plain.optimizer.theta(other))[0], rtol=0, atol=0)
    fast = ravel(plain.optimizer.theta(after(plain, 1, other)))[0] - first
    slow = ravel(built.optimizer.theta(after(built, 1, one)))[0] - first
    torch.testing.assert_close(slow, 0.775 * fast, rtol=1e-3, atol=2e-7)


def test_agents_live_on_for_as_many_rounds_as_steps() -> None:
    built = parts()
    state, taken = built.state, []
    for _ in range(9):
        state, metrics = built.optimizer.step(state, built.objective, SelfComm(), built.rng)
        taken.append(int(metrics["env_steps"]) // 3)
    assert taken == [16, 0, 0, 0, 8, 0, 0, 0, 8]
    group = state.agents[0]
    assert group.life.state.updates.tolist() == [18] * 3
    assert group.owed == 8 - 2


def test_agents_are_replaced_after_a_lifetime() -> None:
    built = parts("objective.lifetime=24")
    state, numbers, taken = built.state, [], []
    for _ in range(13):
        state, metrics = built.optimizer.step(state, built.objective, SelfComm(), built.rng)
        numbers.append(state.agents[0].life.state.numbers.tolist())
        taken.append(int(metrics["env_steps"]) // 3)
    assert numbers == [[0, 1, 2]] * 8 + [[3, 4, 5]] * 5
    assert taken == [16, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0, 0, 8]
    assert state.agents[0].life.state.updates.tolist() == [10] * 3


def test_policies_begin_anew_beside_critics_that_stay() -> None:
    built = parts("objective.policy_lifetime=16")
    state, ages = built.state, []
    for _ in range(13):
        state, _ = built.optimizer.step(state, built.objective, SelfComm(), built.rng)
        now = state.agents[0].life.state
        ages.append(int(now.adams.parts["actor"].updates[0]))
    # After 16 and 32 steps, when the rounds for them are done.
    assert ages == [1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 1]
    assert now.numbers.tolist() == [0, 1, 2]
    assert now.adams.parts["critics"].updates.tolist() == [26] * 3
    learner = built.objective.environments[0].learner
    fresh = learner.with_fresh_policies(now, Rng(3))
    drawn = learner.agent.init_at(Rng(3), now.numbers)
    assert fresh.replay is now.replay and torch.equal(fresh.updates, now.updates)
    for name in now.params:
        policy = name.startswith("policy.")
        new, target = (drawn, drawn) if policy else (now.params, now.target)
        assert torch.equal(fresh.params[name], new[name])
        assert torch.equal(fresh.target[name], target[name])
    assert not fresh.adams.parts["actor"].second.any() and now.adams.parts["actor"].second.any()
    assert torch.equal(fresh.adams.parts["critics"].second, now.adams.parts["critics"].second)
    assert not torch.equal(fresh.params["policy.0.weight"], now.params["policy.0.weight"])


def test_annealing_is_over_when_it_should_be_and_never_in_meta_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = objective("objective.anneal_after=8", "objective.anneal=16")
    assert [made.share(steps) for steps in (0, 8, 16, 24, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert objective("objective.anneal=0").share(0) == 1.0
    shares = []
    loss = made.network.loss

    def watched(alpha: Any, share: float = 1.0) -> Any:
        shares.append(share)
        return loss(alpha, share)

    monkeypatch.setattr(type(made.network), "loss", lambda self, *args: watched(*args))
    made.heldout(made.init(0), 2)
    assert set(shares) == {1.0}


def test_held_out_agents_are_fresh_and_the_same_for_any_split_of_the_work() -> None:
    made = objective("objective.chunk=64")
    theta = made.init(4)
    every = made.heldout(theta, 5)
    assert every.steps.tolist() == [[48] * 5] and every.returns.dtype == torch.float64
    halves = [made.heldout(theta, 2), made.heldout(theta, 5, first=2)]
    # Products of another number of agents may round differently.
    torch.testing.assert_close(
        torch.cat([half.returns for half in halves], dim=1), every.returns, rtol=1e-6, atol=0
    )
    small = objective("objective.chunk=2")
    torch.testing.assert_close(small.heldout(theta, 5).returns, every.returns, rtol=1e-6, atol=0)
    assert torch.equal(made.heldout(theta, 5).returns, every.returns), "nothing is left over"
    other = {k: v + 0.1 for k, v in theta.items()}
    both = made.heldout({k: torch.cat([v, other[k]]) for k, v in theta.items()}, 5)
    torch.testing.assert_close(both.returns[0], every.returns[0], rtol=1e-6, atol=0)
    assert not torch.allclose(both.returns[1], both.returns[0])
    # Random actions at first, the same for both; the second learns otherwise.
    life = both.metrics["life"]
    torch.testing.assert_close(life[0], every.metrics["life"][0], rtol=1e-6, atol=0)
    assert not torch.equal(made.heldout(theta, 5, seed=9).returns, every.returns)
    assert made.fitness(theta, 3).returns.shape == (1, 2)


def test_scores_are_not_scaled_and_learning_is() -> None:
    plain, scaled = (
        objective("objective.random=48"),
        objective("objective.random=48", "objective.reward_scale=0.01"),
    )
    theta = plain.init(0)
    for name in ("first", "life"):  # actions are random throughout
        assert torch.equal(
            plain.heldout(theta, 2).metrics[name], scaled.heldout(theta, 2).metrics[name]
        )
    lives = scaled.environments[0]
    life, new = lives.act(lives.begin(torch.arange(2), "train"), "train")
    replay = life.state.replay.add(lives.taught(new))
    torch.testing.assert_close(0.01 * new.reward[..., 0].T, replay.reward[:, :8])
    assert new.reward.any() and replay.added == 8


def test_several_environments_learn_one_objective() -> None:
    built = parts(TWO)
    made = built.objective
    assert isinstance(made, MetaGenRLObjective)
    assert [t.task.spec.action.size for t in made.environments] == [1, 2]
    state = after(built, 1)
    assert made.rows(state.agents) == 6
    assert [len(group.life.numbers) for group in state.agents] == [3, 3]
    alone = after(parts(), 1)
    # Agents of the first environment are the agents they would be without the second.
    mine, theirs = state.agents[0].life.state.params, alone.agents[0].life.state.params
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not torch.equal(ravel(built.optimizer.theta(state)), ravel(built.optimizer.theta(alone)))


@pytest.mark.parametrize(
    "more",
    [
        (),
        (TWO,),
        ("objective.inner_steps=2", "objective.time=episode", "objective.snippets=episodes"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, more: tuple[str, ...]) -> None:
    args = ["pendulum-metagenrl", *overrides(*SMALL, *more)]
    assert run_here(*args, "--out", tmp_path / "a") == 0
    short = overrides("budget.updates=6")  # in the middle of the rounds after a window
    assert run_here(*args, *short, "--out", tmp_path / "b") == 0
    before = final_hash(tmp_path / "b")
    assert run_here(*args, "--out", tmp_path / "b", "--resume") == 0
    assert final_hash(tmp_path / "b") == final_hash(tmp_path / "a") != before


def test_a_run_that_is_told_to_stop_trains_no_more_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("held-out agents would be trained for as long as they live")

    monkeypatch.setattr(train, "heldout", never)
    config = configs.resolve(configs.load("pendulum-metagenrl"), list(SMALL))
    told = SimpleNamespace(wanted=True, noted=True)
    code = train.learn(config, tmp_path / "a", False, SelfComm(), told)  # type: ignore[arg-type]
    assert code == train.EXIT_STOPPED and (tmp_path / "a" / "checkpoint").is_dir()
    assert_says(capsys.readouterr().out, "stopped by signal", str(tmp_path / "a"))


@pytest.mark.mpi
def test_ranks_have_their_own_agents_and_go_on_as_one(mpirun: Any, tmp_path: Path) -> None:
    words = ["pendulum-metagenrl", *overrides(*SMALL, TWO)]
    runs = []
    for updates, more, name in ((9, [], "whole"), (6, [], "cut"), (9, ["--resume"], "cut")):
        runs += [*words, *overrides(f"budget.updates={updates}"), *more]
        runs += ["--out", tmp_path / name, "then"]
    done = mpirun(2, ROOT / "tests" / "mpi" / "several.py", *runs)
    assert done.returncode == 0, done.stderr
    assert final_hash(tmp_path / "cut") == final_hash(tmp_path / "whole")
    assert run_here(*words, "--out", tmp_path / "one") == 0
    one, two = (ravel(load_theta(tmp_path / name)[0]) for name in ("one", "whole"))
    # The same agents; only the order in which their gradients are added differs.
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)
    longer = overrides("budget.updates=12")  # and with another number of ranks
    assert run_here(*words, *longer, "--resume", "--out", tmp_path / "cut") == 0


def test_figures_of_an_objective() -> None:
    made = objective("objective.hidden=[5]")
    curves = objectives.life_curves(made, made.init(3), count=2)
    assert set(curves) == {"train", "test"} and len(curves["test"]) == 3
    curve = curves["test"]["learned objective"]
    assert curve.steps.tolist() == [16, 32, 48]
    scores = made.heldout(made.init(3), 2).metrics["life"]  # a mean over three whole episodes
    assert 16 / 3 * float(curve.mean.sum()) == pytest.approx(float(scores.mean()), rel=1e-6)
    surface = objectives.loss_surface(made, made.init(3), 1.0, 0.0)
    assert surface.shape == (41, 41) and surface[20, 20] == 0 and float(surface.std()) > 0
    other = objectives.loss_surface(made, made.init(3), 2.0, 0.0)
    assert not torch.equal(surface, other)


WRONG = [
    (["objective.snippet=60"], ["snippet = 60", "16 steps", "update_after = 600"]),
    (["task.name=maze"], ["4 discrete actions", "continuous"]),
    (["objective.steps=8"], ["objective.steps = 8", "no agent", "update_after = 16"]),
    (["objective.lifetime=10"], ["objective.lifetime = 10", "16 steps", "lifetime = 64"]),
    (["objective.policy_lifetime=20"], ["policy_lifetime = 20", "period = 8", "lifetime = 16"]),
    (["objective.inner_clip=-1"], ["inner_clip = -1.0", ">= 0"]),
    (["objective.saturation=-1"], ["saturation = -1.0", ">= 0"]),
    (["objective.agents=0"], ["objective.agents = 0", ">= 1"]),
    (["objective.period=9"], ["objective.period = 9", "delay = 2", "period = 50"]),
    (["objective.period=24"], ["period = 24", "task.horizon = 64", "task.horizon = 72"]),
    (["objective.time=step"], ["'step'", "snippet, episode, none"]),
    (["objective.values=all"], ["'all'", "both, now, none"]),
    (["objective.inner_reduction=max"], ["'max'", "sum, mean"]),
    (["objective.inner_rate=0"], ["objective.inner_rate = 0.0", "> 0"]),
    (["objective.bound=-1"], ["bound = -1.0", "> 0"]),
    (["objective.chunk=1"], ["objective.chunk = 1", "at least 2"]),
    (["objective.more_tasks=[{size=8}]"], ["more_tasks", "has no name", "name = "]),
    (["objective.more_tasks=[{name='pendulun'}]"], ["'pendulun'", "pendulum"]),
    (["optimizer.name=ppo"], ["MetaGenRLObjective", "optimizer.name = 'openes'"]),
    (["optimizer.learning_rate_final=0"], ["optimizer.learning_rate_final = 0.0", "> 0"]),
    (["optimizer.schedule_updates=-1"], ["optimizer.schedule_updates = -1", ">= 0"]),
    (["optimizer.learning_rate=0"], ["optimizer.learning_rate = 0.0", "> 0"]),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda x: " ".join(x)[:50])
def test_bad_input(tmp_path: Path, changes: list[str], words: list[str]) -> None:
    given = [*SMALL, *changes]
    if "task.name=maze" in changes:
        given = [x for x in given if not x.startswith("task.episode")]
    with pytest.raises(ValueError) as caught:
        run_here("pendulum-metagenrl", *overrides(*given), "--out", tmp_path / "run")
    assert_says(str(caught.value), *words)
    assert not (tmp_path / "run").exists()


def test_adam_wants_a_differentiable_objective_and_agents_for_every_rank() -> None:
    with pytest.raises(UserError) as caught:
        built = train.build(configs.resolve(configs.load("bandit-ppo"), ["optimizer.name=adam"]))
        built.optimizer.check(built.objective, 1)
    assert_says(str(caught.value), "ReturnObjective", "'metagenrl'", "'openes'")
    config = configs.resolve(configs.load("pendulum-metagenrl"), [*SMALL])
    with pytest.raises(UserError) as caught:
        train.build(config, ranks=4)
    assert_says(str(caught.value), "objective.agents = 3", "4 ranks", "objective.agents = 4")
