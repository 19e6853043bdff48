"""Gymnasium environments in lockstep: number for number what a plain loop over each gives."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import tomllib
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import esmeta
from esmeta.envs.remote import RemoteTask
from esmeta.errors import UserError
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import train
from esmeta.tasks import SPLITS, make_task
from esmeta.types import Discrete, Hosted, Tasks

needs_box2d = pytest.mark.skipif(
    importlib.util.find_spec("Box2D") is None,
    reason="LunarLander needs Box2D: pip install 'esmeta[box2d]'",
)


class Probe(gymnasium.Env):
    """Odd spaces, a task, an end that depends on the action; every call is counted."""

    calls = 0
    observation_space = spaces.Dict(
        {"place": spaces.Discrete(3, start=4), "task": spaces.Box(0.0, 2.0**31, (1,))}
    )

    def __init__(self, wide: bool = False, fixed: bool = False) -> None:
        low = np.array([[-3.0, 1.0], [-np.inf, 0.0]], dtype=np.float32)
        high = np.array([[3.0, 2.0], [np.inf, np.inf]], dtype=np.float32)
        self.action_space = spaces.Box(low, high) if wide else spaces.Discrete(3, start=-1)
        self.fixed = fixed

    def _see(self) -> dict[str, Any]:
        return {"place": 4 + self.place, "task": np.array([self.task], dtype=np.float32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        Probe.calls += 1
        self.time = 0
        self.task = (options or {}).get("which", -1)
        self.place = int(self.np_random.integers(3))
        return self._see(), {}

    def step(self, action: Any) -> Any:
        Probe.calls += 1
        assert self.action_space.contains(action), action
        self.time += 1
        self.action = action
        number = float(np.sum(np.where(np.isfinite(action), action, 0)))
        over = not self.fixed and isinstance(self.action_space, spaces.Discrete) and action == 1
        return self._see(), number, over, False, {}


class Unsupported(gymnasium.Env):
    def __init__(self, part: str) -> None:
        actions = {"multi": spaces.MultiDiscrete([2, 3]), "whole": spaces.Box(0, 9, (2,), int)}
        self.action_space = actions.get(part, spaces.Discrete(2))
        text = spaces.Sequence(spaces.Discrete(2)) if part == "sequence" else spaces.Box(0, 1, (1,))
        self.observation_space = text


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("Probe-v0", Probe, max_episode_steps=6)
    gymnasium.register("Endless-v0", functools.partial(Probe, fixed=True))
    gymnasium.register("Unsupported-v0", Unsupported, max_episode_steps=5)
    yield
    for name in ("Probe-v0", "Endless-v0", "Unsupported-v0"):
        del gymnasium.registry[name]


def random_actions(task: Any, steps: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if isinstance(task.spec.action, Discrete):
        return torch.randint(0, task.spec.action.n, (steps, 1, batch), generator=generator)
    return 3 * torch.rand(steps, 1, batch, task.spec.action.size, generator=generator) - 1.5


def plain_loop(
    name: str,
    kwargs: dict[str, Any],
    seeds: list[int],
    limit: int,
    actions: list[Any],
    lasting: bool,
) -> tuple[list[tuple[Any, ...]], list[np.ndarray]]:
    """One trial by hand: (obs, reward, terminated, truncated) and final observations.

    It is over after as many episodes as there are seeds, or (``lasting``) with its last action.
    """
    world = gymnasium.make(name, max_episode_steps=-1, **kwargs).unwrapped
    obs, _ = world.reset(seed=seeds[0])
    rows, final = [(np.float32(obs), 0.0, False, False)], []
    episode, time = 0, 0
    for number, action in enumerate(actions, start=1):
        if episode == len(seeds):
            break
        obs, reward, terminated, truncated, _ = world.step(action)
        time += 1
        last = lasting and number == len(actions)
        truncated = bool(truncated or time == limit or last) and not terminated
        final.append(np.float32(obs))
        if terminated or truncated:
            episode, time = episode + 1, 0
            if episode < len(seeds) and not last:
                obs, _ = world.reset(seed=seeds[episode])
        rows.append((np.float32(obs), np.float32(reward), terminated, truncated))
    return rows, final


LANDER = ("LunarLander-v3", {"continuous": True})


@pytest.mark.parametrize(
    ("name", "kwargs", "horizon", "how"),
    [
        ("CartPole-v1", {}, 60, {"episodes": 3}),
        ("CartPole-v1", {}, 300, {"episode_steps": 25}),
        ("Pendulum-v1", {"g": 9.81}, 30, {"episodes": 2}),
        ("Pendulum-v1", {}, 300, {"episode_steps": 7}),
        ("MountainCar-v0", {}, 20, {"episodes": 1}),
        pytest.param(*LANDER, 240, {"episodes": 2}, marks=needs_box2d),
        pytest.param(*LANDER, 300, {"episode_steps": 1000}, marks=needs_box2d),
    ],
)
def test_equal_to_a_plain_loop(
    name: str, kwargs: dict[str, Any], horizon: int, how: dict[str, int]
) -> None:
    """Trials of so many episodes, or of so many steps, of which the last one cuts an episode."""
    task = make_task("gym", id=name, kwargs=kwargs, horizon=horizon, **how)
    batch, lasting, episodes = 3, "episode_steps" in how, how.get("episodes", horizon)
    limit = how.get("episode_steps", horizon // episodes)
    assert (task.spec.horizon, task.spec.episodes_per_trial) == (horizon, -(-horizon // limit))
    tasks, actions = task.sample(batch, "train", Rng(5)), random_actions(task, horizon, batch)
    draws = Rng(6).fold("dynamics").integers(tasks.index, episodes, 2**31)
    seeds = ((draws + tasks.data["seed"].unsqueeze(-1)) % 2**31)[0].tolist()
    env = task.make_env("cpu")
    for again in range(2):  # the second time on simulators that were used before
        if again:
            env.reset(task.sample(batch, "test", Rng(9)), Rng(9))
        state, ts = env.reset(tasks, Rng(6))
        seen, final = [ts], []
        for action in actions:
            state, ts = env.step(state, action)
            seen.append(ts)
            final.append(env.final_obs(state))
        counts = env.metrics(state)
        assert ("return_1" in counts) == (episodes > 1 and not lasting)
        for b in range(batch):
            theirs = actions[:, 0, b].numpy()
            if theirs.ndim == 2:  # Pendulum: torques up to 2; LunarLander: 1
                theirs = np.clip(theirs, -1, 1) * (2 if name == "Pendulum-v1" else 1)
            rows, last = plain_loop(name, kwargs, seeds[b], limit, list(theirs), lasting)
            for t, (obs, reward, terminated, truncated) in enumerate(rows):
                assert np.array_equal(seen[t].obs[0, b].numpy(), obs)
                assert float(seen[t].reward[0, b]) == reward
                assert bool(seen[t].terminated[0, b]) == terminated
                assert bool(seen[t].truncated[0, b]) == truncated
                assert t == 0 or np.array_equal(final[t - 1][0, b].numpy(), last[t - 1])
            ended = sum(row[2] or row[3] for row in rows)
            over = [bool(ts.new_trial[0, b]) for ts in seen[: len(rows)]]
            assert over == [True, *[False] * (len(rows) - 2), lasting or ended == episodes]
            assert (counts["episodes"][0, b], counts["length"][0, b]) == (ended, len(rows) - 1)
            assert ended >= 1


def test_references_of_trials_of_so_many_steps_are_those_of_episodes() -> None:
    task = make_task("gym", horizon=1500, episode_steps=500)
    one = make_task("gym", horizon=500)
    assert task.reference.best == 3 * 475
    assert task.reference.random == 3 * one.reference.random
    assert task.single(200) == make_task("gym", horizon=200) and one.single(7) is one


def test_spaces_tasks_and_episodes_of_an_environment_of_ones_own() -> None:
    """Discrete(start=-1) actions, a Dict to flatten, tasks as an option, ends by action."""
    task = make_task("gym", id="Probe-v0", task_key="which", episodes=2)
    assert (task.spec.obs_size, task.spec.action, task.spec.horizon) == (4, Discrete(3), 12)
    env = task.make_env("cpu")
    tasks = Tasks(torch.tensor([[0, 1]]), {"seed": torch.tensor([[11, 12]])})
    state, ts = env.reset(tasks, Rng(0))
    assert ts.obs[0, :, 3].tolist() == [11, 12] and ts.obs[0, :, :3].sum(-1).tolist() == [1, 1]
    # Trial 0 ends both episodes early by action 2 (theirs: 1); trial 1 is cut at 6 steps each.
    steps = []
    for t in range(12):
        state, ts = env.step(state, torch.tensor([[2 if t in (0, 2) else 0, 1]]))
        steps.append(ts)
    rewards = torch.stack([ts.reward[0] for ts in steps])
    assert rewards[:, 0].tolist() == [1, -1, 1, *[0] * 9] and not rewards[:, 1].any()
    assert [bool(ts.terminated[0, 0]) for ts in steps] == [True, False, True, *[False] * 9]
    assert [bool(ts.truncated[0, 1]) for ts in steps] == 2 * [*[False] * 5, True]
    assert [bool(ts.new_episode[0, 1]) for ts in steps] == 2 * [*[False] * 5, True]
    assert [bool(ts.new_trial[0, 0]) for ts in steps] == [False, False, *[True] * 10]
    assert all(ts.obs[0, 1, 3] == 12 for ts in steps), "one task in all episodes"
    scores = {name: values[0].tolist() for name, values in env.metrics(state).items()}
    assert scores == {
        "length": [3, 12],
        "episodes": [2, 2],
        "terminated": [1, 0],
        "return_1": [1, 0],
        "return_2": [0, 0],
    }


TOLD: list[dict[str, Any]] = []


class Told(Probe):
    """Notes what its resets are told."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        TOLD.append(dict(options or {}))
        return super().reset(seed=seed)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_an_environment_is_told_the_split_of_its_task(split: str, mixed: bool) -> None:
    gymnasium.register("Told-v0", functools.partial(Told, wide=True), max_episode_steps=4)
    try:
        task: Any = make_task("gym", id="Told-v0", task_key="which", episodes=2)
        if mixed:
            part = {"name": "gym", "id": "Told-v0", "task_key": "which", "episodes": 2}
            task = make_task("mixed", parts=({"name": "double_integrator"}, part), horizon=8)
        policy, params = policy_and_params(task, 2)
        evaluator = esmeta.PopulationEvaluator(policy, task, trials=4)
        TOLD.clear()
        evaluator(params, split=split)
    finally:
        del gymnasium.registry["Told-v0"]
    assert all(set(told) == {"which", "split"} for told in TOLD)
    assert {told["split"] for told in TOLD} == {split}
    count = 2 if mixed else 4  # trials, each by 2 members in 2 episodes
    numbers = [told["which"] for told in TOLD]
    assert len(set(numbers)) == count and min(map(numbers.count, set(numbers))) >= 4


