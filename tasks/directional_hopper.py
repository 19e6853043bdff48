"""Hopper that must find out from reward which way to hop.

DirectionalHopper of EPG (Houthooft et al. 2018, https://arxiv.org/abs/1802.04821): reward
dir * dx/dt, two steps of 0.002 s per control step. An episode ends below 0.7 m or where a number
leaves -100..100, but not by leaning. The direction is a fair coin; the release draws it from a
range of one number, so that it is always backwards.
"""

from __future__ import annotations

from torch import Tensor

from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Definition, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid
from esmeta.types import Reference, Tasks

from . import _epg as epg


@options_class
class Task(walk.Plain):
    """Hop forwards or backwards. Options: :class:`esmeta.envs.locomotion.Simulated`.

    Args:
        mirrored: tasks 2k and 2k + 1 have opposite directions, so that the luck of a policy that
            only hops one way cancels.
    """

    xml = "hopper.xml"
    frame_skip = 2
    sizes = (11, 3)

    horizon: int = 1000
    mirrored: bool = aid(False)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Directions (1, 0) and (-1, 0), see :func:`esmeta.envs.locomotion.directions`."""
        count = self.draws()
        return walk.directions(batch, split, rng, "binary", mirrored=self.mirrored, count=count)

    def definition(self) -> Definition:
        """Reward: speed in the direction."""
        return epg.definition(_healthy)

    @property
    def reference(self) -> Reference:
        """Uniform actions; the speed of TD3 forwards, if backwards were as easy."""
        best = (walk.TD3["hopper"] - 1.0) * self.horizon
        return self.scores(best, "best: at the speed of TD3 on Hopper")


def _healthy(now: Snapshot) -> Tensor:
    return walk.calm(now) & (now.qpos[..., 1] > 0.7)
