"""The tasks that learned losses are tried on, displacement and pendulum, by hand."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch

from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Tasks


def test_pendulum_equals_gymnasiums() -> None:
    theirs = gymnasium.make("Pendulum-v1").unwrapped
    task = make_task("pendulum")
    env = task.make_env("cpu")
    state, ts = env.reset(task.sample(3, "train", Rng(0)), Rng(1))
    rng = np.random.default_rng(0)
    for trial in range(3):
        current, step = state, ts
        theirs.reset(seed=0)
        theirs.state = np.array([float(state.angle[0, trial]), float(state.speed[0, trial])])
        worst = np.zeros(2)
        for _ in range(200):
            torque = rng.uniform(-2.5, 2.5)
            current, step = env.step(current, torch.full((1, 3, 1), torque))
            # From the same state at every step: errors of float32 would add up else.
            obs, reward, _, truncated, _ = theirs.step(np.array([torque]))
            worst[0] = max(worst[0], np.abs(step.obs[0, trial].numpy() - obs).max())
            worst[1] = max(worst[1], abs(float(step.reward[0, trial]) - reward))
            angle, speed = float(current.angle[0, trial]), float(current.speed[0, trial])
            theirs.state = np.array([angle, speed])
        assert worst[0] < 1e-6 * 8 and worst[1] < 1e-6 * 16, worst
        assert bool(step.truncated[0, trial]) and not truncated


def test_an_action_of_a_pendulum_may_last() -> None:
    once, often = make_task("pendulum"), make_task("pendulum", repeat=4, episode_steps=50)
    tasks = once.sample(5, "train", Rng(0))
    envs = [task.make_env("cpu") for task in (once, often)]
    (single, _), (state, _) = (env.reset(tasks, Rng(1)) for env in envs)
    for torque in torch.linspace(-2.5, 2.5, 6):
        action = torque.expand(1, 5, 1)
        total = torch.zeros(1, 5)
        for _ in range(4):
            single, step = envs[0].step(single, action)
            total += step.reward
        state, lasting = envs[1].step(state, action)
        torch.testing.assert_close(lasting.obs, step.obs, rtol=0, atol=0)
        torch.testing.assert_close(lasting.reward, total, rtol=1e-6, atol=0)
    assert often.reference.random == pytest.approx(4 * once.reference.random)


def test_pendulum_gravity_length_and_episodes() -> None:
    task = make_task("pendulum", gravity=(7.0, 13.0), length=(0.7, 1.3), horizon=7, episode_steps=3)
    tasks = task.sample(500, "train", Rng(0))
    for name, low, high in (("gravity", 7.0, 13.0), ("length", 0.7, 1.3)):
        values = tasks.data[name]
        assert low <= float(values.min()) < low + 0.05 * (high - low)
        assert high >= float(values.max()) > high - 0.05 * (high - low)
    data = {"gravity": torch.tensor([[8.0]]), "length": torch.tensor([[0.5]])}
    one = Tasks(tasks.index[:, :1], {**data, "seed": tasks.data["seed"][:, :1]})
    env = task.make_env("cpu")
    state, ts = env.reset(one, Rng(2))
    angle, speed = float(state.angle), float(state.speed)
    assert -math.pi <= angle <= math.pi and -1 <= speed <= 1
    state, ts = env.step(state, torch.full((1, 1, 1), 9.0))  # clipped to 2
    faster = speed + (1.5 * 8.0 / 0.5 * math.sin(angle) + 3.0 / 0.25 * 2.0) * 0.05
    faster = min(8.0, max(-8.0, faster))
    cost = angle**2 + 0.1 * speed**2 + 0.001 * 4.0
    assert float(ts.reward) == pytest.approx(-cost, rel=1e-5)
    assert float(ts.obs[0, 0, 2]) == pytest.approx(faster, rel=1e-5)
    flags = [bool(ts.new_episode)]
    for _ in range(6):
        state, ts = env.step(state, torch.zeros(1, 1, 1))
        flags.append(bool(ts.new_episode))
    assert flags == [False, False, True, False, False, True, True] and bool(ts.new_trial)
    assert len({float(x) for x in state.starts.flatten()}) == 6


def test_displacement_by_hand() -> None:
    task = make_task("displacement", horizon=5, episode_steps=2, reward_scale=10.0)
    tasks = Tasks(torch.tensor([[0]]), {"direction": torch.tensor([[[0.6, -0.8]]])})
    env = task.make_env("cpu")
    state, ts = env.reset(tasks, Rng(0))
    assert not ts.obs.any()
    rows = []
    for action in ([0.5, 0.0], [3.0, -4.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0], [1.0, 0.0]):
        state, ts = env.step(state, torch.tensor([[action]]))
        rows.append((round(float(ts.reward), 5), [round(x, 5) for x in ts.obs[0, 0].tolist()]))
    assert rows[0] == (0.3, [0.05, 0.0, 0.05, 0.0])
    assert rows[1] == (1.0, [0.0, 0.0, 0.0, 0.0])  # the longest step, along u; a new episode
    assert rows[2] == (-0.8, [0.0, 0.1, 0.0, 0.1])
    assert [row[0] for row in rows[3:]] == [0.8, 0.6, 0.0]
    assert float(env.metrics(state)["share"]) == pytest.approx(1.9 / 5, rel=1e-5)


def test_directions_of_the_halves_and_strata() -> None:
    task = make_task("displacement", strata=4)
    # A split has all of its sectors, their outer halves (validation) or the inner ones (test).
    for split, sign in (("train", 1), ("validation", -1), ("test", -1)):
        u = task.sample(400, split, Rng(3)).data["direction"][0]
        assert bool((sign * u[:, 0] > 0).all())
        assert torch.allclose(u.norm(dim=1), torch.ones(400))
        angle = torch.atan2(u[:, 1] * sign, u[:, 0] * sign) / math.pi + 0.5
        wanted = {"train": [0, 1, 2, 3], "validation": [0, 1, 6, 7], "test": [2, 3, 4, 5]}[split]
        parts = 4 if split == "train" else 8
        assert (angle * parts).long().tolist() == wanted * 100
    wide = make_task("displacement", width=240.0)
    for split, low, high in (("train", 0, 120), ("validation", 120, 150), ("test", 150, 180)):
        u = wide.sample(4000, split, Rng(3)).data["direction"][0]
        away = torch.atan2(u[:, 1], u[:, 0]).abs() * 180.0 / math.pi
        assert low <= float(away.min()) < low + 1 and high - 1 < float(away.max()) <= high
    double = make_task("displacement", train="horizontal", test="vertical", width=240.0, strata=8)
    for split, low, high in (("train", 0, 60), ("validation", 60, 75), ("test", 75, 90)):
        u = double.sample(4000, split, Rng(3)).data["direction"][0]
        away = torch.atan2(u[:, 1].abs(), u[:, 0].abs()) * 180.0 / math.pi
        assert low <= float(away.min()) < low + 1 and high - 1 < float(away.max()) <= high
        ahead = u[:, 0] if split == "train" else u[:, 1]
        assert [bool(x > 0) for x in ahead[:16]] == ([True] * 4 + [False] * 4) * 2
    fourfold = make_task("displacement", train="axes", test="diagonals", width=200.0, strata=4)
    for split, low, high in (("train", 0, 25), ("validation", 25, 35), ("test", 35, 45)):
        u = fourfold.sample(4000, split, Rng(3)).data["direction"][0]
        angle = torch.atan2(u[:, 1], u[:, 0]) * 180.0 / math.pi
        away = (angle - 90.0 * (angle / 90.0).round()).abs()  # from the nearest end of an axis
        assert low <= float(away.min()) < low + 1 and high - 1 < float(away.max()) <= high
        first = 0.0 if split == "train" else 45.0
        sectors = ((angle - first) / 90.0).round() % 4
        assert sectors[:8].tolist() == [0, 1, 2, 3] * 2
    twins = make_task("displacement", train="horizontal", test="all", mirrored=True, strata=2)
    for split in ("train", "validation", "test"):
        u = twins.sample(400, split, Rng(3)).data["direction"][0]
        torch.testing.assert_close(u[0::2], -u[1::2], rtol=0, atol=1e-6)
        assert len(u[0::2].unique(dim=0)) == 200
    everywhere = make_task("displacement", train="all").sample(400, "train", Rng(3))
    assert 120 < int((everywhere.data["direction"][..., 0] > 0).sum()) < 280
