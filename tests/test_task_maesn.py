"""MAESN's tasks: rewards by hand, goals as published, models with the numbers of the release."""

from __future__ import annotations

import math

import mujoco
import numpy as np
import pytest
import torch
from test_mujoco import ENGINES, actions, positions
from test_task_bodies import stored
from test_task_families import uniform_in
from torch import Tensor

from esmeta.envs.mujoco import MujocoEnv
from esmeta.envs.mujoco_model import build_model
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Tasks

GOAL = np.array([1.2, 1.6])


pytestmark = pytest.mark.usefixtures("elsewhere")


def scored(
    name: str, sizes: tuple[int, int], offset: tuple[float, float], **options: object
) -> tuple[float, np.ndarray, bool, dict]:
    """Reward, observation and success with what counts at ``goal + offset``."""
    task = make_task(name, **options)
    now, plain = stored(*sizes)
    where = torch.from_numpy(GOAL + offset)
    if name == "ant_ring":
        now.subtree_com[..., 1, :2] = where
    elif name == "wheeled":
        now.qpos[..., :2] = where
    else:
        now.qpos[..., 3 + 2 * 3 : 5 + 2 * 3] = where  # block 3
    action = np.random.default_rng(4).uniform(-1, 1, size=task.spec.action.size)
    data = {
        "goal": torch.from_numpy(GOAL)[None, None],
        "chosen": torch.eye(5, dtype=torch.float64)[3][None, None],
    }
    definition = task.definition()
    zero = torch.zeros(1, 1, 2, dtype=torch.float64)
    reward = definition.reward(now, zero, torch.from_numpy(action)[None, None], data)
    obs = definition.observe(now)[0, 0].numpy()
    assert reward.shape == (1, 1) and obs.shape == (task.spec.obs_size,)
    assert definition.success is not None
    forces = np.clip(plain["cfrc_ext"], -1, 1)
    shown = {leaf: getattr(now, leaf)[0, 0].numpy() for leaf in now._fields}
    shown |= {"a2": float((action**2).sum()), "forces": forces}
    return float(reward), obs, bool(definition.success(now, data)), shown


NEAR, FAR = (0.3, -0.4), (3.0, -4.0)  # 0.5 and 5 m away; 0.7 and 7 m by the sum of coordinates


@pytest.mark.parametrize(
    ("kind", "offset", "distance", "success"),
    [("dense", NEAR, 0.5, True), ("dense", FAR, 5.0, False)]
    + [("gated", NEAR, 0.5, True), ("gated", FAR, 2.0, False)],
)
def test_wheeled(kind: str, offset: tuple, distance: float, success: bool) -> None:
    reward, obs, reached, s = scored("wheeled", (6, 6), offset, reward=kind)
    # Controls are twice the action, and paid for as such.
    assert reward == pytest.approx(-distance - 0.05 * 4 * s["a2"], abs=1e-12)
    assert reached is success
    np.testing.assert_array_equal(obs, np.concatenate([s["qpos"], s["qvel"]]))


@pytest.mark.parametrize(
    ("kind", "offset", "distance", "success"),
    [("dense", NEAR, 0.7, True), ("dense", FAR, 7.0, False)]
    + [("gated", NEAR, 0.7, True), ("gated", FAR, 1.2 + 1.6, False)],
)
def test_legged(kind: str, offset: tuple, distance: float, success: bool) -> None:
    reward, obs, reached, s = scored("ant_ring", (15, 14), offset, reward=kind)
    costs = 0.005 * s["a2"] + 5e-4 * (s["forces"] ** 2).sum()
    assert reward == pytest.approx(4 - distance - costs + 0.05, abs=1e-12)
    assert reached is success
    parts = [s["qpos"], s["qvel"], s["forces"].ravel(), s["xmat"][1], s["subtree_com"][1]]
    np.testing.assert_array_equal(obs, np.concatenate(parts))
    healthy = make_task("ant_ring").definition().healthy
    now, _ = stored(15, 14)
    for z, alive in ((0.19, False), (0.2, True), (1.0, True), (1.01, False)):
        now.qpos[..., 2] = z
        assert healthy is not None and bool(healthy(now)) is alive


@pytest.mark.parametrize(
    ("kind", "offset", "distance", "success"),
    [("dense", (0.12, -0.16), 0.2, True), ("dense", FAR, 5.0, False)]
    + [("gated", (0.12, -0.159), math.hypot(0.12, 0.159), True)]
    + [("gated", (0.12, -0.17), 2.0, False)],
)
def test_block_push(kind: str, offset: tuple, distance: float, success: bool) -> None:
    reward, obs, reached, s = scored("block_push", (13, 13), offset, reward=kind)
    assert reward == pytest.approx(-5 * distance, abs=1e-12)
    assert reached is success or offset == (0.12, -0.16)  # on the border to the last bit
    np.testing.assert_array_equal(obs, np.concatenate([s["qpos"], s["qvel"]]))


