"""Gymnasium's Hopper-v5, Walker2d-v5, HalfCheetah-v5 and Ant-v5: the numbers that are theirs alone.

Rewards and observations are those of gymnasium's sources, step by step; contacts are by default
those of MuJoCo before 3.5 (``contact_rule="native"`` gives gymnasium's on the installed one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Definition, Noise, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.types import Tasks

SMALL_NOISE = Noise("uniform", 5e-3, "uniform", 5e-3)


@options_class
class Standard(walk.Plain):
    """Options of the standard tasks: :class:`esmeta.envs.locomotion.Simulated`."""

    renewable = False

    horizon: int = 1000

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Starts, see :func:`esmeta.envs.locomotion.starts`."""
        return walk.starts(batch, split, rng)


def planar_definition(healthy: walk.Healthy) -> Definition:
    """What Hopper-v5 and Walker2d-v5 share: ``v - 0.001 |a|^2``, and 1 while healthy."""

    def place(now: Snapshot) -> Tensor:
        return now.qpos[..., :1]

    def observe(now: Snapshot) -> Tensor:
        return torch.cat([now.qpos[..., 1:], now.qvel.clamp(-10.0, 10.0)], dim=-1)

    def reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        return velocity[..., 0] + healthy(now).double() - 1e-3 * (action * action).sum(-1)

    return Definition(place, observe, reward, healthy, SMALL_NOISE)
