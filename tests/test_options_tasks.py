"""Every option of every task changes what it says it changes, and nothing that it does not.

A row gives an option two values and says in what their trials differ: ``tasks`` (what a trial is
about; of the splits ``train`` and ``test``), ``obs``, ``reward``, ``ends`` (of trials),
``episodes`` (where they begin), ``metrics``, ``spec``, ``model`` (what is simulated), or in how it
is: ``engine``, ``threads``, simulators in use (``worlds``) and allowed (``bound``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from test_options import Row, compare

from esmeta import names
from esmeta.rng import Rng
from esmeta.tasks import SPLITS, make_task, task_names
from esmeta.types import Discrete

TRIALS, MEMBERS = 6, 2


class Told(gymnasium.Env[Any, Any]):
    """Shows what it was made with and what its reset was told; never ends."""

    observation_space = gymnasium.spaces.Box(-1e9, 1e9, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, level: float = 0.0) -> None:
        self.level, self.told = level, -1.0

    def _seen(self) -> np.ndarray:
        return np.array([self.level, self.told], dtype=np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.told = float((options or {}).get("number", -1))
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._seen(), 1.0, False, False, {}


gymnasium.register("ToldOptions-v0", entry_point=f"{__name__}:Told")
gymnasium.register("Told8-v0", entry_point=f"{__name__}:Told", max_episode_steps=8)
gymnasium.register("Told9-v0", entry_point=f"{__name__}:Told", max_episode_steps=9)


def bits(value: Any) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()


@functools.cache
def seen(name: str, options: str) -> dict[str, Any]:
    """What trials of a task show under actions that are always the same."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(options).items()}
    threads = set(threading.enumerate())
    task: Any = make_task(name, **given)
    spec = task.spec
    env = task.make_env("cpu")
    index = torch.arange(TRIALS)
    drawn = {split: task.sample(index, split, Rng(3)) for split in SPLITS}
    state, ts = env.reset(drawn["train"], Rng(4), MEMBERS)
    steps, generator = [ts], torch.Generator().manual_seed(0)
    for _ in range(min(spec.horizon, 40)):
        shape = (MEMBERS, TRIALS)
        if isinstance(spec.action, Discrete):
            action = torch.randint(0, spec.action.n, shape, generator=generator)
        else:
            action = 2 * torch.rand(*shape, 8, generator=generator)[..., : spec.action.size] - 1
        if name == "navigation":  # straight to the goal, as no random walk ends there
            action = 10 * (drawn["train"].data["goal"] - ts.obs)
        state, ts = env.step(state, action)
        steps.append(ts)
    model = getattr(env, "model", None)
    return {
        "tasks": [[bits(leaf) for leaf in tasks.data.values()] for tasks in drawn.values()],
        "train": [bits(leaf) for leaf in drawn["train"].data.values()],
        "test": [bits(leaf) for leaf in drawn["test"].data.values()],
        "obs": [bits(ts.obs) for ts in steps],
        "reward": [bits(ts.reward) for ts in steps],
        "ends": [bits(ts.new_trial) for ts in steps],
        "episodes": [bits(ts.new_episode) for ts in steps],
        "metrics": {k: bits(v.nan_to_num(-7)) for k, v in env.metrics(state).items()},
        "spec": repr(spec),
        "model": [] if model is None else [
            model.geom_margin.tobytes(), int(model.opt.integrator), model.opt.timestep],
        "engine": getattr(env, "_engine", None),
        "threads": len(set(threading.enumerate()) - threads),
        "worlds": len(getattr(env, "_worlds", ())),
        "bound": getattr(env, "most_worlds", None),
    }  # fmt: skip


