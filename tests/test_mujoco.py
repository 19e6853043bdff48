"""Simulated bodies: equal to gymnasium and to MuJoCo one world at a time, whatever the engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor

from esmeta.envs import mujoco_model
from esmeta.envs.bodies import Body
from esmeta.envs.mujoco import MujocoEnv, State
from esmeta.envs.mujoco_cpu import make_engine
from esmeta.envs.mujoco_model import build_model, mujoco_version, slice_of, world_fields
from esmeta.errors import UserError
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Tasks, TimeStep

STANDARD = {
    "ant": "Ant-v5",
    "half_cheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v5",
}
ENGINES = (
    pytest.param(
        "batch",
        marks=pytest.mark.skipif(mujoco_version() < (3, 17), reason="mujoco.batch came with 3.17"),
    ),
    "rows",
)


# Gymnasium imports it with every MuJoCo environment, for the pictures of its window only.
if importlib.util.find_spec("imageio") is None:
    sys.modules["imageio"] = types.ModuleType("imageio")


def actions(steps: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(steps, *shape, generator=generator) * 2 - 1


def endless(name: str, **options: object) -> tuple[MujocoEnv, list[Tensor]]:
    """The task without an end but its horizon, and where its rewards go in float64."""
    task = make_task(name, **options)
    definition = task.definition()
    rewards = []

    def reward(*args: object) -> Tensor:
        rewards.append(definition.reward(*args))
        return rewards[-1]

    changed = dataclasses.replace(definition, healthy=None, reward=reward)
    engine = options.get("engine", "auto")
    return MujocoEnv(task.body(), changed, horizon=1000, engine=engine), rewards


def positions(env: MujocoEnv, state: State) -> tuple[np.ndarray, np.ndarray]:
    """qpos ``[B, nq]`` and qvel ``[B, nv]`` of the first member."""
    rows, nq, nv = state.rows[0].numpy(), env.model.nq, env.model.nv
    return rows[:, 1 : 1 + nq], rows[:, 1 + nq : 1 + nq + nv]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", STANDARD)
def test_trajectories_are_gymnasiums_bit_for_bit(name: str, engine: str) -> None:
    options: dict[str, object] = {"engine": engine, "contact_rule": "native"}
    if (name, engine) == ("ant", "batch"):
        options["contact"] = "zero"
    env, rewards = endless(name, **options)
    trials, steps = 2, 200
    task = make_task(name, **options)
    state, ts = env.reset(task.sample(trials, "train", Rng(0)), Rng(1))
    acts = actions(steps, 1, trials, task.spec.action.size)
    theirs = [gymnasium.make(STANDARD[name]).unwrapped for _ in range(trials)]
    for other, qpos, qvel in zip(theirs, *positions(env, state), strict=True):
        other.reset(seed=0)
        mujoco.mj_resetData(other.model, other.data)
        other.set_state(qpos, qvel)
    worst = 0.0
    for action in acts:
        state, ts = env.step(state, action)
        qpos, qvel = positions(env, state)
        for b, other in enumerate(theirs):
            obs, reward, terminated, _, info = other.step(action[0, b].double().numpy())
            assert np.array_equal(qpos[b], other.data.qpos), (name, b)
            assert np.array_equal(qvel[b], other.data.qvel), (name, b)
            if options.get("contact") == "zero":
                reward -= info["reward_contact"]
                obs[27:] = 0.0
            worst = max(worst, abs(float(rewards[-1][0, b]) - reward))
            assert np.array_equal(ts.obs[0, b].numpy(), obs.astype(np.float32))
    assert worst <= 1e-12


OLD = ROOT / "tests" / "mujoco_330.npz"
BODIES = {"ant.xml": 5, "half_cheetah.xml": 5, "hopper.xml": 4, "walker2d_v5.xml": 4}


def distance_to_330(xml: str, rule: str, engine: str) -> float:
    """Largest difference to MuJoCo 3.3.0 in qpos and qvel after 20 control steps."""
    with np.load(OLD) as stored:
        start, acts, states = (stored[f"{xml}/{key}"] for key in ("start", "actions", "states"))
    model = build_model(Body(xml, BODIES[xml], contact_rule=rule))
    worlds = make_engine(engine, model, len(start), 1, ())
    parts = mujoco.mjtState
    qpos, qvel, ctrl = (
        worlds.rows[:, slice_of(model, part)]
        for part in (parts.mjSTATE_QPOS, parts.mjSTATE_QVEL, parts.mjSTATE_CTRL)
    )
    worlds.rows[:] = 0.0
    qpos[:], qvel[:] = np.split(start, [model.nq], axis=1)
    worlds.forward(None)
    for action in acts:
        ctrl[:] = action
        worlds.step(None, BODIES[xml])
    return float(np.abs(np.concatenate([qpos, qvel], axis=1) - states[-1]).max())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("xml", BODIES)
def test_the_legacy_rule_is_mujoco_330(xml: str, engine: str) -> None:
    assert distance_to_330(xml, "legacy", engine) <= 1e-10


@pytest.mark.skipif(mujoco_version() < (3, 5), reason="there both rules are one")
def test_the_native_rule_is_not() -> None:
    # Two margins of 0.01 that add up: without this the test above would say nothing.
    assert distance_to_330("ant.xml", "native", "rows") > 1e-3


def varied(worlds: int, model: mujoco.MjModel) -> dict[str, Tensor]:
    """Changes of every kind, one set for each world, ``[1, W, ...]``."""
    draw = np.random.default_rng(7).uniform
    shapes = {
        "mass": (model.nbody,),
        "inertia": (model.nbody, 3),
        "friction": (model.ngeom, 3),
        "damping": (model.nv,),
        "gear": (model.nu,),
        "size": (model.ngeom, 3),
    }
    changes = {name: draw(0.6, 1.5, (1, worlds, *shape)) for name, shape in shapes.items()}
    changes["gravity"] = np.stack(np.broadcast_arrays(0.0, 0.0, -draw(5, 15, (1, worlds))), -1)
    return {name: torch.from_numpy(values) for name, values in changes.items()}


def one_model(xml: str, changes: dict[str, Tensor], world: int) -> mujoco.MjModel:
    """A model of its own for one world, edited as MuJoCo's manual says."""
    model = build_model(Body(xml, 1))
    own = {name: values[0, world].numpy() for name, values in changes.items()}
    model.body_mass *= own["mass"]
    model.body_inertia *= own["inertia"]
    model.geom_friction *= own["friction"]
    model.dof_damping *= own["damping"]
    model.actuator_gear *= own["gear"][:, None]
    model.geom_size *= own["size"]
    model.opt.gravity = own["gravity"]
    mujoco.mj_setConst(model, mujoco.MjData(model))
    if mujoco_version() < (3, 17):  # which leaves bounds as they were
        capsule = model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
        radius, half, _ = model.geom_size[capsule].T
        model.geom_rbound[capsule] = radius + half
        model.geom_aabb[capsule, 3:] = np.stack([radius, radius, radius + half], axis=1)
    return model


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["hopper", "walker2d"])
def test_worlds_with_models_of_their_own(name: str, engine: str) -> None:
    trials, steps = 3, 60
    env, _ = endless(name, engine=engine)
    task = make_task(name)
    tasks = task.sample(trials, "train", Rng(0))
    changes = varied(trials, env.model)
    state, _ = env.reset(Tasks(tasks.index, {**tasks.data, **changes}), Rng(1))
    body = task.body()
    models = [one_model(body.xml, changes, world) for world in range(trials)]
    datas = [mujoco.MjData(model) for model in models]
    for model, data, qpos, qvel in zip(models, datas, *positions(env, state), strict=True):
        data.qpos, data.qvel = qpos, qvel
        mujoco.mj_forward(model, data)
    for action in actions(steps, 1, trials, task.spec.action.size):
        state, _ = env.step(state, action)
        for world, (model, data) in enumerate(zip(models, datas, strict=True)):
            data.ctrl = action[0, world].double().numpy()
            mujoco.mj_step(model, data, body.frame_skip)
    qpos, qvel = positions(env, state)
    assert np.array_equal(qpos, [data.qpos for data in datas])
    assert np.array_equal(qvel, [data.qvel for data in datas])
    plain, _ = endless(name, engine=engine)
    start, _ = plain.reset(tasks, Rng(1))
    assert not np.array_equal(positions(plain, start)[0], qpos)


