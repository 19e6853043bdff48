"""Walker with a body and a gravity of its own in every trial.

RandomWalker of EPG (Houthooft et al. 2018, https://arxiv.org/abs/1802.04821), which is not among
what was released: the randomisation and the reward of RandomHopper on Walker2d, whose four steps
per control step and whose end (height outside 0.8..2 m, beyond 1 rad) are kept.
"""

from __future__ import annotations

from torch import Tensor

from esmeta.envs import locomotion as walk
from esmeta.envs import random_models
from esmeta.envs.bodies import Definition, Snapshot
from esmeta.options import options_class
from esmeta.types import Reference

from . import _epg as epg


@options_class
class Task(epg.RandomBody):
    """Walk forwards on an unknown body. Options: :class:`esmeta.tasks._epg.RandomBody`."""

    xml = "walker2d.xml"  # the right foot with friction 0.9, the left with 1.9
    sizes = (17, 6)
    counts = random_models.WALKER

    def definition(self) -> Definition:
        """Reward: speed."""
        return epg.definition(_healthy)

    @property
    def reference(self) -> Reference:
        """Uniform actions; the speed of TD3 on the standard body."""
        best = (walk.TD3["walker2d"] - 1.0) * self.horizon
        return self.scores(best, "best: at the speed of TD3 on Walker2d")


def _healthy(now: Snapshot) -> Tensor:
    z, angle = now.qpos[..., 1], now.qpos[..., 2]
    return walk.calm(now) & (z > 0.8) & (z < 2.0) & (angle.abs() < 1.0)
