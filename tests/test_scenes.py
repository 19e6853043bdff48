"""Pictures of simulated bodies: what is drawn is where the bodies are; files of all kinds."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from PIL import Image
from test_report import make_run

import esmeta
from esmeta.analysis import pictures
from esmeta.envs import gymnasium_api
from esmeta.envs.scenes import HEIGHT, WIDTH, Scene, choose_view
from esmeta.errors import UserError
from esmeta.rng import Rng
from esmeta.run import report
from esmeta.tasks import make_task, renderer

SCALE = 16


@pytest.fixture(autouse=True)
def _software(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.chdir(tmp_path)


def first(name: str, **options: object) -> tuple[Scene, object]:
    task = make_task(name, **options)
    state, _ = task.make_env("cpu").reset(task.sample(4, "train", Rng(0)), Rng(1), 2)
    scene = renderer(task)
    assert isinstance(scene, Scene)
    return scene, state


@pytest.mark.parametrize(
    ("name", "elevation"),
    [("cheetah_dir", 0.0), ("random_hopper", 0.0), ("ant_ring", 40.0), ("wheeled", 40.0)]
    + [("block_push", 90.0), ("random_reacher", 90.0)],
)
def test_bodies_are_seen_from_where_they_move(name: str, elevation: float) -> None:
    scene, state = first(name)
    assert scene.view.elevation == elevation
    picture = scene(state, 1, 2, SCALE)
    assert picture.dtype == np.uint8 and picture.shape == (HEIGHT * SCALE, WIDTH * SCALE, 3)
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10
    assert np.array_equal(picture, scene(state, 1, 2, SCALE)), "the same pixels every time"


def test_what_is_drawn_is_where_it_is() -> None:
    scene, state = first("block_push")
    picture = scene(state, 0, 1, SCALE)
    centre, width = scene._frame(None)
    zoom = WIDTH * SCALE / (2 * width)
    places = state.rows[0, 1, 1 + 3 : 1 + 13].reshape(5, 2).numpy()
    model = scene._env.model
    for block, (x, y) in enumerate(places):
        column = WIDTH * SCALE / 2 + (x - centre[0]) * zoom
        row = HEIGHT * SCALE / 2 - (y - centre[1]) * zoom
        colour = model.geom_rgba[model.geom(f"block{block}").id][:3] * 255
        assert np.abs(picture[int(row), int(column)] - colour).max() < 3
    goal = state.data["goal"][0, 1].numpy()
    column, row = WIDTH * SCALE / 2 + (goal[0] - centre[0]) * zoom, HEIGHT * SCALE / 2
    row -= (goal[1] - centre[1]) * zoom
    assert tuple(picture[int(row), int(column)]) == (205, 60, 50)


SHAPES = """
<mujoco><worldbody>
  <body pos="0.1 0.2 0.3" euler="20 40 70"><freejoint/>
    <geom type="sphere" size="0.3"/>
    <geom type="capsule" size="0.1 0.4" euler="10 50 0"/>
    <geom type="cylinder" size="0.2 0.3" euler="70 0 20"/>
    <geom type="box" size="0.1 0.2 0.3" euler="0 30 60"/>
    <geom type="ellipsoid" size="0.1 0.2 0.4" euler="40 10 0"/>
  </body>
</worldbody></mujoco>
"""


def surface(kind: int, size: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Many points on a geom in its own frame, by the manual's definition of its shape."""
    ball = rng.normal(size=(50_000, 3))
    ball /= np.linalg.norm(ball, axis=-1, keepdims=True)
    a, b, _ = size
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return a * ball
    if kind == mujoco.mjtGeom.mjGEOM_CAPSULE:
        return a * ball + np.sign(ball[:, 2:]) * (0, 0, b)
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        angle = rng.uniform(0, 2 * np.pi, len(ball))
        ends = b * rng.choice([-1, 1], len(ball))
        return np.stack([a * np.cos(angle), a * np.sin(angle), ends], axis=-1)
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return size * rng.choice([-1.0, 1.0], (len(ball), 3))
    return size * ball


