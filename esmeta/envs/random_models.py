"""Bodies that differ from world to world: what is drawn for each.

Numbers of bodies and geoms are those of the models, so that tasks can be drawn without MuJoCo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from esmeta.rng import Rng

Changes = dict[str, Tensor]


@dataclass(frozen=True)
class Counts:
    """How many bodies (the world is one), geoms (the floor is the first) and dofs a model has."""

    bodies: int
    geoms: int
    dofs: int


HOPPER = Counts(5, 5, 6)
WALKER = Counts(8, 8, 9)


def uniform(rng: Rng, index: Tensor, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform numbers in ``low..high``, float64 ``[1, B, *shape]``."""
    draw = rng.uniform(index, torch.Size(shape).numel())
    return (low + (high - low) * draw).unflatten(-1, shape)


def epg(
    index: Tensor,
    rng: Rng,
    counts: Counts,
    scale: tuple[float, float],
    gravity: tuple[float, float],
) -> Changes:
    """EPG's random bodies: one factor for each mass, coefficient of friction and radius.

    Factors are uniform in ``scale``, gravity in ``gravity`` (m/s^2, downwards). The floor is as it
    was. Masses keep their inertia, as in EPG's release.
    """
    friction = uniform(rng.fold("friction"), index, (counts.geoms, 3), *scale)
    friction[..., 0, :] = 1.0
    size = torch.ones_like(friction)
    size[..., 1:, 0] = uniform(rng.fold("radius"), index, (counts.geoms - 1,), *scale)
    down = torch.zeros(*index.shape, 3, dtype=torch.float64, device=index.device)
    down[..., 2] = -uniform(rng.fold("gravity"), index, (1,), *gravity).squeeze(-1)
    mass = uniform(rng.fold("mass"), index, (counts.bodies,), *scale)
    return {"mass": mass, "friction": friction, "size": size, "gravity": down}


def parameters(index: Tensor, rng: Rng, counts: Counts, limit: float) -> Changes:
    """PEARL's random parameters: ``1.5^u`` for all entries of mass, inertia and friction.

    The floor's friction is among them. Damping is ``1.3^u``, and u is uniform in
    ``-limit..limit``.
    """

    def factor(name: str, base: float, *shape: int) -> Tensor:
        exponents = uniform(rng.fold(name), index, shape, -limit, limit)
        # The bits of torch.pow depend on where in the batch a number stands, those of exp do not.
        return (math.log(base) * exponents).exp()

    return {
        "mass": factor("mass", 1.5, counts.bodies),
        "inertia": factor("inertia", 1.5, counts.bodies, 3),
        "damping": factor("damping", 1.3, counts.dofs),
        "friction": factor("friction", 1.5, counts.geoms, 3),
    }
