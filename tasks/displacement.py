"""Displacement: a point in the plane that is paid for moving in a direction it is not told.

The smallest task on which a learned loss can show what it has learned: each task
is a hidden unit vector u, the reward of a step is its displacement along u. Directions of the two
splits may lie in different half-planes, so that an agent that has memorised directions fails
where a loss that reads rewards does not.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid, check_int, check_split, task_numbers, timed_step
from esmeta.types import Continuous, Reference, Spec, Tasks, TimeStep

Part = Literal["right", "left", "horizontal", "vertical", "axes", "diagonals", "all"]
# Whether ``width`` is of this part or of the rest; equal sectors, and the middle of the first one.
_SECTORS: dict[Part, tuple[bool, int, float]] = {
    "right": (True, 1, 0.0),
    "left": (False, 1, 180.0),
    "horizontal": (True, 2, 0.0),
    "vertical": (False, 2, 90.0),
    "axes": (True, 4, 0.0),
    "diagonals": (False, 4, 45.0),
}
PARTS: tuple[Part, ...] = (*_SECTORS, "all")
STEP = 0.1
"""Length of the longest displacement."""


class State(NamedTuple):
    """State of P x B trials: ``position`` float32 ``[P, B, 2]``, ``time`` int64 ``[]``.

    ``direction`` float32 ``[P or 1, B, 2]`` is the task; ``gained`` float32 ``[P, B]`` sums the
    rewards.
    """

    position: Tensor
    gained: Tensor
    time: Tensor
    direction: Tensor


@options_class
class Task:
    """Observation ``[4]``: position and last displacement; action ``[2]``.

    An action moves the point by 0.1 times itself, by 0.1 if it is longer than 1. At the start of
    every episode the point is put back to the origin.

    Args:
        horizon: steps of a trial.
        episode_steps: steps of an episode; a trial is cut into episodes of that length.
        train: directions of the training split: ``right`` (``width`` degrees about the x axis),
            ``left`` (the others), ``horizontal`` (half of ``width`` about either end of the x
            axis), ``vertical`` (the others), ``axes`` (a quarter of ``width`` about either end of
            both axes), ``diagonals`` (the others) or ``all``.
        test: the same of the test split, which has the inner half of each of these sectors. The
            validation split has the outer halves, next to the directions of training, so that what
            is selected on is disjoint from both. ``all`` has no such halves: splits are streams.
        width: degrees of ``right``, or of all sectors of ``horizontal`` or ``axes``; 180: half of
            all directions.
        strata: directions of tasks k, k + 1, .. are drawn in turn from so many equal parts of the
            their range; a multiple of it as ``task.trials`` makes all generations alike.
        mirrored: tasks 2k and 2k + 1 have opposite directions, so that nothing but reading rewards
            pays on both; not for ``right`` and ``left``. ``strata`` then counts pairs.
        reward_scale: factor on the rewards; 10 makes those of the longest displacements 1.
    """

    horizon: int = 768
    episode_steps: int = 32
    train: Part = "right"
    test: Part = "left"
    width: float = 180.0
    strata: int = aid(1)
    mirrored: bool = aid(False)
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        check_int("horizon", self.horizon, 1, 1_000_000)
        check_int("episode_steps", self.episode_steps, 1, 1_000_000)
        check_int("strata", self.strata, 1, 1_000_000)
        scale = self.reward_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < 1e6:
            raise ValueError(
                f"reward_scale is {scale!r}; it must be a number above 0 and below 1e6: "
                "write reward_scale=10.0"
            )
        width = self.width
        if isinstance(width, bool) or not isinstance(width, int | float) or not 0 < width < 360:
            raise ValueError(
                f"width is {width!r}; it must be a number of degrees between 0 and 360: "
                "write width=180.0"
            )
        for name in ("train", "test"):
            if getattr(self, name) not in PARTS:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(PARTS)}: "
                    f"write {name}='right'"
                )

            if self.mirrored and getattr(self, name) in ("right", "left"):
                raise ValueError(
                    f"mirrored is True with {name} = {getattr(self, name)!r}, which has no "
                    f"opposite directions: write {name}='horizontal', or mirrored=False"
                )

    @property
    def spec(self) -> Spec:
        """Two-dimensional actions."""
        return Spec(
            obs_size=4,
            action=Continuous(2),
            horizon=self.horizon,
            episodes_per_trial=-(-self.horizon // self.episode_steps),
        )

    @property
    def reference(self) -> Reference:
        """Both are exact: directions of random moves cancel, the best always goes along u."""
        return Reference(0.0, STEP * self.reward_scale * self.horizon, "both exact")

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``direction`` float32 ``[1, B, 2]``, a unit vector."""
        check_split(split)
        index = task_numbers(batch)
        part = self.train if split == "train" else self.test
        inner = {"train": None, "validation": False, "test": True}[split]
        number = index // 2 if self.mirrored else index
        place = rng.fold("displacement", split).uniform(number, 1).squeeze(-1)
        angle = self._angle((number % self.strata + place) / self.strata, part, inner)
        direction = torch.stack([angle.cos(), angle.sin()], -1).float()
        if self.mirrored:
            direction = direction * (1 - 2 * (index % 2)).unsqueeze(-1)
        return Tasks(index, {"direction": direction})

    def _angle(self, place: Tensor, part: Part, inner: bool | None) -> Tensor:
        """Angles (radians) at ``place`` in [0, 1) of a split's range.

        ``inner``: of the inner halves of its sectors alone, or the outer; None: of all of them.
        """
        own, count, middle = _SECTORS.get(part, (True, 1, 0.0))
        degrees = 360.0 if part == "all" else self.width if own else 360.0 - self.width
        sector = (count * place).floor()
        within = count * place - sector - 0.5  # of a sector, from its middle
        if part != "all" and inner is not None:
            within = within / 2.0 if inner else within / 2.0 + 0.25 * within.sign()
        within = within * (degrees / count)
        return (middle + 360.0 / count * sector + within) * (math.pi / 180.0)

    def make_env(self, device: torch.device | str) -> DisplacementEnv:
        """The environment; it follows the device of the tasks."""
        return DisplacementEnv(self)


