"""Trials of so many steps: bodies that fall begin anew, and all else stays as it was."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from test_bad_input import assert_says
from test_mujoco import ENGINES, actions, play
from torch import Tensor

from esmeta import PopulationEvaluator, make_policy
from esmeta.envs import mujoco
from esmeta.envs.locomotion import Simulated
from esmeta.envs.mujoco import MujocoEnv, State
from esmeta.learners import ppo
from esmeta.lives import AgentLives, TrialLives
from esmeta.objectives.epg import Objective
from esmeta.rng import Rng
from esmeta.tasks import make_task, single, task_names
from esmeta.tree import leaves_of
from esmeta.types import Tasks, TimeStep

BODIES = [name for name in task_names() if isinstance(make_task(name), Simulated)]


def lived(
    horizon: int, trials: int = 4, *, acts: Tensor | None = None, **options: object
) -> tuple[MujocoEnv, list[TimeStep], list[State]]:
    """Random hoppers for the whole of their trials and three steps more, by two members."""
    options = {"episode_steps": 70, **options}
    task = make_task("random_hopper", horizon=horizon, **options)
    env = task.make_env("cpu")
    acts = actions(horizon + 3, 2, trials, 3) if acts is None else acts
    _, steps, states = play(task, env, acts, task.sample(trials, "train", Rng(0)))
    return env, steps, states


def motion(env: MujocoEnv, state: State) -> Tensor:
    """Positions and velocities ``[P, B, nq + nv]``."""
    return state.rows[..., 1 : 1 + env.model.nq + env.model.nv]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trial_is_its_steps_in_however_many_episodes(engine: str) -> None:
    horizon = 350
    env, steps, states = lived(horizon, engine=engine)
    times, falls = set(), 0
    for member in range(2):
        for b in range(4):
            at = [bool((ts.terminated | ts.truncated)[member, b]) for ts in steps]
            ends = [t for t, ended in enumerate(at) if ended]
            times.add(tuple(ends))
            assert ends[-1] == horizon and not any(at[horizon + 1 :])
            for t, span in zip(ends, np.diff([0, *ends]), strict=True):
                fell = bool(steps[t].terminated[member, b])
                falls += fell
                assert span == 70 or fell or t == horizon and steps[t].truncated[member, b]
                assert span <= 70 and steps[t].new_episode[member, b]
                assert bool(steps[t].new_trial[member, b]) == (t == horizon)
            begun = [t for t, ts in enumerate(steps[1:horizon], 1) if ts.new_episode[member, b]]
            assert begun == ends[:-1]
            for t in begun:  # the step that ends one shows the start of the next
                here = motion(env, states[t])[member, b]
                assert torch.equal(steps[t].obs[member, b, :5], here[1:6].float())
                assert states[t].time[member, b] == 0
    assert len(times) == 8 and falls > 16, "bodies must fall at different times"
    for ts in steps[horizon + 1 :]:
        assert ts.new_trial.all() and not ts.reward.any()
    assert torch.equal(motion(env, states[-1]), motion(env, states[horizon]))


def test_rewards_are_those_of_the_episodes_by_themselves() -> None:
    # The fall is paid for, and physics remembers nothing of the episode before.
    env, steps, states = lived(150)
    begun = [t for t in range(1, 150) if steps[t].new_episode[1, 2]]
    first, second = begun[:2]
    task = make_task("random_hopper", horizon=60)
    tasks = task.sample(torch.tensor([2, 2]), "train", Rng(0))
    other = task.make_env("cpu")
    state, _ = other.reset(tasks, Rng(1))
    worlds = other._at(torch.Size((1, 2)), state.changes)
    there = motion(env, states[first])[1, 2].expand(2, -1)
    worlds.restart(there, torch.ones(2, dtype=torch.bool))
    state = state._replace(
        rows=worlds.saved(torch.Size((1, 2))), place=there[:, :1].reshape(1, 2, 1)
    )
    for t in range(first, second):
        state, ts = other.step(state, actions(153, 2, 4, 3)[t, 1, 2].expand(1, 2, 3))
        assert torch.equal(ts.reward[0, 0], steps[t + 1].reward[1, 2])
    assert ts.terminated.all() and steps[second].terminated[1, 2]


def test_where_an_episode_starts_depends_on_its_number_and_task_alone() -> None:
    def starts(env: MujocoEnv, steps: list[TimeStep], states: list[State], member: int, b: int):
        begun = [t for t, ts in enumerate(steps[:horizon]) if ts.new_episode[member, b]]
        times.add(tuple(begun))
        return [tuple(motion(env, states[t])[member, b].tolist()) for t in begun]

    horizon, times = 200, set()
    whole = lived(horizon)
    task = make_task("random_hopper", horizon=horizon, episode_steps=70)
    part, env = task.sample(torch.tensor([3, 1]), "train", Rng(0)), task.make_env("cpu")
    _, *alone = play(task, env, -actions(horizon, 1, 2, 3), part)
    seen = [starts(*whole, member, 3) for member in range(2)]
    seen.append(starts(env, *alone, 0, 0))
    assert len(times) == 3, "they must not fall at the same times"
    for three in zip(*seen, strict=False):
        assert len(set(three)) == 1, "members and batch mates meet the same starts"
    longest = max(seen, key=len)
    assert len(set(longest)) == len(longest) > 3, "every episode has its own"
    assert not set(longest) & set(starts(*whole, 0, 1)), "and every trial"
    _, *later = play(task, env, actions(30, 1, 2, 3), part)
    state, _ = env.reset(part, Rng(2))
    assert not torch.equal(motion(env, state), motion(env, later[1][0])), "and every seed"


def test_starts_are_noise_about_the_pose() -> None:
    env, steps, states = lived(200, trials=64)
    begun = torch.stack([ts.new_episode[0] & ~ts.new_trial[0] for ts in steps])
    found = torch.stack([motion(env, state)[0] for state in states])[begun]
    noise = found - env._pose
    assert len(noise) > 150
    assert float(noise.abs().max()) <= 5e-3 and float(noise.std()) > 2.5e-3
    assert float(torch.corrcoef(noise.T).fill_diagonal_(0).abs().max()) < 0.3
    assert float(noise.mean(0).abs().max()) < 4 * 3e-3 / len(noise) ** 0.5


def test_every_episode_has_noise_of_its_own_address() -> None:
    # Drawn for many at a time, by worlds that are not at the same episode.
    task = make_task("random_hopper", horizon=160, episode_steps=2)
    tasks, env = task.sample(2, "train", Rng(0)), task.make_env("cpu")
    state, _ = env.reset(tasks, Rng(1))
    state = state._replace(episode=state.episode + torch.tensor([[0, 5]]))
    before = state.episode
    for action in actions(100, 1, 2, 3):
        state, ts = env.step(state, action)
        if not ts.new_episode.any():
            continue
        assert ts.new_episode.all() and (state.episode == before + 1).all()
        before, address = state.episode, state.address + state.episode
        noise = task.definition().noise.draw(mujoco._EPISODES, address, 1, 6, 6).squeeze(-2)
        assert torch.equal(motion(env, state), env._pose + noise)
    assert before.tolist() == [[50, 55]], "past what is drawn at a time"


def test_trials_of_a_number_of_episodes_start_as_before() -> None:
    task = make_task("hopper", horizon=60, episodes=3)
    tasks, env = task.sample(4, "train", Rng(0)), task.make_env("cpu")
    state, _ = env.reset(tasks, Rng(1))
    noise = task.definition().noise.draw(Rng(1), tasks.data["start"], 3, 6, 6)
    assert torch.equal(state.starts, env._pose + noise)


def test_a_state_does_not_grow_with_the_life() -> None:
    sizes = []
    for horizon in (100, 50_000):
        task = make_task("random_hopper", horizon=horizon, episode_steps=50)
        state, _ = task.make_env("cpu").reset(task.sample(3, "train", Rng(0)), Rng(1))
        sizes.append(sum(leaf.numel() for leaf in leaves_of(state)))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("engine", ENGINES)
def test_lost_worlds_begin_anew_and_are_counted(engine: str) -> None:
    task = make_task("random_hopper", engine=engine, horizon=40, episode_steps=30)
    acts, tasks = actions(40, 1, 3, 3), task.sample(3, "train", Rng(0))
    env = task.make_env("cpu")
    clean, _, states = play(task, env, acts, tasks)
    state, steps = states[3], []
    for t in range(3, 40):
        if t in (3, 20):
            poisoned = state.rows.clone()
            poisoned[0, 1, 3] = torch.nan
            state = state._replace(rows=poisoned)
        state, ts = env.step(state, acts[t])
        steps.append(ts)
    for k in (0, 17):
        assert steps[k].terminated[0, 1] and not steps[k].truncated[0, 1]
        assert steps[k].reward[0, 1] == 0 and steps[k].new_episode[0, 1]
        assert not steps[k].new_trial[0, 1] and steps[k].obs[0, 1, 0] > 1, "at its start"
        assert steps[k + 1].reward[0, 1] != 0, "and it goes on"
    assert all(torch.isfinite(ts.obs).all() and torch.isfinite(ts.reward).all() for ts in steps)
    assert env.metrics(state)["unstable"].tolist() == [[0.0, 2.0, 0.0]]
    assert env.metrics(clean)["unstable"].tolist() == [[0.0, 0.0, 0.0]]
    assert state.over.all() and steps[-1].new_trial.all()
    for world in (0, 2):  # the others never knew
        assert torch.equal(state.rows[0, world], clean.rows[0, world])


def test_a_world_that_is_lost_with_the_last_step_is_over() -> None:
    task = make_task("random_hopper", horizon=10, episode_steps=30)
    env, acts, tasks = task.make_env("cpu"), actions(10, 1, 2, 3), task.sample(2, "train", Rng(0))
    *_, states = play(task, env, acts, tasks)
    poisoned = states[9].rows.clone()
    poisoned[0, 1, 3] = torch.nan
    state, ts = env.step(states[9]._replace(rows=poisoned), acts[9])
    assert ts.new_trial.all() and ts.terminated.tolist() == [[False, True]]
    assert ts.truncated.tolist() == [[True, False]] and not ts.obs[0, 1].any()
    assert env.metrics(state)["unstable"].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("name", BODIES)
def test_every_family_can_begin_anew(name: str) -> None:
    task = make_task(name, horizon=25, episode_steps=10)
    assert task.spec.horizon == 25 and task.spec.episodes_per_trial == 3
    acts = actions(27, 2, 4, task.spec.action.size)
    _, steps, states = play(task, task.make_env("cpu"), acts, task.sample(4, "test", Rng(0)))
    for t, ts in enumerate(steps):
        assert bool(ts.new_trial.all()) == bool(ts.new_trial.any()) == (t == 0 or t >= 25)
    assert (steps[25].terminated | steps[25].truncated).all()
    assert (states[25].episode >= 3).all() and (states[25].elapsed == 25).all()
    part = task.sample(torch.tensor([3, 0]), "test", Rng(0))
    _, alone, _ = play(task, task.make_env("cpu"), acts[:, 1:, [3, 0]], part)
    for whole, few in zip(steps, alone, strict=True):
        assert torch.equal(whole.obs[1:, [3, 0]], few.obs)
        assert torch.equal(whole.reward[1:, [3, 0]], few.reward)


def test_every_episode_of_a_reacher_has_its_target() -> None:
    task = make_task("random_reacher", horizon=24, episode_steps=10)
    tasks, env = task.sample(2, "train", Rng(0)), task.make_env("cpu")
    pose = tasks.data["pose"]
    assert pose.shape == (1, 2, 3, 4)
    fixed = make_task("random_reacher", horizon=30, episodes=3).sample(2, "train", Rng(0))
    assert torch.equal(pose, fixed.data["pose"])
    _, _, states = play(task, env, actions(24, 1, 2, 2), tasks)
    for episode, t in enumerate((0, 10, 20)):
        there = motion(env, states[t])[..., 2:4]
        assert torch.allclose(there, pose[:, :, episode, 2:], rtol=0, atol=1e-15)


def test_a_motor_may_fail_from_an_episode_on() -> None:
    task = make_task("cheetah_dir", horizon=20, episode_steps=5, impaired="ffoot", impaired_from=2)
    tasks, env = task.sample(2, "train", Rng(0)), task.make_env("cpu")
    assert tasks.data["working"].shape == (1, 2, 2, 6)
    _, _, states = play(task, env, actions(20, 1, 2, 6), tasks)
    for t, expected in ((0, 1.0), (4, 1.0), (5, 0.0), (12, 0.0), (19, 0.0)):
        assert (env.present(states[t])["working"][..., 5] == expected).all(), t


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"episodes": 2}, ["episodes = 2", "episode_steps = 10", "write episodes = 1"]),
        ({"continual": True}, ["continual = true", "continual = false", "episode_steps = 0"]),
        ({"episode_steps": -1}, ["episode_steps is -1", "0 to 100000", "episode_steps=0"]),
        ({"impaired_from": 0}, ["impaired_from is 0", "impaired_from=1"]),
    ],
)
def test_bad_options(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make_task("ant_dir", **{"horizon": 40, "episode_steps": 10, **options})
    assert_says(str(caught.value), *words)


# --- lives -----------------------------------------------------------------------------------


def test_stored_trials_go_on_bit_for_bit() -> None:
    task = make_task("random_hopper", horizon=60, episode_steps=30)
    policy = make_policy("rl2", task.spec, neurons=6)
    lives = TrialLives(PopulationEvaluator(policy, task, trials=3), seed=4)
    params = policy.init(seed=0, population=3)
    first, _ = lives.advance(lives.begin(params, 2), params, 30)
    _, expected = lives.advance(first, params, 30)
    saved = {name: leaf[[2, 0]] for name, leaf in lives.save(first).items()}
    part = {name: leaf[[2, 0]] for name, leaf in params.items()}
    _, again = lives.advance(lives.restore(saved), part, 30)
    assert torch.equal(again.returns, expected.returns[[2, 0]])
    assert (expected.steps == 30).all(), "nothing ends before the horizon"


def agents(**options: object) -> tuple[AgentLives, object]:
    task = make_task("random_hopper", horizon=64, **options)
    learner, loss = ppo.Learner(period=32, minibatch=16, epochs=1).make(task.spec, 64)
    return AgentLives(learner, task, 0, torch.device("cpu"), test_episodes=3, test_steps=50), loss


def test_a_life_fills_its_steps_and_a_test_episode_is_one() -> None:
    lives, loss = agents(episode_steps=40)
    life = lives.begin(torch.arange(4), "test")
    rewards = []
    for _ in range(lives.updates):
        life, new = lives.advance(life, loss, "test")
        rewards.append(new.reward)
    lived = torch.cat(rewards)
    assert (lived != 0).all(), "no step of a life is lost to the fall before it"
    score, steps = lives.score(life, "test")
    # Once a body has fallen its test is over: the same as trials of one episode.
    once, _ = agents()
    once = dataclasses.replace(once, learner=lives.learner)
    expected, counted = once.score(life, "test")
    assert torch.equal(score, expected) and torch.equal(steps, counted)
    assert steps.max() == 150 and steps.min() < 150, "three of at most 50 steps"


@pytest.mark.parametrize("name", ["hopper", "random_hopper"])
def test_test_episodes_start_in_different_places(name: str, monkeypatch) -> None:
    task = make_task(name, horizon=64, episode_steps=64)
    learner, _ = ppo.Learner(period=64, hidden=(8,)).make(task.spec, 64)
    lives = AgentLives(learner, task, 0, torch.device("cpu"), test_episodes=3, test_steps=2)
    life, reset, seen = lives.begin(torch.arange(2), "test"), MujocoEnv.reset, []

    def spy(self: MujocoEnv, *args: Any) -> tuple[State, TimeStep]:
        state, ts = reset(self, *args)
        seen.append(ts.obs)
        return state, ts

    monkeypatch.setattr(MujocoEnv, "reset", spy)
    lives.score(life, "test")
    assert seen[0].shape[:2] == (2, 3)
    assert len(seen[0].flatten(0, 1).unique(dim=0)) == 6


def test_a_test_episode_costs_no_physics_after_its_end(monkeypatch) -> None:
    lives, _ = agents(episode_steps=40)
    life = lives.begin(torch.arange(4), "test")
    going, step = [], MujocoEnv.step

    def spy(self: MujocoEnv, state: State, action: Tensor) -> tuple[State, TimeStep]:
        going.append(int((~state.over).sum()))
        return step(self, state, action)

    monkeypatch.setattr(MujocoEnv, "step", spy)
    _, steps = lives.score(life, "test")
    assert sum(going) == int(steps.sum())


def test_single_episodes_and_what_they_are_measured_against() -> None:
    task = make_task("random_hopper", horizon=5000, episode_steps=700)
    one = single(task, 300)
    assert (one.spec.horizon, one.spec.episodes_per_trial) == (300, 1)
    plain = make_task("random_hopper", horizon=300)
    assert one == plain and single(plain, 100) is plain
    assert single(make_task("displacement"), 32) == make_task("displacement")
    known = Objective(test_steps=300).reference(task)
    assert (known.random, known.best) == (plain.reference.random, plain.reference.best)


def test_a_step_of_data_is_a_step_of_tasks() -> None:
    # Batches of members with tasks of their own, as agents have them.
    task = make_task("random_hopper", horizon=40, episode_steps=30)
    parts = [task.sample(torch.arange(2) + 2 * member, "train", Rng(0)) for member in range(2)]
    data = {name: torch.cat([part.data[name] for part in parts]) for name in parts[0].data}
    both = Tasks(torch.cat([part.index for part in parts]), data)
    acts = actions(40, 2, 2, 3)
    _, whole, _ = play(task, task.make_env("cpu"), acts, both)
    for member, part in enumerate(parts):
        _, alone, _ = play(task, task.make_env("cpu"), acts[:, member : member + 1], part)
        for together, few in zip(whole, alone, strict=True):
            assert torch.equal(together.obs[member : member + 1], few.obs)


def test_references_are_those_of_episodes() -> None:
    """A life of a million steps is not played to know what random actions earn."""
    life = make_task("hopper", horizon=1_000_000, episode_steps=100).reference
    episode = make_task("hopper", horizon=100).reference
    assert life.random == pytest.approx(10_000 * episode.random)
    assert life.best == pytest.approx(10_000 * episode.best)
