"""Walker2d as gymnasium's Walker2d-v5 has it (Erez, Tassa & Todorov 2011; Towers et al. 2024)."""

from __future__ import annotations

from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Definition
from esmeta.options import options_class
from esmeta.types import Reference

from . import _standard as standard


@options_class
class Task(standard.Standard):
    """Walk forwards. Observation 17, six joints, four steps of 0.002 s per control step."""

    xml = "walker2d_v5.xml"  # both feet with friction 1.9
    sizes = (17, 6)

    def definition(self) -> Definition:
        """Ends when its height leaves 0.8..2 m or it leans by 1 rad."""
        return standard.planar_definition(walk.walker_healthy)

    @property
    def reference(self) -> Reference:
        """Uniform actions; TD3."""
        best = walk.TD3["walker2d"] * self.horizon
        return self.scores(best, "best: TD3 (2018)")