class DisplacementEnv:
    """P x B points in lockstep; nothing is random."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Put every point to the origin."""
        direction = tasks.data["direction"]
        position = torch.zeros(
            population, *direction.shape[1:], dtype=torch.float32, device=direction.device
        )
        none = position[..., 0]
        time = torch.zeros((), dtype=torch.int64, device=direction.device)
        state = State(position, none, time, direction)
        no = torch.zeros_like(none, dtype=torch.bool)
        obs = torch.cat([position, position], dim=-1)
        return state, TimeStep(obs, position, none, no, no, ~no, ~no)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """Move every point; a trial ends by its horizon only."""
        task = self._task
        time = state.time + 1
        alive = (state.time < task.horizon).to(action.dtype)
        length = action.square().sum(dim=-1, keepdim=True).sqrt()
        move = STEP * action / length.clamp_min(1.0) * alive
        reward = task.reward_scale * (move * state.direction).sum(dim=-1)
        again = time % task.episode_steps == 0
        position = torch.where(again, 0.0, state.position + move)
        obs = torch.cat([position, torch.where(again, 0.0, move)], dim=-1)
        step = timed_step(obs, action, reward, time, task.horizon, task.episode_steps)
        return State(position, state.gained + reward, time, state.direction), step

    def metrics(self, state: State) -> dict[str, Tensor]:
        """``share``: return so far as a share of the best possible, float32 ``[P, B]``."""
        steps = state.time.clamp(1, self._task.horizon)
        return {"share": state.gained / (STEP * self._task.reward_scale * steps)}
