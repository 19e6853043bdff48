"""What esmeta adds to MuJoCo Warp: a record of how full its buffers were, and one correction.

Importing this module needs ``pip install "esmeta[gpu]"``; see
:func:`esmeta.envs.mujoco_model.import_warp`.
"""
# Warp reads the annotations of its functions as they stand, so that they are not postponed here,
# and what stands in these functions is Warp's language, not Python.
# pyright: reportInvalidTypeForm=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportMissingImports=false

import mujoco_warp as mjw
import warp as wp
from mujoco_warp._src import collision_primitive, collision_primitive_core

VERSION = "3.17.0"
"""The MuJoCo Warp that the correction is for."""

# Warp announces every kernel that it loads.
wp.config.log_level = max(wp.config.log_level, wp.LOG_WARNING)


@wp.kernel
def note_use(
    nefc: wp.array(dtype=int),
    nacon: wp.array(dtype=int),
    ncollision: wp.array(dtype=int),
    rows: wp.array(dtype=int),
    contacts: wp.array(dtype=int),
) -> None:
    """Keep the largest number of constraints of each world, and of contacts in all of them."""
    world = wp.tid()
    rows[world] = wp.max(rows[world], nefc[world])
    if world == 0:
        contacts[0] = wp.max(contacts[0], wp.max(nacon[0], ncollision[0]))


_given = collision_primitive_core.plane_capsule


@wp.func
def _aligned_plane_capsule(  # noqa: ANN202 - Warp infers it
    plane_normal: wp.vec3,
    plane_pos: wp.vec3,
    capsule_pos: wp.vec3,
    capsule_axis: wp.vec3,
    capsule_radius: float,
    capsule_half_length: float,
):
    """The contacts with their tangents along the capsule, however steep it stands."""
    dist, pos, frame = _given(
        plane_normal, plane_pos, capsule_pos, capsule_axis, capsule_radius, capsule_half_length
    )
    along = capsule_axis - plane_normal * wp.dot(plane_normal, capsule_axis)
    if wp.length(along) > 1.0e-6:
        b = wp.normalize(along)
        c = wp.cross(plane_normal, b)
        n = plane_normal
        frame = wp.mat33(n[0], n[1], n[2], b[0], b[1], b[2], c[0], c[1], c[2])
    return dist, pos, frame


# MuJoCo in C aligns a capsule's contacts with its axis; MuJoCo Warp 3.17 falls back to the world's
# axes where the capsule is within 30 degrees of the normal, which turns pyramidal friction cones
# (google-deepmind/mujoco issue 2774).
if mjw.__version__ == VERSION:
    collision_primitive.plane_capsule = _aligned_plane_capsule
