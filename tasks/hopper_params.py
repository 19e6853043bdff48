"""Hopper whose masses, inertia, friction and damping are unknown; see :mod:`._parameters`.

An episode ends below 0.7 m, beyond 0.2 rad, or where a number leaves -100..100.
"""

from __future__ import annotations

from esmeta.envs import locomotion as walk
from esmeta.envs import random_models
from esmeta.envs.bodies import Definition
from esmeta.options import options_class
from esmeta.types import Reference

from . import _parameters as parameters


@options_class
class Task(parameters.Parameters):
    """Hop forwards. Options: :class:`esmeta.tasks._parameters.Parameters`."""

    xml = "hopper.xml"
    sizes = (11, 3)
    counts = random_models.HOPPER

    def definition(self) -> Definition:
        """Reward ``v + 1 - 0.001 |a|^2``."""
        return parameters.definition(walk.hopper_healthy)

    @property
    def reference(self) -> Reference:
        """Uniform actions; TD3 on the standard body."""
        best = walk.TD3["hopper"] * self.horizon
        return self.scores(best, "best: TD3 on Hopper")
