"""Arm with links of unknown length that reaches for a target, a new one in every episode.

RandomReacher of EPG (Houthooft et al. 2018, https://arxiv.org/abs/1802.04821), which is not among
what was released: gymnasium's Reacher-v5, number for number, with both links times 0.5..2 and mass
and inertia as MuJoCo gives to links of that length. Episodes of 50 steps; targets are uniform in a
disc of 0.2 m, which a short arm does not cover.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import locomotion as walk
from esmeta.envs import random_models
from esmeta.envs.bodies import Data, Definition, Noise, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_split, task_numbers
from esmeta.types import Reference, Tasks

# Numbers of bodies and geoms in reacher.xml, its lengths in m.
FINGERTIP, TARGET = 3, 4
LINK_BODIES, NEXT_BODIES, LINK_GEOMS = (1, 2), (2, 3), (6, 7)
BODIES, GEOMS = 5, 10
LENGTH, RADIUS, TIP = 0.1, 0.01, 0.11
DISC = 0.2
NOISE = Noise("uniform", (0.1, 0.1, 0.0, 0.0), "uniform", (5e-3, 5e-3, 0.0, 0.0))


@options_class
class Task(walk.Plain):
    """Reach for the target. Options: :class:`esmeta.envs.locomotion.Simulated`.

    Args:
        scale_min: smallest factor on the length of a link.
        scale_max: largest one.
    """

    xml = "reacher.xml"
    frame_skip = 2
    sizes = (10, 2)
    renewable = False

    horizon: int = 50
    scale_min: float = 0.5
    scale_max: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.finite_positive("scale_min", self.scale_min, example=0.5)
        walk.check_range("scale", self.scale_min, self.scale_max)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Arms, see :func:`links`; ``pose [1, B, episodes, 4]`` holds the targets."""
        episodes = self.fewest()
        check_split(split)
        index = task_numbers(batch)
        scale = rng.fold("links", split)
        factors = random_models.uniform(scale, index, (2,), self.scale_min, self.scale_max)
        draw = rng.fold("target", split).uniform(index, 2 * episodes)
        u, v = draw.unflatten(-1, (episodes, 2)).unbind(-1)
        radius, angle = DISC * u.sqrt(), 2.0 * math.pi * v
        pose = torch.zeros(*u.shape, 4, dtype=torch.float64, device=u.device)
        pose[..., 2], pose[..., 3] = radius * angle.cos(), radius * angle.sin()
        return Tasks(index, {**links(factors), "pose": pose})

    def definition(self) -> Definition:
        """Reward ``-|fingertip - target| - |a|^2``."""
        return Definition(_place, _observe, _reward, None, NOISE, ("xpos",))

    @property
    def reference(self) -> Reference:
        """Uniform actions; nothing gets above 0."""
        return self.scores(0.0, "best: a bound that no arm reaches")


def links(factors: Tensor) -> dict[str, Tensor]:
    """Changes of the model for links that are ``factors [.., 2]`` as long; the tip stays a tip."""
    ones = torch.ones(*factors.shape[:-1], BODIES, 3, dtype=torch.float64, device=factors.device)
    body_pos, centre, inertia, mass = ones, ones.clone(), ones.clone(), ones[..., 0].clone()
    geom_pos = torch.ones(*factors.shape[:-1], GEOMS, 3, dtype=torch.float64, device=factors.device)
    size = geom_pos.clone()
    weight, across, along = _capsule(factors * LENGTH)
    weight_1, across_1, along_1 = _capsule(torch.full_like(factors, LENGTH))
    for k in range(2):
        link, geom, factor = LINK_BODIES[k], LINK_GEOMS[k], factors[..., k]
        size[..., geom, 1] = factor
        geom_pos[..., geom, 0] = centre[..., link, 0] = factor
        mass[..., link] = (weight / weight_1)[..., k]
        inertia[..., link, :2] = (across / across_1)[..., k : k + 1]
        inertia[..., link, 2] = (along / along_1)[..., k]
    body_pos[..., NEXT_BODIES[0], 0] = factors[..., 0]
    body_pos[..., NEXT_BODIES[1], 0] = (factors[..., 1] * LENGTH + TIP - LENGTH) / TIP
    return {
        "mass": mass,
        "inertia": inertia,
        "size": size,
        "body_pos": body_pos,
        "inertial_pos": centre,
        "geom_pos": geom_pos,
    }


def _capsule(length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mass, and inertia across and along the axis, of capsules of density 1."""
    cylinder, ball = math.pi * RADIUS**2 * length, 4 / 3 * math.pi * RADIUS**3
    along = cylinder * RADIUS**2 / 2 + ball * 2 / 5 * RADIUS**2
    across = cylinder * (3 * RADIUS**2 + length**2) / 12
    across = across + ball * (2 / 5 * RADIUS**2 + length**2 / 4 + 3 / 8 * length * RADIUS)
    return cylinder + ball, across, along


def _offset(now: Snapshot) -> Tensor:
    return now.xpos[..., FINGERTIP, :] - now.xpos[..., TARGET, :]


def _place(now: Snapshot) -> Tensor:
    return now.xpos[..., FINGERTIP, :2]


def _observe(now: Snapshot) -> Tensor:
    angles, target = now.qpos[..., :2], now.qpos[..., 2:]
    parts = [angles.cos(), angles.sin(), target, now.qvel[..., :2], _offset(now)[..., :2]]
    return torch.cat(parts, dim=-1)


def _reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
    return -torch.linalg.vector_norm(_offset(now), dim=-1) - action.square().sum(-1)
