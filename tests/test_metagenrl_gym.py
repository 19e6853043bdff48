"""MetaGenRL and hand-written losses on Gymnasium's environments: episodes that end, worlds left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_bad_input import assert_says
from test_metagenrl_runs import SMALL, parts
from tiny_runs import overrides, run_here

from esmeta.errors import UserError
from esmeta.lives import AgentLives, Life
from esmeta.objectives.metagenrl import MetaGenRLObjective
from esmeta.rl.diary import Scores
from esmeta.run import evaluate, learn
from esmeta.tasks import make_task

BRIEF = ("task.name=gym", "task.id=Brief-v0", "task.horizon=64", "task.episode_steps=10")
BESIDE = "objective.more_tasks=[{name='gym', id='Brief-v0', horizon=64, episode_steps=10}]"


class Brief(gymnasium.Env):
    """An episode of 2 to 5 steps, or of 30, as its seed has it; every step earns 1."""

    observation_space = spaces.Box(-1.0, 1.0, (3,))
    action_space = spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.left = int(self.np_random.choice([2, 3, 4, 5, 30]))
        return self._see(), {}

    def _see(self) -> np.ndarray:
        return np.full(3, self.left / 30, dtype=np.float32)

    def step(self, action: Any) -> Any:
        self.left -= 1
        return self._see(), 1.0, self.left == 0, False, {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("Brief-v0", Brief, max_episode_steps=30)
    yield
    del gymnasium.registry["Brief-v0"]


def training(**options: Any) -> AgentLives:
    """Agents on the environment that ends early, in trials of 40 steps and windows of 8."""
    made = parts(BESIDE).objective
    assert isinstance(made, MetaGenRLObjective)
    runner = made.environments[1]
    task = make_task("gym", id="Brief-v0", **{"horizon": 40, "episode_steps": 10, **options})
    learner = replace(runner.learner, start=1000)  # type: ignore[type-var]
    runner = AgentLives(learner, task, 0, torch.device("cpu"), endless=True)
    runner.check_length()
    return runner


def begun(runner: AgentLives, agents: int) -> tuple[Life, Scores]:
    """Fresh agents that keep the returns of 100 episodes."""
    return runner.begin(torch.arange(agents), "train"), Scores.none(agents, 100, "cpu")


def act(runner: AgentLives, life: Life, scores: Scores, windows: int) -> tuple[Life, Scores]:
    for _ in range(windows):
        life, new = runner.act(life, "train")
        life, scores = life._replace(state=runner.learner.keep(life.state, new)), scores.then(new)
    return life, scores


def test_no_life_is_cut_because_another_agents_episodes_were_short() -> None:
    runner = training()
    life, scores = act(runner, *begun(runner, 4), 5)
    assert life.trial == 0 and life.end.t == 40
    replay = life.state.replay
    assert bool(replay.reward[:, :-1].eq(1).all()), "every step of the trial is lived"
    lengths = scores.recent
    assert len(scores.episodes.unique()) > 1, "they have as many episodes as come"
    assert set(lengths[~lengths.isnan()].tolist()) >= {2.0, 3.0, 4.0, 5.0, 10.0}
    assert scores.total.tolist() == [40.0] * 4
    # An episode that the limit cut is not terminated; one that ended is.
    cut = replay.ended & ~replay.terminated
    since = replay.time
    assert bool(cut.any()) and bool((since[cut] == 9).logical_or(cut.nonzero()[:, 1] == 39).all())
    assert bool((since[replay.terminated] < 9).all())
    # With a number of episodes per trial all would have begun anew together.
    few = training(episodes=4, episode_steps=0)
    assert act(few, *begun(few, 4), 5)[0].trial > 0


def test_what_an_episode_that_was_cut_had_earned_is_not_the_next_ones() -> None:
    runner = training(horizon=48, episode_steps=0, episodes=3)  # at most 16 steps an episode
    life, scores = begun(runner, 4)
    for _ in range(12):
        life, scores = act(runner, life, scores, 1)
        lengths = scores.recent
        assert float(lengths[~lengths.isnan()].max()) <= 16, "no episode is longer than its limit"
    assert life.trial > 1


def test_simulators_that_cannot_be_stored_begin_a_new_trial() -> None:
    runner = training()
    life, scores = act(runner, *begun(runner, 3), 3)
    assert life.end.t == 24 and bool((scores.earned > 0).any())
    saved = {name: leaf.clone() for name, leaf in runner.save(life, "train").items()}
    terminated = life.state.replay.terminated[:, 23].clone()
    other = replace(runner)
    again = other.restore(begun(other, 3)[0], saved, "train")
    for name, leaf in life.state.params.items():
        assert torch.equal(again.state.params[name], leaf)
    assert again.state.replay.added == 24
    for one, two in zip(again.state.replay.kept(), life.state.replay.kept(), strict=True):
        assert torch.equal(one, two)
    later, earned = act(other, again, scores, 1)
    assert (later.trial, later.end.t) == (life.trial + 1, 8), "in the middle of none"
    replay = later.state.replay
    assert bool(replay.ended[:, 23].all()), "nothing follows from the last step"
    assert not bool((replay.terminated[:, 23] & ~terminated).any())
    # What was left unfinished is no score; what was finished stays.
    assert bool((earned.total >= scores.total).all())
    assert bool((earned.total + earned.earned == scores.total + 8).all())


def test_a_run_beside_it_goes_on_after_a_kill(tmp_path: Path) -> None:
    args = ["pendulum-metagenrl", *overrides(*SMALL, BESIDE), "--out", tmp_path / "run"]
    assert run_here(*args, *overrides("budget.updates=6")) == 0
    assert run_here(*args, "--resume") == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["env_steps"] for line in lines]
    assert steps[-1] > steps[5] > 0
    assert evaluate.main([str(tmp_path / "run"), "--trials", "2"]) == 0


def test_meta_test_in_an_environment_that_it_never_met(tmp_path: Path) -> None:
    assert run_here("pendulum-metagenrl", *overrides(*SMALL), "--out", tmp_path / "run") == 0
    words = [str(tmp_path / "run"), "--trials", "2", *overrides(*BRIEF)]
    assert evaluate.main(words) == 0


@pytest.mark.parametrize("learner", ["td3", "ppo"])
def test_hand_written_losses_learn_there(learner: str, tmp_path: Path) -> None:
    short = {
        "ppo": ["learner.period=20", "learner.minibatch=10", "learner.epochs=2"],
        "td3": ["learner.period=20", "learner.start=20", "learner.update_after=20"],
    }[learner]
    pairs = [*short, "learner.hidden=[8]", "task.id=Brief-v0", "task.episode_steps=10"]
    out = tmp_path / "curve.json"
    words = [learner, "--task", "gym", "--steps", "60", "--agents", "3", "--parts", "3"]
    assert learn.main([*words, *overrides(*pairs), "--out", str(out)]) == 0
    curve = json.loads(out.read_text())["curve"]
    assert all(2 <= row["return"] <= 10 for row in curve), "whole episodes in every part"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"horizon": 0}, ["horizon is 0", "episode_steps=10", "horizon=1000"]),
        ({"episodes": 3}, ["episodes is 3", "episode_steps=10", "write episodes=1"]),
        ({"episode_steps": -1}, ["episode_steps is -1", "episode_steps=0"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises((UserError, ValueError)) as caught:
        training(**options)
    assert_says(str(caught.value), *words)
