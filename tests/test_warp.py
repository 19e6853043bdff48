"""MuJoCo Warp: the same physics as MuJoCo in C up to float32, and the same trials.

All that compiles its kernels is slow, and runs on the CPU where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
import types
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from test_mujoco import actions
from torch import Tensor

import esmeta
from esmeta.envs import warp
from esmeta.envs.bodies import Body
from esmeta.envs.mujoco import MujocoEnv, State
from esmeta.envs.mujoco_model import asset, build_model, slice_of
from esmeta.errors import UserError
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Tasks, TimeStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = "esmeta.envs._warp_parts"


def with_warp(test):
    """For tests that run Warp: they compile for half a minute per model, once per machine."""
    there = importlib.util.find_spec("mujoco_warp") is not None
    skip = pytest.mark.skipif(not there, reason='no MuJoCo Warp: pip install "esmeta[gpu]"')
    return pytest.mark.slow(skip(test))


pytestmark = pytest.mark.usefixtures("elsewhere")


def both(name: str, xml: str | None = None, **options: object) -> tuple[MujocoEnv, MujocoEnv]:
    """The task without an end but its horizon, by Warp and by MuJoCo in C."""
    task = make_task(name, **options)
    definition = dataclasses.replace(task.definition(), healthy=None)
    body = dataclasses.replace(task.body(), **({} if xml is None else {"xml": xml}))
    ours = MujocoEnv(body, definition, horizon=1000, engine="warp", device=DEVICE)
    return ours, MujocoEnv(body, definition, horizon=1000)


def motion(env: MujocoEnv, state: State) -> Tensor:
    """qpos and qvel of the first member, ``[B, nq + nv]``."""
    return state.rows[0, :, 1 : 1 + env.model.nq + env.model.nv].double().cpu()


def as_warp(env: MujocoEnv, theirs: State, ours: State) -> State:
    """``ours`` at the positions, velocities and warm start of ``theirs``."""
    start = slice_of(env.model, mujoco.mjtState.mjSTATE_WARMSTART)
    count = 1 + env.model.nq + env.model.nv
    rows = torch.cat([theirs.rows[..., :count], theirs.rows[..., start]], dim=-1)
    return ours._replace(rows=rows.to(ours.rows), place=theirs.place.to(ours.place))


def one_step_errors(
    ours: MujocoEnv, theirs: MujocoEnv, tasks: Tasks, acts: Tensor
) -> dict[str, float]:
    """Largest differences after single control steps from states of a trajectory of C's.

    C starts from the state rounded to float32 too. ``motion`` is relative to 1 + the largest
    number of the state: velocities go up to 30.
    """
    mine, _ = ours.reset(tasks, Rng(1))
    other, _ = theirs.reset(tasks, Rng(1))
    worst = {"motion": 0.0, "qpos": 0.0, "reward": 0.0, "obs": 0.0}
    for action in acts:
        rounded = {"rows": other.rows.float().double(), "place": other.place.float().double()}
        other = other._replace(**rounded)
        mine, seen = ours.step(as_warp(theirs, other, mine), action.to(DEVICE))
        other, expected = theirs.step(other, action)
        state = motion(theirs, other)
        error, scale = (motion(ours, mine) - state).abs(), 1 + state.abs().amax(-1, keepdim=True)
        obs = (seen.obs.cpu() - expected.obs).abs() / (1 + expected.obs.abs().amax(-1)[..., None])
        found = {
            "motion": error / scale,
            "qpos": error[:, : theirs.model.nq],
            "reward": (seen.reward.cpu() - expected.reward).abs(),
            "obs": obs,
        }
        worst = {name: max(value, float(found[name].max())) for name, value in worst.items()}
    return worst


def contacts_of(env: MujocoEnv) -> int:
    """The most contacts that all worlds had together."""
    (worlds,) = env._worlds.values()
    return int(worlds._contacts_used.numpy()[0])


@with_warp
@pytest.mark.parametrize("name", ["ant", "cheetah_dir", "hopper", "walker2d"])
def test_one_step_is_that_of_c(name: str) -> None:
    options = {"contact": "zero"} if name == "ant" else {}
    ours, theirs = both(name, **options)
    task = make_task(name, **options)
    acts = actions(40, 1, 8, task.spec.action.size)
    worst = one_step_errors(ours, theirs, task.sample(8, "train", Rng(0)), acts)
    print(name, worst)
    assert max(worst.values()) <= 1e-4, worst
    assert contacts_of(ours) >= 8
    ours.metrics(ours.reset(task.sample(8, "train", Rng(0)), Rng(1))[0])  # no room was missing


@with_warp
def test_elliptic_cones_too(tmp_path: Path) -> None:
    xml = tmp_path / "elliptic.xml"
    text = asset("ant.xml").read_text(encoding="utf-8")
    xml.write_text(text.replace("<option ", '<option cone="elliptic" ', 1), encoding="utf-8")
    ours, theirs = both("ant", str(xml), contact="zero")
    assert theirs.model.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC
    tasks = make_task("ant").sample(8, "train", Rng(0))
    worst = one_step_errors(ours, theirs, tasks, actions(40, 1, 8, 8))
    print("elliptic", worst)
    assert max(worst.values()) <= 1e-4, worst
    assert contacts_of(ours) >= 8


@with_warp
def test_contact_forces_are_those_of_c() -> None:
    ours, theirs = both("ant", contact="mj")
    tasks = make_task("ant").sample(4, "train", Rng(0))
    worst = one_step_errors(ours, theirs, tasks, actions(30, 1, 4, 8))
    print("forces", worst)
    assert worst["obs"] <= 2e-3 and worst["reward"] <= 1e-4, worst
    state, _ = theirs.reset(tasks, Rng(1))
    for action in actions(30, 1, 4, 8):
        state, ts = theirs.step(state, action)
    assert ts.obs[..., 27:].abs().max() > 0.1, "there must be forces to compare"


@with_warp
def test_worlds_with_models_of_their_own() -> None:
    ours, theirs = both("hopper")
    tasks = make_task("hopper").sample(4, "train", Rng(0))
    draw, model = np.random.default_rng(7).uniform, theirs.model
    shapes = {
        "mass": (model.nbody,),
        "inertia": (model.nbody, 3),
        "friction": (model.ngeom, 3),
        "damping": (model.nv,),
        "gear": (model.nu,),
        "size": (model.ngeom, 3),
    }
    changes = {name: draw(0.7, 1.4, (1, 4, *shape)) for name, shape in shapes.items()}
    changes["gravity"] = np.stack(np.broadcast_arrays(0.0, 0.0, -draw(5, 15, (1, 4))), -1)
    own = {name: torch.from_numpy(values) for name, values in changes.items()}
    acts = actions(40, 1, 4, 3)
    worst = one_step_errors(ours, theirs, Tasks(tasks.index, {**tasks.data, **own}), acts)
    print("own models", worst)
    assert max(worst.values()) <= 1e-4, worst
    # Without the changes it is another world: else the test would say nothing.
    states = []
    for data in ({}, own):
        state, _ = ours.reset(Tasks(tasks.index, {**tasks.data, **data}), Rng(1))
        states.append(motion(ours, ours.step(state, acts[0].to(DEVICE))[0]))
    assert (states[0] - states[1]).abs().max() > 0.1


def play(env: MujocoEnv, acts: Tensor, tasks: Tasks) -> tuple[list[TimeStep], list[State]]:
    state, ts = env.reset(tasks, Rng(1), acts.shape[1])
    steps, states = [ts], [state]
    for action in acts:
        state, ts = env.step(state, action.to(env._like.device))
        steps.append(ts)
        states.append(state)
    return steps, states


def compared(name: str, **options: object) -> tuple[MujocoEnv, list[TimeStep], list[State], Tensor]:
    """A batch of whole trials by Warp, which C's agree with; also the actions."""
    ours, theirs = (make_task(name, engine=engine, **options) for engine in ("warp", "auto"))
    tasks = ours.sample(6, "train", Rng(0))
    acts = actions(ours.spec.horizon, 2, 6, ours.spec.action.size)
    env = ours.make_env(DEVICE)
    steps, states = play(env, acts, tasks)
    expected, _ = play(theirs.make_env("cpu"), acts, tasks)
    for mine, other in zip(steps, expected, strict=True):
        for name, leaf in mine._asdict().items():
            wanted = getattr(other, name)
            assert leaf.dtype == wanted.dtype
            if leaf.dtype == torch.bool:
                assert torch.equal(leaf.cpu(), wanted), name
            else:
                torch.testing.assert_close(leaf.cpu(), wanted, atol=2e-4, rtol=2e-4)
    assert ours.reference == theirs.reference
    return env, steps, states, acts