SIMULATED = {
    "horizon": Row(9, 12, "ends spec"),
    "episodes": Row(2, 3, "episodes spec", "ends model"),
    "episode_steps": Row(4, 6, "episodes", "ends model"),
    "engine": Row("batch", "rows", "engine", "obs reward ends"),
    "threads": Row(2, 3, "threads", "obs reward", {"engine": "rows"}),
    "impaired_from": Row(2, 1, "obs", "episodes", {"episodes": 2}),
    "continual": Row(True, False, "tasks", "episodes model", {"episodes": 2}),
}
BODY = {"horizon": 12}
ANT = BODY | {"engine": "rows"}
TOUCHING = {"contact": "mj", "horizon": 40}  # until a foot is on the ground
PULL = {"horizon": 8, "episode_steps": 4}
POINT = {"horizon": 12}
# One table per module: what holds for all of its rows, and its rows.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Row]]] = {
    "bandit": (
        {"horizon": 12},
        {
            "arms": Row(3, 4, "tasks spec", "ends", {"reward_probability": 1.0}),
            "reward_probability": Row(0.7, 1.0, "reward", "ends"),
            "horizon": Row(7, 9, "ends spec"),
        },
    ),
    "harlow": (
        {"horizon": 20},
        {
            "horizon": Row(18, 15, "ends"),
            "presentations": Row(2, 1, "metrics"),
            "cells": Row(7, 9, "obs"),
            "mirrored": Row(True, False, "tasks", "spec"),
            "forfeit": Row(0.5, 2.0, "reward", "obs ends tasks"),
        },
    ),
    "maze": (
        {"horizon": 24},
        {
            "size": Row(5, 6, "tasks obs", "ends"),
            "horizon": Row(11, 9, "ends spec"),
            "generator": Row("carve", "pillars", "tasks", "ends"),
            "avoid_target": Row(True, False, "obs", "ends", {"size": 4}),
        },
    ),
    "displacement": (
        {"horizon": 12, "episode_steps": 4},
        {
            "horizon": Row(8, 16, "ends spec"),
            "episode_steps": Row(3, 6, "episodes", "ends train"),
            "train": Row("left", "all", "train", "test ends"),
            "test": Row("right", "all", "test", "train obs"),
            "width": Row(90.0, 120.0, "train test"),
            "strata": Row(2, 3, "train", "ends"),
            "mirrored": Row(True, False, "train", "ends",
                            {"train": "horizontal", "test": "vertical"}),
            "reward_scale": Row(2.0, 10.0, "reward", "obs train"),
        },
    ),
    "double_integrator": (
        PULL,
        {
            "horizon": Row(12, 4, "ends spec"),
            "episode_steps": Row(2, 8, "episodes", "ends tasks"),
            "mass": Row((0.2, 0.4), (2.0, 3.0), "tasks obs", "ends"),
        },
    ),
    "pendulum": (
        PULL,
        {
            "horizon": Row(12, 4, "ends spec"),
            "episode_steps": Row(2, 8, "episodes", "ends tasks"),
            "gravity": Row((7.0, 8.0), (11.0, 12.0), "tasks obs", "ends"),
            "length": Row((0.7, 0.8), (1.2, 1.3), "tasks obs", "ends"),
            "repeat": Row(2, 3, "obs reward", "ends tasks"),
        },
    ),
    "navigation": (
        {"horizon": 24},
        {
            "reward": Row("squared", "distance", "reward", "obs ends"),
            "horizon": Row(8, 12, "ends spec"),
            "episodes": Row(2, 3, "episodes spec", "tasks"),
            "terminate": Row(False, True, "ends", "tasks"),
        },
    ),
    "point": (
        POINT,
        {
            "goals": Row("circle", "square", "tasks", "ends"),
            "reward": Row("sparse", "gated", "reward", "obs tasks"),
            "radius": Row(0.5, 2.0, "tasks", "ends"),
            "tolerance": Row(0.4, 1.2, "reward", "obs tasks", {"reward": "sparse"}),
            "step_size": Row(0.2, 0.3, "obs", "tasks ends"),
            "start": Row("square", "origin", "obs", "tasks ends"),
            "horizon": Row(6, 8, "ends spec"),
            "episodes": Row(2, 3, "episodes spec", "ends tasks"),
            "train_goals": Row(1, 2, "train", "test"),
        },
    ),
    "gym": (
        {"id": "ToldOptions-v0", "horizon": 12},
        {
            "id": Row("Told8-v0", "Told9-v0", "ends spec", "", {"horizon": 0}),
            "kwargs": Row({"level": 2.0}, {"level": 3.0}, "obs", "ends spec"),
            "horizon": Row(6, 8, "ends spec"),
            "episodes": Row(2, 3, "episodes spec", "ends"),
            "episode_steps": Row(3, 4, "episodes", "ends"),
            "task_key": Row("number", "other", "obs", "ends"),
            "most_worlds": Row(20, 30, "bound", "obs worlds"),
        },
    ),
    "mixed": (
        {"horizon": 6, "parts": [{"name": "pendulum", "episode_steps": 3},
                                 {"name": "double_integrator", "episode_steps": 3}]},
        {
            "parts": Row([{"name": "pendulum", "episode_steps": 3}],
                         [{"name": "pendulum", "episode_steps": 3, "factor": 3.0}],
                         "reward", "obs ends"),
            "test_parts": Row([{"name": "pendulum", "episode_steps": 3, "gravity": [7.0, 8.0],
                                "label": "p"}],
                              [{"name": "pendulum", "episode_steps": 3, "gravity": [8.0, 9.0],
                                "label": "p"}],
                              "test", "reward"),
            "horizon": Row(6, 7, "spec"),
            "obs_size": Row(5, 6, "spec obs", "reward"),
            "action_size": Row(2, 3, "spec", "ends"),
        },
    ),
    "half_cheetah": (BODY, {"horizon": Row(9, 12, "ends spec")}),
    "cheetah_dir": (
        BODY,
        SIMULATED
        | {
            "impaired": Row("bfoot", "ffoot", "obs", "ends"),
            "obs_set": Row("gym", "rllab", "obs spec", "reward"),
            "physics": Row("rllab", "gym", "obs reward", "tasks"),
            "ctrl_cost": Row(0.5, 2.0, "reward", "obs tasks"),
            "mirrored": Row(True, False, "tasks", "ends"),
        },
    ),
    "cheetah_vel": (
        BODY,
        {
            "speed_min": Row(0.5, 1.0, "tasks reward", "obs"),
            "speed_max": Row(1.0, 3.0, "tasks reward", "obs"),
        },
    ),
    "ant": (ANT, {"contact": Row("zero", "mj", "obs", "ends")}),
    "ant_dir": (
        ANT,
        {
            "obs_set": Row("gym", "compact", "spec", "reward"),
            "physics": Row("rllab", "gym", "model reward"),
            "contact": Row("mj", "zero", "obs", "tasks"),
            "ctrl_cost": Row(0.5, 2.0, "reward", "obs tasks"),
            "contact_cost": Row(0.5, 2.0, "reward", "obs tasks", TOUCHING),
            "alive_bonus": Row(1.0, 2.0, "reward", "obs ends"),
            "terminate": Row(False, True, "ends", "tasks", {"z_min": 0.74}),
            "z_min": Row(0.7, 0.75, "ends", "tasks"),
            "z_max": Row(0.7, 0.75, "ends", "tasks"),
            "directions": Row("circle", "binary", "tasks", "obs"),
            "mirrored": Row(True, False, "tasks", "spec"),
            "contact_rule": Row("native", "legacy", "model"),
            "integrator": Row("euler", "model", "model obs"),
        },
    ),
    "ant_goal": (
        ANT,
        {
            "obs_set": Row("rllab", "compact", "spec", "reward"),
            "ctrl_cost": Row(0.5, 2.0, "reward", "obs tasks"),
            "alive_bonus": Row(1.0, 2.0, "reward", "obs ends"),
            "terminate": Row(True, False, "ends", "tasks", {"z_min": 0.74}),
            "goals": Row("square", "disc", "tasks", "ends"),
            "reach": Row(1.0, 2.0, "tasks reward", "ends"),
            "bonus": Row(1.0, 2.0, "reward", "obs tasks"),
        },
    ),
    "ant_ring": (
        ANT,
        {
            "physics": Row("gym", "rllab", "obs reward", "tasks"),
            "contact": Row("zero", "mj", "obs", "tasks", {"horizon": 40}),
            "reward": Row("gated", "dense", "reward", "obs tasks"),
            "radius": Row(1.0, 3.0, "tasks reward"),
            "tolerance": Row(0.5, 2.5, "reward", "obs tasks", {"reward": "gated"}),
            "bonus": Row(1.0, 2.0, "reward", "obs tasks"),
        },
    ),
    "ant_vel": (
        ANT,
        {
            "speed_min": Row(0.5, 1.0, "tasks reward", "obs"),
            "speed_max": Row(1.0, 4.0, "tasks reward", "obs"),
        },
    ),
    "goal_ant": (
        ANT,
        {
            "obs_set": Row("rllab", "compact", "spec", "reward"),
            "contact_cost": Row(0.5, 2.0, "reward", "obs tasks", TOUCHING),
            "alive_bonus": Row(1.0, 2.0, "reward", "obs ends"),
            "terminate": Row(True, False, "ends", "tasks", {"z_min": 0.74}),
            "reward": Row("progress", "distance", "reward", "obs tasks"),
            "near": Row(1.0, 3.0, "tasks reward"),
            "far": Row(6.0, 9.0, "tasks reward"),
        },
    ),
    "block_push": (
        BODY,
        {
            "horizon": Row(9, 12, "ends spec"),
            "reward": Row("gated", "dense", "reward", "obs tasks"),
            "tolerance": Row(0.01, 9.0, "reward", "obs tasks", {"reward": "gated"}),
        },
    ),
    "directional_hopper": (
        BODY,
        {
            "horizon": Row(9, 12, "ends spec"),
            "mirrored": Row(True, False, "tasks", "spec"),
        },
    ),
    "hopper_params": (BODY, {"log_scale_limit": Row(1.0, 2.0, "tasks obs", "spec")}),
    "random_hopper": (
        BODY,
        {
            "horizon": Row(9, 12, "ends spec"),
            "scale_min": Row(0.6, 0.9, "tasks obs", "spec"),
            "scale_max": Row(1.1, 1.6, "tasks obs", "spec"),
            "gravity_min": Row(3.0, 5.0, "tasks obs", "spec"),
            "gravity_max": Row(8.0, 12.0, "tasks obs", "spec"),
        },
    ),
    "random_reacher": (
        BODY,
        {
            "horizon": Row(9, 12, "ends spec"),
            "scale_min": Row(0.6, 0.9, "tasks obs", "spec"),
            "scale_max": Row(1.1, 1.6, "tasks obs", "spec"),
        },
    ),
    "wheeled": (
        BODY,
        {
            "reward": Row("gated", "dense", "reward", "obs tasks"),
            "radius": Row(1.0, 3.0, "tasks reward", "obs"),
            "tolerance": Row(0.5, 2.5, "reward", "obs tasks", {"reward": "gated"}),
            "ctrl_cost": Row(0.5, 2.0, "reward", "obs tasks"),
        },
    ),
}  # fmt: skip
# Modules in which rows of a base class stand again, as what they reach is the module's own.
ALSO = {
    "cheetah_vel": {"ctrl_cost", "obs_set"},
    "ant_ring": {"ctrl_cost", "contact_cost", "alive_bonus", "z_min"},
    "ant_vel": {"ctrl_cost", "contact_cost", "alive_bonus", "z_min", "z_max"},
    "ant_goal": {"contact_cost", "physics"},
    "goal_ant": {"ctrl_cost", "physics"},
    "walker_params": {"log_scale_limit"},
    "random_walker": {"scale_min", "scale_max", "gravity_min", "gravity_max"},
    "walker2d": {"horizon"},
    "hopper": {"horizon"},
    "half_cheetah": {"episodes", "episode_steps"},
    "wheeled": {"episodes", "episode_steps", "continual", "horizon"},
    "random_reacher": {"episodes", "episode_steps"},
    "block_push": {"episodes", "episode_steps"},
    "ant_dir": {"horizon", "episodes", "episode_steps", "continual"},
}