def test_an_environment_keeps_finite_sets_of_tasks_apart() -> None:
    """Tasks of our own through Gymnasium, which play trials of the split that they are told."""
    name = "esmeta.envs.gymnasium_api:esmeta/DoubleIntegrator-v0"
    task = make_task("gym", id=name, horizon=3, task_key="trial")
    inside, env = make_task("double_integrator"), task.make_env("cpu")
    for split in SPLITS:
        tasks = task.sample(2, split, Rng(0))
        _, ts = env.reset(tasks, Rng(1))
        for b, number in enumerate(tasks.data["seed"][0].tolist()):
            root = Rng(int(env._worlds[b].env.unwrapped.np_random_seed))  # type: ignore[union-attr]
            its = inside.sample(torch.tensor([number]), split, root.fold("tasks"))
            first = inside.make_env("cpu").reset(its, root.fold("trials", split))[1]
            assert torch.equal(ts.obs[0, b], first.obs[0, 0])


def test_trials_that_are_over_are_not_simulated() -> None:
    env = make_task("gym", id="Probe-v0").make_env("cpu")
    state, _ = env.reset(make_task("gym", id="Probe-v0").sample(4, "train", Rng(0)), Rng(0), 2)
    Probe.calls = 0
    action = torch.tensor([[2, 0, 0, 0], [2, 2, 0, 0]])
    for expected in (8, 13, 18):  # eight trials, then the five that go on
        state, _ = env.step(state, action)
        assert Probe.calls == expected


