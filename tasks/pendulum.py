"""Pendulum: swing a pendulum up and hold it, Gymnasium's Pendulum-v1 in torch.

The dynamics are those of https://gymnasium.farama.org/environments/classic_control/pendulum/ to
float32. Gravity and length may be drawn per task (for example 7 to 13 and 0.7 to 1.3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_int, check_span, check_split, task_numbers, timed_step
from esmeta.types import Continuous, Reference, Spec, Tasks, TimeStep

MAX_SPEED, MAX_TORQUE, DT = 8.0, 2.0, 0.05
MASS = 1.0
# Measured with the default options: 20,000 episodes of actions uniform in [-1, 1]; and of the best
# agent trained here (runs/README.md).
_RANDOM, _BEST = -1228.0, -150.0


class State(NamedTuple):
    """State of P x B trials, float32 ``[P, B]``: angle (0 is upright), its speed, summed rewards.

    ``starts`` float32 ``[episodes, P or 1, B, 2]`` are the angles and speeds that episodes begin
    with; ``time`` int64 ``[]``; ``gravity`` and ``length`` ``[P or 1, B]``.
    """

    angle: Tensor
    speed: Tensor
    time: Tensor
    starts: Tensor
    gravity: Tensor
    length: Tensor


@options_class
class Task:
    """Observation ``[3]``: cosine and sine of the angle, angular speed; action ``[1]``: torque.

    Reward of a step: ``-(angle^2 + 0.1 speed^2 + 0.001 torque^2)`` before it, angle in [-pi, pi].

    Args:
        horizon: steps of a trial.
        episode_steps: steps of an episode; each begins at a random angle and speed.
        gravity: lowest and highest gravity (m/s^2) of the tasks.
        length: lowest and highest length (m) of the pendulum.
        repeat: steps of 0.05 s that an action lasts; their rewards are summed. 4 with
            ``episode_steps = 50`` is the same task with a quarter of the decisions.
    """

    horizon: int = 200
    episode_steps: int = 200
    gravity: tuple[float, float] = (10.0, 10.0)
    length: tuple[float, float] = (1.0, 1.0)
    repeat: int = 1

    def __post_init__(self) -> None:
        check_int("horizon", self.horizon, 1, 100_000_000)
        check_int("episode_steps", self.episode_steps, 1, 1_000_000)
        check_int("repeat", self.repeat, 1, 1_000)
        check_span("gravity", self.gravity, (7.0, 13.0))
        check_span("length", self.length, (0.7, 1.3))

    @property
    def spec(self) -> Spec:
        """Torques up to 2 either way."""
        episodes = -(-self.horizon // self.episode_steps)
        action = Continuous(1, -MAX_TORQUE, MAX_TORQUE)
        return Spec(obs_size=3, action=action, horizon=self.horizon, episodes_per_trial=episodes)

    @property
    def reference(self) -> Reference:
        """Both measured for 200 steps of the usual pendulum; in proportion for others."""
        share = self.horizon * self.repeat / 200
        note = "both measured on gravity 10 and length 1, per 200 steps"
        return Reference(_RANDOM * share, _BEST * share, note)

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``gravity`` and ``length`` float32, ``seed`` int64 ``[1, B]``.

        The seed and the number of a trial address the starts of its episodes.
        """
        check_split(split)
        index = task_numbers(batch)
        u = rng.fold("pendulum", split).uniform(index, 2)
        data = {"seed": rng.fold("seed", split).integers(index, 1, 1 << 31).squeeze(-1)}
        for k, name in enumerate(("gravity", "length")):
            low, high = getattr(self, name)
            data[name] = (low + (high - low) * u[..., k]).float()
        return Tasks(index, data)

    def make_env(self, device: torch.device | str) -> PendulumEnv:
        """The environment; it follows the device of the tasks."""
        return PendulumEnv(self)


class PendulumEnv:
    """P x B pendulums in lockstep; only the starts of episodes are random."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Angles uniform in [-pi, pi), speeds in [-1, 1)."""
        task, index = self._task, tasks.index
        episodes = task.spec.episodes_per_trial
        where = index + tasks.data["seed"]
        u = 2.0 * rng.fold("dynamics").uniform(where, 2 * episodes) - 1.0
        starts = u.reshape(*index.shape, episodes, 2).permute(2, 0, 1, 3).float()
        scale = torch.tensor([math.pi, 1.0], dtype=torch.float32, device=index.device)
        starts = (starts * scale).contiguous()
        first = starts[0].expand(population, -1, -1)
        time = torch.zeros((), dtype=torch.int64, device=index.device)
        data = tasks.data
        state = State(first[..., 0], first[..., 1], time, starts, data["gravity"], data["length"])
        none = torch.zeros_like(first[..., 0])
        no = torch.zeros_like(none, dtype=torch.bool)
        obs = _observed(state.angle, state.speed)
        return state, TimeStep(obs, none.unsqueeze(-1), none, no, no, ~no, ~no)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """``repeat`` Euler steps of 0.05 s; a trial ends by its horizon only."""
        task = self._task
        torque = action.squeeze(-1).clamp(-MAX_TORQUE, MAX_TORQUE)
        angle, speed, cost = state.angle, state.speed, torch.zeros_like(torque)
        for _ in range(task.repeat):
            wrapped = torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi
            cost = cost + wrapped.square() + 0.1 * speed.square() + 0.001 * torque.square()
            pull = 1.5 * state.gravity / state.length * torch.sin(angle)
            speed = speed + (pull + 3.0 / (MASS * state.length.square()) * torque) * DT
            speed = speed.clamp(-MAX_SPEED, MAX_SPEED)
            angle = angle + speed * DT
        time = state.time + 1
        reward = torch.where(state.time < task.horizon, -cost, 0.0)
        again = (time < task.horizon) & (time % task.episode_steps == 0)
        episode = (time // task.episode_steps).clamp(max=len(state.starts) - 1)
        start = state.starts.index_select(0, episode.reshape(1))[0]
        angle = torch.where(again, start[..., 0], angle)
        speed = torch.where(again, start[..., 1], speed)
        obs = _observed(angle, speed)
        step = timed_step(obs, action, reward, time, task.horizon, task.episode_steps)
        return state._replace(angle=angle, speed=speed, time=time), step

    def metrics(self, state: State) -> dict[str, Tensor]:
        """None beside the return."""
        return {}


def _observed(angle: Tensor, speed: Tensor) -> Tensor:
    return torch.stack([torch.cos(angle), torch.sin(angle), speed], dim=-1)