@with_warp
def test_trials_end_and_begin_again_as_on_the_cpu() -> None:
    env, steps, states, acts = compared("hopper", horizon=80, episodes=2)
    ended = torch.stack([ts.terminated for ts in steps]).sum(0)
    assert ended.max() > 0 and states[-1].over.all()
    assert len(torch.stack([~state.over for state in states]).sum(0).unique()) > 1
    for before, after in zip(states, states[1:], strict=False):
        assert torch.equal(before.rows[before.over], after.rows[before.over])
    # A step leaves its state alone.
    again, _ = env.step(states[5], acts[5].to(DEVICE))
    assert torch.equal(again.rows, states[6].rows)


@with_warp
def test_episodes_with_tasks_and_failing_motors_of_their_own() -> None:
    options = {"impaired": "random", "continual": True, "physics": "rllab"}
    _, steps, *_ = compared("cheetah_dir", horizon=20, episodes=2, **options)
    assert steps[10].new_episode.all() and not steps[10].new_trial.any()


@with_warp
def test_a_trial_does_not_depend_on_batch_mates() -> None:
    task = make_task("cheetah_dir", engine="warp", horizon=12)
    acts = actions(12, 2, 5, 6)
    env = task.make_env(DEVICE)
    steps, _ = play(env, acts, task.sample(5, "train", Rng(0)))
    rows = [3, 1]
    part = task.sample(torch.tensor(rows), "train", Rng(0))
    alone, _ = play(env, acts[:, 1:, rows], part)
    for mine, other in zip(alone, steps, strict=True):
        for name, leaf in mine._asdict().items():
            assert torch.equal(leaf, getattr(other, name)[1:, rows]), name


