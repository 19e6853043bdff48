"""Ant that must find out from reward which way to walk.

Finn, Abbeel & Levine 2017 (MAML, arXiv 1703.03400), section 5.3, and its descendants: reward
dir * v - 0.005 |a|^2 - 0.0005 |clip(f)|^2 + 0.05, terminated when the torso's height leaves
0.2..1 m. As MetODS has it by default: one episode of 200 steps per trial, observation 125, so that
a policy sees 134 numbers (with action and reward).

Other published versions are options: ProMP and learn2learn ``directions="circle", ctrl_cost=0.5,
alive_bonus=1, z_min=0, obs_set="gym"``; PEARL the same with ``z_min=0.2, obs_set="compact"``.
variBAD's code takes +1 and -1 for angles in radians, so that its two directions are 115 degrees
apart and neither is backwards; that is not reproduced.
"""

from __future__ import annotations

from torch import Tensor

from esmeta import errors
from esmeta.envs import ants
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid
from esmeta.types import Reference, Tasks


@options_class
class Task(ants.Ant):
    """Walk in an unknown direction. Options: :class:`esmeta.envs.ants.Ant`.

    Args:
        directions: ``"binary"``: along x or against it; ``"circle"``: any.
        mirrored: tasks 2k and 2k + 1 are twins: all is alike, noise included, but their directions
            are opposite, so that what a policy earns without reading rewards cancels exactly.
    """

    directions: str = "binary"
    mirrored: bool = aid(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("directions", self.directions, walk.DIRECTIONS)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Unit vectors, see :func:`esmeta.envs.locomotion.directions`."""
        return walk.directions(
            batch, split, rng, self.directions, mirrored=self.mirrored, count=self.draws()
        )

    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """Reward ``dir . v - ctrl_cost |a|^2 - contact_cost |clip(f)|^2 + alive_bonus``."""
        along = (data["direction"] * velocity).sum(-1)
        return along + self.upkeep(now, action)

    @property
    def reference(self) -> Reference:
        """Uniform actions; the speed that TD3 reaches on the standard task."""
        # There a step pays 1 for being alive; its costs are small beside the speed.
        best = (walk.TD3["ant"] - 1.0 + self.alive_bonus) * self.horizon
        return self.scores(best, "best: at the speed of TD3 on Ant (4372 in 1000 steps)")
