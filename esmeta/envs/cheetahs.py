"""The half-cheetah of the meta-learning papers: body, observations, costs.

``physics="gym"`` is what PEARL, variBAD and MetODS use: five steps of 0.01 s, speed of the torso.
``physics="rllab"`` is that of MAML: one step of 0.01 s, speed of the whole body's centre of mass
(here from its displacement, there from its Jacobian), smaller noise at the start.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Body, Data, Definition, Snapshot
from esmeta.options import options_class
from esmeta.tasks import aid
from esmeta.types import Spec

XML = "half_cheetah.xml"
SIZES = {"rllab": 20, "gym": 17, "compact": 17}


@options_class
class Cheetah(walk.Simulated):
    """Options of the cheetah tasks, beside :class:`esmeta.envs.locomotion.Simulated`.

    Args:
        obs_set: ``"rllab"`` (20): qpos without x, qvel, torso position; ``"gym"`` or
            ``"compact"`` (17): without the position.
        physics: ``"gym"`` or ``"rllab"``, see this module.
        ctrl_cost: times the sum of squares of the action.
    """

    obs_set: str = "rllab"
    physics: str = "gym"
    ctrl_cost: float = aid(0.05, only=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("obs_set", self.obs_set, walk.OBS_SETS)
        errors.one_of("physics", self.physics, walk.PHYSICS)
        errors.non_negative("ctrl_cost", self.ctrl_cost)

    def body(self) -> Body:
        """Gymnasium's half_cheetah.xml."""
        skip = 1 if self.physics == "rllab" else 5
        return Body(XML, skip, integrator=self.integrator, contact_rule=self.contact_rule)

    @property
    def spec(self) -> Spec:
        """Six joints; episodes end by the horizon only."""
        return self.trial(SIZES[self.obs_set], 6)

    def reads(self) -> tuple[str, ...]:
        """What observation and speed need of the simulator."""
        if self.physics == "rllab":
            return ("subtree_com",)
        return ("xpos",) if self.obs_set == "rllab" else ()

    def noise(self) -> walk.Noise:
        """Noise of the lineage."""
        return walk.RLLAB_NOISE if self.physics == "rllab" else walk.GYM_NOISE

    def place(self, now: Snapshot) -> Tensor:
        """The x of what the lineage takes the speed of, ``[.., 1]`` in metres."""
        if self.physics == "rllab":
            return walk.com(now, "rllab")[..., :1]
        return now.qpos[..., :1]

    def observe(self, now: Snapshot) -> Tensor:
        """The observation set, ``[.., 20]`` or ``[.., 17]``."""
        parts = [now.qpos[..., 1:], now.qvel]
        if self.obs_set == "rllab":
            parts.append(walk.com(now, self.physics))
        return torch.cat(parts, dim=-1)

    def effort(self, action: Tensor) -> Tensor:
        """Control cost ``[..]``."""
        return self.ctrl_cost * (action * action).sum(-1)

    @abstractmethod
    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """The reward of a step; see :class:`esmeta.envs.bodies.Definition`."""

    def definition(self) -> Definition:
        """What is seen and paid; nothing but the horizon ends an episode."""
        return Definition(
            self.place, self.observe, self.pay, None, self.noise(), self.reads(), walk.LEARNING
        )
