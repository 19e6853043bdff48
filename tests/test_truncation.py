"""Ends of episodes that a Gymnasium world sets itself: terminated and truncated are kept apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from esmeta import make_policy, make_task
from esmeta import rollout as loop
from esmeta.agent.inner import inner_policy
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import ppo
from esmeta.ranks.comm import SelfComm
from esmeta.rl.losses import Data, PolicyGradient
from esmeta.rng import Rng
from esmeta.types import TimeStep


class Cut(gymnasium.Env):
    """Shows and pays the step of the episode; ends at step ``cut`` with the two flags of ``ends``.

    An episode begins at 100.
    """

    def __init__(self, cut: int = 3, ends: tuple[bool, bool] = (False, True)) -> None:
        self.observation_space = spaces.Box(0, 200, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.cut, self.ends = cut, tuple(ends)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return np.array([100], dtype=np.float32), {}

    def step(self, action: Any) -> Any:
        self.time += 1
        flags = self.ends if self.time == self.cut else (False, False)
        return np.array([self.time], dtype=np.float32), float(self.time), *flags, {}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("Cut-v0", Cut, max_episode_steps=4)
    yield
    del gymnasium.registry["Cut-v0"]


def play(steps: int, **options: Any) -> tuple[list[TimeStep], list[float], dict[str, float]]:
    """Time steps after the first, final observations and metrics of one trial."""
    task = make_task("gym", id="Cut-v0", **options)
    env = task.make_env("cpu")
    state, _ = env.reset(task.sample(1, "train", Rng(0)), Rng(0))
    seen, final = [], []
    for _ in range(steps):
        state, ts = env.step(state, torch.zeros(1, 1, dtype=torch.int64))
        seen.append(ts)
        final.append(float(env.final_obs(state)))
    return seen, final, {name: float(value) for name, value in env.metrics(state).items()}


def column(seen: list[TimeStep], name: str) -> list[float]:
    return [float(getattr(ts, name).flatten()[0]) for ts in seen]


@pytest.mark.parametrize(
    ("ends", "terminated"),
    [((False, True), False), ((True, False), True), ((True, True), True)],
)
@pytest.mark.parametrize("lasting", [False, True])
def test_flags_of_a_world(ends: tuple[bool, bool], terminated: bool, lasting: bool) -> None:
    kwargs = {"cut": 3, "ends": list(ends)}
    how = {"horizon": 6, "episode_steps": 5} if lasting else {"horizon": 10, "episodes": 2}
    seen, final, metrics = play(6, kwargs=kwargs, **how)
    over = [0, 0, 1, 0, 0, 1]
    no = [0] * 6
    assert column(seen, "terminated") == (over if terminated else no)
    assert column(seen, "truncated") == (no if terminated else over), "one of the two"
    assert column(seen, "new_episode") == over
    assert column(seen, "new_trial") == [0, 0, 0, 0, 0, 1]
    assert column(seen, "reward") == [1, 2, 3, 1, 2, 3]
    # The next episode is shown at once, what ended the old one is kept.
    assert column(seen, "obs") == [1, 2, 100, 1, 2, 3] and final == [1, 2, 3, 1, 2, 3]
    assert metrics["terminated"] == terminated and metrics["episodes"] == 2


def test_the_horizon_is_the_limit_not_the_registered_one() -> None:
    seen, _, metrics = play(14, kwargs={"cut": 99}, horizon=14, episodes=2)
    late = [float(step in (7, 14)) for step in range(1, 15)]
    assert column(seen, "truncated") == column(seen, "new_episode") == late
    assert not any(column(seen, "terminated")) and metrics["terminated"] == 0
    assert metrics["return_1"] == metrics["return_2"] == sum(range(1, 8))
    # Without a horizon it is the registered one.
    seen, _, _ = play(4, kwargs={"cut": 99})
    assert column(seen, "new_trial") == [0, 0, 0, 1]


@pytest.mark.parametrize(("ends", "worth"), [((False, True), True), ((True, False), False)])
def test_learners_bootstrap_from_what_was_cut_alone(ends: tuple[bool, bool], worth: bool) -> None:
    """V stands for the future of an episode that was cut; there is none after a termination."""
    task = make_task("gym", id="Cut-v0", kwargs={"cut": 3, "ends": list(ends)}, horizon=6,
                     episode_steps=6)  # fmt: skip
    loss = PolicyGradient(gamma=0.5, gae_lambda=1.0)
    agent = inner_policy(task.spec, "epg", (4,), loss.needs, std=1.0)
    params = agent.init_at(Rng(0), torch.arange(1))
    params = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    params["value.1.bias"] += 10.0  # V = 10 everywhere
    env = task.make_env("cpu")
    begin = loop.start(agent, params, env, task.sample(1, "train", Rng(0)), Rng(0))
    recorder = loop.Recorder(begin.state, heads=False)
    steps = recorder.trajectory(loop.rollout(agent, env, begin, recorder))
    assert steps.ended.flatten().tolist() == [False, False, True] * 2
    assert steps.terminated.flatten().tolist() == [False, False, not worth] * 2
    made = loss.prepare(agent, params, Data(steps, {}, 6)).constants
    # r + 0.5 V' - V with V = 10, summed backwards within an episode only.
    third = 3 + 5.0 * worth - 10
    second = 2 + 5 - 10 + 0.5 * third
    first = 1 + 5 - 10 + 0.5 * second
    torch.testing.assert_close(made["target"] - 10.0, torch.tensor([[first, second, third] * 2]))


@pytest.mark.parametrize(("ends", "worth"), [((False, True), True), ((True, False), False)])
def test_policy_gradients_bootstrap_from_what_was_cut_alone(
    ends: tuple[bool, bool], worth: bool
) -> None:
    task = make_task("gym", id="Cut-v0", kwargs={"cut": 3, "ends": list(ends)}, horizon=6)
    policy = make_policy("mlp", task.spec, neurons=4, value=True)
    objective = ReturnObjective(policy, task, trials=2, seed=0, device="cpu")
    theta = {name: torch.zeros_like(leaf) for name, leaf in objective.init(0).items()}
    last = next(name for name in reversed(theta) if name.startswith("value.") and "bias" in name)
    theta[last] += 10.0
    config = ppo.Optimizer(gamma=0.5, gae_lambda=0.0, normalize_advantage=False, bootstrap=True)
    data, _ = config.collect(theta, 0, objective, SelfComm())
    expected = torch.tensor([1 + 5.0 - 10, 2 + 5.0 - 10, 3 + 5.0 * worth - 10])
    for trial in range(2):
        torch.testing.assert_close(data.advantage[:3, 0, trial], expected)