@pytest.mark.parametrize("engine", ENGINES)
def test_changes_of_another_kind_replace_those_before(engine: str) -> None:
    task = make_task("hopper", engine=engine)
    tasks = task.sample(3, "train", Rng(0))
    used = task.make_env("cpu")
    changes = varied(3, used.model)
    acts = actions(5, 1, 3, 3)
    for kinds in (["mass"], ["gravity"], [], ["mass", "gravity"]):
        data = {**tasks.data, **{kind: changes[kind] for kind in kinds}}
        ends = [
            play(task, env, acts, Tasks(tasks.index, data))[0]
            for env in (used, task.make_env("cpu"))
        ]
        assert torch.equal(ends[0].rows, ends[1].rows), kinds


@pytest.mark.skipif(mujoco_version() < (3, 17), reason="MuJoCo before 3.17 keeps old bounds")
def test_bounds_of_scaled_geoms_are_mujocos_own() -> None:
    env, _ = endless("hopper")
    changes = {name: v[0].numpy() for name, v in varied(2, env.model).items()}
    fields = world_fields(env.model, {"size": changes["size"]})
    for world in range(2):
        model = build_model(Body("hopper.xml", 1))
        model.geom_size *= changes["size"][world]
        mujoco.mj_setConst(model, mujoco.MjData(model))
        assert np.array_equal(fields["geom_rbound"][world], model.geom_rbound)
        assert np.array_equal(fields["geom_aabb"][world], model.geom_aabb)


