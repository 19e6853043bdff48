"""Families of bodies and tasks: definitions by hand, what is drawn, worlds against models."""

from __future__ import annotations

import math
import re

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from test_mujoco import ENGINES, actions, endless, positions
from test_task_bodies import stored
from torch import Tensor

from esmeta.envs.mujoco import MujocoEnv, State
from esmeta.envs.mujoco_model import asset, build_model, motors
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.tasks.random_reacher import links
from esmeta.types import Tasks

EPG = ("random_hopper", "random_walker", "directional_hopper", "random_reacher")


pytestmark = pytest.mark.usefixtures("elsewhere")


# --- definitions -----------------------------------------------------------------------------


def planar(s: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [s["qpos"][1:], np.clip(s["qvel"], -10, 10)]


def reach(s: dict[str, np.ndarray]) -> np.ndarray:
    return s["xpos"][3] - s["xpos"][4]


def to_goal(s: dict[str, np.ndarray]) -> float:
    return math.hypot(s["xpos"][1, 0] - 1, s["xpos"][1, 1] + 2)


def progress(s: dict[str, np.ndarray]) -> float:
    # The speed is (2, -1) m/s for 0.05 s.
    before = math.hypot(s["xpos"][1, 0] - 0.1 - 1, s["xpos"][1, 1] + 0.05 + 2)
    return (before - to_goal(s)) / 0.05


# Task, options, size of qpos and qvel, reward and observation by hand.
DEFINITIONS = {
    "EPG, RandomHopper": ("random_hopper", {}, (6, 6), lambda s: 2.0, planar),
    "EPG, RandomWalker": ("random_walker", {}, (9, 9), lambda s: 2.0, planar),
    "EPG, DirectionalHopper": ("directional_hopper", {}, (6, 6), lambda s: -2.0, planar),
    "EPG, RandomReacher": (
        ("random_reacher", {}, (4, 4), lambda s: -math.sqrt((reach(s) ** 2).sum()) - s["a2"])
        + (
            lambda s: (
                [np.cos(s["qpos"][:2]), np.sin(s["qpos"][:2]), s["qpos"][2:], s["qvel"][:2]]
                + [reach(s)[:2]]
            ),
        )
    ),
    "EPG, GoalAnt": (
        ("goal_ant", {}, (15, 14), lambda s: -to_goal(s) - 0.005 * s["a2"])
        + (lambda s: [s["qpos"], s["qvel"], np.zeros(84)],)
    ),
    "EPG, GoalAnt by progress": (
        ("goal_ant", {"reward": "progress", "obs_set": "compact"}, (15, 14))
        + (lambda s: progress(s) - 0.005 * s["a2"], lambda s: [s["qpos"], s["qvel"]])
    ),
    "PEARL, hopper": (
        ("hopper_params", {}, (6, 6), lambda s: 2 + 1 - 1e-3 * s["a2"], planar)  #
    ),
    "PEARL, walker": (
        ("walker_params", {}, (9, 9), lambda s: 2 + 1 - 1e-3 * s["a2"], planar)  #
    ),
}


@pytest.mark.parametrize("which", DEFINITIONS)
def test_published_reward_and_observation(which: str) -> None:
    name, options, sizes, reward_of, obs_of = DEFINITIONS[which]
    task = make_task(name, **options)
    now, plain = stored(*sizes)
    action = np.random.default_rng(4).uniform(-1, 1, size=task.spec.action.size)
    plain["a2"] = float((action**2).sum())
    data = {
        "direction": torch.tensor([[[-1.0, 0.0]]], dtype=torch.float64),
        "goal": torch.tensor([[[1.0, -2.0]]], dtype=torch.float64),
    }
    if name.startswith("random"):
        del data["direction"]
    speed = torch.tensor([[[2.0, -1.0]]], dtype=torch.float64)
    definition = task.definition()
    reward = definition.reward(now, speed, torch.from_numpy(action)[None, None], data)
    obs = definition.observe(now)[0, 0].numpy()
    assert reward.shape == (1, 1) and obs.shape == (task.spec.obs_size,)
    assert float(reward) == pytest.approx(reward_of(plain), abs=1e-12)
    np.testing.assert_allclose(obs, np.concatenate(obs_of(plain)), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "z", "angle", "speed", "alive"),
    [
        ("random_hopper", 0.71, 0.49, 99.0, True),
        ("random_hopper", 0.69, 0.0, 0.0, False),
        ("random_hopper", 1.2, -0.51, 0.0, False),
        ("random_hopper", 1.2, 0.0, -100.0, False),
        ("directional_hopper", 0.71, 1.5, 0.0, True),
        ("directional_hopper", 0.69, 0.0, 0.0, False),
        ("directional_hopper", 1.2, 0.0, 100.0, False),
        ("random_walker", 1.99, 0.99, 99.0, True),
        ("random_walker", 0.79, 0.0, 0.0, False),
        ("random_walker", 2.01, 0.0, 0.0, False),
        ("random_walker", 1.2, -1.01, 0.0, False),
        ("hopper_params", 0.71, 0.19, 0.0, True),
        ("hopper_params", 1.2, 0.21, 0.0, False),
        ("hopper_params", 1.2, 0.0, 101.0, False),
        ("walker_params", 0.81, 0.99, 200.0, True),
        ("walker_params", 0.79, 0.0, 0.0, False),
        ("walker_params", 1.2, 1.01, 0.0, False),
        ("random_reacher", 0.0, 0.0, 0.0, None),
        ("goal_ant", 0.0, 0.0, 0.0, None),
    ],
)
def test_when_an_episode_ends(
    name: str, z: float, angle: float, speed: float, alive: bool | None
) -> None:
    healthy = make_task(name).definition().healthy
    if alive is None:
        assert healthy is None
        return
    size = 9 if "walker" in name else 6
    now, _ = stored(size, size)
    now.qpos.zero_()
    now.qvel.zero_()
    now.qpos[..., 0] = 1000.0  # far away is no end
    now.qpos[..., 1], now.qpos[..., 2], now.qvel[..., -1] = z, angle, speed
    assert healthy is not None and bool(healthy(now)) is alive


