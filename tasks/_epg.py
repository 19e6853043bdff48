"""What the planar tasks of EPG share (Houthooft et al. 2018, https://arxiv.org/abs/1802.04821).

The reward is the speed forwards and nothing else: no bonus for being alive, no cost of control.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from esmeta import errors
from esmeta.envs import locomotion as walk
from esmeta.envs import random_models
from esmeta.envs.bodies import Data, Definition, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_split, task_numbers
from esmeta.types import Tasks

from . import _standard as standard


def definition(healthy: walk.Healthy) -> Definition:
    """Gymnasium's observation of hopper and walker; reward ``direction * v`` (m/s)."""

    def reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        along = data["direction"][..., 0] if "direction" in data else 1.0
        return along * velocity[..., 0]

    return dataclasses.replace(standard.planar_definition(healthy), reward=reward)


@options_class
class RandomBody(walk.Plain):
    """Options of a body drawn for each trial, beside :class:`esmeta.envs.locomotion.Simulated`.

    Args:
        scale_min: smallest factor on masses, coefficients of friction and radii.
        scale_max: largest one.
        gravity_min: weakest gravity in m/s^2.
        gravity_max: strongest one.
    """

    renewable = False
    counts: ClassVar[random_models.Counts]

    horizon: int = 1000
    scale_min: float = 0.5
    scale_max: float = 2.0
    gravity_min: float = 2.0
    gravity_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.finite_positive("scale_min", self.scale_min, example=0.5)
        walk.check_range("scale", self.scale_min, self.scale_max)
        walk.check_range("gravity", self.gravity_min, self.gravity_max)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Bodies, see :func:`esmeta.envs.random_models.epg`; the splits are different draws."""
        check_split(split)
        index = task_numbers(batch)
        scale, gravity = (self.scale_min, self.scale_max), (self.gravity_min, self.gravity_max)
        stream = rng.fold("body", split)
        return Tasks(index, random_models.epg(index, stream, self.counts, scale, gravity))
