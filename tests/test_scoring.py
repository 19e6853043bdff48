"""What scores are of (splits, training aids) and how sure they are (groups of trials)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from tiny_runs import overrides, run_here

import esmeta
from esmeta.options import for_json
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import evaluate, scoring, train
from esmeta.run.record import read_metrics
from esmeta.summary import linked, summary
from esmeta.tasks import SPLITS, aids, make_task, published, task_groups, task_names

AIDS = {  # the value of each option that helps training, and what it is scored with
    "harlow": {"mirrored": (True, False), "forfeit": (1.0, 0.0)},
    "displacement": {"mirrored": (True, False), "strata": (4, 1)},
    "cheetah_dir": {
        "mirrored": (True, False),
        "ctrl_cost": (0.0, 0.05),
        "integrator": ("euler", "model"),
    },
    "ant_dir": {"mirrored": (True, False), "ctrl_cost": (0.0, 0.005)},
    "ant_goal": {"ctrl_cost": (0.0, 0.1)},
    "directional_hopper": {"mirrored": (True, False)},
    "random_hopper": {"integrator": ("euler", "model")},
    "ant_ring": {"reward": ("dense", "gated")},
    "wheeled": {"reward": ("dense", "gated"), "ctrl_cost": (0.0, 0.05)},
    "block_push": {"reward": ("dense", "gated")},
    "goal_ant": {"reward": ("progress", "distance")},
}


@pytest.mark.parametrize("name", AIDS)
def test_training_aids_are_left_out(name: str) -> None:
    axes = {"train": "axes", "test": "diagonals"} if name == "displacement" else {}
    given = {option: value for option, (value, _) in AIDS[name].items()}
    task = make_task(name, **axes, **given)
    assert aids(task) == AIDS[name]
    scored = published(task)
    assert not aids(scored) and scored.spec == task.spec
    assert {k: getattr(scored, k) for k in given} == {k: v for k, (_, v) in AIDS[name].items()}
    changed = {f.name for f in dataclasses.fields(task)} - set(given)
    assert all(getattr(scored, k) == getattr(task, k) for k in changed)
    assert published(scored) is scored
    kept = next(iter(given))
    assert getattr(published(task, keep=[kept]), kept) == given[kept]


def test_what_is_published_is_no_aid() -> None:
    plain = {name for name in task_names() if aids(make_task(name))}
    assert plain == {"ant_ring", "wheeled", "block_push"}, "whose dense reward is for training"
    # Another published control cost stays as it is; only free motion is an aid.
    assert published(make_task("ant_dir", ctrl_cost=0.5)).ctrl_cost == 0.5


def test_aids_of_the_parts_of_a_mixture() -> None:
    table = {"name": "half_cheetah", "integrator": "euler", "label": "a"}
    task = make_task("mixed", parts=(table, {"name": "hopper"}), horizon=50)
    assert aids(task) == {"a.integrator": ("euler", "model")}
    scored = published(task)
    assert not aids(scored) and [p.task.integrator for p in scored._all] == ["model", "model"]
    assert aids(task), "the task itself stays as it is"
    assert scored != task and scored.parts[0] == {**table, "integrator": "model"}
    assert scored == make_task("mixed", parts=scored.parts, horizon=50)


@pytest.mark.parametrize("name", task_names())
def test_three_splits_share_no_draw(name: str) -> None:
    ranges = {"gravity": (7.0, 13.0), "length": (0.7, 1.3)} if name == "pendulum" else {}
    task = make_task(name, **ranges)
    drawn = [task.sample(6, split, Rng(3)).data for split in SPLITS]
    for one, other in itertools.combinations(drawn, 2):
        same = {k for k in one if torch.equal(one[k], other[k])} - {"part"}  # which takes turns
        assert not same, f"{name}: two splits have the same {same}"


def test_a_mixture_is_validated_on_its_training_parts() -> None:
    parts = ({"name": "pendulum"}, {"name": "displacement"})
    task = make_task("mixed", parts=parts, test_parts=({"name": "double_integrator"},), horizon=64)
    part = {split: task.sample(4, split, Rng(0)).data["part"][0].tolist() for split in SPLITS}
    assert part == {"train": [0, 1, 0, 1], "validation": [0, 1, 0, 1], "test": [2, 2, 2, 2]}


# --- how sure ----------------------------------------------------------------------------------


def test_standard_error_over_groups() -> None:
    values = torch.tensor([math.nan, 1.0, 3.0, 5.0, 7.0])
    alone = summary(values)
    assert alone == summary(values, torch.arange(5))
    assert (alone.mean, alone.trials, alone.independent) == (4.0, 4, 4)
    assert alone.sd == pytest.approx(math.sqrt(20 / 3))
    assert alone.se == pytest.approx(alone.sd / 2)
    # Twins: the means 2 and 6 of two groups, (6 - 2) / 2.
    twins = summary(values, torch.tensor([0, 1, 1, 2, 2]))
    assert (twins.mean, twins.sd, twins.independent) == (alone.mean, alone.sd, 2)
    assert twins.se == pytest.approx(2.0)
    # What cancels over twins is no noise.
    assert summary(torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([0, 0, 1, 1])).se == 0
    one = summary(values, torch.zeros(5, dtype=torch.int64))
    assert one.independent == 1 and math.isnan(one.se)


def test_the_error_over_groups_is_that_of_repeated_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(2000, 40, 1, generator=generator)
    values = (shared + 0.5 * torch.randn(2000, 40, 3, generator=generator)).flatten(1)
    groups = torch.arange(120) // 3
    found = torch.tensor([summary(row, groups).se for row in values])
    assert float(found.mean()) == pytest.approx(float(values.mean(1).std()), rel=0.05)
    naive = torch.tensor([summary(row).se for row in values[:50]])
    assert float(naive.mean()) < 0.75 * float(found.mean())


def test_labels_that_overlap_are_one_group() -> None:
    rows = torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.tensor([9, 8, 8, 7, 6, 6, 5])
    assert linked(*rows).tolist() == [0, 0, 0, 0, 4, 4, 6]
    assert linked(rows[0]).tolist() == [0, 0, 2, 2, 4, 4, 6]


def test_which_trials_of_a_task_share_randomness() -> None:
    index = torch.arange(6)
    assert task_groups(make_task("harlow", mirrored=True), index, "test").tolist() == [
        0, 0, 1, 1, 2, 2
    ]  # fmt: skip
    assert task_groups(make_task("harlow"), index, "test").tolist() == index.tolist()
    goals = make_task("point", train_goals=2)
    assert task_groups(goals, index, "train").tolist() == [0, 1, 0, 1, 0, 1]
    assert task_groups(goals, index, "test").tolist() == index.tolist()
    parts = ({"name": "cheetah_dir", "mirrored": True}, {"name": "hopper"})
    mixed = make_task("mixed", parts=parts, horizon=50)
    # Trials 0, 2 are the cheetah's own 0, 1; hoppers 1, 3, 5 are alone.
    labels = task_groups(mixed, torch.arange(8), "train").tolist()
    assert labels[0] == labels[2] != labels[4] == labels[6]
    assert len({labels[1], labels[3], labels[5], labels[7], labels[0], labels[4]}) == 6


# --- in runs -----------------------------------------------------------------------------------

TINY = ("task.trials=4", "task.horizon=12", "optimizer.popsize=4", "policy.neurons=4")


def tiny_run(out, *more: str) -> int:
    sets = [*TINY, "budget.generations=2", "run.evaluate_every=1", "run.evaluate_trials=16", *more]
    return run_here("harlow-openes", "--out", out, *overrides(*sets))


def scored(out, *flags: str, capsys) -> dict:
    capsys.readouterr()
    assert evaluate.main([str(out), "--trials", "16", "--json", *flags]) == 0
    return json.loads(capsys.readouterr().out)["return"]


def test_json_has_null_for_what_is_not_known(tmp_path, capsys) -> None:
    assert tiny_run(tmp_path / "run") == 0
    one = scored(tmp_path / "run", "--trials", "1", capsys=capsys)
    assert one["trials"] == 1 and one["se"] is None and one["sd"] is None
    table = {"a": [np.float32("inf"), (np.int64(2), True)], "b": torch.tensor(float("nan"))}
    assert for_json(table) == {"a": [None, [2, True]], "b": None}


def test_a_run_is_scored_on_the_published_task(tmp_path, capsys) -> None:
    assert tiny_run(tmp_path / "run") == 0
    printed = capsys.readouterr().out
    assert "test split, without task.mirrored = True, task.forfeit = 1.0" in printed
    last = read_metrics(tmp_path / "run")[-1]
    policy, params, task = esmeta.load(tmp_path / "run")
    assert (task.mirrored, task.forfeit) == (False, 0.0)
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=16)
    for split in ("validation", "test"):
        returns = evaluator(params, seed=0, split=split).returns
        row = scored(tmp_path / "run", "--split", split, capsys=capsys)
        assert row["mean"] == pytest.approx(float(returns.mean()), abs=1e-12)
        assert row["se"] == pytest.approx(float(returns.std()) / 4, abs=1e-12)
        assert row["sd"] == pytest.approx(float(returns.std()), abs=1e-12)
        assert (row["random"], row["best"]) == (task.reference.random, task.reference.best)
        if split == "validation":
            assert last["validation_return"] == pytest.approx(row["mean"], abs=1e-12)
            assert last["validation_se"] == pytest.approx(row["se"], abs=1e-12)
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["test"]
    assert summary["trials"] == 256
    wanted = evaluator(params, seed=0, split="test", index=torch.arange(256)).returns
    assert summary["test_return"] == pytest.approx(float(wanted.mean()), abs=1e-12)


def test_aids_stay_if_told(tmp_path, capsys) -> None:
    assert tiny_run(tmp_path / "run", "run.evaluate_as_trained=true") == 0
    assert "with task.mirrored = True, task.forfeit = 1.0" in capsys.readouterr().out
    policy, params, task = esmeta.load(tmp_path / "run", as_trained=True)
    assert (task.mirrored, task.forfeit) == (True, 1.0)
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=16)
    returns = evaluator(params, seed=0, split="validation").returns[0]
    last = read_metrics(tmp_path / "run")[-1]
    assert last["validation_return"] == pytest.approx(float(returns.mean()), abs=1e-12)
    pairs = returns.reshape(8, 2).mean(1)
    expected = float(pairs.std()) / math.sqrt(8)
    assert last["validation_se"] == pytest.approx(expected, abs=1e-12), "over pairs of twins"
    row = scored(tmp_path / "run", "--as-trained", "--split", "validation", capsys=capsys)
    assert (row["mean"], row["se"]) == pytest.approx((float(returns.mean()), expected))
    assert (row["trials"], row["independent"]) == (16, 8)
    one = scored(tmp_path / "run", "--set", "task.mirrored=true", capsys=capsys)
    assert one["variant"] == ", without task.forfeit = 1.0, with task.mirrored = True"


def test_a_run_stops_by_validation_not_by_test(tmp_path, monkeypatch) -> None:
    """A target that the test split reaches at once, and validation never."""
    real = train.heldout
    asked = []

    def split_scores(objective, theta, trials, split, comm=None):
        asked.append(split)
        found = real(objective, theta, trials, split, comm)
        return found | {f"{split}_return": -1.0 if split == "validation" else 99.0}

    monkeypatch.setattr(train, "heldout", split_scores)
    assert tiny_run(tmp_path / "run", "budget.target=5.0") == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["stopped_by"] == "steps" and facts["test"]["test_return"] == 99.0
    assert asked[-1] == "test" and set(asked[:-1]) == {"validation"}


def test_epg_is_scored_without_twins() -> None:
    raw = configs.load("displacement-epg")
    config = configs.resolve(raw, ["task.trials=2"])
    used = scoring.training_aids(config)
    assert used == {
        "task.strata": (4, 1),
        "task.mirrored": (True, False),
        "objective.twins": (2, 1),
    }
    parts = train.build(configs.resolve(raw, ["optimizer.popsize=4"]))
    assert parts.scored is not parts.objective
    assert (parts.scored.lives.twins, parts.scored.task.mirrored) == (1, False)
    assert (parts.objective.lives.twins, parts.objective.task.mirrored) == (2, True)
    index = torch.arange(4)
    assert parts.objective.groups(index, "test").tolist() == [0, 0, 2, 2]
    assert parts.scored.groups(index, "test").tolist() == [0, 1, 2, 3]
