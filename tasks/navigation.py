"""2-D navigation of MAML: go to a goal that only the reward tells of.

Finn, Abbeel & Levine 2017, section 5.3, https://arxiv.org/abs/1703.03400. The text pays the
negative squared distance; the authors' code, and with it the published returns (random
initialisation -82.7, MAML -40.4 before and -3.3 after two gradient steps), the negative distance,
which is the default here.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import plane
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_split, episode_steps, task_numbers
from esmeta.types import Tasks

REWARDS = ("distance", "squared")
_HALF_WIDTH, _STEP, _ARRIVAL = 0.5, 0.1, 0.01


@options_class
class Task(plane.OnPlane):
    """A point moves from the origin to a hidden goal. Observation ``[2]``: its position.

    A step adds 0.1 times the action, clipped to -1 .. 1. The reward is the negative (squared)
    distance to the goal, uniform in [-0.5, 0.5]^2, after the step. The episode terminates where
    both coordinates are within 0.01 of the goal's.

    Args:
        reward: ``"distance"`` or ``"squared"``.
        horizon: steps per trial, shared evenly by its episodes; MAML's episodes have 100.
        episodes: per trial, all with the same goal.
        terminate: whether arriving ends an episode. A learner that is to adapt meets rewards of
            different length if it does.
    """

    reward: Literal["distance", "squared"] = "distance"
    horizon: int = 100
    episodes: int = 1
    terminate: bool = True

    def __post_init__(self) -> None:
        errors.one_of("reward", self.reward, REWARDS)
        if not isinstance(self.terminate, bool):
            raise errors.UserError(
                f"terminate is {self.terminate!r}; it must be true or false: write terminate=true"
            )
        episode_steps(self.horizon, self.episodes)

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``goal`` float32 ``[1, B, 2]``.

        Goals are real numbers: ``train`` and ``test`` never share one.
        """
        check_split(split)
        index = task_numbers(batch)
        draw = rng.fold("navigation", split).uniform(index, 2)
        return Tasks(index, {"goal": ((2.0 * draw - 1.0) * _HALF_WIDTH).to(torch.float32)})

    def rules(self) -> plane.Rules:
        """How the point moves, and what pays."""
        return plane.Rules(
            reward=functools.partial(_reward, self.reward),
            step_size=_STEP,
            steps=episode_steps(self.horizon, self.episodes),
            episodes=self.episodes,
            near=_ARRIVAL * 2**0.5,
            arrival=_ARRIVAL if self.terminate else 0.0,
        )


def _reward(kind: str, offset: Tensor, goal: Tensor) -> Tensor:
    squared = (offset * offset).sum(-1)
    return -squared if kind == "squared" else -squared.sqrt()
