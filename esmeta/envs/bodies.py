"""What a task makes of simulated bodies, for every simulator: observation, reward, end, start.

A simulator (:mod:`esmeta.envs.mujoco` on the CPU) shows its P x B worlds as a :class:`Snapshot`;
all else is pure torch functions of it, collected in a :class:`Definition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from esmeta import errors
from esmeta.rng import Rng

CONTACT_RULES = ("legacy", "native")
INTEGRATORS = ("model", "euler")
Data = Mapping[str, Tensor]
"""Task data, leaves ``[P or 1, B, ...]``."""


@dataclass(frozen=True)
class Body:
    """What is simulated.

    Args:
        xml: name of a model that comes with the package gymnasium, or a path to one of your own.
        frame_skip: physics steps per control step.
        timestep: seconds per physics step; None: the model's.
        integrator: ``"model"``, or ``"euler"`` (other physics, 3.5 times faster than RK4).
        contact_rule: ``"legacy"``: two geoms of margin m touch within m, as in every MuJoCo before
            3.5 and in the published results; ``"native"``: what the installed MuJoCo does (since
            3.5, within 2 m).
        gear: of all motors; None: the model's.
        nconmax: contacts per world that MuJoCo Warp has room for, on average over the worlds; 0:
            as many as can be, or 64. MuJoCo on the CPU makes room by itself.
        njmax: constraints of a world that MuJoCo Warp has room for; 0: enough for ``nconmax``.
    """

    xml: str
    frame_skip: int
    timestep: float | None = None
    integrator: str = "model"
    contact_rule: str = "legacy"
    gear: float | None = None
    nconmax: int = 0
    njmax: int = 0

    def __post_init__(self) -> None:
        errors.positive_int("frame_skip", self.frame_skip)
        errors.one_of("integrator", self.integrator, INTEGRATORS)
        errors.one_of("contact_rule", self.contact_rule, CONTACT_RULES)
        if self.timestep is not None:
            errors.finite_positive("timestep", self.timestep)
        if self.gear is not None:
            errors.finite_positive("gear", self.gear, example=30.0)
        errors.non_negative_int("nconmax", self.nconmax)
        errors.non_negative_int("njmax", self.njmax)


class Snapshot(NamedTuple):
    """The worlds after a control step; leaves ``[P, B, ...]`` in the simulator's precision.

    ``qpos [.., nq]`` and ``qvel [.., nv]`` are the state. The others are what the simulator
    derived from the state one substep before (at RK4 from its last stage), as MuJoCo leaves it
    and published environments read it: ``xpos [.., nbody, 3]``, ``xmat [.., nbody, 9]``,
    ``subtree_com [.., nbody, 3]`` in metres, and ``cfrc_ext [.., nbody, 6]``, the contact forces
    and torques in N and Nm. A leaf that :attr:`Definition.reads` does not name is empty.
    """

    qpos: Tensor
    qvel: Tensor
    xpos: Tensor
    xmat: Tensor
    subtree_com: Tensor
    cfrc_ext: Tensor


@dataclass(frozen=True)
class Noise:
    """How an episode starts: the first pose plus noise in positions and velocities.

    A scale is one number, or one for each coordinate.
    """

    qpos: Literal["uniform", "normal"]
    qpos_scale: float | tuple[float, ...]
    qvel: Literal["uniform", "normal"]
    qvel_scale: float | tuple[float, ...]

    def draw(self, rng: Rng, index: Tensor, episodes: int, nq: int, nv: int) -> Tensor:
        """Noise of every episode, float64 ``[*index.shape, episodes, nq + nv]``.

        Uniform is from -scale to scale, normal has the standard deviation scale.
        """
        parts = []
        for name, kind, scale, size in (
            ("qpos", self.qpos, self.qpos_scale, nq),
            ("qvel", self.qvel, self.qvel_scale, nv),
        ):
            stream = rng.fold("dynamics", name)
            if kind == "uniform":
                draws = 2.0 * stream.uniform(index, episodes * size) - 1.0
            else:
                draws = stream.normal(index, episodes * size)
            rows = draws.reshape(*index.shape, episodes, size)
            parts.append(rows * torch.tensor(scale, dtype=torch.float64, device=rows.device))
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Definition:
    """A task on a body, as pure functions.

    ``place(now)`` ``[P, B, k]`` is a position in metres; its change over a control step, divided
    by the seconds of that step, is the velocity that rewards are made of.
    ``observe(now)`` ``[P, B, obs]``.
    ``reward(now, velocity, action, data)`` ``[P, B]`` is that of one control step; ``action``
    ``[P, B, nu]`` is clipped to -1..1.
    ``healthy(now)`` bool ``[P, B]``: where False the episode is terminated; None: never.
    ``reads``: which leaves of the snapshot are needed beside the state.
    ``phases``: spans of an episode (first step, last step; counted from 1) whose mean reward per
    step is a metric.
    ``current``: whether these leaves are those of the state itself, as rllab computes them anew
    after a step, instead of one substep behind it.
    ``success(now, data)`` bool ``[P, B]``: where the goal is reached; a metric says in which share
    of the trials that came to be at any step.
    ``again()`` makes the same definition, where its functions are local ones: no pickle takes them.
    """

    place: Callable[[Snapshot], Tensor]
    observe: Callable[[Snapshot], Tensor]
    reward: Callable[[Snapshot, Tensor, Tensor, Data], Tensor]
    healthy: Callable[[Snapshot], Tensor] | None
    noise: Noise
    reads: tuple[str, ...] = ()
    phases: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    current: bool = False
    success: Callable[[Snapshot, Data], Tensor] | None = None
    again: Callable[[], Definition] | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> Any:
        return (self.again, ()) if self.again else super().__reduce__()
