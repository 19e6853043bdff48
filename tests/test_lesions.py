"""Lesions of ``esmeta.evaluate``: what they take away, and which would take away nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import overrides, run_here, write_preset

from esmeta import make_policy
from esmeta.errors import UserError
from esmeta.rng import Rng
from esmeta.run import evaluate
from esmeta.tasks import make_task

torch.set_num_threads(1)
TRIALS = 6


@pytest.mark.parametrize("name", ["metods", "rl2", "lstm"])
def test_which_memories_are_reset(name: str) -> None:
    """All of them before every step, or those of trials in which an episode begins."""
    task = make_task("harlow", horizon=20)
    options: dict[str, Any] = {"w0": "sampled"} if name == "metods" else {}
    policy = make_policy(name, task.spec, neurons=4, **options)
    params, index = policy.init(population=2), torch.arange(TRIALS).unsqueeze(0)
    _, ts = task.make_env("cpu").reset(task.sample(TRIALS, "test", Rng(0)), Rng(1), 2)
    fresh = policy.initial_state(params, TRIALS, Rng(1), index)
    _, used = policy.step(params, fresh, ts)
    assert not any(torch.equal(used[k], fresh[k]) for k in ("W", "h", "c") if k in fresh)
    begins = torch.tensor([[True, False, False, True, False, False]]).expand(2, -1)
    ts = ts._replace(new_episode=begins)
    for lesion, all_of_them in (("reset-memory-each-step", True), ("reset-memory", False)):
        change = evaluate.lesion(lesion, policy, params)
        assert change is not None
        after, same = change(used, ts)
        assert torch.equal(same.reward, ts.reward)
        for key, leaf in fresh.items():
            assert torch.equal(after[key][:, [0, 3]], leaf[:, [0, 3]]), key
            rest = leaf if all_of_them else used[key]
            assert torch.equal(after[key][:, [1, 2, 4, 5]], rest[:, [1, 2, 4, 5]]), key


def test_lesions_that_change_nothing_are_refused() -> None:
    point = {"horizon": 8}
    for policy, task, options, lesion, words in (
        ("rl2", "point", point, "reset-memory", "one episode; write --lesion reset-memory-each"),
        ("rl2", "hopper", {"horizon": 40}, "reset-memory", "one episode"),
        ("mlp", "point", point | {"episodes": 2}, "reset-memory", "the policy has no memory"),
        ("mlp", "point", point, "reset-memory-each-step", "no memory; leave --lesion out"),
        ("rl2", "point", point, "zero-reward", "policy.reward_input_scale = 0"),
        ("rl2", "bandit", {"horizon": 1}, "reset-memory-each-step", "task.horizon = 1"),
        ("rl2", "bandit", {"horizon": 1}, "zero-reward", "task.horizon = 1"),
        ("rl2", "point", point | {"episodes": 2}, "reset-memory", ""),
        ("rl2", "hopper", {"horizon": 40, "episode_steps": 20}, "reset-memory", ""),
        ("rl2", "hopper", {"horizon": 20, "episode_steps": 20}, "reset-memory", ""),
        ("mlp", "point", point, "zero-reward", ""),
        ("mlp", "bandit", {"horizon": 1}, "none", ""),
    ):
        distribution = make_task(task, **options)
        scale = 0.0 if "reward_input_scale" in words else 1.0
        made = make_policy(policy, distribution.spec, neurons=4, reward_input_scale=scale)
        given = (lesion, made, made.init(), distribution)
        if not words:
            evaluate.check_lesion(*given)
            continue
        with pytest.raises(UserError, match=f"--lesion {lesion} would change nothing: .*{words}"):
            evaluate.check_lesion(*given)


def test_lesions_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    changes = ("task.name=point", "task.horizon=8", "task.episodes=2", "budget.generations=1")
    cheap = ("optimizer.popsize=4", "run.evaluate_every=0")
    args = overrides(*changes, *cheap)
    assert run_here(write_preset(tmp_path), "--out", run, *args) == 0
    capsys.readouterr()
    for episodes, lesions in (
        (2, ("reset-memory", "reset-memory-each-step", "zero-reward")),
        (1, ("reset-memory-each-step", "zero-reward")),
    ):
        found = []
        for lesion in ("none", *lesions):
            more = ["--lesion", lesion, "--set", f"task.episodes={episodes}"]
            assert evaluate.main([str(run), "--trials", "8", "--json", *more]) == 0
            row = json.loads(capsys.readouterr().out)["return"]
            assert row["lesion"] == lesion and not row["greedy"] and row["theta"] == "last"
            found.append(row["mean"])
        assert len(set(found)) == len(found), found
    more = ["--trials", "8", "--lesion", "zero-reward", "--greedy"]
    assert evaluate.main([str(run), *more]) == 0
    said = capsys.readouterr().out
    assert said.startswith("test split, lesion zero-reward, the most likely actions; mean ±")
    more = ["--lesion", "reset-memory", "--set", "task.episodes=1"]
    assert evaluate.main([str(run), *more]) == 2
    assert re.fullmatch(r"esmeta: error: --lesion [^\n]+\n", capsys.readouterr().err)