def test_outlines_are_the_rims_of_the_shapes() -> None:
    rng = np.random.default_rng(0)
    model = mujoco.MjModel.from_xml_string(SHAPES)
    scene, _ = first("ant_dir")
    scene._model, scene._data = model, mujoco.MjData(model)
    mujoco.mj_forward(model, scene._data)
    assert choose_view(model).elevation == 40.0
    plane = scene.view.axes[:2]
    # In these directions the outline has corners, so that it reaches as far as the body does.
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)])
    for geom in range(model.ngeom):
        turn = scene._data.geom_xmat[geom].reshape(3, 3)
        points = surface(model.geom_type[geom], model.geom_size[geom], rng) @ turn.T
        exact = ((points + scene._data.geom_xpos[geom]) @ plane.T @ directions).max(0)
        drawn = (scene._outline(geom) @ plane.T @ directions).max(0)
        # No point on the surface lies outside, and one of so many is close to the farthest.
        assert (drawn >= exact - 1e-12).all()
        np.testing.assert_allclose(drawn, exact, atol=2e-3)


def test_worlds_are_drawn_with_their_own_bodies() -> None:
    scene, state = first("random_hopper")
    for p, b in ((0, 0), (1, 3)):
        scene(state, p, b, SCALE)
        factor = state.changes["size"][0, b, 1:, 0].numpy()
        radii = scene._env.model.geom_size[1:, 0] * factor
        np.testing.assert_array_equal(scene._model.geom_size[1:, 0], radii)


def test_goals_of_later_episodes() -> None:
    scene, state = first("wheeled", episodes=2, continual=True)
    goals = state.data["goal"]
    np.testing.assert_array_equal(scene(state, 0, 1, SCALE), scene(state, 0, 1, SCALE))
    assert np.array_equal(scene._goal(state, 0, 1), goals[0, 1, 0])
    later = state._replace(episode=torch.ones_like(state.episode))
    assert np.array_equal(scene._goal(later, 0, 1), goals[0, 1, 1])


def test_trials_as_frames() -> None:
    task = make_task("cheetah_vel", horizon=9)
    policy = esmeta.make_policy("mlp", task.spec)
    frames = pictures.trial_frames(policy, policy.init(seed=0), task, index=2, every=4)
    whole = pictures.trial_frames(policy, policy.init(seed=0), task, index=2)
    assert len(whole) == 10 and len(frames) == 3
    for ours, theirs in zip(frames, whole[::4], strict=True):
        assert np.array_equal(ours, theirs)
    assert not np.array_equal(whole[0], whole[1])
    assert pictures.frame_rate(task) == pytest.approx(20.0)
    assert pictures.frame_rate(make_task("maze")) == 8.0


def test_opengl_that_cannot_be_used_says_what_to_install(monkeypatch) -> None:
    scene, state = first("cheetah_dir")
    monkeypatch.setenv("MUJOCO_GL", "egl")

    def broken(*args: object) -> None:
        raise ImportError("no driver")

    monkeypatch.setattr(mujoco, "Renderer", broken)
    with pytest.raises(UserError) as caught:
        scene(state, 0, 0, SCALE)
    for word in ("MUJOCO_GL = 'egl'", "no driver", "libegl1", "libosmesa6", "leave MUJOCO_GL"):
        assert word in str(caught.value)


def test_opengl_draws_the_same_moment(monkeypatch) -> None:
    scene, state = first("wheeled")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    seen = []

    drawn = mujoco.MjvScene(scene._env.model, 100)

    class Renderer:
        scene = drawn

        def __init__(self, model: mujoco.MjModel, height: int, width: int) -> None:
            self.shape = (height, width, 3)

        def update_scene(self, data: mujoco.MjData, camera: mujoco.MjvCamera) -> None:
            seen.append((data.qpos.copy(), camera.azimuth, camera.elevation))

        def render(self) -> np.ndarray:
            return np.zeros(self.shape, dtype=np.uint8)

    monkeypatch.setattr(mujoco, "Renderer", Renderer)
    assert scene(state, 0, 2, SCALE).shape == (HEIGHT * SCALE, WIDTH * SCALE, 3)
    ((qpos, azimuth, elevation),) = seen
    assert np.array_equal(qpos, state.rows[0, 2, 1:7]) and (azimuth, elevation) == (90.0, -40.0)
    marker = drawn.geoms[0]
    np.testing.assert_allclose(marker.pos[:2], state.data["goal"][0, 2], atol=1e-6)


