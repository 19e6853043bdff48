"""Ant that must find out from reward where to walk to.

PEARL (Rakelly et al. 2019, arXiv 1903.08254) and variBAD (Zintgraf et al. 2020, arXiv 1910.08348):
reward -|xy - goal|_1 - 0.1 |a|^2 - 0.0005 |clip(f)|^2, goals in a disc of radius 3 m, never
terminated; observation 113 (``obs_set="gym"``: here x and y are shown). MAML's code has a variant
``goals="square"``: goals in -3..3 m squared, and ``bonus=4`` per step.
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

GOALS = ("disc", "square")


@options_class
class Task(ants.Ant):
    """Walk to an unknown point. Options: :class:`esmeta.envs.ants.Ant`.

    Args:
        goals: ``"disc"``: radius ``reach * sqrt(U)`` at a uniform angle; ``"square"``: both
            coordinates uniform in -reach..reach.
        reach: in m.
        bonus: reward per step, on top of ``alive_bonus``.
    """

    obs_set: str = "gym"
    ctrl_cost: float = aid(0.1, only=0.0)
    alive_bonus: float = 0.0
    terminate: bool = False
    goals: str = "disc"
    reach: float = 3.0
    bonus: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.one_of("goals", self.goals, GOALS)
        errors.finite_positive("reach", self.reach, example=3.0)
        errors.finite("bonus", self.bonus)

    def hidden(self) -> int:
        """The x and y are shown: 113 and 29 numbers."""
        return 0

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Goals ``goal`` float64 ``[1, B, (episodes,) 2]`` in m; the splits are different draws."""
        check_split(split)
        index = task_numbers(batch)
        count = self.draws()
        draw = walk.per_episode(rng.fold("goal", split).uniform(index, 2 * count), count)
        u, v = draw.unbind(-1)
        if self.goals == "square":
            goal = torch.stack([2.0 * u - 1.0, 2.0 * v - 1.0], dim=-1)
        else:
            angle = 2.0 * torch.pi * v
            goal = u.sqrt().unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], dim=-1)
        return Tasks(index, {"goal": self.reach * goal})

    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """Reward ``bonus - |xy - goal|_1`` minus costs."""
        distance = (self.place(now) - data["goal"]).abs().sum(-1)
        return self.bonus - distance + self.upkeep(now, action)

    @property
    def reference(self) -> Reference:
        """Uniform actions; nothing gets above the bonuses."""
        best = (self.bonus + self.alive_bonus) * self.horizon
        return self.scores(best, "best: a bound that no body reaches")