# --- what is drawn ---------------------------------------------------------------------------


def uniform_in(values: Tensor, low: float, high: float) -> None:
    """Whether the numbers are uniform in ``low..high``: range, and Kolmogorov and Smirnov."""
    flat = values.flatten().sort().values
    assert low <= float(flat[0]) and float(flat[-1]) <= high
    count = len(flat)
    expected = (torch.arange(count) + 0.5) / count
    distance = ((flat - low) / (high - low) - expected).abs().max()
    assert float(distance) < 1.95 / math.sqrt(count)  # passed by 99.9 %


@pytest.mark.parametrize(("name", "bodies"), [("random_hopper", 5), ("random_walker", 8)])
def test_epg_bodies_are_drawn_as_published(name: str, bodies: int) -> None:
    task = make_task(name)
    data = task.sample(1000, "train", Rng(0)).data
    assert data["mass"].shape == (1, 1000, bodies)
    for body in range(bodies):
        uniform_in(data["mass"][..., body], 0.5, 2.0)
    assert (data["friction"][:, :, 0] == 1).all() and (data["size"][:, :, 0] == 1).all()
    for geom in range(1, bodies):
        uniform_in(data["size"][:, :, geom, 0], 0.5, 2.0)
        for k in range(3):
            uniform_in(data["friction"][:, :, geom, k], 0.5, 2.0)
    assert (data["size"][..., 1:] == 1).all(), "radii change, lengths do not"
    assert not data["gravity"][..., :2].any()
    uniform_in(-data["gravity"][..., 2], 2.0, 20.0)
    # No two of the numbers are one number.
    drawn = torch.cat([data["mass"], data["friction"][:, :, 1:].flatten(2)], dim=-1)
    drawn = torch.cat([drawn, data["size"][:, :, 1:, 0], data["gravity"][..., 2:]], dim=-1)[0]
    correlation = torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1])
    assert float(correlation.abs().max()) < 4.5 / math.sqrt(1000)


@pytest.mark.parametrize("name", ["hopper_params", "walker_params"])
def test_parameters_are_drawn_as_published(name: str) -> None:
    task = make_task(name)
    data = task.sample(1000, "train", Rng(0)).data
    for leaf, base in (("mass", 1.5), ("inertia", 1.5), ("friction", 1.5), ("damping", 1.3)):
        exponents = data[leaf][0].log().flatten(1) / math.log(base)
        for k in range(exponents.shape[1]):
            uniform_in(exponents[:, k], -3.0, 3.0)
    plain = make_task(name, log_scale_limit=0.0).sample(3, "train", Rng(0)).data
    assert all((leaf == 1).all() for leaf in plain.values())


