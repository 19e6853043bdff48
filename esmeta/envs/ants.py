"""The ant of the meta-learning papers: body, observations, costs, end.

``physics="gym"`` is what PEARL, variBAD and MetODS use: five steps of 0.01 s, speed of the torso.
``physics="rllab"`` is that of MAML: one step of 0.02 s, speed of the whole body's centre of mass
(here from its displacement, there from its Jacobian), smaller noise at the start. Torques are up to
150 Nm in both.
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

XML = "ant.xml"
BODIES = 14
HEIGHT = 2  # qpos
SIZES = {"rllab": 125, "gym": 111, "compact": 27}
HIDDEN = 2  # coordinates that "gym" and "compact" leave out where a task has no goal in the plane


@options_class
class Ant(walk.Simulated):
    """Options of the ant tasks, beside :class:`esmeta.envs.locomotion.Simulated`.

    Args:
        obs_set: ``"rllab"`` (125): qpos, qvel, clipped forces, rotation matrix and position of
            the torso; ``"gym"`` (111): qpos without x and y, qvel, forces; ``"compact"`` (27):
            the same without forces.
        physics: ``"gym"`` or ``"rllab"``, see this module.
        contact: forces ``"zero"`` as in most published results, or ``"mj"`` as simulated, which
            needs ``engine="rows"``.
        ctrl_cost: times the sum of squares of the action.
        contact_cost: times the sum of squares of the clipped forces.
        alive_bonus: reward per step.
        terminate: whether an episode ends when the torso's height leaves ``z_min..z_max`` (m).
    """

    obs_set: str = "rllab"
    physics: str = "gym"
    contact: str = "zero"
    ctrl_cost: float = aid(0.005, only=0.0)
    contact_cost: float = 5e-4
    alive_bonus: float = 0.05
    terminate: bool = True
    z_min: float = 0.2
    z_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("obs_set", self.obs_set, walk.OBS_SETS)
        errors.one_of("physics", self.physics, walk.PHYSICS)
        errors.one_of("contact", self.contact, walk.CONTACTS)
        errors.non_negative("ctrl_cost", self.ctrl_cost)
        errors.non_negative("contact_cost", self.contact_cost)
        errors.finite("alive_bonus", self.alive_bonus)
        errors.non_negative("z_min", self.z_min)
        errors.finite_positive("z_max", self.z_max, example=1.0)
        if self.contact == "mj" and self.engine == "batch":
            raise errors.UserError(
                "contact = 'mj' with engine = 'batch', which has no contact forces; write "
                "engine = 'rows', or contact = 'zero'"
            )

    def body(self) -> Body:
        """Gymnasium's ant.xml."""
        skip, timestep = (1, 0.02) if self.physics == "rllab" else (5, None)
        return Body(XML, skip, timestep, self.integrator, self.contact_rule)

    @property
    def spec(self) -> Spec:
        """Eight joints."""
        shown = 0 if self.obs_set == "rllab" else HIDDEN - self.hidden()
        return self.trial(SIZES[self.obs_set] + shown, 8)

    def hidden(self) -> int:
        """How many of x, y the sets ``gym`` and ``compact`` leave out."""
        return HIDDEN

    def reads(self) -> tuple[str, ...]:
        """What observation, speed and costs need of the simulator."""
        names = ["subtree_com" if self.physics == "rllab" else "xpos"]
        names += ["xmat"] if self.obs_set == "rllab" else []
        names += ["cfrc_ext"] if self.contact == "mj" else []
        return tuple(names)

    def noise(self) -> walk.Noise:
        """Noise of the lineage."""
        return walk.RLLAB_NOISE if self.physics == "rllab" else walk.GYM_NOISE

    def place(self, now: Snapshot) -> Tensor:
        """The x and y of what the lineage takes the speed of, ``[.., 2]`` in metres."""
        return walk.com(now, self.physics)[..., :2]

    def observe(self, now: Snapshot) -> Tensor:
        """The observation set, ``[.., obs]``."""
        if self.obs_set == "rllab":
            parts = [now.qpos, now.qvel, walk.flat_forces(now, self.contact, BODIES)]
            parts += [now.xmat[..., walk.TORSO, :], walk.com(now, self.physics)]
            return torch.cat(parts, dim=-1)
        parts = [now.qpos[..., self.hidden() :], now.qvel]
        if self.obs_set == "gym":
            parts.append(walk.flat_forces(now, self.contact, BODIES))
        return torch.cat(parts, dim=-1)

    def upkeep(self, now: Snapshot, action: Tensor) -> Tensor:
        """Bonus for being alive minus the costs of action and contact, ``[..]``."""
        effort = self.ctrl_cost * (action * action).sum(-1)
        return self.alive_bonus - effort - self.contact_cost * walk.force_cost(now, self.contact)

    @abstractmethod
    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """The reward of a step; see :class:`esmeta.envs.bodies.Definition`."""

    def definition(self) -> Definition:
        """What is seen and paid; with ``terminate`` the height ends an episode."""
        healthy = walk.upright(self.z_min, self.z_max, HEIGHT) if self.terminate else None
        return Definition(
            self.place, self.observe, self.pay, healthy, self.noise(), self.reads(), walk.LEARNING
        )
