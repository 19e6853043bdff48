"""Simulated bodies: equal to gymnasium and to MuJoCo one world at a time, whatever the engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from torch import Tensor

from esmeta.envs.mujoco import MujocoEnv, State
from esmeta.rng import Rng
from esmeta.tasks import make_task

STANDARD = {
    "ant": "Ant-v5",
    "half_cheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v5",
}
ENGINES = ("batch", "rows")


# Gymnasium imports it with every MuJoCo environment, for the pictures of its window only.
if importlib.util.find_spec("imageio") is None:
    sys.modules["imageio"] = types.ModuleType("imageio")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    # MuJoCo writes its warnings to a file in the working directory.
    monkeypatch.chdir(tmp_path)


def actions(steps: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, *shape, generator=generator) * 2 - 1


def endless(name: str, **options: object) -> tuple[MujocoEnv, list[Tensor]]:
    """The task without an end but its horizon, and where its rewards go in float64."""
    task = make_task(name, **options)
    definition = task.definition()
    rewards = []

    def reward(*args: object) -> Tensor:
        rewards.append(definition.reward(*args))
        return rewards[-1]

    changed = dataclasses.replace(definition, healthy=None, reward=reward)
    engine = options.get("engine", "auto")
    return MujocoEnv(task.body(), changed, horizon=1000, engine=engine), rewards


def positions(env: MujocoEnv, state: State) -> tuple[np.ndarray, np.ndarray]:
    """qpos ``[B, nq]`` and qvel ``[B, nv]`` of the first member."""
    rows, nq, nv = state.rows[0].numpy(), env.model.nq, env.model.nv
    return rows[:, 1 : 1 + nq], rows[:, 1 + nq : 1 + nq + nv]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STANDARD)
def test_trajectories_are_gymnasiums_bit_for_bit(name: str, engine: str) -> None:
    options: dict[str, object] = {"engine": engine, "contact_rule": "native"}
    if (name, engine) == ("ant", "batch"):
        options["contact"] = "zero"
    env, rewards = endless(name, **options)
    trials, steps = 2, 200
    task = make_task(name, **options)
    state, ts = env.reset(task.sample(trials, "train", Rng(0)), Rng(1))
    acts = actions(steps, 1, trials, task.spec.action.size)
    theirs = [gymnasium.make(STANDARD[name]).unwrapped for _ in range(trials)]
    for other, qpos, qvel in zip(theirs, *positions(env, state), strict=True):
        other.reset(seed=0)
        mujoco.mj_resetData(other.model, other.data)
        other.set_state(qpos, qvel)
    worst = 0.0
    for action in acts:
        state, ts = env.step(state, action)
        qpos, qvel = positions(env, state)
        for b, other in enumerate(theirs):
            obs, reward, terminated, _, info = other.step(action[0, b].double().numpy())
            assert np.array_equal(qpos[b], other.data.qpos), (name, b)
            assert np.array_equal(qvel[b], other.data.qvel), (name, b)
            if options.get("contact") == "zero":
                reward -= info["reward_contact"]
                obs[27:] = 0.0
            worst = max(worst, abs(float(rewards[-1][0, b]) - reward))
            assert np.array_equal(ts.obs[0, b].numpy(), obs.astype(np.float32))
    assert worst <= 1e-12
