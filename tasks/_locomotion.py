"""Bodies that walk: what published tasks observe, pay and end, as pure functions of a snapshot.

The functions know no simulator. ``TORSO`` is the number of the main body in all four models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs.bodies import Body, Definition, Noise, Snapshot
from esmeta.envs.mujoco import MujocoEnv
from esmeta.rng import Rng
from esmeta.tasks import check_int, check_split, episode_steps, task_numbers
from esmeta.types import Continuous, Reference, Spec, Tasks

TORSO = 1
OBS_SETS = ("rllab", "gym", "compact")
PHYSICS = ("gym", "rllab")
CONTACTS = ("zero", "mj")
DIRECTIONS = ("binary", "circle")
# Gymnasium's and rllab's own.
GYM_NOISE = Noise("uniform", 0.1, "normal", 0.1)
RLLAB_NOISE = Noise("normal", 0.01, "normal", 0.1)
LEARNING = {"early": (1, 10), "late": (21, 1_000_000)}
"""Phases of an episode in which a task is found out, and in which it is known."""

# Mean return per step of TD3 (Fujimoto, van Hoof & Meger 2018, table 1): known to be possible.
TD3 = {"half_cheetah": 9.637, "hopper": 3.564, "walker2d": 4.683, "ant": 4.372}

Healthy = Callable[[Snapshot], Tensor]
_RANDOM_TRIALS = 64


@dataclass(frozen=True)
class Simulated:
    """Options of every task with a simulated body.

    Args:
        horizon: control steps of a trial at most, shared evenly by its episodes.
        episodes: episodes of a trial, all on the same task.
        engine: ``"auto"``, ``"batch"`` (MuJoCo 3.17) or ``"rows"``: the same numbers.
        threads: threads that step worlds; with MPI, ranks do the same and 1 is right.
        contact_rule: ``"legacy"`` (margins as before MuJoCo 3.5, as published) or ``"native"``.
        integrator: ``"model"`` or ``"euler"`` (faster, other physics).
    """

    horizon: int = 200
    episodes: int = 1
    engine: str = "auto"
    threads: int = 1
    contact_rule: str = "legacy"
    integrator: str = "model"

    def __post_init__(self) -> None:
        episode_steps(self.horizon, self.episodes)
        check_int("threads", self.threads, 1, 1024)
        errors.one_of("engine", self.engine, ("auto", "batch", "rows"))
        self.body()  # checks what is left

    def body(self) -> Body:
        """What is simulated."""
        raise NotImplementedError

    def definition(self) -> Definition:
        """What is seen, paid and ended."""
        raise NotImplementedError

    @property
    def spec(self) -> Spec:
        """Sizes of observation and action."""
        raise NotImplementedError

    def trial(self, obs_size: int, actions: int) -> Spec:
        """The spec of a trial of these options."""
        return Spec(obs_size, Continuous(actions), self.horizon, self.episodes)

    def make_env(self, device: torch.device | str) -> MujocoEnv:
        """The environment; physics is on the CPU, time steps are on ``device``."""
        return MujocoEnv(
            self.body(),
            self.definition(),
            horizon=episode_steps(self.horizon, self.episodes),
            episodes=self.episodes,
            engine=self.engine,
            threads=self.threads,
            device=device,
        )

    def scores(self, best: float, note: str) -> Reference:
        """References: uniform actions are measured, ``best`` is known from elsewhere."""
        mean = random_return(self)
        return Reference(mean, best, f"random: uniform actions, {_RANDOM_TRIALS} trials; {note}")


@functools.lru_cache(maxsize=64)
def random_return(task: Simulated) -> float:
    """Mean return of a trial under uniform actions."""
    env, batch = task.make_env("cpu"), _RANDOM_TRIALS
    state, _ = env.reset(task.sample(batch, "train", Rng(0)), Rng(1))  # type: ignore[attr-defined]
    size, horizon = task.spec.action.size, task.spec.horizon
    draws = Rng(2).uniform(torch.arange(batch).unsqueeze(0), horizon * size)
    total = 0.0
    for action in (2.0 * draws - 1.0).unflatten(-1, (horizon, size)).unbind(2):
        state, ts = env.step(state, action)
        total += float(ts.reward.sum(dtype=torch.float64))
    return total / batch


# --- tasks -----------------------------------------------------------------------------------


def starts(batch: int | Tensor, split: str, rng: Rng) -> Tasks:
    """Trials that differ by where they start: ``start`` int64 ``[1, B]`` addresses the noise."""
    check_split(split)
    index = task_numbers(batch)
    return Tasks(index, {"start": rng.fold("start", split).bits(index, 1).squeeze(-1)})


def directions(
    batch: int | Tensor, split: str, rng: Rng, kind: str, *, mirrored: bool = False
) -> Tasks:
    """Unit vectors ``direction`` float64 ``[1, B, 2]`` in the plane.

    ``"binary"``: (1, 0) or (-1, 0), a fair coin each; ``"circle"``: a uniform angle. With
    ``mirrored`` the tasks 2k and 2k + 1 have opposite directions. There are only two binary
    directions, so that the splits share them; their streams differ.
    """
    check_split(split)
    index = task_numbers(batch)
    source = index // 2 if mirrored else index
    draw = rng.fold("direction", split).uniform(source, 1).squeeze(-1)
    if kind == "binary":
        along = torch.where(draw < 0.5, 1.0, -1.0).double()
        direction = torch.stack([along, torch.zeros_like(along)], dim=-1)
    else:
        angle = 2.0 * torch.pi * draw
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    if mirrored:
        direction = torch.where((index % 2 == 1).unsqueeze(-1), -direction, direction)
    return Tasks(index, {"direction": direction})


def speeds(batch: int | Tensor, split: str, rng: Rng, low: float, high: float) -> Tasks:
    """Target speeds ``speed`` float64 ``[1, B]``, uniform in ``low..high`` m/s."""
    check_split(split)
    index = task_numbers(batch)
    draw = rng.fold("speed", split).uniform(index, 1).squeeze(-1)
    return Tasks(index, {"speed": low + (high - low) * draw})


def check_range(option: str, low: float, high: float) -> None:
    """Refuse speeds that are negative, or a range that is empty."""
    errors.non_negative(f"{option}_min", low)
    errors.finite_positive(f"{option}_max", high, example=2.0)
    if low >= high:
        raise errors.UserError(
            f"{option}_min = {low} is not below {option}_max = {high}; write "
            f"{option}_min = 0 and {option}_max = {max(high, 2.0)}"
        )


# --- observations ----------------------------------------------------------------------------


def flat_forces(now: Snapshot, contact: str, bodies: int) -> Tensor:
    """External forces on all bodies clipped to -1..1, ``[.., 6 bodies]``; zeros where not asked.

    Zeros are what published results had: no MuJoCo since 2.0 computes them unless it is told to
    (openai/gym issue 1541).
    """
    if contact == "zero":
        return now.qpos.new_zeros(*now.qpos.shape[:-1], 6 * bodies)
    return now.cfrc_ext.flatten(-2).clamp(-1.0, 1.0)


def force_cost(now: Snapshot, contact: str) -> Tensor | float:
    """Sum of squares of the clipped forces, ``[..]``; 0 where they are not simulated."""
    return 0.0 if contact == "zero" else flat_forces(now, contact, 0).square().sum(-1)


def com(now: Snapshot, physics: str) -> Tensor:
    """What the lineages call centre of mass, in metres ``[.., 3]``.

    rllab's is that of the whole body; gym's ``get_body_com`` is the origin of the torso.
    """
    where = now.subtree_com if physics == "rllab" else now.xpos
    return where[..., TORSO, :]


def upright(low: float, high: float, height: int) -> Healthy:
    """Whether ``qpos[height]`` is within ``low..high`` metres, both included."""

    def healthy(now: Snapshot) -> Tensor:
        z = now.qpos[..., height]
        return (z >= low) & (z <= high)

    return healthy