def play(
    task: object, env: MujocoEnv, acts: Tensor, tasks: Tasks
) -> tuple[State, list[TimeStep], list[State]]:
    state, ts = env.reset(tasks, Rng(1), acts.shape[1])
    steps, states = [ts], [state]
    for action in acts:
        state, ts = env.step(state, action)
        steps.append(ts)
        states.append(state)
    return state, steps, states


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_change_no_bit(engine: str) -> None:
    results = []
    for threads in (1, 2, 3):
        task = make_task("hopper", engine=engine, threads=threads, horizon=60, episodes=2)
        acts = actions(40, 2, 5, 3)
        state, steps, _ = play(task, task.make_env("cpu"), acts, task.sample(5, "train", Rng(0)))
        results.append((state.rows, torch.stack([ts.obs for ts in steps])))
    for rows, obs in results[1:]:
        assert torch.equal(rows, results[0][0]) and torch.equal(obs, results[0][1])


def test_a_step_that_failed_leaves_no_trace() -> None:
    task = make_task("hopper", horizon=30)
    definition, calls = task.definition(), []

    def reward(*args: object) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("a reward of the user's")
        return definition.reward(*args)

    changed = dataclasses.replace(definition, reward=reward)
    env = MujocoEnv(task.body(), changed, horizon=30)
    acts = actions(3, 1, 2, 3)
    tasks = task.sample(2, "train", Rng(0))
    with pytest.raises(RuntimeError):
        play(task, env, acts, tasks)
    state, *_ = play(task, env, acts[:2], tasks)
    calls[:] = calls[:2]
    with pytest.raises(RuntimeError):
        env.step(state, acts[2])
    again, _ = env.step(state, acts[2])
    *_, states = play(task, task.make_env("cpu"), acts, tasks)
    assert torch.equal(again.rows, states[3].rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_finished_worlds_cost_no_physics(engine: str, monkeypatch) -> None:
    task = make_task("hopper", engine=engine, horizon=60)
    env = task.make_env("cpu")
    seen = []
    cls = type(make_engine(engine, env.model, 1, 1, ()))
    step = cls.step

    def spy(self, worlds, substeps):
        seen.append(None if worlds is None else worlds.tolist())
        return step(self, worlds, substeps)

    monkeypatch.setattr(cls, "step", spy)
    *_, states = play(task, env, actions(60, 2, 4, 3), task.sample(4, "train", Rng(0)))
    ends = [state.over.flatten() for state in states]
    assert ends[-1].all() and not ends[5].any()
    for worlds, over, before, after in zip(seen, ends, states, states[1:], strict=False):
        going = (~over).nonzero().flatten().tolist()
        assert worlds == (None if len(going) == len(over) else going)
        frozen, physics = before.over, 1 + env.model.nq + env.model.nv
        kept, later = (each.rows[frozen][:, :physics] for each in (before, after))
        assert torch.equal(kept, later)
    lengths = torch.stack([~over for over in ends]).sum(0)
    assert len(lengths.unique()) > 1, "the worlds must not all end at once"


@pytest.mark.parametrize("engine", ENGINES)
def test_lost_worlds_are_ended_and_counted(engine: str) -> None:
    task = make_task("cheetah_dir", engine=engine, horizon=40, episodes=2)
    acts = actions(10, 1, 3, 6)
    tasks = task.sample(3, "train", Rng(0))
    env = task.make_env("cpu")
    clean, _, states = play(task, env, acts, tasks)
    poisoned = states[4].rows.clone()
    poisoned[0, 1, 3] = torch.nan
    state, steps = states[4]._replace(rows=poisoned), []
    for action in acts[4:]:
        state, ts = env.step(state, action)
        steps.append(ts)
    first = steps[0]
    assert first.terminated.tolist() == [[False, True, False]]
    assert first.new_trial.tolist() == [[False, True, False]] and not first.truncated.any()
    for ts in steps:
        assert torch.isfinite(ts.obs).all() and torch.isfinite(ts.reward).all()
        assert ts.reward[0, 1] == 0 and ts.new_trial[0, 1]
    metrics = env.metrics(state)
    assert metrics["unstable"].tolist() == [[0.0, 1.0, 0.0]]
    assert not env.metrics(clean)["unstable"].any()
    assert torch.isfinite(metrics["early"]).all()
    for world in (0, 2):  # the others never knew
        assert torch.equal(state.rows[0, world], clean.rows[0, world])


def test_an_exploding_world_is_ended_by_its_own_physics() -> None:
    task = make_task("hopper", horizon=30)
    tasks = task.sample(2, "train", Rng(0))
    gear = torch.ones(1, 2, 3, dtype=torch.float64)
    gear[0, 1] = 1e12
    env = task.make_env("cpu")
    tasks = Tasks(tasks.index, {**tasks.data, "gear": gear})
    state, *_ = play(task, env, actions(3, 1, 2, 3), tasks)
    assert env.metrics(state)["unstable"].tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_warnings_go_to_the_log_alone(
    engine: str, threads: int, tmp_path, monkeypatch, caplog, capfd
) -> None:
    monkeypatch.chdir(tmp_path)  # where MuJoCo would write a file
    task = make_task("cheetah_dir", engine=engine, threads=threads)
    env = task.make_env("cpu")
    state, _ = env.reset(task.sample(2, "train", Rng(0)), Rng(0))
    with caplog.at_level("DEBUG", logger="esmeta.mujoco"):
        _, ts = env.step(state, torch.full((1, 2, 6), torch.nan))
    # A policy that says NaN earns NaN, which makes a member of a population fail.
    assert ts.reward.isnan().all()
    assert {"CTRL" in record.message for record in caplog.records} == {True}
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_episodes_follow_each_other_in_the_same_step() -> None:
    task = make_task("hopper", horizon=75, episodes=3)
    env, tasks = task.make_env("cpu"), task.sample(4, "train", Rng(0))
    acts = actions(75, 1, 4, 3)
    state, steps, states = play(task, env, acts, tasks)
    assert task.spec.horizon == 75 and task.spec.episodes_per_trial == 3
    nq = env.model.nq
    for b in range(4):
        ends = [t for t, ts in enumerate(steps) if (ts.terminated | ts.truncated)[0, b]]
        assert len(ends) == 3
        assert [bool(steps[t].new_trial[0, b]) for t in ends] == [False, False, True]
        for number, t in enumerate(ends[:2], start=1):
            start = state.starts[0, b, number]
            assert torch.equal(states[t].rows[0, b, 1 : 1 + nq], start[:nq])
            assert torch.equal(steps[t].obs[0, b, : nq - 1], start[1:nq].float())
            assert steps[t].new_episode[0, b] and steps[t].reward[0, b] != 0
        spans = np.diff([0, *ends])
        falls = [bool(steps[t].terminated[0, b]) for t in ends]
        assert all(span == 25 or fell for span, fell in zip(spans, falls, strict=True))
        assert all(span <= 25 for span in spans)
    assert any(ts.terminated.any() for ts in steps)


def refused(*words: str, **change: object) -> None:
    """A wrong change to the worlds' models is refused, with these words."""
    task = make_task("hopper")
    tasks = task.sample(2, "train", Rng(0))
    data = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in change.items()}
    with pytest.raises(UserError) as caught:
        task.make_env("cpu").reset(Tasks(tasks.index, {**tasks.data, **data}), Rng(1))
    for word in words:
        assert word in str(caught.value)


