"""Every published definition of a task on a body, worked out by hand on a stored state."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import esmeta
from esmeta.envs.bodies import Snapshot
from esmeta.errors import UserError
from esmeta.rng import Rng
from esmeta.tasks import make_task

BODIES, TORSO = 14, 1


def stored(nq: int, nv: int, bodies: int = BODIES) -> tuple[Snapshot, dict[str, np.ndarray]]:
    """A state as the simulator would show it, ``[1, 1, ...]``, and the same in numpy."""
    rng = np.random.default_rng(3)
    plain = {
        "qpos": rng.normal(size=nq),
        "qvel": rng.normal(size=nv) * 8,
        "xpos": rng.normal(size=(bodies, 3)),
        "xmat": rng.normal(size=(bodies, 9)),
        "subtree_com": rng.normal(size=(bodies, 3)),
        "cfrc_ext": rng.normal(size=(bodies, 6)) * 2,
    }
    return Snapshot(
        *(torch.from_numpy(plain[name])[None, None] for name in Snapshot._fields)
    ), plain


def parts(name: str, velocity: list[float], **options: object) -> tuple[dict, Tensor, np.ndarray]:
    """Observation and reward of a task on the stored state, and its action."""
    task = make_task(name, **options)
    sizes = {"ant": (15, 14), "hopper": (6, 6)}.get(name.split("_")[0], (9, 9))
    now, plain = stored(*sizes)
    action = np.random.default_rng(4).uniform(-1, 1, size=task.spec.action.size)
    data = {
        "direction": torch.tensor([[[-0.6, 0.8]]], dtype=torch.float64),
        "speed": torch.tensor([[1.5]], dtype=torch.float64),
        "goal": torch.tensor([[[1.0, -2.0]]], dtype=torch.float64),
    }
    definition = task.definition()
    speed = torch.tensor([[velocity]], dtype=torch.float64)
    reward = definition.reward(now, speed, torch.from_numpy(action)[None, None], data)
    assert reward.shape == (1, 1)
    obs = definition.observe(now)[0, 0].numpy()
    assert obs.shape == (task.spec.obs_size,)
    place = definition.place(now)[0, 0].numpy()
    alive = None if definition.healthy is None else definition.healthy(now)
    return {**plain, "a2": float((action**2).sum()), "place": place, "alive": alive}, reward, obs


def clipped(plain: dict) -> np.ndarray:
    return np.clip(plain["cfrc_ext"], -1, 1)


ZEROS = np.zeros(84)
# Options, reward by hand, observation by hand; along: -0.6 * 2 + 0.8 * -1 = -2.
ANT_DIR = {
    "MAML and MetODS, forces as simulated": (
        {"contact": "mj"},
        lambda s: -2 - 0.005 * s["a2"] - 5e-4 * (clipped(s) ** 2).sum() + 0.05,
        lambda s: [s["qpos"], s["qvel"], clipped(s).ravel(), s["xmat"][1], s["xpos"][1]],
    ),
    "MetODS, forces zero": (
        {},
        lambda s: -2 - 0.005 * s["a2"] + 0.05,
        lambda s: [s["qpos"], s["qvel"], ZEROS, s["xmat"][1], s["xpos"][1]],
    ),
    "MAML in rllab": (
        {"physics": "rllab", "contact": "mj"},
        lambda s: -2 - 0.005 * s["a2"] - 5e-4 * (clipped(s) ** 2).sum() + 0.05,
        lambda s: [s["qpos"], s["qvel"], clipped(s).ravel(), s["xmat"][1], s["subtree_com"][1]],
    ),
    "ProMP and learn2learn": (
        {"directions": "circle", "ctrl_cost": 0.5, "alive_bonus": 1.0, "z_min": 0.0}
        | {"obs_set": "gym", "contact": "mj"},
        lambda s: -2 - 0.5 * s["a2"] - 5e-4 * (clipped(s) ** 2).sum() + 1.0,
        lambda s: [s["qpos"][2:], s["qvel"], clipped(s).ravel()],
    ),
    "PEARL": (
        {"directions": "circle", "ctrl_cost": 0.5, "alive_bonus": 1.0, "obs_set": "compact"},
        lambda s: -2 - 0.5 * s["a2"] + 1.0,
        lambda s: [s["qpos"][2:], s["qvel"]],
    ),
}
OTHERS = {
    "ant-vel, MAML": (
        ("ant_vel", {"contact": "mj"}),
        lambda s: 1 - 0.5 - 0.005 * s["a2"] - 5e-4 * (clipped(s) ** 2).sum() + 0.05,
        lambda s: [s["qpos"], s["qvel"], clipped(s).ravel(), s["xmat"][1], s["xpos"][1]],
    ),
    "ant-goal, PEARL and variBAD": (
        ("ant_goal", {"contact": "mj"}),
        lambda s: (
            -abs(s["xpos"][1, 0] - 1)
            - abs(s["xpos"][1, 1] + 2)
            - 0.1 * s["a2"]
            - 5e-4 * (clipped(s) ** 2).sum()
        ),
        lambda s: [s["qpos"], s["qvel"], clipped(s).ravel()],
    ),
    "ant-pos, MAML's code": (
        (
            "ant_goal",
            {"goals": "square", "bonus": 4.0, "ctrl_cost": 0.005, "alive_bonus": 0.05}
            | {"terminate": True, "obs_set": "rllab"},
        ),
        lambda s: 4 - abs(s["xpos"][1, 0] - 1) - abs(s["xpos"][1, 1] + 2) - 0.005 * s["a2"] + 0.05,
        lambda s: [s["qpos"], s["qvel"], ZEROS, s["xmat"][1], s["xpos"][1]],
    ),
    "cheetah-dir": (
        ("cheetah_dir", {}),
        lambda s: -0.6 * 2 - 0.05 * s["a2"],
        lambda s: [s["qpos"][1:], s["qvel"], s["xpos"][1]],
    ),
    "cheetah-dir in rllab": (
        ("cheetah_dir", {"physics": "rllab"}),
        lambda s: -0.6 * 2 - 0.05 * s["a2"],
        lambda s: [s["qpos"][1:], s["qvel"], s["subtree_com"][1]],
    ),
    "cheetah-dir, ProMP": (
        ("cheetah_dir", {"obs_set": "gym"}),
        lambda s: -0.6 * 2 - 0.05 * s["a2"],
        lambda s: [s["qpos"][1:], s["qvel"]],
    ),
    "cheetah-vel": (
        ("cheetah_vel", {}),
        lambda s: -0.5 - 0.05 * s["a2"],
        lambda s: [s["qpos"][1:], s["qvel"], s["xpos"][1]],
    ),
}
DEFINITIONS = {name: (("ant_dir", rest[0]), *rest[1:]) for name, rest in ANT_DIR.items()} | OTHERS


@pytest.mark.parametrize("which", DEFINITIONS)
def test_published_reward_and_observation(which: str) -> None:
    (name, options), reward_of, obs_of = DEFINITIONS[which]
    state, reward, obs = parts(name, [2.0, -1.0], **options)
    assert float(reward) == pytest.approx(reward_of(state), abs=1e-12)
    np.testing.assert_array_equal(obs, np.concatenate(obs_of(state)))


@pytest.mark.parametrize(
    ("name", "options", "z", "alive"),
    [
        ("ant_dir", {}, 0.19, False),
        ("ant_dir", {}, 0.2, True),
        ("ant_dir", {}, 1.0, True),
        ("ant_dir", {}, 1.01, False),
        ("ant_dir", {"z_min": 0.0}, 0.1, True),
        ("ant_vel", {}, 1.01, False),
        ("ant_goal", {}, 9.0, None),
        ("ant_goal", {"terminate": True}, 9.0, False),
        ("cheetah_dir", {}, 9.0, None),
        ("cheetah_vel", {}, 9.0, None),
    ],
)
def test_when_an_episode_ends(
    name: str, options: dict[str, object], z: float, alive: bool | None
) -> None:
    healthy = make_task(name, **options).definition().healthy
    if alive is None:
        assert healthy is None
        return
    now, _ = stored(15, 14)
    now.qpos[..., 2] = z
    assert healthy is not None and bool(healthy(now)) is alive


def test_sizes_are_the_published_ones() -> None:
    ant, cheetah = make_task("ant-dir"), make_task("cheetah-dir")
    assert (ant.spec.obs_size, cheetah.spec.obs_size) == (125, 20)
    for task, inputs in ((ant, 134), (cheetah, 27)):
        assert esmeta.make_policy("metods", task.spec, extra="none").input_size == inputs
    assert make_task("ant-dir", obs_set="gym").spec.obs_size == 111
    assert make_task("ant-dir", obs_set="compact").spec.obs_size == 27
    assert make_task("ant-goal").spec.obs_size == 113
    assert make_task("ant-goal", obs_set="compact").spec.obs_size == 29
    assert make_task("cheetah-dir", obs_set="gym").spec.obs_size == 17
    assert make_task("ant-dir").spec.horizon == 200


@pytest.mark.parametrize(
    ("name", "physics", "steps", "seconds"),
    [
        ("cheetah_dir", "gym", 200, 0.05),
        ("cheetah_dir", "rllab", 200, 0.01),
        ("ant_dir", "gym", 200, 0.05),
        ("ant_dir", "rllab", 200, 0.02),
        ("random_hopper", None, 1000, 0.004),
        ("directional_hopper", None, 1000, 0.004),
        ("random_walker", None, 1000, 0.008),
        ("random_reacher", None, 50, 0.02),
        ("goal_ant", None, 200, 0.05),
        ("hopper_params", None, 200, 0.008),
        ("walker_params", None, 200, 0.008),
    ],
)
def test_steps_last_as_published(
    name: str, physics: str | None, steps: int, seconds: float
) -> None:
    task = make_task(name, **({"physics": physics} if physics else {}))
    assert task.spec.horizon == steps
    assert task.make_env("cpu").seconds == pytest.approx(seconds, abs=1e-15)


@pytest.mark.parametrize("name", ["ant_dir", "cheetah_dir"])
def test_two_directions_are_opposite(name: str) -> None:
    # variBAD's code reads +1 and -1 as angles: both then have cos(1) = 0.54 forwards.
    direction = make_task(name).sample(400, "train", Rng(0)).data["direction"][0]
    assert {tuple(row) for row in direction.tolist()} == {(1.0, 0.0), (-1.0, 0.0)}
    assert abs(float(direction[:, 0].mean())) < 4 / math.sqrt(400)
    mirrored = make_task(name, mirrored=True).sample(10, "train", Rng(0)).data["direction"][0]
    assert torch.equal(mirrored[::2], -mirrored[1::2])


def test_what_twins_earn_without_reading_rewards_cancels() -> None:
    task = make_task("cheetah_dir", mirrored=True, horizon=20, ctrl_cost=0.0)
    policy = esmeta.make_policy("mlp", task.spec, reward_input_scale=0.0, std_value=0.5)
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=6)
    returns = evaluator(policy.init(0), seed=0, split="train").returns[0]
    assert float(returns.abs().min()) > 1e-3
    assert torch.equal(returns[::2], -returns[1::2])
    assert len(set(returns[::2].tolist())) == 3


def test_directions_of_the_circle_are_uniform() -> None:
    task = make_task("ant_dir", directions="circle")
    direction = task.sample(4000, "test", Rng(0)).data["direction"][0]
    assert torch.allclose(direction.square().sum(-1), torch.ones(4000, dtype=torch.float64))
    counts = torch.histc(torch.atan2(direction[:, 1], direction[:, 0]), 8, -math.pi, math.pi)
    assert (counts - 500).abs().max() < 4 * math.sqrt(500)


def test_goals_and_speeds_are_distributed_as_published() -> None:
    goal = make_task("ant_goal").sample(4000, "train", Rng(0)).data["goal"][0]
    radius = goal.square().sum(-1).sqrt()
    assert float(radius.max()) <= 3
    # Uniform over the disc: a quarter of it lies within half the radius.
    assert float((radius < 1.5).double().mean()) == pytest.approx(0.25, abs=0.03)
    square = make_task("ant_goal", goals="square").sample(4000, "train", Rng(0)).data["goal"][0]
    assert float(square.abs().max()) <= 3 and float(square.std()) == pytest.approx(3**0.5, abs=0.1)
    for name, top in (("cheetah_vel", 2.0), ("ant_vel", 3.0)):
        speed = make_task(name).sample(4000, "train", Rng(0)).data["speed"][0]
        assert 0 <= float(speed.min()) and top * 0.99 < float(speed.max()) <= top
        assert float(speed.mean()) == pytest.approx(top / 2, abs=0.05)


def test_reward_of_a_whole_trial_is_distance_and_effort() -> None:
    # From the simulator this time: what is paid for speed adds up to the way that was made.
    task = make_task("cheetah_dir", horizon=40)
    env, tasks = task.make_env("cpu"), task.sample(4, "train", Rng(0))
    state, ts = env.reset(tasks, Rng(1))
    before = state.rows[0, :, 1]
    acts = torch.rand(40, 1, 4, 6, generator=torch.Generator().manual_seed(0)) * 4 - 2
    total, effort = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for action in acts:
        state, ts = env.step(state, action)
        total += ts.reward[0]
        effort += 0.05 * action[0].clamp(-1, 1).double().square().sum(-1)
        assert torch.equal(ts.prev_action, action.clamp(-1, 1)), "too large actions are clipped"
    way = (state.rows[0, :, 1] - before) / 0.05 * tasks.data["direction"][0, :, 0]
    assert torch.allclose(total, way - effort, atol=1e-4)


def test_without_mujoco_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    task = make_task("cheetah_dir")  # a name and numbers need no simulator
    with pytest.raises(UserError, match=r'pip install "esmeta\[mujoco\]"'):
        task.make_env("cpu")
