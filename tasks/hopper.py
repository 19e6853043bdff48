"""Hopper as gymnasium's Hopper-v5 has it (Erez, Tassa & Todorov 2011; Towers et al. 2024)."""

from __future__ import annotations

from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Definition
from esmeta.options import options_class
from esmeta.types import Reference

from . import _standard as standard


@options_class
class Task(standard.Standard):
    """Hop forwards. Observation 11, three joints, four steps of 0.002 s per control step."""

    xml = "hopper.xml"
    sizes = (11, 3)

    def definition(self) -> Definition:
        """Ends when it falls below 0.7 m, leans by 0.2 rad, or a number leaves -100..100."""
        return standard.planar_definition(walk.hopper_healthy)

    @property
    def reference(self) -> Reference:
        """Uniform actions; TD3."""
        best = walk.TD3["hopper"] * self.horizon
        return self.scores(best, "best: TD3 (2018)")
