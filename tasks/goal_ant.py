"""Ant that must find out from reward where to walk to, tested on the other half of the plane.

GoalAnt of EPG (Houthooft et al. 2018, https://arxiv.org/abs/1802.04821): reward -|xy - goal|_2
- 0.005 |a|^2; the goals of training have x > 0, those of the test x < 0. What the paper does not
give is chosen here: goals 2..5 m away, episodes of 200 steps that nothing else ends, observation
113 with x and y. ``reward="progress"`` pays what the distance shrinks by, in m/s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import ants
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid, check_split, task_numbers
from esmeta.types import Reference, Tasks

REWARDS = ("distance", "progress")


@options_class
class Task(ants.Ant):
    """Walk to an unknown point ahead or, in the test, behind. Options: :class:`.ant.Ant`.

    Args:
        reward: ``"distance"`` or ``"progress"``.
        near: distance of the nearest goals in m.
        far: distance of the farthest.
    """

    obs_set: str = "gym"
    contact_cost: float = 0.0
    alive_bonus: float = 0.0
    terminate: bool = False
    reward: str = aid("distance")
    near: float = 2.0
    far: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("reward", self.reward, REWARDS)
        errors.finite_positive("near", self.near, example=2.0)
        errors.finite_positive("far", self.far, example=5.0)
        if self.near >= self.far:
            raise errors.UserError(
                f"near = {self.near} is not below far = {self.far}; write near = 2 and far = 5"
            )

    def hidden(self) -> int:
        """The x and y are shown: 113 and 29 numbers."""
        return 0

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Goals ``goal`` float64 ``[1, B, (episodes,) 2]`` in m: x > 0 in training, else < 0.

        The half circle behind is cut into sixteen sectors, which are of the validation split and of
        the test in turn.
        """
        check_split(split)
        index, count = task_numbers(batch), self.draws()
        draw = walk.per_episode(rng.fold("goal", split).uniform(index, 2 * count), count)
        radius = self.near + (self.far - self.near) * draw[..., 0]
        place, ahead = draw[..., 1], 1.0
        if split != "train":
            sector = (8 * place).floor()
            place = (2 * sector + (split == "test") + (8 * place - sector)) / 16
            ahead = -1.0
        angle = torch.pi * (place - 0.5)
        goal = radius.unsqueeze(-1) * torch.stack([ahead * angle.cos(), angle.sin()], dim=-1)
        return Tasks(index, {"goal": goal})

    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """Reward ``-|xy - goal|_2``, or the speed towards it, minus costs."""
        offset = data["goal"] - self.place(now)
        distance = torch.linalg.vector_norm(offset, dim=-1)
        if self.reward == "distance":
            return self.upkeep(now, action) - distance
        before = torch.linalg.vector_norm(offset + velocity * self.seconds(), dim=-1)
        return self.upkeep(now, action) + (before - distance) / self.seconds()

    def seconds(self) -> float:
        """Length of a control step."""
        return 0.02 if self.physics == "rllab" else 0.05

    @property
    def reference(self) -> Reference:
        """Uniform actions; standing on the goal, or the speed of TD3 towards it."""
        steps = self.horizon
        if self.reward == "distance":
            return self.scores(0.0, "best: a bound that no body reaches")
        return self.scores((walk.TD3["ant"] - 1.0) * steps, "best: at the speed of TD3 on Ant")
