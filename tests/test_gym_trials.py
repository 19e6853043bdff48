"""Gymnasium's environments in trials of so many steps: episodes begin anew until the last one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_env_gym import needs_box2d, plain_loop, random_actions

from esmeta.rng import Rng
from esmeta.tasks import make_task


@pytest.mark.parametrize(
    ("name", "kwargs", "limit"),
    [
        ("CartPole-v1", {}, 25),
        ("Pendulum-v1", {}, 7),
        pytest.param("LunarLander-v3", {"continuous": True}, 1000, marks=needs_box2d),
    ],
)
def test_trials_of_so_many_steps_equal_a_plain_loop(
    name: str, kwargs: dict[str, Any], limit: int
) -> None:
    """Episodes begin anew as in trials with a number of them, until the last step cuts one."""
    batch, horizon = 3, 300
    task = make_task("gym", id=name, kwargs=kwargs, horizon=horizon, episode_steps=limit)
    assert task.spec.horizon == horizon
    assert task.spec.episodes_per_trial == -(-horizon // min(limit, horizon))
    tasks, actions = task.sample(batch, "train", Rng(5)), random_actions(task, horizon, batch)
    draws = Rng(6).fold("dynamics").integers(tasks.index, horizon, 2**31)
    seeds = ((draws + tasks.data["seed"].unsqueeze(-1)) % 2**31)[0].tolist()
    env = task.make_env("cpu")
    state, ts = env.reset(tasks, Rng(6))
    seen = [ts]
    for action in actions:
        state, ts = env.step(state, action)
        seen.append(ts)
    for b in range(batch):
        theirs = actions[:, 0, b].numpy()
        if theirs.ndim == 2:
            theirs = np.clip(theirs, -1, 1) * (2 if name == "Pendulum-v1" else 1)
        rows, last = plain_loop(name, kwargs, seeds[b], limit, list(theirs))
        for t, (obs, reward, terminated, truncated) in enumerate(rows[:-1]):
            assert np.array_equal(seen[t].obs[0, b].numpy(), obs)
            assert float(seen[t].reward[0, b]) == reward
            assert bool(seen[t].terminated[0, b]) == terminated
            assert bool(seen[t].truncated[0, b]) == truncated
            assert bool(seen[t].new_trial[0, b]) == (t == 0)
        _, reward, terminated, _ = rows[-1]
        end = seen[horizon]
        assert bool(end.new_trial[0, b]) and float(end.reward[0, b]) == reward
        assert bool(end.terminated[0, b]) == terminated
        assert bool(end.truncated[0, b]) != terminated
        assert np.array_equal(env.final_obs(state)[0, b].numpy(), last[-1])
        ends = sum(row[2] or row[3] for row in rows[:-1])
        done = ends + 1
        assert int(env.metrics(state)["episodes"][0, b]) == done and ends >= 1
    assert set(env.metrics(state)) == {"length", "episodes", "terminated"}
    assert env.metrics(state)["length"].eq(horizon).all()


def test_references_of_such_trials_are_those_of_episodes() -> None:
    task = make_task("gym", horizon=1500, episode_steps=500)
    one = make_task("gym", horizon=500)
    assert task.reference.best == 3 * 475
    assert task.reference.random == 3 * one.reference.random
    assert task.single(200) == make_task("gym", horizon=200) and one.single(7) is one