def test_the_direction_is_a_fair_coin() -> None:
    # EPG's release draws it from a range of one number.
    direction = make_task("directional_hopper").sample(2000, "train", Rng(0)).data["direction"]
    assert {tuple(row) for row in direction[0].tolist()} == {(1.0, 0.0), (-1.0, 0.0)}
    assert abs(float(direction[..., 0].mean())) < 4 / math.sqrt(2000)


def test_goals_of_the_test_lie_on_the_other_half() -> None:
    task = make_task("goal_ant")
    for split, sign in (("train", 1.0), ("validation", -1.0), ("test", -1.0)):
        goal = task.sample(1000, split, Rng(0)).data["goal"][0]
        uniform_in(torch.linalg.vector_norm(goal, dim=-1), 2.0, 5.0)
        angle = torch.atan2(goal[:, 1], sign * goal[:, 0])
        if split == "train":
            uniform_in(angle, -math.pi / 2, math.pi / 2)
            continue
        # Sixteen sectors of the half circle, which the two have in turn.
        place = 16 * (angle / math.pi + 0.5)
        uniform_in(place.floor() // 2 + place % 1, 0, 8)
        assert ((place.floor() % 2 == 1) == (split == "test")).all()


def test_targets_are_uniform_in_the_disc_and_new_in_every_episode() -> None:
    pose = (
        make_task("random_reacher", horizon=150, episodes=3)
        .sample(1000, "train", Rng(0))
        .data["pose"]
    )
    assert pose.shape == (1, 1000, 3, 4) and not pose[..., :2].any()
    square = pose[0, ..., 2:].square().sum(-1)
    for episode in range(3):
        uniform_in(square[:, episode], 0.0, 0.04)
    assert not torch.equal(pose[:, :, 0], pose[:, :, 1])


# --- physics ---------------------------------------------------------------------------------


def replay(name: str, engine: str, models: list[mujoco.MjModel], **options: object) -> float:
    """Largest difference in state between worlds and models of their own, after 50 steps."""
    env, _ = endless(name, engine=engine, **options)
    task = make_task(name, **options)
    tasks = task.sample(len(models), "train", Rng(0))
    state, _ = env.reset(tasks, Rng(1))
    datas = [mujoco.MjData(model) for model in models]
    for model, data, qpos, qvel in zip(models, datas, *positions(env, state), strict=True):
        data.qpos, data.qvel = qpos, qvel
        mujoco.mj_forward(model, data)
    for action in actions(50, 1, len(models), task.spec.action.size):
        state, _ = env.step(state, action)
        for world, (model, data) in enumerate(zip(models, datas, strict=True)):
            data.ctrl = action[0, world].double().numpy()
            mujoco.mj_step(model, data, task.body().frame_skip)
    qpos, qvel = positions(env, state)
    theirs = np.array([np.concatenate([data.qpos, data.qvel]) for data in datas])
    return float(np.abs(np.concatenate([qpos, qvel], axis=1) - theirs).max())


def arm(first: float, second: float) -> mujoco.MjModel:
    """Gymnasium's reacher with links of other lengths, compiled by MuJoCo."""
    text = asset("reacher.xml").read_text()
    for name, length in (("link0", first), ("link1", second)):
        text, count = re.subn(
            rf'fromto="0 0 0 0.1 0 0" name="{name}"',
            f'fromto="0 0 0 {length!r} 0 0" name="{name}"',
            text,
        )
        assert count == 1
    text = text.replace('name="body1" pos="0.1 0 0"', f'name="body1" pos="{first!r} 0 0"')
    tip = f'name="fingertip" pos="{second + 0.01!r} 0 0"'
    text = text.replace('name="fingertip" pos="0.11 0 0"', tip)
    model = mujoco.MjModel.from_xml_string(text)
    model.opt.disableflags = build_model(make_task("random_reacher").body()).opt.disableflags
    return model


@pytest.mark.parametrize("engine", ENGINES)
def test_arms_are_as_mujoco_compiles_them(engine: str) -> None:
    tasks = make_task("random_reacher").sample(3, "train", Rng(0))
    lengths = 0.1 * tasks.data["size"][0, :, [6, 7], 1]
    models = [arm(*row) for row in lengths.tolist()]
    assert replay("random_reacher", engine, models) < 1e-9
    assert replay("random_reacher", engine, [arm(0.1, 0.1)] * 3) > 1e-3


def test_links_have_mujocos_mass_and_inertia() -> None:
    factors = torch.tensor([[[0.5, 2.0]]], dtype=torch.float64)
    changes = {name: leaf[0, 0].numpy() for name, leaf in links(factors).items()}
    model, plain = arm(0.05, 0.2), arm(0.1, 0.1)
    for field, name in (
        ("body_mass", "mass"),
        ("body_inertia", "inertia"),
        ("body_pos", "body_pos"),
        ("body_ipos", "inertial_pos"),
        ("geom_pos", "geom_pos"),
        ("geom_size", "size"),
    ):
        theirs, ours = getattr(model, field), getattr(plain, field) * changes[name]
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15, err_msg=field)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_arm_of_gymnasiums_lengths_is_reacher_v5(engine: str) -> None:
    env, rewards = endless("random_reacher", engine=engine)
    tasks = make_task("random_reacher").sample(2, "train", Rng(0))
    same = links(torch.ones(1, 2, 2, dtype=torch.float64))
    state, _ = env.reset(Tasks(tasks.index, {**tasks.data, **same}), Rng(1))
    theirs = [gymnasium.make("Reacher-v5").unwrapped for _ in range(2)]
    for other, qpos, qvel in zip(theirs, *positions(env, state), strict=True):
        assert (np.abs(qpos[:2]) <= 0.1).all() and (np.abs(qvel[:2]) <= 5e-3).all()
        assert math.hypot(*qpos[2:]) <= 0.2 and not qvel[2:].any()
        other.reset(seed=0)
        mujoco.mj_resetData(other.model, other.data)
        other.set_state(qpos, qvel)
    for action in actions(50, 1, 2, 2):
        state, ts = env.step(state, action)
        for b, other in enumerate(theirs):
            obs, reward, *_ = other.step(action[0, b].double().numpy())
            assert abs(float(rewards[-1][0, b]) - reward) <= 1e-12
            np.testing.assert_allclose(ts.obs[0, b].numpy(), obs.astype(np.float32), atol=1e-12)
            np.testing.assert_array_equal(positions(env, state)[0][b], other.data.qpos)