@pytest.mark.parametrize("name", ["wheeled", "ant_ring"])
def test_goals_are_uniform_on_the_half_circle(name: str) -> None:
    goal = make_task(name).sample(2000, "test", Rng(0)).data["goal"][0]
    assert torch.allclose(goal.square().sum(-1), torch.tensor(4.0, dtype=torch.float64))
    uniform_in(torch.atan2(goal[:, 1], goal[:, 0]), 0.0, math.pi)


def test_blocks_and_goals_are_drawn_as_published() -> None:
    data = make_task("block_push").sample(2000, "train", Rng(0)).data
    assert not data["pose"][..., :3].any()
    places = data["pose"][0, :, 3:].unflatten(-1, (5, 2))
    bands = ((places[..., 1] + 0.5) / 0.2).floor()
    assert torch.equal(bands.sort(-1).values, torch.arange(5.0).double().expand(2000, 5))
    for block in range(5):
        uniform_in(places[:, block, 0], 0.35, 0.65)
        uniform_in(places[:, block, 1], -0.5, 0.5)
    for row in range(5):  # every block lies in every band as often
        assert float((bands[:, 0] == row).double().mean()) == pytest.approx(0.2, abs=0.04)
    goal, chosen = data["goal"][0], data["chosen"][0]
    assert (chosen.sum(-1) == 1).all() and float((chosen.mean(0) - 0.2).abs().max()) < 0.04
    uniform_in(goal[:, 0], 0.75, 0.95)
    uniform_in(goal[:, 1], -0.5, 0.5)
    band = (chosen * bands).sum(-1)
    assert torch.equal(((goal[:, 1] + 0.5) / 0.2).floor(), band), "the goal is in its block's band"


def test_models_have_the_published_numbers() -> None:
    wheeled = build_model(make_task("wheeled").body())
    assert (wheeled.nq, wheeled.nv, wheeled.nu, wheeled.opt.timestep) == (6, 6, 2, 0.01)
    assert wheeled.body_mass.sum() == pytest.approx(14.0, abs=1e-12)
    assert (wheeled.actuator_ctrlrange == [-2, 2]).all()
    push = build_model(make_task("block_push").body())
    assert (push.nq, push.nv, push.nu, push.opt.timestep) == (13, 13, 3, 0.01)
    assert not push.opt.gravity.any() and (push.actuator_ctrlrange == [-2, 2]).all()
    assert (push.dof_damping == [0.5] * 3 + [1.5] * 10).all()
    boxes = push.geom_type == mujoco.mjtGeom.mjGEOM_BOX
    assert boxes.sum() == 5 and (push.geom_size[boxes] == 0.03).all()
    ant = build_model(make_task("ant_ring").body())
    assert (ant.actuator_gear[:, 0] == 30).all() and ant.opt.timestep == 0.01
    for name, steps, seconds in (("wheeled", 200, 0.01), ("ant_ring", 200, 0.01)):
        task = make_task(name)
        assert task.spec.horizon == steps and task.make_env("cpu").seconds == seconds
    assert make_task("block_push").spec.horizon == 100
    sizes = {name: make_task(name).spec.obs_size for name in ("wheeled", "ant_ring", "block_push")}
    assert sizes == {"wheeled": 12, "ant_ring": 125, "block_push": 26}


def driven(name: str, action: list[float], steps: int, tasks: Tasks | None = None) -> tuple:
    """Rewards ``[T, B]``, places ``[T, B, nq]`` and metrics under a constant action."""
    task = make_task(name)
    tasks = task.sample(16, "train", Rng(0)) if tasks is None else tasks
    env = task.make_env("cpu")
    state, ts = env.reset(tasks, Rng(1))
    acts = torch.tensor(action).expand(1, tasks.index.shape[1], -1)
    rewards, places = [], []
    for _ in range(steps):
        state, ts = env.step(state, acts)
        rewards.append(ts.reward[0])
        places.append(torch.from_numpy(positions(env, state)[0]).clone())
    return torch.stack(rewards), torch.stack(places), env.metrics(state)


