"""Double integrator: push a point of unknown mass to the middle of a square and keep it there.

The textbook's linear system with a quadratic cost in two dimensions, with limited force and walls:
an environment that is unlike a pendulum for a learned objective to meet.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_int, check_span, check_split, task_numbers, timed_step
from esmeta.types import Continuous, Reference, Spec, Tasks, TimeStep

DT, WALL, START = 0.1, 4.0, 2.0
SPEED_COST, FORCE_COST = 0.1, 0.01
_RANDOM_EPISODES = 4096


class State(NamedTuple):
    """State of P x B trials, float32 ``[P, B, 2]``: position and velocity.

    ``starts`` float32 ``[episodes, P or 1, B, 2]`` are the positions that episodes begin at;
    ``time`` int64 ``[]``; ``mass`` float32 ``[P or 1, B]``.
    """

    position: Tensor
    velocity: Tensor
    time: Tensor
    starts: Tensor
    mass: Tensor


@options_class
class Task:
    """Observation ``[4]``: position (m) and velocity (m/s); action ``[2]``: force, -1 to 1 N.

    Reward of a step: ``-(|p|^2 + 0.1 |v|^2 + 0.01 |u|^2)`` before it. Walls at 4 m stop the point.

    Args:
        horizon: steps of a trial, of 0.1 s.
        episode_steps: steps of an episode; each begins at rest, within 2 m of the middle.
        mass: lowest and highest mass (kg) of the tasks.
    """

    horizon: int = 100
    episode_steps: int = 100
    mass: tuple[float, float] = (0.5, 1.5)

    def __post_init__(self) -> None:
        check_int("horizon", self.horizon, 1, 100_000_000)
        check_int("episode_steps", self.episode_steps, 1, 1_000_000)
        check_span("mass", self.mass, (0.5, 1.5))

    @property
    def spec(self) -> Spec:
        """Two forces."""
        episodes = -(-self.horizon // self.episode_steps)
        return Spec(4, Continuous(2), self.horizon, episodes)

    @property
    def reference(self) -> Reference:
        """Uniform forces, measured; the best without limits to force and place, exact."""
        return _reference(self)

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``mass`` float32 ``[1, B]``."""
        check_split(split)
        index = task_numbers(batch)
        low, high = self.mass
        u = rng.fold("double_integrator", split).uniform(index, 1).squeeze(-1)
        return Tasks(index, {"mass": (low + (high - low) * u).float()})

    def make_env(self, device: torch.device | str) -> DoubleIntegratorEnv:
        """The environment; it follows the device of the tasks."""
        return DoubleIntegratorEnv(self)


class DoubleIntegratorEnv:
    """P x B points in lockstep; only the starts of episodes are random."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Positions uniform in [-2, 2), at rest."""
        index, episodes = tasks.index, self._task.spec.episodes_per_trial
        u = 2.0 * rng.fold("dynamics").uniform(index, 2 * episodes) - 1.0
        starts = START * u.reshape(*index.shape, episodes, 2).permute(2, 0, 1, 3).float()
        position = starts[0].expand(population, -1, -1)
        velocity = torch.zeros_like(position)
        time = torch.zeros((), dtype=torch.int64, device=index.device)
        state = State(position, velocity, time, starts.contiguous(), tasks.data["mass"])
        none = torch.zeros_like(position[..., 0])
        no = torch.zeros_like(none, dtype=torch.bool)
        obs = torch.cat([position, velocity], dim=-1)
        return state, TimeStep(obs, velocity, none, no, no, ~no, ~no)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """One semi-implicit Euler step; a trial ends by its horizon only."""
        task = self._task
        force = action.clamp(-1.0, 1.0)
        cost = (
            state.position.square() + SPEED_COST * state.velocity.square()
            + FORCE_COST * force.square()
        ).sum(dim=-1)  # fmt: skip
        velocity = state.velocity + DT * force / state.mass.unsqueeze(-1)
        moved = state.position + DT * velocity
        position = moved.clamp(-WALL, WALL)
        velocity = torch.where(moved == position, velocity, 0.0)
        time = state.time + 1
        reward = torch.where(state.time < task.horizon, -cost, 0.0)
        again = (time < task.horizon) & (time % task.episode_steps == 0)
        episode = (time // task.episode_steps).clamp(max=len(state.starts) - 1)
        start = state.starts.index_select(0, episode.reshape(1))[0]
        position = torch.where(again.unsqueeze(-1), start, position)
        velocity = torch.where(again.unsqueeze(-1), 0.0, velocity)
        obs = torch.cat([position, velocity], dim=-1)
        step = timed_step(obs, action, reward, time, task.horizon, task.episode_steps)
        return state._replace(position=position, velocity=velocity, time=time), step

    def metrics(self, state: State) -> dict[str, Tensor]:
        """None beside the return."""
        return {}


def best_cost(mass: float, steps: int) -> float:
    """Expected cost of an episode under the best linear control (Riccati's recursion), exact."""
    a = torch.tensor([[1.0, DT], [0.0, 1.0]], dtype=torch.float64, device="cpu")
    b = torch.tensor([[DT * DT / mass], [DT / mass]], dtype=torch.float64, device="cpu")
    now = torch.diag(torch.tensor([1.0, SPEED_COST], dtype=torch.float64, device="cpu"))
    worth = torch.zeros(2, 2, dtype=torch.float64, device="cpu")
    for _ in range(steps):
        gain = (b.T @ worth @ a) / (FORCE_COST + b.T @ worth @ b)
        worth = now + a.T @ worth @ (a - b @ gain)
    return float(worth[0, 0]) * 2 * START**2 / 3  # two axes, positions uniform in -START..START


@functools.cache
def _reference(task: Task) -> Reference:
    steps = min(task.episode_steps, task.horizon)
    once = Task(steps, steps, task.mass)
    env = once.make_env("cpu")
    state, _ = env.reset(once.sample(_RANDOM_EPISODES, "train", Rng(0)), Rng(1))
    index, total = torch.arange(_RANDOM_EPISODES, device="cpu").unsqueeze(0), 0.0
    for t in range(steps):
        action = 2.0 * Rng(2).fold(t).uniform(index, 2) - 1.0
        state, ts = env.step(state, action.float())
        total += float(ts.reward.sum(dtype=torch.float64)) / _RANDOM_EPISODES
    low, high = task.mass
    masses = [low + (high - low) * (k + 0.5) / 16 for k in range(16)]
    best = -sum(best_cost(mass, steps) for mass in masses) / len(masses)
    share = task.horizon / steps
    note = "random: measured; best: exact without limits to force and place, hence a bound"
    return Reference(total * share, best * share, note)
