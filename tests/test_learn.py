"""``python -m esmeta.learn``: baselines as learners, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import overrides

from esmeta.run import learn

SHORT = ["learner.period=20", "learner.minibatch=10", "learner.epochs=2"]


def run(*args: object) -> int:
    return learn.main([str(arg) for arg in args])


def test_policies_are_scored_after_their_lives(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    more = overrides(*SHORT, "learner.hidden=[8]", "task.episode_steps=20")
    args = ["ppo", "--task", "pendulum", "--steps", 40, "--agents", 3, *more, "--out", out]
    assert run(*args) == 0
    assert json.loads(out.read_text())["test"] is None
    assert "after the life" not in capsys.readouterr().out
    args += ["--test-episodes", 2, "--test-steps", 10]
    assert run(*args) == 0
    found = json.loads(out.read_text())["test"]
    shown = f"return {found['return']:10.3f} ± {found['se']:.3f}  (2 test episodes of at most 10"
    assert "after the life" in (said := capsys.readouterr().out) and shown in said
    lives, loss = learn.build(learn.parser().parse_args([str(arg) for arg in args]))
    life = lives.begin(torch.arange(3), "test")
    untrained = lives.score(life, "test")[0]
    for _ in range(2):
        life, _ = lives.advance(life, loss, "test")
    trained, steps = lives.score(life, "test")
    assert found["agents"] == 3 and steps.tolist() == [20, 20, 20]
    assert found["return"] == pytest.approx(float(trained.mean()))
    assert found["se"] == pytest.approx(float(trained.std()) / 3**0.5)
    assert not torch.equal(trained, untrained)


def test_discrete_actions() -> None:
    args = ["--task", "bandit", "--steps", 40, "--agents", 2]
    assert run("ppo", *args, *overrides("learner.period=20", "learner.minibatch=10")) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pp0", "--task", "pendulum"], ["'pp0'", "did you mean 'ppo'", "td3"]),
        (["ppo", "--task", "pendulun"], ["'pendulun'", "did you mean 'pendulum'"]),
        (["ppo", "--task", "pendulum", "--steps", "0"], ["--steps = 0", ">= 1"]),
        (["ppo", "--task", "pendulum", "--agents", "0"], ["--agents = 0", ">= 1"]),
        (["ppo", "--task", "pendulum", "--test-episodes", "-1"], ["--test-episodes = -1", ">= 0"]),
        (["ppo", "--task", "pendulum", "--test-steps", "0"], ["--test-steps = 0", ">= 1"]),
        (["ppo", "--task", "pendulum", "--steps", "100"], ["period = 2000", "task.horizon = 2000"]),
        (["ppo", "--task", "pendulum", "--set", "ppo.clip=1"], ["ppo.clip", "learner.KEY"]),
        (["ppo", "--task", "pendulum", "--set", "learner.klip=1"], ["learner.klip", "'clip'"]),
        (
            ["ppo", "--task", "pendulum", "--policy", "rl2", "--set", "policy.extra=time"]
            + ["--steps", "100"],
            ["policy.extra = 'time'", "'bias' or 'none'"],
        ),
        (
            ["ppo", "--task", "pendulum", "--policy", "rl2", "--set", "learner.hidden=[8]"],
            ["learner.hidden = (8,)", "published networks", "--set policy.hidden="],
        ),
        (
            ["reinforce", "--task", "pendulum", "--policy", "rl2", "--set", "learner.log_std=-1"],
            ["learner.log_std = -1.0", "published networks", "--set policy.std_value="],
        ),
        (["td3", "--task", "bandit"], ["2 discrete actions", "ppo"]),
        (["td3", "--task", "pendulum", "--set", "learner.polyak=2"], ["polyak = 2.0", "0 and 1"]),
        (
            ["offpolicy_reinforce", "--task", "pendulum", "--set", "learner.capacity=10"],
            ["snippet = 20", "10 steps"],
        ),
    ],
)
def test_bad_input(args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*args) == 2
    message = capsys.readouterr().err
    assert message.startswith("esmeta: error: ") and message.count("\n") == 1
    for word in words:
        assert word in message, message
