"""Ant as gymnasium's Ant-v5 has it (Schulman et al. 2016; Towers et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import ants
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Definition, Snapshot
from esmeta.options import options_class
from esmeta.types import Reference

from . import _standard as standard

_HEALTHY = walk.upright(0.2, 1.0, ants.HEIGHT)


@options_class
class Task(standard.Standard):
    """Walk forwards. Observation 105, eight joints, five steps of 0.01 s per control step.

    Args:
        contact: forces ``"mj"`` as in Ant-v5, which needs ``engine="rows"``, or ``"zero"``: the
            78 of the observation and their cost are 0.
    """

    xml = ants.XML
    frame_skip = 5
    sizes = (105, 8)

    contact: str = "mj"

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("contact", self.contact, walk.CONTACTS)

    def definition(self) -> Definition:
        """Reward ``v - 0.5 |a|^2 - 0.0005 |clip(f)|^2``, and 1 while its height is 0.2..1 m."""

        def observe(now: Snapshot) -> Tensor:
            forces = walk.flat_forces(now, self.contact, ants.BODIES)
            # Those on the world itself, which come first, are paid for but not shown.
            return torch.cat([now.qpos[..., 2:], now.qvel, forces[..., 6:]], dim=-1)

        def reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
            costs = 0.5 * (action * action).sum(-1) + 5e-4 * walk.force_cost(now, self.contact)
            return velocity[..., 0] + _HEALTHY(now).double() - costs

        reads = ("xpos", "cfrc_ext") if self.contact == "mj" else ("xpos",)
        return Definition(_place, observe, reward, _HEALTHY, walk.GYM_NOISE, reads)

    @property
    def reference(self) -> Reference:
        """Uniform actions; TD3."""
        best = walk.TD3["ant"] * self.horizon
        return self.scores(best, "best: TD3 (2018)")


def _place(now: Snapshot) -> Tensor:
    return now.xpos[..., walk.TORSO, :1]
