"""``python -m esmeta.learn``: baselines as learners, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from esmeta import names
from esmeta.run import learn

SHORT = {
    "ppo": ["learner.period=20", "learner.minibatch=10", "learner.epochs=2"],
    "reinforce": ["learner.period=20", "learner.minibatch=10", "learner.value_epochs=2"],
    "td3": ["learner.period=10", "learner.start=10", "learner.update_after=20", "learner.batch=5"],
}
SHORT["offpolicy_reinforce"] = [*SHORT["td3"], "learner.snippet=5"]


def run(*args: object) -> int:
    return learn.main([str(arg) for arg in args])


def changes(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def test_every_learner_is_tried_here() -> None:
    assert names.known("learner") == sorted(SHORT)


@pytest.mark.parametrize("name", sorted(SHORT))
def test_a_learner_lives_and_repeats(name: str, tmp_path: Path) -> None:
    curves = []
    for k in range(2):
        out = tmp_path / f"{k}.json"
        more = changes(*SHORT[name], "learner.hidden=[8]", "task.episode_steps=20")
        args = [name, "--task", "pendulum", "--steps", 40, "--agents", 1 + 2 * k, "--parts", 2]
        assert run(*args, *more, "--out", out) == 0
        written = json.loads(out.read_text())
        assert written["learner"] == name and len(written["curve"]) == 2
        assert [row["agents"] for row in written["curve"]] == [1 + 2 * k] * 2
        curves.append([row["return"] for row in written["curve"]])
    assert all(-4000 < value < 0 for value in curves[1])
    assert curves[0] != curves[1], "three agents are not one"


def test_policies_are_scored_after_their_lives(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    more = changes(*SHORT["ppo"], "learner.hidden=[8]", "task.episode_steps=20")
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
    assert run("ppo", *args, *changes("learner.period=20", "learner.minibatch=10")) == 0


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


def test_flags_are_frozen() -> None:
    flags = {word for action in learn.parser()._actions for word in action.option_strings}
    assert flags == {
        "-h", "--help", "--task", "--steps", "--agents", "--set", "--split", "--seed", "--device",
        "--parts", "--out", "--test-episodes", "--test-steps", "--policy",
    }  # fmt: skip