def test_actions_are_clipped_and_scaled_to_the_bounds() -> None:
    task = make_task("gym", id="Probe-v0", kwargs={"wide": True})
    assert task.spec.action.size == 4
    env = task.make_env("cpu")
    state, _ = env.reset(task.sample(1, "train", Rng(0)), Rng(0))
    for given, expected in (
        ([0.5, 0.0, 7.0, -3.0], [[1.5, 1.5], [7.0, 0.0]]),
        ([-9.0, 1.0, -7.0, 3.0], [[-3.0, 2.0], [-7.0, 3.0]]),
    ):
        state, ts = env.step(state, torch.tensor([[given]]))
        assert env._worlds[0].env.unwrapped.action.tolist() == expected
        assert ts.prev_action[0, 0].tolist() == given, "as the policy gave it"


def policy_and_params(task: Any, population: int) -> Any:
    policy = esmeta.make_policy("metods", task.spec, neurons=4, hidden=[4], head_hidden=4)
    return policy, policy.init(seed=0, population=population)


def test_trials_that_were_left_cannot_be_gone_on_with() -> None:
    task = make_task("gym", horizon=10)
    env = task.make_env("cpu")
    assert isinstance(env, Hosted)
    assert not isinstance(make_task("maze").make_env("cpu"), Hosted)
    tasks, action = task.sample(2, "train", Rng(0)), torch.zeros(1, 2, dtype=torch.int64)
    first, _ = env.reset(tasks, Rng(0))
    second, _ = env.step(first, action)
    with pytest.raises(RuntimeError, match=r"step 0 were left.*step 1.*another environment"):
        env.step(first, action)
    env.reset(tasks, Rng(0))
    for call in (lambda: env.step(second, action), lambda: env.metrics(second)):
        with pytest.raises(RuntimeError, match="trials 1 at step 1 were left"):
            call()


