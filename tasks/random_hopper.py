"""Hopper with a body and a gravity of its own in every trial.

RandomHopper of EPG (Houthooft et al. 2018, https://arxiv.org/abs/1802.04821): masses, friction and
radii times 0.5..2, gravity 2..20 m/s^2, two steps of 0.002 s per control step, reward dx/dt. An
episode ends below 0.7 m, beyond 0.5 rad, or where a number leaves -100..100. The release draws its
direction from a range of one number, so that it is forwards; here it is forwards by definition,
and ``directional_hopper`` has the coin.
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
    """Hop forwards on an unknown body. Options: :class:`esmeta.tasks._epg.RandomBody`."""

    xml = "hopper.xml"
    frame_skip = 2
    sizes = (11, 3)
    counts = random_models.HOPPER

    def definition(self) -> Definition:
        """Reward: speed."""
        return epg.definition(_healthy)

    @property
    def reference(self) -> Reference:
        """Uniform actions; the speed of TD3 on the standard body."""
        best = (walk.TD3["hopper"] - 1.0) * self.horizon
        return self.scores(best, "best: at the speed of TD3 on Hopper")


def _healthy(now: Snapshot) -> Tensor:
    z, angle = now.qpos[..., 1], now.qpos[..., 2]
    return walk.calm(now) & (z > 0.7) & (angle.abs() < 0.5)
