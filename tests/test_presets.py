"""Every preset: its name says what it is, it builds, and it takes a step."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from conftest import ROOT

from esmeta import config as configs
from esmeta import train
from esmeta.comm import SelfComm
from esmeta.tree import ravel, size_of

PRESETS = sorted(path.stem for path in (ROOT / "runs" / "presets").glob("*.toml"))
OPTIMIZERS = configs.module_names("esmeta.optimizers")
NAME = re.compile(rf"([a-z0-9-]+?)-(gru-)?({'|'.join([*OPTIMIZERS, 'epg', 'metagenrl'])})")


def test_there_are_presets_and_names_agree() -> None:
    assert configs.preset_names() == PRESETS
    assert "harlow-ppo" in PRESETS and len(PRESETS) >= 39


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_and_its_name_is_true(name: str) -> None:
    config = configs.resolve(configs.load(name))
    match = NAME.fullmatch(name)
    assert match, (
        f"{name}: name presets <task>-<optimizer>, <task>-gru-<optimizer> or <task>-<objective>"
    )
    learned = config.objective.name != "return"
    last = config.objective.name if learned else config.optimizer.name
    assert configs.canonical(match[1]) == config.task.name and match[3] == last
    assert config.policy.name == ("none" if learned else "rl2" if match[2] else "metods")
    again = configs.resolve(configs.load(name), [])
    assert configs.digest(again) == configs.digest(config)
    text = (ROOT / "runs" / "presets" / f"{name}.toml").read_text(encoding="utf-8")
    assert text.startswith("#"), f"{name}: the first line says what it is"
    parts = train.build(config)
    assert ravel(parts.theta).shape == (1, size_of(parts.objective.shapes))
    if parts.policy is not None:
        assert parts.policy.has_value == parts.optimizer.gradient  # type: ignore[attr-defined]
    assert torch.equal(ravel(parts.optimizer.theta(parts.state)), ravel(parts.theta))
    minibatches = getattr(parts.optimizer, "minibatches", 1)
    assert minibatches <= config.trials, "one process must be able to run it"


def tiny(name: str) -> configs.Config:
    """The preset with everything that costs time made small, and all else as it is."""
    config = configs.resolve(configs.load(name))
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
        small |= {"task.episodes": 2, "objective.period": 2}
    for section in ("task", "policy", "objective", "optimizer"):
        instance = getattr(config, section).instance
        known = {f.name for f in dataclasses.fields(instance)} if instance else set()
        for key in [key for key in small if key.startswith(f"{section}.")]:
            if key.partition(".")[2] not in known | {"trials"}:
                del small[key]
    return configs.resolve(configs.load(name), [f"{k}={v}" for k, v in small.items()])


@pytest.mark.parametrize("name", PRESETS)
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
def test_every_preset_steps_on_two_ranks(mpirun: Any) -> None:
    done = mpirun(2, ROOT / "tests" / "mpi" / "preset_steps.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{len(PRESETS)} presets on 2 ranks"
