"""MuJoCo: what is installed, models and their files, and what may differ between worlds."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from esmeta import errors
from esmeta.envs.bodies import Body

ENGINES = ("auto", "batch", "rows", "warp")
_LOG = logging.getLogger("esmeta.mujoco")
_BATCH_SINCE = (3, 17)
_MARGINS_ADD_UP = (3, 5)
"""The first MuJoCo that adds the margins of two geoms; before, the larger one counted."""
# What a world may change, the model's array that holds it, and the number of the array's last axes
# that one number stands for (a gear is a row of six, of which motors use the first).
FACTORS = {
    "mass": ("body_mass", 0),
    "inertia": ("body_inertia", 0),
    "friction": ("geom_friction", 0),
    "damping": ("dof_damping", 0),
    "gear": ("actuator_gear", 1),
    "size": ("geom_size", 0),
    "body_pos": ("body_pos", 0),
    "inertial_pos": ("body_ipos", 0),
    "geom_pos": ("geom_pos", 0),
}


def import_mujoco() -> Any:
    """The package ``mujoco``; a ``UserError`` that names the extra where it is missing."""
    try:
        return importlib.import_module("mujoco")
    except ImportError as error:
        raise errors.UserError(
            f"this task needs MuJoCo, which cannot be imported ({error}); install it with: "
            'pip install "esmeta[mujoco]"'
        ) from error
    except AttributeError as error:  # of PyOpenGL, which it loads for osmesa
        raise errors.UserError(
            f"MUJOCO_GL = {os.environ.get('MUJOCO_GL')!r}: MuJoCo cannot be imported so ({error}); "
            "install libosmesa6, write MUJOCO_GL=egl, or leave it unset"
        ) from error


def import_warp() -> Any:
    """:mod:`esmeta.envs._warp_parts`; a ``UserError`` that names the extra where it is missing."""
    try:
        parts = importlib.import_module("esmeta.envs._warp_parts")
    except ImportError as error:
        raise errors.UserError(
            f"engine = 'warp' needs MuJoCo Warp, which cannot be imported ({error}); install it "
            "with: pip install \"esmeta[gpu]\", or write engine = 'auto', which needs no GPU"
        ) from error
    if parts.mjw.__version__ != parts.VERSION:
        raise errors.UserError(
            f"engine = 'warp' needs MuJoCo Warp {parts.VERSION}, this is {parts.mjw.__version__}: "
            'pip install "esmeta[gpu]"'
        )
    return parts


def mujoco_version() -> tuple[int, int]:
    """(major, minor) of the installed MuJoCo."""
    major, minor = import_mujoco().__version__.split(".")[:2]
    return int(major), int(minor)


def choose_engine(engine: str, outputs: tuple[str, ...]) -> str:
    """``"batch"``, ``"rows"`` or ``"warp"``, for what was asked and what is installed.

    On the CPU, contact forces as gymnasium has them (``cfrc_ext`` after the step) only the row loop
    can give.
    """
    errors.one_of("engine", engine, ENGINES)
    if engine == "warp":
        import_warp()
        return engine
    there = mujoco_version() >= _BATCH_SINCE
    if engine == "auto":
        return "batch" if there and "cfrc_ext" not in outputs else "rows"
    if engine == "batch" and not there:
        version = import_mujoco().__version__
        raise errors.UserError(
            f"engine = 'batch' needs MuJoCo 3.17 or newer, this is {version}; write "
            "engine = 'rows', which gives the same numbers, or: pip install 'mujoco>=3.17,<4'"
        )
    if engine == "batch" and "cfrc_ext" in outputs:
        raise errors.UserError(
            "engine = 'batch' has no contact forces; write engine = 'rows', or contact = 'zero'"
        )
    return engine


def asset(xml: str) -> Path:
    """The file that ``xml`` stands for: a path, or a name among gymnasium's models."""
    path = Path(xml)
    if len(path.parts) > 1 or path.is_file():
        if not path.is_file():
            raise errors.UserError(f"xml = {xml!r}: there is no such file; give a MuJoCo XML file")
        return path
    spec = importlib.util.find_spec("gymnasium")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "envs" / "mujoco" / "assets"
    names = sorted(file.name for file in folder.glob("*.xml"))
    if xml not in names:
        raise errors.UserError(
            f"xml = {xml!r}: there is no such file here, and no such model in gymnasium"
            f"{errors.nearest(xml, names)}; there are: {', '.join(names)}; or give a path"
        )
    return folder / xml


@functools.cache
def motors(xml: str) -> tuple[str, ...]:
    """The joints that the motors of a model move, in the order of actions; needs no MuJoCo."""
    found = ElementTree.parse(asset(xml)).getroot().find("actuator")
    assert found is not None, f"{xml} has no actuators"
    return tuple(motor.get("joint", "") for motor in found)