def test_what_needs_worlds_in_tensors_is_refused_before_any_work() -> None:
    task = make_task("gym", horizon=10)
    policy, _ = policy_and_params(task, 1)
    with pytest.raises(UserError, match=r"capture = true.*GymEnv.*objective.capture = false"):
        esmeta.PopulationEvaluator(policy, task, capture=True)
    pendulum = ["task.name=gym", "task.id=Pendulum-v1", "task.horizon=640"]
    windows = ["optimizer.name=nres", "objective.ppo_generations=0"]
    config = configs.resolve(configs.load("displacement-epg"), [*pendulum, *windows])
    with pytest.raises(UserError, match=r"GymEnv cannot be left.*optimizer.name = 'openes'"):
        train.build(config)


def test_lives_that_are_not_left_need_no_copies() -> None:
    """EPG by a search for whole lives: the same bits in any chunk, and simulators of their own."""
    small = ["task.name=gym", "task.id=Pendulum-v1", "task.horizon=48", "task.episodes=2",
             "task.trials=3", "objective.period=16", "objective.buffer=32", "objective.hidden=[4]",
             "objective.minibatch=8", "objective.test_steps=9", "objective.twins=1"]  # fmt: skip
    config = configs.resolve(configs.load("displacement-epg"), small)
    objective: Any = train.build(config).objective
    draw = torch.Generator().manual_seed(0)
    theta = 0.1 * torch.randn(4, esmeta.ravel(objective.init(0)).shape[1], generator=draw)
    whole = objective.fitness(theta, 3)
    assert len(whole.returns.unique()) == whole.returns.numel()
    config = configs.resolve(configs.load("displacement-epg"), [*small, "objective.chunk=5"])
    chunked: Any = train.build(config).objective
    assert torch.equal(chunked.fitness(theta, 3).returns, whole.returns)
    far = dataclasses.replace(chunked.lives, task=RemoteTask(config.task.instance, None))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="run.remote_envs = false"):
        far.check_own()
    held = chunked.heldout(theta[:1], 4)
    assert torch.equal(chunked.heldout(theta[:1], 4, first=2).returns, held.returns[:, 2:])


