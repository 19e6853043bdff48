"""Hopper and walker with random parameters, as PEARL and variBAD have them.

Rakelly et al. 2019 (PEARL, https://arxiv.org/abs/1903.08254): mass, inertia and friction times
1.5^u, damping times 1.3^u, u uniform in -3..3 for each entry; reward dx/dt + 1 - 0.001 |a|^2, also
in the step in which it falls. Episodes of 200 steps; four steps of 0.002 s per control step for
both bodies (the release takes no other, though it asks for five with the walker).
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


@options_class
class Parameters(walk.Plain):
    """Options, beside :class:`esmeta.envs.locomotion.Simulated`.

    Args:
        log_scale_limit: largest u; 0 gives the model itself.
    """

    renewable = False
    counts: ClassVar[random_models.Counts]

    log_scale_limit: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.non_negative("log_scale_limit", self.log_scale_limit, example=3.0)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Bodies, see :func:`esmeta.envs.random_models.parameters`; the splits differ."""
        check_split(split)
        index, stream = task_numbers(batch), rng.fold("body", split)
        limit = self.log_scale_limit
        return Tasks(index, random_models.parameters(index, stream, self.counts, limit))


def definition(healthy: walk.Healthy) -> Definition:
    """Gymnasium's observation; reward ``v + 1 - 0.001 |a|^2``."""

    def reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        return velocity[..., 0] + 1.0 - 1e-3 * action.square().sum(-1)

    return dataclasses.replace(standard.planar_definition(healthy), reward=reward)