@with_warp
def test_lost_worlds_are_ended_and_counted() -> None:
    task = make_task("cheetah_dir", engine="warp", horizon=20)
    tasks, acts = task.sample(3, "train", Rng(0)), actions(10, 1, 3, 6)
    env = task.make_env(DEVICE)
    _, states = play(env, acts, tasks)
    clean = states[-1]
    poisoned = states[4].rows.clone()
    poisoned[0, 1, 3] = torch.nan
    state, steps = states[4]._replace(rows=poisoned), []
    for action in acts[4:]:
        state, ts = env.step(state, action.to(DEVICE))
        steps.append(ts)
    assert steps[0].terminated.tolist() == [[False, True, False]]
    for ts in steps:
        assert torch.isfinite(ts.obs).all() and torch.isfinite(ts.reward).all()
        assert ts.reward[0, 1] == 0 and ts.new_trial.tolist() == [[False, True, False]]
    assert env.metrics(state)["unstable"].tolist() == [[0.0, 1.0, 0.0]]
    assert not env.metrics(clean)["unstable"].any()
    assert torch.isfinite(state.rows).all(), "what is stepped on must be fit to be"
    for world in (0, 2):  # the others never knew
        assert torch.equal(state.rows[0, world], clean.rows[0, world])


@with_warp
def test_too_little_room_is_an_error_that_says_how_much(monkeypatch) -> None:
    task = make_task("cheetah_dir")
    tasks, acts = task.sample(4, "train", Rng(0)), actions(12, 1, 4, 6)

    def run(**room: int) -> tuple[MujocoEnv, State]:
        body = dataclasses.replace(task.body(), **room)
        options = {"horizon": 20, "engine": "warp", "device": DEVICE}
        env = MujocoEnv(body, task.definition(), **options)
        return env, play(env, acts, tasks)[1][-1]

    env, roomy = run()
    assert torch.isfinite(env.metrics(roomy)["early"]).all()
    sizes = {"nconmax": 1, "njmax": 2}
    for _ in range(5):
        env, last = run(**sizes)
        try:
            env.metrics(last)
            break
        except UserError as error:
            found = re.search(r"nconmax=(\d+), njmax=(\d+)\)", str(error))
            assert found and "results since are wrong" in str(error)
            larger = {"nconmax": int(found[1]), "njmax": int(found[2])}
            assert larger != sizes
            sizes = larger
    assert 1 < sizes["nconmax"] <= 16 and 2 < sizes["njmax"] <= 70
    assert torch.equal(last.rows, roomy.rows)
    monkeypatch.setattr(warp, "_CHECK_EVERY", 3)
    with pytest.raises(UserError, match="ran out of room on 'half_cheetah.xml'"):
        run(nconmax=1, njmax=2)


