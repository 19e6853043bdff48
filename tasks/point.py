"""Point robot: find a goal that only the reward tells of, the smallest task of adaptation.

The point robots of PEARL (Rakelly et al. 2019, https://arxiv.org/abs/1903.08254), variBAD
(Zintgraf et al. 2020, https://arxiv.org/abs/1910.08348) and, as its smallest case, MAESN (Gupta
et al. 2018, https://arxiv.org/abs/1802.07245) differ in the goals, the horizon and what is paid:

* PEARL, dense: ``goals="square", start="square", horizon=20``;
* PEARL, sparse: ``reward="sparse", horizon=20``;
* variBAD: ``horizon=100``, ``reward`` dense or sparse;
* MAESN: ``radius=2, horizon=60``, trained on ``reward="dense"``, tested on ``reward="gated",
  tolerance=0.5``.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import plane
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_split, episode_steps, task_numbers
from esmeta.types import Tasks

GOALS = ("half_circle", "circle", "square")
REWARDS = ("dense", "sparse", "gated")
STARTS = ("origin", "square")


@options_class
class Task(plane.OnPlane):
    """A point moves to a hidden goal g. Observation ``[2]``: its position p.

    A step adds ``step_size`` times the action, clipped to -1 .. 1. The reward is that of the place
    it leads to: ``dense``: -|p - g|; ``sparse``: 1 - |p - g| within ``tolerance``, else 0;
    ``gated``: -|p - g| within ``tolerance``, else -|g|. Nothing terminates.

    Args:
        goals: ``"half_circle"`` (upper) or ``"circle"`` of ``radius``, ``"square"`` of half width
            ``radius``; uniform.
        reward: ``"dense"``, ``"sparse"`` or ``"gated"``.
        radius: how far away goals are.
        tolerance: distance that counts as being there.
        step_size: of one step along each axis.
        start: ``"origin"``, or ``"square"``: uniform in the square of half width ``radius``.
        horizon: steps per trial, shared evenly by its episodes.
        episodes: per trial, all with the same goal.
        train_goals: how many different goals there are in training; 0: as many as tasks.
    """

    goals: Literal["half_circle", "circle", "square"] = "half_circle"
    reward: Literal["dense", "sparse", "gated"] = "dense"
    radius: float = 1.0
    tolerance: float = 0.2
    step_size: float = 0.1
    start: Literal["origin", "square"] = "origin"
    horizon: int = 100
    episodes: int = 1
    train_goals: int = 0

    def __post_init__(self) -> None:
        errors.one_of("goals", self.goals, GOALS)
        errors.one_of("reward", self.reward, REWARDS)
        errors.one_of("start", self.start, STARTS)
        errors.finite_positive("radius", self.radius, example=1.0)
        errors.finite_positive("tolerance", self.tolerance, example=0.2)
        errors.finite_positive("step_size", self.step_size, example=0.1)
        errors.non_negative_int("train_goals", self.train_goals, example=100)
        episode_steps(self.horizon, self.episodes)

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``goal`` float32 ``[1, B, 2]``.

        Goals are real numbers: ``train`` and ``test`` never share one.
        """
        check_split(split)
        index = task_numbers(batch)
        number = index % self.train_goals if self.train_goals and split == "train" else index
        draw = rng.fold("point", split).uniform(number, 2)
        if self.goals == "square":
            goal = (2.0 * draw - 1.0) * self.radius
        else:
            angle = draw[..., 0] * math.pi * (1.0 if self.goals == "half_circle" else 2.0)
            goal = self.radius * torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)
        return Tasks(index, {"goal": goal.to(torch.float32)})

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Trials with one of ``train_goals`` share it; see :func:`esmeta.tasks.task_groups`."""
        return index % self.train_goals if self.train_goals and split == "train" else index

    def rules(self) -> plane.Rules:
        """How the point moves, and what pays."""
        return plane.Rules(
            reward=functools.partial(_reward, self.reward, self.tolerance),
            step_size=self.step_size,
            steps=episode_steps(self.horizon, self.episodes),
            episodes=self.episodes,
            near=self.tolerance,
            start_width=self.radius if self.start == "square" else 0.0,
        )


def _reward(kind: str, tolerance: float, offset: Tensor, goal: Tensor) -> Tensor:
    distance = torch.linalg.vector_norm(offset, dim=-1)
    if kind == "dense":
        return -distance
    near = distance <= tolerance
    if kind == "sparse":
        return torch.where(near, 1.0 - distance, 0.0)
    return -torch.where(near, distance, torch.linalg.vector_norm(goal, dim=-1))