# --- motors that fail, tasks that change -----------------------------------------------------


def run(env: MujocoEnv, tasks: Tasks, acts: Tensor) -> tuple[list[State], Tensor, Tensor]:
    """States, rewards ``[T, B]`` and what the agent sees of its actions ``[T, B, nu]``."""
    state, ts = env.reset(tasks, Rng(1))
    states, rewards, seen = [state], [], []
    for action in acts:
        state, ts = env.step(state, action)
        states.append(state)
        rewards.append(ts.reward[0])
        seen.append(ts.prev_action[0])
    return states, torch.stack(rewards), torch.stack(seen)


def test_motors_are_those_of_the_paper() -> None:
    # MetODS counts the joints of the body and says "right_back_leg, coordinate 8" and "ffoot,
    # coordinate 6": the eighth joint is the second motor. Its index among motors is another leg.
    ant, cheetah = motors("ant.xml"), motors("half_cheetah.xml")
    assert (ant.index("ankle_4"), ant.index("hip_4"), ant.index("ankle_3")) == (1, 0, 7)
    assert cheetah.index("ffoot") == 5
    for xml, names in (("ant.xml", ant), ("half_cheetah.xml", cheetah)):
        model = mujoco.MjModel.from_xml_path(str(asset(xml)))
        joints = [model.joint(j).name for j in model.actuator_trnid[:, 0]]
        assert joints == list(names)
    assert mujoco.MjModel.from_xml_path(str(asset("ant.xml"))).joint("ankle_4").bodyid == 13


@pytest.mark.parametrize(
    ("name", "impaired", "dead"),
    [
        ("ant_dir", "ankle_4", [1]),
        ("ant_dir", "ankle_3", [7]),
        ("ant_dir", "hip_4,ankle_4", [0, 1]),
        ("cheetah_dir", "ffoot", [5]),
        ("walker2d", "foot_left_joint", [5]),
    ],
)
def test_a_failed_motor_gives_no_torque(name: str, impaired: str, dead: list[int]) -> None:
    options = {"horizon": 12}
    intact, hurt = make_task(name, **options), make_task(name, impaired=impaired, **options)
    acts = actions(12, 1, 3, intact.spec.action.size)
    tasks = hurt.sample(3, "train", Rng(0))
    states, rewards, seen = run(hurt.make_env("cpu"), tasks, acts)
    zeroed = acts.clone()
    zeroed[..., dead] = 0.0
    plain = intact.sample(3, "train", Rng(0))
    others, same, _ = run(intact.make_env("cpu"), plain, zeroed)
    assert torch.equal(states[-1].rows, others[-1].rows) and torch.equal(rewards, same)
    going = ~torch.stack([state.over[0] for state in states[1:]])
    assert torch.equal(seen[going], acts[:, 0][going]), "the agent sees what it wanted"
    unhurt, *_ = run(intact.make_env("cpu"), plain, acts)
    assert not torch.equal(unhurt[-1].rows, states[-1].rows)


