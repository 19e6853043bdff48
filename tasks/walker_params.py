"""Walker whose masses, inertia, friction and damping are unknown; see :mod:`._parameters`.

An episode ends when the height leaves 0.8..2 m or it leans by 1 rad.
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
    """Walk forwards. Options: :class:`esmeta.tasks._parameters.Parameters`."""

    xml = "walker2d.xml"  # the right foot with friction 0.9, the left with 1.9
    sizes = (17, 6)
    counts = random_models.WALKER

    def definition(self) -> Definition:
        """Reward ``v + 1 - 0.001 |a|^2``."""
        return parameters.definition(walk.walker_healthy)

    @property
    def reference(self) -> Reference:
        """Uniform actions; TD3 on the standard body."""
        best = walk.TD3["walker2d"] * self.horizon
        return self.scores(best, "best: TD3 on Walker2d")
