"""What the tasks of MAESN share (Gupta et al. 2018, https://arxiv.org/abs/1802.07245).

There is a place to be and a distance to it. ``reward="dense"``, for training, pays for the distance
everywhere. ``reward="gated"``, for testing and sparse in the paper's words, pays the same constant
everywhere but near the goal: for the distance from the origin to the goal.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import locomotion as walk
from esmeta.rng import Rng
from esmeta.tasks import check_split, task_numbers
from esmeta.types import Tasks

REWARDS = ("dense", "gated")
MODELS = Path(__file__).parent / "models"


def check(reward: str, tolerance: float) -> None:
    """Refuse rewards that do not exist and distances that are none."""
    errors.one_of("reward", reward, REWARDS)
    errors.finite_positive("tolerance", tolerance, example=0.8)


def half_circle(
    batch: int | Tensor, split: str, rng: Rng, radius: float, *, count: int = 1
) -> Tasks:
    """Goals ``goal`` float64 ``[1, B, (count,) 2]`` in m: uniform on the half circle y > 0."""
    check_split(split)
    index = task_numbers(batch)
    draw = walk.per_episode(rng.fold("goal", split).uniform(index, count), count)
    angle = math.pi * draw.squeeze(-1)
    return Tasks(index, {"goal": radius * torch.stack([angle.cos(), angle.sin()], dim=-1)})


def length(offset: Tensor) -> Tensor:
    """Euclidean length over the last axis."""
    return torch.linalg.vector_norm(offset, dim=-1)


def paid_distance(kind: str, distance: Tensor, near: Tensor, goal: Tensor, norm: int = 2) -> Tensor:
    """The distance that a step pays for: the real one, or (gated, not near) that of the goal."""
    if kind == "dense":
        return distance
    return torch.where(near, distance, torch.linalg.vector_norm(goal, ord=norm, dim=-1))