@with_warp
def test_a_population_is_scored_as_on_the_cpu() -> None:
    returns = []
    for engine in ("warp", "auto"):
        task = esmeta.make_task("cheetah_vel", engine=engine, horizon=12)
        policy = esmeta.make_policy("mlp", task.spec)
        device = DEVICE if engine == "warp" else "cpu"
        evaluator = esmeta.PopulationEvaluator(policy, task, trials=3, device=device)
        returns.append(evaluator(policy.init(seed=0, population=2), seed=0).returns)
    torch.testing.assert_close(*returns, atol=1e-3, rtol=1e-4)


# --- without Warp ----------------------------------------------------------------------------


def test_without_warp_the_error_names_the_extra(monkeypatch) -> None:
    monkeypatch.delitem(sys.modules, PARTS, raising=False)
    monkeypatch.setitem(sys.modules, "mujoco_warp", None)
    with pytest.raises(UserError) as caught:
        make_task("hopper", engine="warp").make_env("cpu")
    for words in ("engine = 'warp'", 'pip install "esmeta[gpu]"', "engine = 'auto'"):
        assert words in str(caught.value)


def test_another_version_is_refused(monkeypatch) -> None:
    other = types.SimpleNamespace(VERSION="3.17.0", mjw=types.SimpleNamespace(__version__="3.18.0"))
    monkeypatch.setitem(sys.modules, PARTS, other)
    with pytest.raises(UserError, match=r'3\.17\.0, this is 3\.18\.0: pip install "esmeta\[gpu\]"'):
        make_task("hopper", engine="warp").make_env("cpu")


def floor_pairs(model: mujoco.MjModel) -> np.ndarray:
    """The floor, which is the first geom, with each of the others."""
    return np.array([(0, geom) for geom in range(1, model.ngeom)])


@pytest.mark.parametrize(
    ("body", "room"),
    [
        # A sphere and twelve capsules, two points each; four edges per point, eight joints' limits.
        (Body("ant.xml", 5), (25, 25 * 4 + 8)),
        (Body("half_cheetah.xml", 5), (16, 16 * 4 + 6)),
        (Body("walker2d_v5.xml", 4), (14, 14 * 4 + 6)),
        (Body("ant.xml", 5, nconmax=3), (3, 3 * 4 + 8)),
        (Body("ant.xml", 5, njmax=50), (25, 50)),
    ],
)
def test_there_is_room_for_all_contacts_that_can_be(body: Body, room: tuple[int, int]) -> None:
    model = build_model(body)
    assert warp.room(model, body, floor_pairs(model)) == room


def test_boxes_that_touch_each_other_are_refused() -> None:
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><worldbody><geom type="plane" size="1 1 1"/>
        <body><freejoint/><geom type="box" size="1 1 1"/></body>
        <body><freejoint/><geom type="box" size="1 1 1"/></body>
        </worldbody></mujoco>"""
    )
    body = Body("ant.xml", 5)
    warp.refuse_boxes(model, body, np.array([[0, 1], [0, 2]]))
    with pytest.raises(UserError, match="boxes of 'ant.xml'.*engine = 'auto'"):
        warp.refuse_boxes(model, body, np.array([[0, 1], [1, 2]]))


@with_warp
def test_the_pushed_blocks_are_such_boxes() -> None:
    task = make_task("block_push", engine="warp")
    with pytest.raises(UserError, match="boxes of .*block_push.xml"):
        task.make_env(DEVICE).reset(task.sample(2, "train", Rng(0)), Rng(1))


def test_elliptic_contacts_need_three_rows() -> None:
    model = build_model(Body("ant.xml", 5))
    model.opt.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    assert warp.room(model, Body("ant.xml", 5), floor_pairs(model)) == (25, 25 * 3 + 8)


def test_negative_room_is_refused() -> None:
    with pytest.raises(UserError, match="nconmax = -1.*integer >= 0"):
        Body("ant.xml", 5, nconmax=-1)
    with pytest.raises(UserError, match="njmax = -1.*integer >= 0"):
        Body("ant.xml", 5, njmax=-1)
