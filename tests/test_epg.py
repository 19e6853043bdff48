"""EPG: what a loss is worth does not depend on who else is scored, where, or in how many parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_bad_input import assert_says
from tiny_runs import final_hash, overrides, run_here

from esmeta.analysis import losses
from esmeta.errors import UserError
from esmeta.objectives.epg import EpgObjective
from esmeta.rl.losses import PolicyGradient
from esmeta.run import config as configs
from esmeta.run import evaluate, report, train
from esmeta.tree import ravel

AGENTS = (
    "objective.period=16",
    "objective.buffer=32",
    "objective.minibatch=8",
    "objective.hidden=[8]",
    "objective.test_steps=16",
    "objective.ppo_generations=4",
    "objective.ppo_first=1.0",
    "objective.twins=1",
)
SMALL = (
    "task.trials=3",
    "task.horizon=48",
    "task.episode_steps=16",
    "task.train=right",
    "task.test=left",
    "task.width=180",
    "task.strata=1",
    "task.mirrored=false",
    *AGENTS,
    "optimizer.popsize=8",
    "optimizer.sigma_blocks=off",
    "optimizer.sigma=0.05",
    "budget.generations=3",
    "run.evaluate_every=2",
    "run.evaluate_trials=3",
    "run.tensorboard=false",
)


def objective(*more: str) -> Any:
    config = configs.resolve(configs.load("displacement-epg"), [*SMALL, *more])
    made = train.build(config).objective
    assert isinstance(made, EpgObjective)
    return made


def members(of: Any, count: int = 7) -> torch.Tensor:
    noise = torch.randn(
        count, ravel(of.init(0)).shape[1], generator=torch.Generator().manual_seed(0)
    )
    return ravel(of.init(0)) + 0.3 * noise


@pytest.fixture(autouse=True)
def no_global_randomness() -> Any:
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("generation", [1, 9])
def test_fitness_has_the_same_bits_in_any_batch(generation: int) -> None:
    whole = objective("objective.chunk=64")
    thetas = members(whole)
    expected = whole.fitness(thetas, generation)
    assert expected.returns.shape == (7, 3) and expected.returns.dtype == torch.float64
    assert expected.steps.tolist() == [[48 + 3 * 16] * 3] * 7
    assert len(expected.returns.unique()) == 21, "every member and life differ"
    for chunk in (2, 5, 16):
        found = objective(f"objective.chunk={chunk}").fitness(thetas, generation).returns
        assert torch.equal(found, expected.returns), chunk
    for rows in ([3], [6, 0]):
        assert torch.equal(whole.fitness(thetas[rows], generation).returns, expected.returns[rows])
    tree = {k: v for k, v in whole.init(0).items()}
    assert whole.fitness(tree, generation).returns.shape == (1, 3)


def test_held_out_lives_can_be_shared_out() -> None:
    whole = objective()
    theta = whole.init(4)
    every = whole.heldout(theta, 7)
    parts = [whole.heldout(theta, 3), whole.heldout(theta, 7, first=3)]
    for name in ("untrained", "life"):
        joined = torch.cat([part.metrics[name] for part in parts], 1)
        assert torch.equal(joined, every.metrics[name])
    assert torch.equal(torch.cat([part.returns for part in parts], 1), every.returns)
    other = whole.heldout(theta, 7, seed=8)
    assert not torch.equal(other.returns, every.returns)


def test_ppos_share_falls_and_is_zero_where_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = objective()
    assert [whole.share(g) for g in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    half = objective("objective.ppo_last=0.5", "objective.ppo_generations=2")
    assert [half.share(g) for g in range(4)] == [1.0, 0.75, 0.5, 0.5]
    assert objective("objective.ppo_generations=0").share(0) == 0.0
    thetas = members(whole, 2)
    first = whole.fitness(thetas, 0).returns
    assert torch.equal(first[0], first[1]), "by PPO alone members do not differ"

    def poison(*_: Any) -> None:
        raise AssertionError("PPO's loss was computed")

    monkeypatch.setattr(PolicyGradient, "prepare", poison)
    monkeypatch.setattr(PolicyGradient, "__call__", poison)
    whole.fitness(thetas, 4)
    whole.heldout(whole.init(0), 2)
    with pytest.raises(AssertionError, match="PPO's loss was computed"):
        whole.fitness(thetas, 3)


def test_lives_grow_and_held_out_ones_are_whole() -> None:
    grows = ("objective.life_first=0.25", "objective.life_generations=4")
    young = objective(*grows, "objective.period=4", "objective.ppo_generations=0")
    assert [young.updates(g) for g in (0, 2, 3, 4, 9)] == [3, 6, 8, 12, 12]
    whole = objective("objective.period=4", "objective.ppo_generations=0")
    assert [whole.updates(g) for g in (0, 9)] == [12, 12]
    thetas = members(young, 3)
    for generation, steps in ((0, 12), (2, 24), (5, 48)):
        found = young.fitness(thetas, generation)
        assert found.steps.tolist() == [[steps + 3 * 16] * 3] * 3
        assert torch.equal(found.returns, whole.fitness(thetas, generation).returns) == (
            steps == 48
        )
    held = young.heldout(thetas, 2)
    assert torch.equal(held.returns, whole.heldout(thetas, 2).returns)
    assert held.steps.tolist() == [[48 + 3 * 16] * 2] * 3
    # The first updates of a short life are those of the whole one.
    few = objective("task.horizon=12", "objective.period=4", "objective.ppo_generations=0")
    assert few.lives.updates == young.updates(0)


@pytest.mark.parametrize("windows", [(1, 1, 1), (2, 1), (3,)])
def test_windows_add_up_to_the_life(windows: tuple[int, ...]) -> None:
    whole = objective("objective.chunk=5")
    assert whole.life_steps == 3
    thetas = members(whole)
    for number in (1, 6):
        lives, total = whole.begin(thetas, number), torch.zeros(7, 3, dtype=torch.float64)
        steps = torch.zeros(7, 3, dtype=torch.int64)
        for window in windows:
            before = lives
            lives, fitness = whole.advance(lives, thetas, window)
            again, same = whole.advance(before, thetas, window)  # what is given stays as it is
            assert torch.equal(same.returns, fitness.returns) and again.step == lives.step
            total, steps = total + fitness.returns, steps + fitness.steps
        expected = whole.fitness(thetas, number)
        torch.testing.assert_close(total, expected.returns, rtol=0, atol=1e-12)
        assert steps.unique().tolist() == [48 + len(windows) * 48]


def test_stored_lives_go_on_bit_for_bit() -> None:
    whole = objective("objective.chunk=5", "objective.memory=true")
    thetas = members(whole)
    lives, _ = whole.advance(whole.begin(thetas, 6), thetas, 1)
    saved = whole.save(lives)
    assert all(leaf.shape[0] == 7 for leaf in saved.values())
    expected, fitness = whole.advance(lives, thetas, 2)
    for rows in (list(range(7)), [5], [4, 1, 2]):
        chosen = whole.restore({name: leaf[rows] for name, leaf in saved.items()})
        _, found = whole.advance(chosen, thetas[rows], 2)
        assert torch.equal(found.returns, fitness.returns[rows]), rows
    mixed = {**saved, "step": saved["step"] + torch.arange(7)}
    with pytest.raises(ValueError, match="must have one step"):
        whole.restore(mixed)


def test_twins_differ_by_their_task_alone() -> None:
    mirror = ("task.mirrored=true", "task.train=horizontal", "task.test=vertical", "task.trials=4")
    plain = ("task.strata=1", "objective.ppo_generations=0", *mirror)
    blind = objective("objective.twins=2", "objective.reward=false", *plain)
    thetas = members(blind, 3)
    found = blind.fitness(thetas, 3).returns
    # What does not read rewards earns on one what it loses on the other, exactly.
    assert torch.equal(found[:, 0::2], -found[:, 1::2]) and bool((found.abs() > 0.01).all())
    apart = objective("objective.reward=false", *plain).fitness(thetas, 3).returns
    assert not torch.allclose(apart[:, 0::2], -apart[:, 1::2], atol=0.01)
    reading = objective("objective.twins=2", *plain).fitness(thetas, 3).returns
    assert not torch.allclose(reading[:, 0::2], -reading[:, 1::2], atol=1e-3)


def test_an_evolved_first_policy_is_what_agents_begin_with() -> None:
    whole = objective("objective.evolve_init=true", "objective.ppo_generations=0")
    theta = whole.init(0)
    assert set(theta) > set(whole.network.shapes) and "policy.0.weight" in theta
    right = {k: v.clone() for k, v in theta.items()}
    right["policy.1.bias"] = torch.tensor([[9.0, 0.0]])
    right["log_std"] -= 9.0
    lives = whole.begin(right, 2)
    agents = lives.parts[0].life.state.params
    assert torch.equal(agents["policy.1.bias"], right["policy.1.bias"].expand(3, 2))
    score = whole.heldout(right, 4).metrics["untrained"]
    cosines = whole.task.sample(4, "test", _rng(whole)).data["direction"][..., 0]
    torch.testing.assert_close(score.float(), 16 * cosines, rtol=1e-2, atol=0.05)


def _rng(of: Any) -> Any:
    from esmeta.rng import Rng

    return Rng(of.seed).fold("tasks")


@pytest.mark.parametrize("optimizer", ["openes", "nres", "snes"])
def test_any_optimizer_and_a_resumed_run_repeats(tmp_path: Path, optimizer: str) -> None:
    args = ["displacement-epg", "--optimizer", optimizer, *overrides(*SMALL)]
    assert run_here(*args, "--out", tmp_path / "a") == 0
    more = overrides("budget.generations=2")
    assert run_here(*args, *more, "--out", tmp_path / "b") == 0
    short = final_hash(tmp_path / "b")
    assert run_here(*args, "--out", tmp_path / "b", "--resume") == 0
    assert final_hash(tmp_path / "b") == final_hash(tmp_path / "a") != short


def test_another_size_of_loss_cannot_be_resumed(tmp_path: Path) -> None:
    args = ["displacement-epg", *overrides(*SMALL), "--out", tmp_path / "a"]
    assert run_here(*args) == 0
    with pytest.raises(UserError) as caught:
        run_here(*args, "--resume", *overrides("objective.evolve_init=true"))
    assert_says(str(caught.value), "objective.evolve_init", "False there", "True here")


WRONG = [
    (
        ["policy.name=metods", "objective.buffer=40"],
        ["buffer = 40", "memory", "multiple of period = 16", "buffer = 32"],
    ),
    (["objective.name=return"], ["policy.name = 'none'", 'policy.name = "metods"']),
    (["optimizer.name=ppo"], ["EpgObjective", "optimizer.name = 'openes'"]),
    (["objective.period=32"], ["period = 32", "task.horizon = 48", "task.horizon = 64"]),
    (["objective.period=64"], ["objective.period = 64", "buffer = 32", "buffer = 256"]),
    (["objective.buffer=20"], ["buffer = 20", "at least buffer = 21"]),
    (["objective.chunk=1"], ["objective.chunk = 1", "at least 2", "chunk = 64"]),
    (["objective.ppo_last=2"], ["objective.ppo_last = 2.0", "0 and 1"]),
    (["objective.learning_rate=0"], ["objective.learning_rate = 0.0", "> 0"]),
    (["objective.hidden=[0]"], ["hidden", "0", ">= 1"]),
    (["objective.perod=8"], ["objective.perod", "did you mean 'period'"]),
    (["optimizer.learning_rate_generations=-1"], ["learning_rate_generations = -1", ">= 0"]),
    (["optimizer.tasks=per_pair"], ["'per_pair'", "tasks = 'shared'", "ppo_generations = 0"]),
    (
        ["optimizer.tasks=per_pair", "objective.ppo_generations=0", "objective.life_generations=3"],
        ["'per_pair'", "tasks = 'shared'", "life_generations = 0"],
    ),
    (["objective.saturation=-1"], ["objective.saturation = -1.0", ">= 0"]),
    (["objective.life_first=0"], ["objective.life_first = 0.0", "> 0"]),
    (["objective.life_first=2"], ["objective.life_first = 2.0", "0 and 1"]),
    (["objective.life_generations=-1"], ["objective.life_generations = -1", ">= 0"]),
    (["policy.neurons=4"], ["policy.neurons", "takes no options", "[objective]"]),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=lambda x: " ".join(x)[:50])
def test_bad_input(tmp_path: Path, changes: list[str], words: list[str]) -> None:
    changes = [x for x in (*SMALL, *changes)]
    if "objective.name=return" in changes:
        changes = [x for x in changes if not x.startswith("objective.") or "name" in x]
    if "optimizer.name=ppo" in changes:
        changes = [x for x in changes if not x.startswith("optimizer.") or "name" in x]
    with pytest.raises(UserError) as caught:
        run_here("displacement-epg", *overrides(*changes), "--out", tmp_path / "run")
    assert_says(str(caught.value), *words)
    assert "per_pair" in str(caught.value) or not (tmp_path / "run").exists()


def test_evaluate_and_report_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert run_here("displacement-epg", *overrides(*SMALL), "--out", run) == 0
    capsys.readouterr()
    assert evaluate.main([str(run), "--trials", "5", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert {"return", "untrained", "life", "steps"} <= set(scores)
    made, theta, _ = evaluate.open_run(run)
    expected = made.heldout(theta, 5).returns.mean()
    assert scores["return"]["mean"] == pytest.approx(float(expected))
    assert scores["return"]["best"] == pytest.approx(16.0)
    assert evaluate.main([str(run), "--trials", "5", "--split", "train", "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["return"]
    assert train["mean"] == pytest.approx(
        float(made.heldout(theta, 5, split="train").returns.mean())
    )
    assert evaluate.main([str(run), "--trials", "5", "--set", "task.test=right", "--json"]) == 0
    right = json.loads(capsys.readouterr().out)
    assert right["return"]["mean"] != scores["return"]["mean"]
    check_other_objective(run, capsys, scores["return"]["mean"])
    assert evaluate.main([str(run), "--greedy"]) == 2
    assert_says(capsys.readouterr().err, "--greedy and --lesion", "'epg'", "leave them out")
    with pytest.raises(UserError, match="not a policy.*esmeta.evaluate"):
        evaluate.load(run)
    page = report.report([run])
    text = page.read_text(encoding="utf-8")
    assert "The learned loss" in text and "displacement epg openes" in text
    assert len(list(page.parent.glob("l*.png"))) == 2


def check_other_objective(run: Path, capsys: pytest.CaptureFixture[str], plain: float) -> None:
    """Options of the objective can change, as long as theta is the same; a penalty is told."""
    found, fast = [], "learning_rate=0.1"  # with which means leave the range of the actions
    for changes in (("saturation=0",), ("ppo_generations=0",), (fast,), (fast, "saturation=50")):
        args = [str(run), "--trials", "5", *overrides(*(f"objective.{x}" for x in changes))]
        assert evaluate.main([*args, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["return"])
        told = "with objective.saturation = 50.0 in the agents' loss"
        assert (told in found[-1]["variant"]) == ("saturation=50" in changes)
        assert ("saturation" in found[-1]["variant"]) == ("saturation=50" in changes)
    means = [row["mean"] for row in found]
    assert means[0] == means[1] == plain and len(set(means)) == 3
    assert evaluate.main([str(run), "--set", "objective.evolve_init=true"]) == 2
    assert_says(capsys.readouterr().err, "theta has other shapes", "--set may not change")


def test_curves_and_surfaces_are_of_the_given_loss() -> None:
    whole = objective()
    eta = whole.init(0)
    curves = losses.life_curves(whole, eta)
    for split in ("train", "test"):
        found = curves[split]
        assert np.array_equal(found["learned loss"].mean, found["untrained loss"].mean)
        assert not np.array_equal(found["PPO"].mean, found["learned loss"].mean)
        assert found["PPO"].mean[0] == found["learned loss"].mean[0], "before the first update"
    loss = whole.network.loss({k: v.expand(32, *v.shape[1:]) for k, v in eta.items()})
    life, new = whole.lives.advance(whole.lives.begin(torch.arange(32), "test"), loss, "test")
    se = new.reward[..., 0].double().mean(dim=0).std() / math.sqrt(32)
    assert curves["test"]["learned loss"].se[0] == pytest.approx(float(se))
    surface = losses.loss_surface(whole, eta, 0, 2)
    assert surface.shape == (41, 41) and float(surface[20, 20]) == 0.0
    blind = objective("objective.reward=false")
    flat = losses.loss_surface(blind, eta, 0, 2)
    assert bool((flat == flat[:1]).all()) and not bool((surface == surface[:1]).all())
    assert float(surface[20].abs().max()) > 0, "displacements matter"