def test_simulators_can_be_closed_and_made_again() -> None:
    task = make_task("gym", horizon=10)
    env, tasks = task.make_env("cpu"), task.sample(2, "train", Rng(0))
    _, first = env.reset(tasks, Rng(1))
    env.close()
    assert not env._worlds and not env._pool._open
    _, again = env.reset(tasks, Rng(1))
    assert torch.equal(first.obs, again.obs)


def test_reference_is_measured_and_the_threshold_is_theirs() -> None:
    reference = make_task("gym", id="Pendulum-v1", horizon=20).reference
    assert math.isnan(reference.best) and -250 < reference.random < -60
    assert reference.words() == f"random {reference.random:.4g}, best not known"
    two = make_task("gym", episodes=2).reference
    one = make_task("gym").reference
    assert two.random == pytest.approx(2 * one.random, rel=0.15)
    assert (one.best, two.best) == (475, 950)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"id": "CartPol-v1"}, ["'CartPol-v1'", "did you mean 'CartPole-v1'", "module"]),
        ({"id": "CartPole-v9"}, ["'CartPole-v9'", "did you mean 'CartPole-v1'"]),
        ({"id": "nowhere_at_all:X-v0"}, ["nowhere_at_all", "PYTHONPATH"]),
        ({"id": "CartPole-v1", "kwargs": {"gravity": 3}}, ["kwargs", "'gravity'"]),
        ({"kwargs": "continuous"}, ["kwargs = 'continuous'", "a table"]),
        ({"kwargs": {"x": object()}}, ["kwargs", "kept in a file"]),
        ({"id": "Endless-v0"}, ["horizon is 0", "Endless-v0", "horizon=1000"]),
        ({"id": "Unsupported-v0", "kwargs": {"part": "multi"}}, ["MultiDiscrete", "wrap"]),
        ({"id": "Unsupported-v0", "kwargs": {"part": "whole"}}, ["Box", "real numbers"]),
        ({"id": "Unsupported-v0", "kwargs": {"part": "sequence"}}, ["Sequence", "fixed number"]),
        ({"horizon": -1}, ["horizon is -1", "horizon=0"]),
        ({"horizon": 100, "episodes": 3}, ["horizon is 100", "3 episodes", "horizon=99"]),
        ({"most_worlds": 1}, ["most_worlds is 1", "most_worlds=2"]),
    ],
)
def test_bad_options(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        make_task("gym", **options)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise gymnasium.error.DependencyNotInstalled("Box2D is not installed, you can install it")

    monkeypatch.setattr(gymnasium, "make", missing)
    with pytest.raises(UserError, match=r"'Lander-v0'.*pip install 'esmeta\[box2d\]'"):
        make_task("gym", id="Lander-v0")


def test_a_run_keeps_the_arguments_in_its_file() -> None:
    raw = configs.load("gym-ppo")
    changes = ["task.id=Pendulum-v1", "task.kwargs={g = 9.0}", "task.horizon=50"]
    config = configs.resolve(raw, changes)
    assert config.task.instance.kwargs == {"g": 9.0}
    again = configs.resolve(tomllib.loads(configs.to_toml(config)))
    assert again == config and configs.digest(again) == configs.digest(config)
    assert configs.digest(config) != configs.digest(configs.resolve(raw, changes[:1]))
    for change, words in (
        ("task.id=Pendulun-v1", r"task\.id = 'Pendulun-v1'.*did you mean 'Pendulum-v1'"),
        ("task.kwargs=continuous", r"task\.kwargs = 'continuous'"),
        ("task.kwargs={gg = 1}", r"task\.id = 'CartPole-v1' cannot be made with kwargs.*'gg'"),
    ):
        with pytest.raises(UserError, match=words):
            configs.resolve(raw, [change])