def test_wrong_changes_are_refused() -> None:
    refused("mass", "factor of -1", "> 0", "write 1", mass=-np.ones((1, 2, 5)))
    refused("size", "[2, 5]", "[worlds, 5, 3]", size=np.ones((1, 2, 5)))
    refused("gravity", "[2, 1]", "[worlds, 3]", gravity=np.ones((1, 2, 1)))
    refused("damping", "finite", damping=np.full((1, 2, 6), np.nan))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"xml": "hoper.xml"}, ["'hoper.xml'", "did you mean 'hopper.xml'", "ant.xml"]),
        ({"xml": "models/none.xml"}, ["'models/none.xml'", "no such file"]),
        ({"xml": "broken.xml"}, ["'broken.xml'", "MuJoCo cannot read it"]),
        pytest.param(
            {"xml": "margins.xml"},
            ["different margins", "contact_rule = 'native'"],
            marks=pytest.mark.skipif(mujoco_version() < (3, 5), reason="there it is the only rule"),
        ),
    ],
)
def test_wrong_models_are_refused(
    tmp_path, monkeypatch, body: dict[str, str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.xml").write_text("<mujoco><worldbody></mujoco>")
    geoms = '<geom size="1" margin="0.1"/><geom size="1"/>'
    (tmp_path / "margins.xml").write_text(f"<mujoco><worldbody>{geoms}</worldbody></mujoco>")
    with pytest.raises(UserError) as caught:
        build_model(Body(frame_skip=1, **body))
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "cannot read it (xml" not in str(caught.value)  # what is told is told once


def test_the_batch_engine_needs_its_mujoco(monkeypatch) -> None:
    monkeypatch.setattr(mujoco_model, "mujoco_version", lambda: (3, 16))
    assert mujoco_model.choose_engine("auto", ()) == "rows"
    with pytest.raises(UserError, match="3.17 or newer.*engine = 'rows'.*pip install"):
        make_task("hopper", engine="batch").make_env("cpu")
    monkeypatch.setattr(mujoco_model, "mujoco_version", lambda: (3, 17))
    assert mujoco_model.choose_engine("auto", ()) == "batch"
    assert mujoco_model.choose_engine("auto", ("xpos", "cfrc_ext")) == "rows"
