"""Pictures of simulated bodies: MuJoCo's own where OpenGL is asked for, else drawn in software.

Software needs neither a display nor a driver, and gives the same pixels on every machine: geoms are
projected in parallel and painted from the back to the front. With ``MUJOCO_GL`` set to ``egl``,
``osmesa`` or ``glfw``, MuJoCo renders instead.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from esmeta import errors
from esmeta.envs import mujoco_model as models
from esmeta.envs.mujoco import MujocoEnv, State
from esmeta.sharing import MadeAgain, one_at_a_time

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

WIDTH, HEIGHT = 15, 10  # times the scale, in pixels
_FINER = 2  # drawn so many times larger, then shrunk
_SKY, _FLOOR, _GRID = (236, 241, 246), (214, 222, 214), (190, 200, 190)
_GOAL = (205, 60, 50)
_ANGLES = 2.0 * np.pi * np.arange(48) / 48
_ROUND = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=-1)


@dataclass(frozen=True)
class View:
    """A parallel projection: ``right`` and ``up`` ``[3]`` span the picture, ``ahead`` goes into it.

    ``elevation`` is how far above the horizon the camera stands, in degrees.
    """

    elevation: float

    @property
    def axes(self) -> np.ndarray:
        """Right, up, ahead, ``[3, 3]``; the camera looks along y."""
        tilt = np.radians(self.elevation)
        up = (0.0, np.sin(tilt), np.cos(tilt))
        ahead = (0.0, np.cos(tilt), -np.sin(tilt))
        return np.array([(1.0, 0.0, 0.0), up, ahead])


def choose_view(model: Any) -> View:
    """From the side what moves in x and z, from above what moves in x and y, else obliquely."""
    joint = models.import_mujoco().mjtJoint
    axes = np.abs(model.jnt_axis)
    free, slide = (model.jnt_type == kind for kind in (joint.mjJNT_FREE, joint.mjJNT_SLIDE))
    turn = model.jnt_type == joint.mjJNT_HINGE
    if not free.any() and not (slide & (axes[:, 1] > 0.5)).any():
        return View(0.0)
    flat = not free.any() and (axes[slide, 2] == 0).all() and (axes[turn, 2] > 0.5).all()
    return View(90.0 if flat else 40.0)


class Scene(MadeAgain):
    """Draws the states of one task's environments; ``scene(state, p, b, scale)`` is a picture."""

    def __init__(self, make_env: Callable[[], MujocoEnv]) -> None:
        self._make_env = make_env
        self.forget()

    def forget(self) -> None:
        """See :class:`esmeta.sharing.MadeAgain`."""
        self._of: tuple[Any, int, int] | None = None
        self._gl: Any = None
        self._first: tuple[np.ndarray, float] | None = None

    @one_at_a_time
    def __call__(self, state: State, p: int, b: int, scale: int = 24) -> np.ndarray:
        """Trial ``[p, b]`` as uint8 ``[10 scale, 15 scale, 3]``."""
        self._prepare(state, p, b)
        mujoco, model, data = self._mujoco, self._model, self._data
        row = state.rows[p, b].numpy()
        mujoco.mj_setState(model, data, row, int(mujoco.mjtState.mjSTATE_INTEGRATION))
        mujoco.mj_forward(model, data)
        goal = self._goal(state, p, b)
        centre, width = self._frame(goal)
        if os.environ.get("MUJOCO_GL"):
            return self._rendered(centre, width, goal, scale)
        return self._drawn(centre, width, goal, scale)

    @functools.cached_property
    def _env(self) -> MujocoEnv:
        return self._make_env()

    @functools.cached_property
    def _mujoco(self) -> Any:
        return models.import_mujoco()

    @functools.cached_property
    def view(self) -> View:
        """Where the bodies are seen from."""
        return choose_view(self._env.model)

    def _prepare(self, state: State, p: int, b: int) -> None:
        """The model of this trial's own world."""
        of = (state.changes, p, b)
        if self._of is not None and self._of[0] is of[0] and self._of[1:] == of[1:]:
            return
        self._of, self._gl, self._first = of, None, None
        self._model = copy.copy(self._env.model)
        own = {name: leaf[p % len(leaf), b : b + 1].numpy() for name, leaf in state.changes.items()}
        for name, values in models.world_fields(self._env.model, own).items():
            holder = self._model.opt if name.startswith("opt.") else self._model
            getattr(holder, name.removeprefix("opt."))[...] = values[0]
        self._data = self._mujoco.MjData(self._model)
        self._mujoco.mj_setConst(self._model, self._data)
        self._mujoco.mj_forward(self._model, self._data)
        solid = self._solid()
        reach = np.linalg.norm(self._data.geom_xpos[solid] - self._data.xpos[1], axis=-1)
        self._extent = float((reach + self._model.geom_rbound[solid]).max())

    def _solid(self) -> np.ndarray:
        """Numbers of the geoms that are no planes."""
        return np.flatnonzero(self._model.geom_type != self._mujoco.mjtGeom.mjGEOM_PLANE)

    def _goal(self, state: State, p: int, b: int) -> np.ndarray | None:
        """Where a goal in the plane is, ``[2]`` in m."""
        leaf = self._env.present(state).get("goal")
        return None if leaf is None else leaf[p % len(leaf), b].numpy()

    def _frame(self, goal: np.ndarray | None) -> tuple[np.ndarray, float]:
        """Point in the middle of the picture and half of its width, in metres."""
        if self.view.elevation == 90.0:
            return self._still(goal)
        if goal is not None and self.view.elevation > 0.0:
            middle = np.array([goal[0] / 2, goal[1] / 2, 0.0])
            spread = max(np.abs(goal - middle[:2]).max(), np.abs(self._place() - middle)[:2].max())
            return middle, 1.5 * (spread + self._extent)
        middle = self._place().copy()
        if self.view.elevation == 0.0:
            middle[2] = 0.6 * self._extent
        return middle, 1.6 * self._extent

    def _still(self, goal: np.ndarray | None) -> tuple[np.ndarray, float]:
        """The same frame for the whole trial: around all that is there at its beginning."""
        if self._first is None:
            solid = self._solid()
            centres, radii = self._data.geom_xpos[solid], self._model.geom_rbound[solid, None]
            points = [centres - radii, centres + radii]
            points += [] if goal is None else [np.array([[*goal, 0.0]])]
            low, high = np.concatenate(points).min(0), np.concatenate(points).max(0)
            half = (high - low) / 2
            self._first = (low + high) / 2, 1.2 * max(half[0], half[1] * WIDTH / HEIGHT)
        return self._first

    def _place(self) -> np.ndarray:
        return self._data.subtree_com[1]

    # --- in software -------------------------------------------------------------------------

    def _drawn(
        self, centre: np.ndarray, width: float, goal: np.ndarray | None, scale: int
    ) -> np.ndarray:
        from PIL import Image, ImageDraw

        size = (WIDTH * scale * _FINER, HEIGHT * scale * _FINER)
        axes, zoom = self.view.axes, size[0] / (2.0 * width)

        def pixels(points: np.ndarray) -> list[tuple[float, float]]:
            flat = (points - centre) @ axes[:2].T * zoom
            return [(size[0] / 2 + x, size[1] / 2 - y) for x, y in flat]

        image = Image.new("RGB", size, _SKY if self.view.elevation == 0.0 else _FLOOR)
        draw = ImageDraw.Draw(image)
        self._floor(draw, centre, width, pixels, size)
        if goal is not None:
            spot = np.pad(goal + 0.04 * width * _ROUND, ((0, 0), (0, 1)))
            draw.polygon(pixels(spot), fill=_GOAL)
        depth = self._data.geom_xpos @ axes[2]
        for geom in sorted(self._solid(), key=lambda g: -depth[g]):
            colour = self._model.geom_rgba[geom]
            if colour[3] == 0.0:
                continue
            fill = tuple(int(255 * shade) for shade in colour[:3])
            edge = tuple(int(150 * shade) for shade in colour[:3])
            draw.polygon(pixels(self._outline(geom)), fill=fill, outline=edge)
        small = image.resize((WIDTH * scale, HEIGHT * scale), Image.Resampling.BOX)
        return np.asarray(small).copy()

    def _floor(
        self, draw: ImageDraw, centre: np.ndarray, width: float, pixels: Any, size: tuple[int, int]
    ) -> None:
        """Ground and a grid on it, whose lines are 0.1, 1 or 10 m apart."""
        step = 10.0 ** np.floor(np.log10(width))
        reach = 2.0 * width / max(np.sin(np.radians(self.view.elevation)), 0.25)
        lines = [step * np.arange(np.floor((c - reach) / step), (c + reach) / step) for c in centre]
        if self.view.elevation == 0.0:
            ((_, ground),) = pixels(np.array([[centre[0], 0.0, 0.0]]))
            draw.rectangle((0, ground, *size), fill=_FLOOR)
            for x in lines[0]:
                ((at, _),) = pixels(np.array([[x, 0.0, 0.0]]))
                draw.line((at, ground, at, size[1]), fill=_GRID, width=_FINER)
            return
        for along, across in ((0, 1), (1, 0)):
            for value in lines[across]:
                ends = np.zeros((2, 3))
                ends[:, across] = value
                ends[:, along] = centre[along] - reach, centre[along] + reach
                draw.line(pixels(ends), fill=_GRID, width=_FINER)

    def _outline(self, geom: int) -> np.ndarray:
        """Points on the rim of a geom as it is seen, ``[48, 3]`` in m.

        They are the farthest points of the body in 48 directions of the picture; of a convex body
        no others are on the rim.
        """
        kind, shape = self._mujoco.mjtGeom, self._model.geom_type[geom]
        turn = self._data.geom_xmat[geom].reshape(3, 3)
        a, b, c = size = self._model.geom_size[geom]
        far = _ROUND @ self.view.axes[:2] @ turn
        # Not quite 0, so that a flat end seen from the side is a line and not a point.
        signs = np.where(far >= 0, 1.0, -1.0)
        if shape == kind.mjGEOM_SPHERE:
            points = a * far
        elif shape == kind.mjGEOM_CAPSULE:
            points = a * far + signs * (0.0, 0.0, b)
        elif shape == kind.mjGEOM_CYLINDER:
            side = np.linalg.norm(far[:, :2], axis=-1, keepdims=True)
            rim = a * far[:, :2] / np.maximum(side, 1e-12)
            points = np.concatenate([rim, b * signs[:, 2:]], axis=-1)
        elif shape == kind.mjGEOM_BOX:
            points = signs * size
        else:
            assert shape == kind.mjGEOM_ELLIPSOID, f"geom {geom} is of type {shape}"
            points = far * size**2 / np.linalg.norm(far * size, axis=-1, keepdims=True)
        return self._data.geom_xpos[geom] + points @ turn.T

    # --- by OpenGL ---------------------------------------------------------------------------

    def _rendered(
        self, centre: np.ndarray, width: float, goal: np.ndarray | None, scale: int
    ) -> np.ndarray:
        mujoco = self._mujoco
        if self._gl is None:
            self._gl = self._open(scale)
        camera = mujoco.MjvCamera()
        camera.lookat[:] = centre
        # MuJoCo's field of view is 45 degrees high.
        camera.distance = width * HEIGHT / WIDTH / np.tan(np.radians(22.5))
        camera.azimuth = 90.0
        camera.elevation = -max(self.view.elevation, 10.0)
        self._gl.update_scene(self._data, camera)
        if goal is not None:
            scene = self._gl.scene
            mujoco.mjv_initGeom(
                scene.geoms[scene.ngeom],
                mujoco.mjtGeom.mjGEOM_CYLINDER,
                np.array([0.04 * width, 0.04 * width, 0.005]),
                np.array([*goal, 0.0]),
                np.eye(3).ravel(),
                np.array([*_GOAL, 255.0], dtype=np.float32) / 255.0,
            )
            scene.ngeom += 1
        return self._gl.render().copy()

    def _open(self, scale: int) -> Any:
        """MuJoCo's renderer; what to install where OpenGL cannot be used."""
        try:
            return self._mujoco.Renderer(self._model, HEIGHT * scale, WIDTH * scale)
        except Exception as error:  # each driver fails in a way of its own
            name = os.environ["MUJOCO_GL"]
            raise errors.UserError(
                f"MUJOCO_GL = {name!r}: OpenGL cannot be used so ({error}); without a display "
                "install libegl1 (MUJOCO_GL=egl) or libosmesa6 (MUJOCO_GL=osmesa), with one write "
                "MUJOCO_GL=glfw; or leave MUJOCO_GL unset: pictures are then drawn in software"
            ) from error
