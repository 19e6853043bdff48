"""What every task must satisfy; a module that is added to ``tasks/`` is tested by existing."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from esmeta.rng import Rng
from esmeta.tasks import make_task, task_names
from esmeta.types import Discrete, Task, Tasks, TimeStep

EXTRA_STEPS = 3
# Simulated bodies take their time, and do in a short episode what they do in a long one.
SHORT = {
    16: "ant ant_dir ant_goal ant_ring ant_vel goal_ant cheetah_dir cheetah_vel",
    30: "half_cheetah hopper mixed walker2d hopper_params walker_params",
    40: "directional_hopper random_hopper random_walker block_push wheeled",
}
CHEAP = {name: {"horizon": steps} for steps, names in SHORT.items() for name in names.split()}


def actions_for(task: Task, steps: int, population: int, batch: int, seed: int = 0) -> Tensor:
    shape = (steps, population, batch)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(task.spec.action, Discrete):
        return torch.randint(0, task.spec.action.n, shape, generator=generator)
    return torch.rand(*shape, task.spec.action.size, generator=generator) * 2 - 1


def play(
    task: Task, tasks: Tasks, actions: Tensor, seed: int = 1
) -> tuple[TimeStep, list[dict[str, Tensor]]]:
    """All time steps stacked (the first from reset), and the metrics at the end and 3 steps on."""
    env = task.make_env("cpu")
    state, ts = env.reset(tasks, Rng(seed), actions.shape[1])
    steps, scores = [ts], []
    for t, action in enumerate(actions):
        if t == task.spec.horizon:
            scores.append(env.metrics(state))
        state, ts = env.step(state, action)
        steps.append(ts)
    scores.append(env.metrics(state))
    return TimeStep(*(torch.stack(leaf) for leaf in zip(*steps, strict=True))), scores


@pytest.fixture(params=task_names())
def task(request: pytest.FixtureRequest) -> Task:
    return make_task(request.param, **CHEAP.get(request.param, {}))


def test_shapes_dtypes_and_first_step(task: Task) -> None:
    spec = task.spec
    tasks = task.sample(3, "train", Rng(0))
    assert tasks.index.tolist() == [[0, 1, 2]]
    assert all(leaf.shape[:2] == (1, 3) for leaf in tasks.data.values())
    ts, _ = play(task, tasks, actions_for(task, 4, 2, 3))
    assert ts.obs.shape == (5, 2, 3, spec.obs_size)
    assert ts.prev_action.shape == (5, 2, 3, spec.action.size)
    for leaf in (ts.obs, ts.prev_action, ts.reward):
        assert leaf.dtype == torch.float32
    for leaf in (ts.terminated, ts.truncated, ts.new_episode, ts.new_trial):
        assert leaf.dtype == torch.bool
        assert leaf.shape == ts.reward.shape == (5, 2, 3)
    assert not ts.prev_action[0].any() and not ts.reward[0].any()
    assert not ts.terminated[0].any() and not ts.truncated[0].any()
    assert ts.new_trial[0].all() and ts.new_episode[0].all()


def test_prev_action_is_the_action_that_led_here(task: Task) -> None:
    actions = actions_for(task, 6, 2, 3)
    ts, _ = play(task, task.sample(3, "train", Rng(0)), actions)
    alive = ~ts.new_trial[1:]
    expected = actions
    if isinstance(task.spec.action, Discrete):
        expected = torch.nn.functional.one_hot(actions, task.spec.action.n).float()
    assert torch.equal(ts.prev_action[1:][alive], expected[alive])


def test_a_trial_ends_once_and_then_nothing_happens(task: Task) -> None:
    horizon = task.spec.horizon
    actions = actions_for(task, horizon + EXTRA_STEPS, 2, 8)
    ts, (at_end, later) = play(task, task.sample(8, "train", Rng(0)), actions)
    over = ts.new_trial[1:]
    assert over[horizon - 1].all()
    assert (over[1:] >= over[:-1]).all()
    ending = over.clone()
    ending[1:] &= ~over[:-1]
    assert torch.equal(ts.terminated[1:] | ts.truncated[1:], ending)
    assert not (ts.terminated & ts.truncated).any()
    assert not ts.reward[1:][over & ~ending].any()
    for name, score in at_end.items():
        assert score.shape == (2, 8)
        assert torch.equal(score.nan_to_num(-7), later[name].nan_to_num(-7)), name


EPISODIC = [
    name for name in task_names() if hasattr(make_task(name, **CHEAP.get(name, {})), "episodes")
]


@pytest.mark.parametrize("name", EPISODIC)
def test_the_return_of_every_episode_is_told(name: str) -> None:
    """``return_k`` is the sum of its rewards so far, NaN for an episode that did not begin."""
    task = make_task(name, **{**CHEAP.get(name, {}), "episodes": 3, "horizon": 60})
    steps = 62
    env = task.make_env("cpu")
    state, ts = env.reset(task.sample(5, "train", Rng(0)), Rng(1), 2)
    sums = torch.zeros(2, 5, 3, dtype=torch.float64)
    number = torch.zeros(2, 5, dtype=torch.int64)
    over = torch.zeros(2, 5, dtype=torch.bool)
    waited = 0
    for action in actions_for(task, steps, 2, 5):
        scores = env.metrics(state)
        for k in range(3):
            begun = number >= k
            waited += int((~begun).sum())
            told = scores[f"return_{k + 1}"].double()
            assert torch.equal(told.isnan(), ~begun), k
            assert torch.allclose(told[begun], sums[..., k][begun], rtol=1e-4, atol=1e-4), k
        assert "return_4" not in scores
        state, ts = env.step(state, action)
        sums.scatter_add_(-1, number.unsqueeze(-1), ts.reward.double().unsqueeze(-1))
        over |= ts.new_trial
        number = (number + (ts.new_episode & ~over)).clamp(max=2)
    assert waited > 0 and int(number.max()) == 2 and float(sums.abs().max()) > 0


def test_a_trial_does_not_depend_on_batch_mates_or_population(task: Task) -> None:
    steps = min(task.spec.horizon + 1, 300)
    actions = actions_for(task, steps, 3, 6)
    whole, scores = play(task, task.sample(6, "test", Rng(0)), actions)
    for member, rows in ((0, [4]), (2, [5, 1, 3]), (1, [0, 2])):
        part = task.sample(torch.tensor(rows), "test", Rng(0))
        alone, alone_scores = play(task, part, actions[:, member : member + 1, rows])
        for name, leaf in alone._asdict().items():
            expected = getattr(whole, name)[:, member : member + 1, rows]
            assert torch.equal(leaf, expected), name
        for name, score in alone_scores[-1].items():
            expected = scores[-1][name][member : member + 1, rows]
            assert torch.equal(score.nan_to_num(-7), expected.nan_to_num(-7)), name


def test_tasks_may_differ_between_members(task: Task) -> None:
    actions = actions_for(task, 12, 2, 3)
    parts = [task.sample(torch.arange(3) + 3 * member, "train", Rng(0)) for member in range(2)]
    data = {name: torch.cat([part.data[name] for part in parts]) for name in parts[0].data}
    both, _ = play(task, Tasks(torch.cat([part.index for part in parts]), data), actions)
    for member, part in enumerate(parts):
        alone, _ = play(task, part, actions[:, member : member + 1])
        for name, leaf in alone._asdict().items():
            assert torch.equal(leaf, getattr(both, name)[:, member : member + 1]), name


def test_global_generators_are_neither_read_nor_moved(task: Task) -> None:
    actions = actions_for(task, 20, 1, 4)
    results = []
    for poison in (1, 2):
        torch.manual_seed(poison)
        np.random.seed(poison)
        random.seed(poison)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        results.append(play(task, task.sample(4, "train", Rng(3 + 0)), actions)[0])
        assert torch.equal(before[0], torch.get_rng_state())
        assert (before[1] == np.random.get_state()[1]).all()
        assert before[2] == random.getstate()
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_seed_and_split_matter_and_repeat(task: Task) -> None:
    def fingerprint(seed: int, split: str) -> list[float]:
        data = task.sample(64, split, Rng(seed)).data
        return [float(x) for leaf in data.values() for x in leaf.double().flatten()]

    assert fingerprint(0, "train") == fingerprint(0, "train")
    assert fingerprint(0, "train") != fingerprint(1, "train")
    assert fingerprint(0, "train") != fingerprint(0, "test")


def test_random_reference_agrees_with_a_random_agent(task: Task) -> None:
    batch = 3000 if isinstance(task.spec.action, Discrete) else 16
    if hasattr(task, "most_worlds"):
        task = dataclasses.replace(task, most_worlds=batch)
    env = task.make_env("cpu")
    state, ts = env.reset(task.sample(batch, "train", Rng(11)), Rng(12))
    total = torch.zeros(1, batch, dtype=torch.float64)
    for action in actions_for(task, task.spec.horizon, 1, batch, seed=5):
        state, ts = env.step(state, action)
        total += ts.reward
    mean, error = float(total.mean()), float(total.std()) / batch**0.5
    expected = task.reference.random
    assert abs(mean - expected) < 3 * error + 0.02 * abs(expected), (mean, error, expected)
    assert task.reference.best > expected


def test_bad_requests_are_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        task.sample(2, "valid", Rng(0))
    with pytest.raises(ValueError, match="batch is 0.*batch=1"):
        task.sample(0, "train", Rng(0))
    with pytest.raises(ValueError, match=r"int64 tensor \[B\]"):
        task.sample(torch.zeros(2, 2), "train", Rng(0))


def test_names_are_the_modules_of_the_folder() -> None:
    assert {"bandit", "displacement", "harlow", "maze", "pendulum"} <= set(task_names())
    assert not any(name.startswith("_") for name in task_names())


WRONG: list[tuple[str, dict[str, object], list[str]]] = [
    ("harlo", {}, ["'harlo'", "did you mean 'harlow'", "maze", "package.module:Task"]),
    ("maze", {"sise": 8}, ["task.sise", "did you mean 'size'", "horizon"]),
    ("maze", {"size": "8"}, ["task.size = '8'", "an integer"]),
    ("maze", {"size": True}, ["task.size = True", "an integer"]),
    ("maze", {"size": 13}, ["size is 13", "4 to 12", "size=12"]),
    ("maze", {"size": 3}, ["size is 3", "4 to 12", "size=4"]),
    ("maze", {"generator": "prim"}, ["'prim'", "pillars, carve", "generator='pillars'"]),
    ("maze", {"avoid_target": 1}, ["task.avoid_target = 1", "true or false"]),
    ("harlow", {"horizon": 0}, ["horizon is 0", "horizon=1"]),
    ("harlow", {"cells": 16}, ["cells is 16", "odd", "cells=17"]),
    ("harlow", {"presentations": 99}, ["99", "1 to 20", "presentations=20"]),
    ("bandit", {"reward_probability": 0.5}, ["0.5", "at most 1", "reward_probability=0.8"]),
    ("bandit", {"arms": 4}, ["4 arms", "reward_probability=1.0"]),
    ("bandit", {"arms": 1}, ["arms is 1", "2 to 100", "arms=2"]),
    ("displacement", {"train": "up"}, ["task.train = 'up'", "right, left, horizontal"]),
    ("pendulum", {"gravity": (13.0, 7.0)}, ["(13.0, 7.0)", "lowest", "gravity=(7.0, 13.0)"]),
    ("pendulum", {"repeat": 0}, ["repeat", "0"]),
    ("pendulum", {"length": (0.0, 1.0)}, ["(0.0, 1.0)", "above 0", "length=(0.7, 1.3)"]),
    ("displacement", {"width": 360.0}, ["360.0", "between 0 and 360", "width=180.0"]),
    ("displacement", {"reward_scale": 0.0}, ["0.0", "above 0", "reward_scale=10.0"]),
    ("displacement", {"mirrored": True}, ["'right'", "train='horizontal'", "mirrored=False"]),
    ("displacement", {"strata": 0}, ["strata is 0", "strata=1"]),
    ("displacement", {"episode_steps": 0}, ["episode_steps is 0", "episode_steps=1"]),
    (
        "no_such_package.tasks:Mine",
        {},
        ["no module 'no_such_", "package.module:Name"],
    ),
    ("esmeta.rng:nothing", {}, ["'esmeta.rng' has no class 'nothing'"]),
    ("math:floor", {}, ["'math' has no class 'floor'"]),
    ("ant_dir", {"obs_set": "rlab"}, ["'rlab'", "rllab, gym, compact", "did you mean 'rllab'"]),
    ("ant_dir", {"directions": "both"}, ["'both'", "binary, circle"]),
    ("ant_dir", {"physics": "mujoco"}, ["'mujoco'", "gym, rllab"]),
    ("ant_dir", {"contact": "none"}, ["'none'", "zero, mj"]),
    ("ant_dir", {"contact": "mj", "engine": "batch"}, ["contact", "engine = 'rows'"]),
    ("ant_dir", {"engine": "wrap"}, ["'wrap'", "auto, batch, rows"]),
    ("ant_dir", {"contact_rule": "old"}, ["'old'", "legacy, native"]),
    ("ant_dir", {"integrator": "rk4"}, ["'rk4'", "model, euler"]),
    ("ant_dir", {"ctrl_cost": -1.0}, ["ctrl_cost", "-1.0", ">= 0"]),
    ("cheetah_dir", {"threads": 0}, ["threads is 0", "threads=1"]),
    ("cheetah_dir", {"horizon": 201, "episodes": 2}, ["horizon is 201", "horizon=200"]),
    ("cheetah_vel", {"speed_min": 3.0}, ["speed_min = 3.0", "speed_max = 2.0"]),
    ("cheetah_vel", {"speed_max": -1.0}, ["speed_max", "-1.0", "> 0"]),
    ("ant_goal", {"goals": "ring"}, ["'ring'", "disc, square"]),
    ("cheeta-dir", {}, ["'cheeta_dir'", "did you mean 'cheetah_dir'"]),
    ("ant_dir", {"impaired": "ankle_9"}, ["'ankle_9'", "ankle_4", "hip_1", "did you mean"]),
    ("ant_dir", {"impaired": "hip_4, ankle_4"}, ["' ankle_4'", "hip_4"]),
    ("cheetah_dir", {"impaired": "foot"}, ["'foot'", "ffoot", "bfoot"]),
    ("cheetah_dir", {"impaired": "ffoot", "impaired_from": 2}, ["impaired_from", "1"]),
    ("cheetah_dir", {"continual": True}, ["episodes = 1", "episodes = 5"]),
    ("hopper_params", {"continual": True, "episodes": 2}, ["continual", 'impaired = "random"']),
    ("half_cheetah", {"continual": True, "episodes": 2}, ["continual", 'impaired = "random"']),
    ("random_hopper", {"scale_min": 0.0}, ["scale_min", "0.0", "> 0"]),
    ("random_hopper", {"scale_min": 3.0}, ["scale_min = 3.0", "scale_max = 2.0"]),
    ("random_walker", {"gravity_min": -1.0}, ["gravity_min", "-1.0", ">= 0"]),
    ("random_reacher", {"scale_max": -1.0}, ["scale_max", "-1.0"]),
    ("hopper_params", {"log_scale_limit": -3.0}, ["log_scale_limit", "-3.0", ">= 0"]),
    ("goal_ant", {"reward": "sparse"}, ["'sparse'", "distance, progress"]),
    ("goal_ant", {"near": 6.0}, ["near = 6.0", "far = 5.0"]),
    ("wheeled", {"reward": "sparse"}, ["'sparse'", "dense, gated"]),
    ("wheeled", {"radius": 0.0}, ["radius", "0.0", "> 0"]),
    ("wheeled", {"ctrl_cost": -0.1}, ["ctrl_cost", "-0.1", ">= 0"]),
    ("ant_ring", {"tolerance": -0.8}, ["tolerance", "-0.8", "> 0"]),
    ("ant_ring", {"engine": "batch"}, ["contact", "engine = 'rows'"]),
    ("block_push", {"reward": "none"}, ["'none'", "dense, gated"]),
    ("block_push", {"continual": True, "episodes": 2}, ["continual"]),
    ("block_push", {"impaired": "gripper_z"}, ["'gripper_z'", "gripper_x", "gripper_turn"]),
    ("point", {"goals": "halfcircle"}, ["goals = 'halfcircle'", "did you mean 'half_circle'"]),
    ("point", {"reward": "sparce"}, ["reward = 'sparce'", "did you mean 'sparse'"]),
    ("point", {"start": "corner"}, ["start = 'corner'", "origin, square"]),
    ("point", {"radius": 0.0}, ["radius = 0.0", "> 0"]),
    ("point", {"radius": math.nan}, ["radius = nan", "finite"]),
    ("point", {"step_size": -0.1}, ["step_size = -0.1", "> 0"]),
    ("point", {"tolerance": 0}, ["tolerance = 0", "> 0"]),
    ("point", {"train_goals": -1}, ["train_goals = -1", ">= 0"]),
    ("point", {"horizon": 10, "episodes": 4}, ["horizon is 10", "4 episodes", "horizon=8"]),
    ("point", {"horizon": 3, "episodes": 4}, ["horizon is 3", "horizon=4"]),
    ("point", {"episodes": 0}, ["episodes is 0", "episodes=1"]),
    ("navigation", {"reward": "l2"}, ["reward = 'l2'", "distance, squared"]),
    ("navigation", {"terminate": 1}, ["terminate = 1", "true or false"]),
]


@pytest.mark.parametrize(("name", "options", "words"), WRONG, ids=lambda value: str(value)[:50])
def test_bad_options_say_value_range_and_cure(
    name: str, options: dict[str, object], words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        make_task(name, **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_class_from_outside() -> None:
    assert make_task("esmeta.tasks.bandit:Task", horizon=7).spec.horizon == 7
