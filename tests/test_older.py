"""Runs that an earlier version wrote are gone on with as if they were of today."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_metagenrl_runs import after, parts

from esmeta.ranks.comm import SelfComm
from esmeta.rl.replay import Replay
from esmeta.run import config as configs
from esmeta.run import train
from esmeta.tree import ravel
from esmeta.types import State


def as_before(saved: State, replay: Replay) -> State:
    """Agents of one environment in the words of before: rows of a replay, Adam leaf by leaf."""
    state = [saved.pop(f"state.{i}") for i in range(sum(k.startswith("state.") for k in saved))]
    ts = [saved.pop(f"ts.{i}") for i in range(8)]
    count, updates, learned = state[0], state[1], state[8:]
    number = torch.arange(replay.added - replay.size, replay.added)
    order = (number % replay.capacity).argsort()
    now, following = number % (replay.capacity + 1), (number + 1) % (replay.capacity + 1)
    rows = (replay.obs[:, now], replay.action[:, now], replay.reward[:, now],
            replay.obs[:, following], replay.terminated[:, now], replay.ended[:, now],
            replay.time[:, now])  # fmt: skip
    networks, moments = learned[:-6], learned[-6:]
    leaves = networks[: len(networks) // 2]
    policy = len(leaves) // 3
    first, second, steps = [], [], []
    for own, (one, two, done) in ((leaves[:policy], moments[:3]), (leaves[policy:], moments[3:])):
        sizes = [leaf[0].numel() for leaf in own]
        for kept, flat in ((first, one), (second, two)):
            split = flat.split(sizes, dim=1)
            kept += [x.reshape(leaf.shape) for x, leaf in zip(split, own, strict=True)]
        steps += [done] * len(own)
    written = {"replay": [leaf[:, order] for leaf in rows], "where": ts,
               "learned": [*networks, *first, *second, *steps]}  # fmt: skip
    named = {f"{k}.{i}": leaf for k in written for i, leaf in enumerate(written[k])}
    return saved | named | {"count": count, "updates": updates}


@pytest.mark.parametrize("capacity", [20, 40])  # the replay has been written over, or not
def test_agents_of_before_go_on_bit_for_bit(capacity: int) -> None:
    built = parts(f"objective.capacity={capacity}")
    optimizer: Any = built.optimizer
    objective: Any = built.objective
    state = optimizer.gather(after(built, 7), objective, SelfComm())
    saved = optimizer.state_dict(state)
    replay = state.agents[0].life.state.replay
    assert replay.added == 24
    own = {name.removeprefix("0/"): leaf for name, leaf in saved["agents"].items()}
    written = as_before(own, replay)
    assert {"count", "updates", "learned.89", "replay.6", "where.7", "env.0"} <= set(written)
    assert not any(name.startswith(("state.", "ts.")) for name in written)
    oldest = {f"0/{name}": leaf.clone() for name, leaf in written.items()}
    later = {name: leaf for name, leaf in saved["agents"].items() if name != "0/lived"}
    states = [
        optimizer.load_state_dict(saved | {"agents": x}, built.theta) for x in (oldest, later)
    ]
    expected = after(built, 6, state)
    known = objective.save(expected.agents)
    for again in (after(built, 6, old) for old in states):
        for one, two in ((again.theta, expected.theta), (again.adam.second, expected.adam.second)):
            assert torch.equal(one, two)
        for name, leaf in objective.save(again.agents).items():
            assert torch.equal(leaf.nan_to_num(-7), known[name].nan_to_num(-7)), name


@pytest.mark.parametrize("name", ["a2c", "ppo"])
def test_gradient_steps_of_before_are_gone_on_with(name: str) -> None:
    built = train.build(configs.resolve(configs.load("bandit-ppo"), [f"optimizer.name={name}"]))
    flat = ravel(built.theta)[0]
    saved: dict[str, Any] = {
        "theta": flat + 1.0, "first_moment": flat * 0.1, "second_moment": flat.square(),
        "adam_steps": 12, "update": 3,
    }  # fmt: skip
    state = built.optimizer.load_state_dict(saved, built.theta)
    assert torch.equal(ravel(built.optimizer.theta(state))[0], flat + 1.0) and state.update == 3
    written = built.optimizer.state_dict(state)
    assert list(written) == list(saved)
    assert all(torch.equal(torch.as_tensor(written[k]), torch.as_tensor(saved[k])) for k in saved)
    # The next step is Adam's thirteenth, from those moments.
    gradient = torch.linspace(-1.0, 1.0, len(flat))
    moved = ravel(built.optimizer.theta(state.along(gradient[None], 0.01, 1e-8)))[0]
    first = 0.9 * saved["first_moment"] + 0.1 * gradient
    second = 0.999 * saved["second_moment"] + 0.001 * gradient.square()
    step = first / (1 - 0.9**13) / ((second / (1 - 0.999**13)).sqrt() + 1e-8)
    torch.testing.assert_close(moved, flat + 1.0 - 0.01 * step, rtol=1e-5, atol=1e-6)
