"""Car with two driven wheels that must find a place from reward.

Wheeled locomotion of MAESN (Gupta et al. 2018, https://arxiv.org/abs/1802.07245): goals on a half
circle of 2 m, episodes of 200 steps of 0.01 s. Dense reward -|xy - goal| - 0.05 |u|^2, where u are
the controls of the motors (-2..2); the gated one pays -|goal| in place of the distance farther
away than 0.8 m. The car (14 kg; x, y, z, yaw, wheels) is a model of our own: its wheels and gears
are such that at full speed it comes within 0.8 m of a goal straight ahead in 60 steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Definition, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid
from esmeta.types import Reference, Tasks

from . import _maesn as maesn

MOTOR = 2.0
"""Largest control of a motor: an action of 1."""


@options_class
class Task(walk.Plain):
    """Drive to an unknown point. Observation 12: qpos and qvel. Two motors.

    Options, beside :class:`esmeta.envs.locomotion.Simulated`:

    Args:
        reward: ``"dense"`` or ``"gated"``.
        radius: distance of the goals in m.
        tolerance: how far from the goal, in m, the gated reward begins; closer is a success.
        ctrl_cost: times the sum of squares of the controls.
    """

    xml = str(maesn.MODELS / "wheeled.xml")
    frame_skip = 1
    sizes = (12, 2)

    reward: str = aid("dense", published="gated")
    radius: float = 2.0
    tolerance: float = 0.8
    ctrl_cost: float = aid(0.05, only=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        maesn.check(self.reward, self.tolerance)
        errors.finite_positive("radius", self.radius, example=2.0)
        errors.non_negative("ctrl_cost", self.ctrl_cost)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Goals, see :func:`esmeta.tasks._maesn.half_circle`."""
        return maesn.half_circle(batch, split, rng, self.radius, count=self.draws())

    def definition(self) -> Definition:
        """Reward ``-distance - ctrl_cost |u|^2``."""

        def distance(now: Snapshot, data: Data) -> Tensor:
            return maesn.length(_place(now) - data["goal"])

        def near(now: Snapshot, data: Data) -> Tensor:
            return distance(now, data) <= self.tolerance

        def reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
            far = maesn.paid_distance(
                self.reward, distance(now, data), near(now, data), data["goal"]
            )
            return -far - self.ctrl_cost * (MOTOR * action).square().sum(-1)

        return Definition(_place, _observe, reward, None, walk.RLLAB_NOISE, success=near)

    @property
    def reference(self) -> Reference:
        """Uniform actions; nothing gets above 0."""
        return self.scores(0.0, "best: a bound that no car reaches")


def _place(now: Snapshot) -> Tensor:
    return now.qpos[..., :2]


def _observe(now: Snapshot) -> Tensor:
    return torch.cat([now.qpos, now.qvel], dim=-1)