# --- files -----------------------------------------------------------------------------------

FAKE = """#!{python}
import pathlib, sys
pathlib.Path(sys.argv[-1]).write_bytes(sys.stdin.buffer.read())
pathlib.Path("command.txt").write_text("\\n".join(sys.argv[1:]))
"""


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_mp4_hands_every_frame_to_ffmpeg(tmp_path, monkeypatch) -> None:
    frames = [np.full((5, 7, 3), k, dtype=np.uint8) for k in range(3)]
    script(tmp_path / "ffmpeg", FAKE.format(python=sys.executable))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    out = pictures.write_mp4(frames, tmp_path / "film" / "a.mp4", fps=12.5)
    assert out.read_bytes() == b"".join(frame.tobytes() for frame in frames)
    words = (tmp_path / "command.txt").read_text().splitlines()
    assert words[words.index("-s") + 1] == "7x5" and words[words.index("-r") + 1] == "12.5"
    assert words[words.index("-f") + 1] == "rawvideo" and "yuv420p" in words
    script(tmp_path / "ffmpeg", "#!/bin/sh\necho no codec >&2\nexit 1\n")
    with pytest.raises(UserError, match="no codec"):
        pictures.write_mp4(frames, tmp_path / "b.mp4")
    with pytest.raises(UserError, match="no frames"):
        pictures.write_mp4([], tmp_path / "b.mp4")
    with pytest.raises(UserError, match="fps"):
        pictures.write_mp4(frames, tmp_path / "b.mp4", fps=0)


def test_without_ffmpeg_the_error_names_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match="apt-get install ffmpeg.*imageio-ffmpeg.*GIF or PNG"):
        pictures.write_mp4([np.zeros((2, 2, 3), dtype=np.uint8)], tmp_path / "a.mp4")


def test_report_animates_a_run(tmp_path, capsys) -> None:
    tiny = ["task.horizon=12", "policy.neurons=4", "budget.updates=1", "run.evaluate_trials=8"]
    run = make_run(tmp_path / "run", "cheetah-vel-ppo", *tiny, "task.trials=4")
    capsys.readouterr()
    arguments = [str(run), "--picture", "--trial", "3", "--film", "png", "--out", str(tmp_path)]
    assert report.main(arguments) == 0
    assert "frames: " in capsys.readouterr().out
    (gif,) = tmp_path.glob("trial-*.gif")
    assert Image.open(gif).n_frames > 5 and gif.stat().st_size < 300_000
    (folder,) = (path for path in tmp_path.glob("trial-*") if path.is_dir())
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"{k:04d}.png" for k in range(13)]
    policy, params, task = esmeta.load(run)
    frames = pictures.trial_frames(policy, params, task, 3)
    for name, frame in zip(names, frames, strict=True):
        assert np.array_equal(np.asarray(Image.open(folder / name)), frame)
    assert "Test trial 3 of theta" in (tmp_path / "report.html").read_text()
    for wrong, words in (("--film mp4", "--picture"), ("--picture --trial -1", "--trial = -1")):
        assert report.main([str(run), *wrong.split()]) == 2
        assert words in capsys.readouterr().err


def test_gymnasium_renders_bodies() -> None:
    gymnasium_api.register()
    env = gymnasium.make("esmeta/CheetahDir-v0", horizon=5, render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    assert isinstance(before, np.ndarray) and before.dtype == np.uint8 and before.ndim == 3
    env.step(env.action_space.sample())
    assert not np.array_equal(before, env.render())