def test_a_motor_may_fail_later_or_at_random() -> None:
    later = make_task("cheetah_dir", impaired="ffoot", horizon=60, episodes=3, impaired_from=3)
    working = later.sample(2, "test", Rng(0)).data["working"]
    assert working.shape == (1, 2, 3, 6) and working[:, :, :2].all()
    assert (working[:, :, 2] == torch.tensor([1, 1, 1, 1, 1, 0.0])).all()
    task = make_task("ant_dir", impaired="random", episodes=2)
    working = task.sample(4000, "train", Rng(0)).data["working"][0]
    assert (working.sum(-1) == 7).all() and torch.equal(working[:, 0], working[:, 1])
    share = 1 - working[:, 0].mean(0)
    assert float((share - 1 / 8).abs().max()) < 4 * math.sqrt(7 / 64 / 4000)
    varied = make_task("ant_dir", impaired="random", episodes=2, continual=True)
    working = varied.sample(4000, "train", Rng(0)).data["working"][0]
    assert float((working[:, 0] == working[:, 1]).all(-1).double().mean()) == pytest.approx(
        1 / 8, abs=0.03
    )


def test_tasks_change_between_the_episodes_of_a_trial() -> None:
    task = make_task("cheetah_dir", horizon=40, episodes=5, continual=True)
    tasks = task.sample(16, "test", Rng(0))
    direction = tasks.data["direction"][0]
    assert direction.shape == (16, 5, 2)
    once = make_task("cheetah_dir").sample(16, "test", Rng(0)).data["direction"][0]
    assert torch.equal(direction[:, 0], once), "the first is that of a trial of one episode"
    assert 20 < (direction[..., 0] > 0).sum() < 60
    acts = actions(40, 1, 16, 6)
    states, rewards, _ = run(task.make_env("cpu"), tasks, acts)
    effort = 0.05 * acts[:, 0].double().square().sum(-1)
    x = torch.stack([state.rows[0, :, 1] for state in states])
    for episode in range(5):
        first = 8 * episode
        # The last step of an episode ends at the start of the next; the seven before it are ours.
        speed = x[first + 1 : first + 8].diff(dim=0) / 0.05
        expected = direction[:, episode, 0] * speed - effort[first + 1 : first + 7][: len(speed)]
        assert torch.allclose(rewards[first + 1 : first + 7].double(), expected, atol=1e-5)


def test_the_last_step_of_an_episode_is_paid_for_its_own_task() -> None:
    task = make_task("cheetah_vel", horizon=6, episodes=2, continual=True)
    tasks = task.sample(2, "train", Rng(0))
    tasks.data["speed"] = torch.tensor([[[100.0, 1000.0], [1000.0, 100.0]]], dtype=torch.float64)
    _, rewards, _ = run(task.make_env("cpu"), tasks, torch.zeros(6, 1, 2, 6))
    assert torch.allclose(rewards[:3, 0], torch.tensor(-100.0), atol=9)
    assert torch.allclose(rewards[3:, 0], torch.tensor(-1000.0), atol=9)
    assert torch.allclose(rewards[:3, 1], torch.tensor(-1000.0), atol=9)


@pytest.mark.parametrize("name", ["ant_dir", "ant_vel", "ant_goal", "goal_ant", "cheetah_vel"])
def test_every_family_of_tasks_can_change(name: str) -> None:
    task = make_task(name, horizon=12, episodes=3, continual=True, impaired="random")
    tasks = task.sample(5, "train", Rng(0))
    for leaf, values in tasks.data.items():
        assert values.shape[:3] == (1, 5, 3)
        assert not torch.equal(values[:, :, 0], values[:, :, 1]), leaf
    part = task.sample(torch.tensor([3]), "train", Rng(0))
    whole, rewards, _ = run(task.make_env("cpu"), tasks, actions(12, 1, 5, task.spec.action.size))
    _, alone, _ = run(
        task.make_env("cpu"), part, actions(12, 1, 5, task.spec.action.size)[:, :, 3:4]
    )
    assert torch.equal(rewards[:, 3:4], alone) and whole[-1].over.all()