def owner(name: str, option: str) -> tuple[str, str]:
    """The class that defines an option last, for a task."""
    cls = names.load("task", name)
    found = next(c for c in cls.__mro__ if option in c.__dict__.get("__annotations__", {}))
    return found.__module__, option


def options_of(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(names.load("task", name)) if field.init]


BY_OWNER = {owner(name, option): (name, row) for name, (_, rows) in ROWS.items()
            for option, row in rows.items()}  # fmt: skip
CASES = [(name, option, row) for name, (_, rows) in ROWS.items() for option, row in rows.items()]
CASES += [(name, option, BY_OWNER[owner(name, option)][1]) for name, more in ALSO.items()
          for option in sorted(more)]  # fmt: skip


def test_no_option_is_left_out() -> None:
    missing = {
        owner(name, option)
        for name in task_names()
        for option in options_of(name)
        if owner(name, option) not in BY_OWNER
    }
    assert not missing, f"give these a row in ROWS: {sorted(missing)}"
    for name, (_, rows) in ROWS.items():
        assert set(rows) <= set(options_of(name)), name


def default_of(name: str, option: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(names.load("task", name))}
    return fields[option].default


@pytest.mark.parametrize(("name", "option", "row"), CASES, ids=lambda v: str(v)[:40])
def test_an_option_changes_what_it_says(name: str, option: str, row: Row) -> None:
    common = {"horizon": 12} | ROWS.get(name, (BODY, {}))[0]
    if option == "engine":
        common.pop("engine", None)
    if "impaired_from" == option:
        common["impaired"] = "bfoot"

    def results(given: dict[str, Any]) -> dict[str, Any]:
        return seen(name, json.dumps(common | given, sort_keys=True))

    compare(results, option, row, default_of(name, option))