def build_model(body: Body) -> Any:
    """The ``MjModel`` of a body.

    Constraint islands are switched off: for bodies this small they only cost time. MuJoCo's own
    reset of unstable worlds is switched off too, because it would hide them.
    """
    mujoco = import_mujoco()
    log_warnings(mujoco)
    path = asset(body.xml)
    try:
        model = mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:
        raise errors.UserError(
            f"xml = {body.xml!r}: MuJoCo cannot read it ({error}); give a MuJoCo XML file"
        ) from error
    flags = mujoco.mjtDisableBit
    # Before MuJoCo 3.4 islands are off by default, and the flag that switches them on is another.
    island = getattr(flags, "mjDSBL_ISLAND", 0)
    model.opt.disableflags |= int(island) | int(flags.mjDSBL_AUTORESET)
    if body.timestep is not None:
        model.opt.timestep = body.timestep
    if body.gear is not None:
        model.actuator_gear[:, 0] = body.gear
    if body.integrator == "euler":
        model.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    if body.contact_rule == "legacy" and mujoco_version() >= _MARGINS_ADD_UP:
        if np.ptp(model.geom_margin) != 0:
            raise errors.UserError(
                f"contact_rule = 'legacy': the geoms of {body.xml!r} have different margins, for "
                "which this MuJoCo has no such rule; write contact_rule = 'native'"
            )
        model.geom_margin *= 0.5  # exact, and so is the sum of two halves
    return model


def log_warnings(mujoco: Any) -> None:
    """Send MuJoCo's warnings to the log ``esmeta.mujoco``, as debugging messages.

    By itself MuJoCo prints them, world by world, and writes them to a file in the working
    directory. What they say of worlds that are lost is counted by the environment.
    """
    mujoco.set_mju_user_warning(_LOG.debug)


def slice_of(model: Any, component: int) -> slice:
    """Where a component of ``mjtState`` lies in a row of the state that is integrated."""
    mujoco = import_mujoco()
    # Components stand in the order of their bits.
    before = int(mujoco.mjtState.mjSTATE_INTEGRATION) & (int(component) - 1)
    start = mujoco.mj_stateSize(model, before)
    return slice(start, start + mujoco.mj_stateSize(model, int(component)))


def world_fields(model: Any, changes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays of the model for every world, from what differs between worlds.

    ``changes`` has leaves float64 ``[N, ...]`` (N worlds): factors > 0 on the model's own values,
    ``mass [N, nbody]``, ``inertia [N, nbody, 3]``, ``friction [N, ngeom, 3]``,
    ``damping [N, nv]``, ``gear [N, nu]``, ``size [N, ngeom, 3]`` and, of frames within their
    parents, ``body_pos``, ``inertial_pos [N, nbody, 3]`` and ``geom_pos [N, ngeom, 3]``; and the
    vector ``gravity [N, 3]`` in m/s^2. Returns arrays by the model's names; constants that follow
    from them (``mj_setConst``) are not among them, but for the bounds of geoms.
    """
    fields = {}
    for name, values in changes.items():
        if name == "gravity":
            fields["opt.gravity"] = _checked(name, values, (3,))
            continue
        if name not in FACTORS:
            raise errors.UserError(
                f"{name!r} cannot differ between worlds{errors.nearest(name, FACTORS)}; what can: "
                f"{', '.join(FACTORS)}, gravity"
            )
        array, rows = FACTORS[name]
        own = getattr(model, array)
        factors = _checked(name, values, own.shape[: own.ndim - rows])
        if (factors <= 0).any():
            raise errors.UserError(
                f"{name} has a factor of {factors.min():g}; factors must be > 0: "
                "write 1 where the model shall stay as it is"
            )
        fields[array] = own * factors.reshape(*factors.shape, *[1] * rows)
    if "geom_size" in fields:
        fields |= _bounds(model, fields["geom_size"])
    return fields


def _checked(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.shape[1:] != shape or not np.isfinite(values).all():
        raise errors.UserError(
            f"{name} has shape {list(values.shape)}; it must be finite numbers of shape "
            f"[worlds, {', '.join(map(str, shape))}]"
        )
    return values


def _bounds(model: Any, size: np.ndarray) -> dict[str, np.ndarray]:
    """Radius and half-widths of the boxes around geoms of ``size [N, ngeom, 3]``.

    Collisions are looked for inside these only, and MuJoCo before 3.17 does not renew them.
    """
    mujoco = import_mujoco()
    kind = mujoco.mjtGeom
    radius = np.broadcast_to(model.geom_rbound, size.shape[:2]).copy()
    boxes = np.broadcast_to(model.geom_aabb, (*size.shape[:2], 6)).copy()
    for geom, shape in enumerate(model.geom_type):
        a, b, c = np.moveaxis(size[:, geom], -1, 0)
        if shape == kind.mjGEOM_SPHERE:
            radius[:, geom], half = a, (a, a, a)
        elif shape == kind.mjGEOM_CAPSULE:
            radius[:, geom], half = a + b, (a, a, a + b)
        elif shape == kind.mjGEOM_CYLINDER:
            radius[:, geom], half = np.hypot(a, b), (a, a, b)
        elif shape == kind.mjGEOM_ELLIPSOID:
            radius[:, geom], half = size[:, geom].max(-1), (a, b, c)
        elif shape == kind.mjGEOM_BOX:
            radius[:, geom], half = np.sqrt(a * a + b * b + c * c), (a, b, c)
        elif shape == kind.mjGEOM_PLANE:
            continue  # boundless
        else:
            raise errors.UserError(
                f"size: geom {geom} is neither a primitive nor a plane and cannot be scaled; "
                "leave size out"
            )
        boxes[:, geom, 3:] = np.stack(half, axis=-1)
    return {"geom_rbound": radius, "geom_aabb": boxes}
