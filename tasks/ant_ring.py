"""Weak ant that must find a place on a half circle from reward.

Legged locomotion of MAESN (Gupta et al. 2018, https://arxiv.org/abs/1802.07245): an ant with gears
of 30, steps of 0.01 s, episodes of 200, goals on a half circle of 2 m. Dense reward
4 - |xy - goal|_1 - 0.005 |a|^2 - 0.0005 |clip(f)|^2 + 0.05; the gated one pays |goal|_1 in place
of the distance where the Euclidean distance is 0.8 m or more. Terminated when the torso's height
leaves 0.2..1 m. As in rllab, xy is the centre of mass of the whole body at the end of the step.
Contact forces are simulated (``contact="zero"`` leaves them out).
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from esmeta import errors
from esmeta.envs import ants
from esmeta.envs.bodies import Body, Data, Definition, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid
from esmeta.types import Reference, Tasks

from . import _maesn as maesn


@options_class
class Task(ants.Ant):
    """Walk to an unknown point.

    Options, beside :class:`esmeta.envs.ants.Ant`:

    Args:
        reward: ``"dense"`` or ``"gated"``.
        radius: distance of the goals in m.
        tolerance: how far from the goal, in m, the gated reward begins; closer is a success.
        bonus: reward per step, on top of ``alive_bonus``.
    """

    physics: str = "rllab"
    contact: str = "mj"
    reward: str = aid("dense", published="gated")
    radius: float = 2.0
    tolerance: float = 0.8
    bonus: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        maesn.check(self.reward, self.tolerance)
        errors.finite_positive("radius", self.radius, example=2.0)
        errors.finite("bonus", self.bonus)

    def body(self) -> Body:
        """Gymnasium's ant.xml with gears of 30."""
        skip = 1 if self.physics == "rllab" else 5
        return Body(ants.XML, skip, 0.01, self.integrator, self.contact_rule, gear=30.0)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Goals, see :func:`esmeta.tasks._maesn.half_circle`."""
        return maesn.half_circle(batch, split, rng, self.radius, count=self.draws())

    def definition(self) -> Definition:
        """Also when it is there; rllab computes what is seen of a state anew."""
        current = self.physics == "rllab"
        return dataclasses.replace(
            super().definition(), phases={}, current=current, success=self.near
        )

    def near(self, now: Snapshot, data: Data) -> Tensor:
        """Whether it is there."""
        return maesn.length(self.place(now) - data["goal"]) < self.tolerance

    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """Reward ``bonus - distance`` minus costs."""
        distance, near = (self.place(now) - data["goal"]).abs().sum(-1), self.near(now, data)
        far = maesn.paid_distance(self.reward, distance, near, data["goal"], norm=1)
        return self.bonus - far + self.upkeep(now, action)

    @property
    def reference(self) -> Reference:
        """Uniform actions; nothing gets above the bonuses."""
        best = (self.bonus + self.alive_bonus) * self.horizon
        return self.scores(best, "best: a bound that no body reaches")
