"""Every preset: its name says what it is, it builds, and it takes a step."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from typing import Any

import pytest
import torch
from conftest import ROOT

from esmeta import names
from esmeta.ranks.comm import SelfComm
from esmeta.run import config as configs
from esmeta.run import train
from esmeta.tree import ravel, size_of

PRESETS = sorted(path.stem for path in (ROOT / "runs" / "presets").glob("*.toml"))
OPTIMIZERS = names.known("optimizer")
NAME = re.compile(
    rf"([a-z0-9-]+?)(?:-small)?-(gru-|lstm-)?({'|'.join([*OPTIMIZERS, 'epg', 'metagenrl'])})"
)
SHORT = {"half_cheetah": "cheetah", "walker2d": "walker"}
MEMORIES = {None: "metods", "gru-": "rl2", "lstm-": "lstm"}
LUNAR = [name for name in PRESETS if "LunarLander" in str(configs.load(name))]
HERE = [name for name in PRESETS if name not in LUNAR or importlib.util.find_spec("Box2D")]
"""Those that can be built: the others need an extra that is not installed."""
needs_box2d = pytest.mark.skipif(
    HERE != PRESETS, reason="LunarLander needs Box2D: pip install 'esmeta[box2d]'"
)
ALL = [pytest.param(name, marks=[needs_box2d] if name in LUNAR else []) for name in PRESETS]


def subject(config: configs.Config) -> str:
    """What the first part of a preset's name says: the task, or its environments in order."""
    task = {"name": config.task.name, **config.task.options}
    tables = [*task.get("parts", [task]), *config.objective.options.get("more_tasks", [])]
    lunar = ["LunarLander" in table.get("id", "") for table in tables]
    if len(tables) == 1 and not lunar[0]:
        return config.task.name
    words = [SHORT.get(table["name"], table["name"]) for table in tables]
    return "_".join("lunar" if there else word for there, word in zip(lunar, words, strict=True))


def test_there_are_presets_and_names_agree() -> None:
    assert configs.preset_names() == PRESETS
    assert "harlow-ppo" in PRESETS and len(PRESETS) >= 39
    rows = [
        "cheetah-lunar", "cheetah-lunar-small", "cheetah-lunar-walker-ant", "hopper-lunar", "lunar",
        "lunar-hopper-walker-ant",
    ]  # fmt: skip
    learned = [f"{row}-metagenrl" for row in rows]
    assert sorted(["cheetah-lunar-epg", "cheetah-lunar-lstm-ppo", *learned]) == LUNAR


@pytest.mark.parametrize("name", ALL)
def test_a_preset_builds_and_its_name_is_true(name: str) -> None:
    config = configs.resolve(configs.load(name))
    match = NAME.fullmatch(name)
    assert match, (
        f"{name}: name presets <task>-<optimizer>, <task>-gru-<optimizer>, <task>-lstm-<optimizer> "
        "or <task>-<objective>"
    )
    learned = config.objective.name != "return"
    last = config.objective.name if learned else config.optimizer.name
    assert names.canonical(match[1]) == subject(config) and match[3] == last
    assert config.policy.name == ("none" if learned else MEMORIES[match[2]])
    again = configs.resolve(configs.load(name), [])
    assert configs.digest(again) == configs.digest(config)
    text = (ROOT / "runs" / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("#"), f"{name}: the first line says what it is"
    parts = train.build(config)
    assert ravel(parts.theta).shape == (1, size_of(parts.objective.shapes))
    if parts.objective.policy is not None:
        assert (parts.objective.policy.value is not None) == parts.optimizer.gradient
    assert torch.equal(ravel(parts.optimizer.theta(parts.state)), ravel(parts.theta))
    minibatches = getattr(parts.optimizer, "minibatches", 1)
    assert minibatches <= config.trials, "one process must be able to run it"


def tiny(name: str) -> configs.Config:
    """The preset with everything that costs time made small, and all else as it is."""
    raw = configs.load(name)
    for part in raw["task"].get("parts", ()):
        part |= {"episodes": 2} if "episodes" in part else {}
        part |= {"episode_steps": 3} if "episode_steps" in part else {}
    if "parts" in raw["task"]:
        raw["task"]["horizon"] = 6  # what two episodes share
    config = configs.resolve(raw)
    small: dict[str, Any] = {
        "task.trials": 8,
        "task.horizon": 6,
        "objective.period": 3,
        "objective.buffer": 21,
        "objective.minibatch": 3,
        "objective.hidden": [4],
        "objective.test_steps": 6,
        "objective.agents": 2,
        "objective.update_after": 6,
        "objective.snippet": 3,
        "objective.batch": 2,
        "objective.extra": 1,
        "objective.critic_batch": 4,
        "objective.capacity": 12,
        "policy.neurons": 5,
        "policy.hidden": [4],
        "policy.head_hidden": 4,
        "optimizer.popsize": 6,
        "optimizer.window": 2,
        "run.tensorboard": "false",
    }
    if config.objective.name == "metagenrl":
        small |= {"task.episode_steps": 6, "objective.period": 2}
    for section in ("task", "policy", "objective", "optimizer"):
        instance = getattr(config, section).instance
        known = {f.name for f in dataclasses.fields(instance)} if instance else set()
        for key in [key for key in small if key.startswith(f"{section}.")]:
            if key.partition(".")[2] not in known | {"trials"}:
                del small[key]
    return configs.resolve(raw, [f"{k}={v}" for k, v in small.items()])


def kind_of(name: str) -> tuple[str, ...]:
    """What ranks share work by: tasks only differ in what is scored."""
    config = configs.resolve(configs.load(name))
    return config.policy.name, config.objective.name, config.optimizer.name


KINDS = list({kind_of(name): name for name in HERE}.values())


@pytest.mark.parametrize("name", ALL)
def test_a_preset_takes_a_step(name: str) -> None:
    parts = train.build(tiny(name))
    before = ravel(parts.theta)
    state, metrics = parts.optimizer.step(parts.state, parts.objective, SelfComm(), parts.rng)
    after = ravel(parts.optimizer.theta(state))
    assert after.shape == before.shape and bool(torch.isfinite(after).all())
    assert metrics["env_steps"] > 0
    # A score of the task may be undefined in so short a trial, what the optimizer says may not.
    undefined = {key for key, value in metrics.items() if not math.isfinite(value)}
    assert all(key.startswith(("accuracy_", "late")) for key in undefined), undefined
    # Equal returns of all members tell nothing; otherwise theta moves.
    assert torch.equal(after, before) == bool(metrics.get("flat", 0.0))


@pytest.mark.mpi
def test_presets_of_every_kind_step_on_two_ranks(mpirun: Any) -> None:
    done = mpirun(2, ROOT / "tests" / "mpi" / "preset_steps.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(KINDS)} presets on 2 ranks"