def test_the_car_reaches_a_goal_ahead_in_sixty_steps() -> None:
    tasks = make_task("wheeled").sample(2, "train", Rng(0))
    tasks.data["goal"] = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    rewards, places, metrics = driven("wheeled", [1.0, 1.0], 100, tasks)
    way = torch.linalg.vector_norm(places[..., :2], dim=-1)
    assert 55 <= int((way[:, 0] > 1.2).int().argmax()) <= 65
    assert metrics["success"].tolist() == [[1.0, 0.0]]
    assert rewards[80, 0] > rewards[0, 0] + 1.5
    _, turned, _ = driven("wheeled", [1.0, -1.0], 60, tasks)
    assert float(turned[-1, :, 3].abs().min()) > 3, "it turns on the spot"
    assert float(turned[..., :2].abs().max()) < 0.1
    # The noise at the start may lift it by a few cm.
    assert float(places[30:, :, 2].abs().max()) < 0.005, "it stays on the ground"


def test_the_gripper_pushes_blocks_and_never_goes_through_them() -> None:
    # The gripper waits in the row of the chosen block, as if it had been moved there.
    tasks = make_task("block_push").sample(200, "train", Rng(0))
    chosen = tasks.data["chosen"][0].argmax(-1)
    row = torch.arange(200)
    block_y = 3 + 2 * chosen + 1
    tasks.data["pose"][0, :, 1] = tasks.data["pose"][0, row, block_y]
    tasks.data["goal"][0, :, 1] = tasks.data["pose"][0, row, block_y]
    rewards, places, metrics = driven("block_push", [1.0, 0.0, 0.0], 100, tasks)
    x = places[:, row, 3 + 2 * chosen]
    held = (places[:, row, block_y] - places[..., 1]).abs() < 0.1
    assert not (held & (x < places[..., 0])).any()
    assert float(metrics["success"].mean()) > 0.9
    distance = (x[:-1] - tasks.data["goal"][0, :, 0]).hypot(
        places[:-1, row, block_y] - tasks.data["goal"][0, :, 1]
    )
    assert torch.allclose(rewards[:-1].double(), -5 * distance, atol=1e-5)
    still, *_ = driven("block_push", [0.0, 0.0, 0.0], 20)
    assert torch.allclose(still, still[0].expand_as(still), atol=1e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["wheeled", "block_push", "ant_ring"])
def test_physics_is_mujocos_and_what_is_read_is_up_to_date(name: str, engine: str) -> None:
    options = {"contact": "zero"} if name == "ant_ring" else {}
    task = make_task(name, engine=engine, **options)
    env, tasks = task.make_env("cpu"), task.sample(2, "train", Rng(0))
    state, _ = env.reset(tasks, Rng(1))
    model = build_model(task.body())
    datas = [mujoco.MjData(model) for _ in range(2)]
    for data, qpos, qvel in zip(datas, *positions(env, state), strict=True):
        data.qpos, data.qvel = qpos, qvel
        mujoco.mj_forward(model, data)
    for action in actions(40, 1, 2, task.spec.action.size):
        state, ts = env.step(state, action)
        for world, data in enumerate(datas):
            data.ctrl = action[0, world].double().numpy() * model.actuator_ctrlrange[:, 1]
            mujoco.mj_step(model, data)
            mujoco.mj_forward(model, data)
            if name == "ant_ring" and not ts.new_trial[0, world]:
                com = data.subtree_com[1].astype(np.float32)
                np.testing.assert_array_equal(ts.obs[0, world, -3:].numpy(), com)
    going = ~state.over[0].numpy()
    assert going.any()
    for ours, leaf in zip(positions(env, state), ("qpos", "qvel"), strict=True):
        theirs = np.array([getattr(data, leaf) for data in datas])
        np.testing.assert_array_equal(ours[going], theirs[going])


def test_goals_change_between_episodes() -> None:
    task = make_task("wheeled", horizon=10, episodes=2, continual=True)
    tasks = task.sample(4, "train", Rng(0))
    assert tasks.data["goal"].shape == (1, 4, 2, 2)
    tasks.data["goal"][:, :, 1] *= 3
    env: MujocoEnv = task.make_env("cpu")
    state, _ = env.reset(tasks, Rng(1))
    still = torch.zeros(1, 4, 2)
    rewards: list[Tensor] = []
    for _ in range(10):
        state, ts = env.step(state, still)
        rewards.append(ts.reward[0])
    for episode in range(2):
        place = state.starts[0, :, episode, :2]
        distance = torch.linalg.vector_norm(tasks.data["goal"][0, :, episode] - place, dim=-1)
        assert torch.allclose(rewards[5 * episode].double(), -distance, atol=0.01)
    assert torch.allclose(rewards[5], torch.tensor(-6.0), atol=0.2)
