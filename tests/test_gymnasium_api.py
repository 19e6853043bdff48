"""Tasks as Gymnasium environments: its own checker, and number for number our own rollout."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import esmeta
from esmeta import rollout as loop
from esmeta.envs import gymnasium_api as api

ROOT = Path(__file__).resolve().parents[1]
TASKS = esmeta.task_names()


@pytest.mark.parametrize("name", TASKS)
def test_gymnasiums_checker_is_content(name: str) -> None:
    env = gymnasium.make(api.environment_id(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env.unwrapped)
    # Taste: an observation may be any number, and an action beyond 1 (a torque).
    taste = ("infinity", "symmetric and normalized")
    told = [str(w.message) for w in caught if not any(word in str(w.message) for word in taste)]
    assert not told, told


@pytest.mark.parametrize("name", TASKS)
def test_every_field_of_a_task_can_be_set(name: str) -> None:
    """A value that no field takes comes back in an error that names the field."""
    made = type(esmeta.make_task(name))
    theirs = {*inspect.signature(gymnasium.make).parameters}
    theirs |= {*inspect.signature(gymnasium.make_vec).parameters}
    theirs |= {*inspect.signature(api.TaskVectorEnv).parameters, "self"}
    makes: list[Any] = [gymnasium.make, gymnasium.make_vec]
    for make in makes:
        for field in (field.name for field in dataclasses.fields(made)):
            tables = [{"options": {field: Ellipsis}}]
            tables += [] if field in theirs else [{field: Ellipsis}]
            for table in tables:
                with pytest.raises(ValueError, match=rf"\b{field}\b.*Ellipsis"):
                    make(api.environment_id(name), **table)
        for table in ({"nonsense": 1}, {"options": {"nonsense": 1}}):
            with pytest.raises(ValueError, match="nonsense is not an option.*options are"):
                make(api.environment_id(name), **table)


def test_options_in_a_table() -> None:
    table = {"id": "Pendulum-v1", "kwargs": {"g": 9.0}}
    env = gymnasium.make("esmeta/Gym-v0", options=table, horizon=7)
    assert env.unwrapped._task == esmeta.make_task("gym", **table, horizon=7)  # type: ignore[attr-defined]
    for mode in (None, "sync"):
        envs = gymnasium.make_vec(
            "esmeta/Gym-v0", num_envs=2, vectorization_mode=mode, options=table, horizon=7
        )
        assert envs.reset(seed=0)[0].shape == (2, 3)
        envs.close()
    with pytest.raises(ValueError, match="'horizon' is given twice, as 7 and in options"):
        gymnasium.make("esmeta/Gym-v0", options={"horizon": 8}, horizon=7)
    with pytest.raises(ValueError, match="must be a table of the task's fields"):
        gymnasium.make("esmeta/Gym-v0", options=["id"])


def test_a_trial_of_another_split() -> None:
    envs = {split: gymnasium.make("esmeta/Maze-v0", split=split) for split in ("train", "test")}
    seen = {split: env.reset(seed=3, options={"trial": 5})[0] for split, env in envs.items()}
    told = {"trial": 5, "split": "test"}
    assert np.array_equal(envs["train"].reset(seed=3, options=told)[0], seen["test"])
    walls = [env.unwrapped._state.tables.views for env in envs.values()]  # type: ignore[attr-defined]
    assert torch.equal(*walls)
    envs["train"].reset(seed=3, options={"trial": 5})
    assert not torch.equal(envs["train"].unwrapped._state.tables.views, walls[1])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        envs["train"].reset(options={"split": "valid"})


@pytest.mark.parametrize("name", TASKS)
def test_equal_to_our_own_rollout(name: str) -> None:
    """The trials of an evaluator, played by a policy, then again through Gymnasium."""
    task = esmeta.make_task(name)
    policy = esmeta.make_policy("metods", task.spec, neurons=4, hidden=[4], head_hidden=4)
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=8)
    index, seed, steps = torch.arange(3, 11), 5, min(task.spec.horizon, 120)
    tasks, rng = evaluator.trial_set(index, seed, "test")
    begin = loop.start(policy, policy.init(1), evaluator.env, tasks, rng)
    recorder = loop.Recorder(begin.state)
    end = loop.rollout(policy, evaluator.env, begin, recorder, until=steps)
    scores = evaluator.env.metrics(end.env_state)
    record = recorder.trajectory(end)
    env = gymnasium.make(api.environment_id(name), split="test")
    env.reset(seed=seed)
    for b, trial in enumerate(index.tolist()):
        obs, info = env.reset(options={"trial": trial})
        for t in range(len(record.reward)):
            assert np.array_equal(obs, record.ts.obs[t, 0, b].numpy())
            assert info["new_episode"] == bool(record.ts.new_episode[t, 0, b])
            obs, reward, terminated, truncated, info = env.step(record.action[t, 0, b].numpy())
            assert reward == float(record.reward[t, 0, b])
            over = bool(record.over[t, 0, b])
            assert terminated == (over and bool(record.terminated[t, 0, b]))
            assert truncated == (over and bool(record.after.truncated[t, 0, b]))
            if terminated or truncated:
                for key, value in info["metrics"].items():
                    assert np.array_equal(value, float(scores[key][0, b]), equal_nan=True)
                break


def actions_of(env: Any, steps: int) -> list[Any]:
    env.action_space.seed(3)
    return [env.action_space.sample() for _ in range(steps)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bandit", {}),
        ("harlow", {"horizon": 40, "presentations": 1}),  # trials of different lengths
        ("gym", {"horizon": 60, "episodes": 2}),
        ("navigation", {"horizon": 20, "episodes": 2}),
        ("maze", {"size": 4, "horizon": 15}),
    ],
)
def test_a_vector_is_its_single_environments(name: str, options: dict[str, Any]) -> None:
    count, steps = 5, 100
    envs = gymnasium.make_vec(api.environment_id(name), num_envs=count, **options)
    assert envs.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    singles = [gymnasium.make(api.environment_id(name), **options) for _ in range(count)]
    obs, _ = envs.reset(seed=9)
    number = np.arange(count)
    for single in singles:
        single.reset(seed=9)
    expected = [s.reset(options={"trial": int(k)})[0] for s, k in zip(singles, number, strict=True)]
    assert np.array_equal(obs, expected)
    ends = 0
    for action in actions_of(envs, steps):
        obs, reward, terminated, truncated, infos = envs.step(action)
        for i, single in enumerate(singles):
            alone = single.step(action[i])
            assert (reward[i], terminated[i], truncated[i]) == alone[1:4]
            ended = bool(terminated[i] or truncated[i])
            assert ended == bool("_final_obs" in infos and infos["_final_obs"][i])
            first = alone[0]
            if ended:
                ends += 1
                assert np.array_equal(infos["final_obs"][i], alone[0])
                for key, value in alone[4]["metrics"].items():
                    theirs = infos["final_info"]["metrics"][key][i]
                    assert np.array_equal(theirs, value, equal_nan=True)
                number[i] += count
                first, alone_info = single.reset(options={"trial": int(number[i])})
            else:
                alone_info = alone[4]
                assert bool(infos["new_episode"][i]) == alone_info["new_episode"]
            assert np.array_equal(obs[i], first)
    assert ends >= count
    again, _ = envs.reset(seed=9)
    assert np.array_equal(again, expected)
    envs.close()


def test_trials_that_end_together_stay_one_batch() -> None:
    envs = gymnasium.make_vec("esmeta/Bandit-v0", num_envs=7, horizon=3).unwrapped
    envs.reset(seed=0)
    for _ in range(10):
        envs.step(np.zeros(7, dtype=np.int64))
    assert len(envs._groups) == 1 and not envs._free[1:]


def test_a_seed_has_its_trials_and_none_is_drawn_twice() -> None:
    env = gymnasium.make("esmeta/Point-v0", start="square", goals="square")

    def starts(count: int) -> list[float]:
        return [float(env.reset()[0][0]) for _ in range(count)]

    first, _ = env.reset(seed=4)
    rest = starts(5)
    again, _ = env.reset(seed=4)
    assert np.array_equal(first, again) and starts(5) == rest
    assert len({float(first[0]), *rest}) == 6
    other = gymnasium.make("esmeta/Point-v0", start="square", goals="square")
    assert float(other.reset()[0][0]) != float(env.reset()[0][0]), "no seed: a random one"


def test_pictures() -> None:
    env = gymnasium.make("esmeta/Maze-v0", size=4, render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3
    assert gymnasium.make("esmeta/Bandit-v0").unwrapped.metadata["render_modes"] == []


def test_nothing_is_registered_twice_and_all_tasks_are() -> None:
    before = dict(gymnasium.registry)
    api.register()
    assert dict(gymnasium.registry) == before
    assert {api.environment_id(name) for name in TASKS} <= set(before)
    assert api.environment_id("ant_dir") == "esmeta/AntDir-v0"


def test_an_id_imports_its_module_and_plain_esmeta_stays_light() -> None:
    code = (
        "import sys, esmeta; assert 'gymnasium' not in sys.modules\n"
        "import gymnasium\n"
        "env = gymnasium.make('esmeta.envs.gymnasium_api:esmeta/Maze-v0', size=8)\n"
        "envs = gymnasium.make_vec('esmeta/Maze-v0', num_envs=3, size=8)\n"
        "print(env.reset(seed=0)[0].shape, envs.reset(seed=0)[0].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.stdout.strip() == "(9,) (3, 9)", done.stderr


def refused(words: str, call: Any) -> None:
    with pytest.raises((ValueError, gymnasium.error.Error), match=words):
        call()


def test_bad_requests() -> None:
    make, vec = gymnasium.make, gymnasium.make_vec
    refused("size is 99.*4 to 12", lambda: make("esmeta/Maze-v0", size=99))
    refused("task.sise .*did you mean 'size'", lambda: make("esmeta/Maze-v0", sise=8))
    refused("split is 'valid'", lambda: make("esmeta/Maze-v0", split="valid"))
    refused("split is 'valid'", lambda: vec("esmeta/Maze-v0", split="valid"))
    refused("num_envs is 0", lambda: vec("esmeta/Maze-v0", num_envs=0))
    refused("vectors are not drawn", lambda: vec("esmeta/Maze-v0", render_mode="rgb_array"))
    refused("no picture", lambda: api.TaskEnv("bandit", render_mode="rgb_array"))
    env, envs = api.TaskEnv("maze"), api.TaskVectorEnv("maze", 2)
    refused("call env.reset", lambda: env.step(0))
    refused("call envs.reset", lambda: envs.step(np.zeros(2, dtype=int)))
    refused("trial is -1", lambda: env.reset(options={"trial": -1}))
    refused(r"\['trail'\].*'trial'", lambda: env.reset(options={"trail": 1}))
    refused(r"\['reset_mask'\].*no options", lambda: envs.reset(options={"reset_mask": 1}))
    refused("one seed", lambda: envs.reset(seed=[1, 2]))
    env.reset(seed=0)
    envs.reset(seed=0)
    for action in (4, -1, 0.5, np.array([1, 1])):
        refused("0 to 3", lambda action=action: env.step(action))
    for action in (np.array([0, 4]), np.array([0]), np.array([0.0, 1.0])):
        refused("0 to 3", lambda action=action: envs.step(action))
    point = api.TaskEnv("point")
    point.reset(seed=0)
    refused(r"shape \(3,\).*2 numbers", lambda: point.step(np.zeros(3)))
