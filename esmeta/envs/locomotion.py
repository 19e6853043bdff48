"""Bodies that walk: what published tasks observe, pay and end, as pure functions of a snapshot.

The functions know no simulator. ``TORSO`` is the number of the main body in all four models.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import mujoco_model as models
from esmeta.envs.bodies import Body, Definition, Noise, Snapshot
from esmeta.envs.mujoco import MujocoEnv
from esmeta.envs.scenes import Scene
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid, check_int, check_split, episode_steps, task_numbers
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


def calm(now: Snapshot) -> Tensor:
    """Whether all positions but the first two and all velocities are within -100..100."""
    return (now.qpos[..., 2:].abs() < 100.0).all(-1) & (now.qvel.abs() < 100.0).all(-1)


def hopper_healthy(now: Snapshot) -> Tensor:
    """Gymnasium's rule for a hopper, bool ``[P, B]``: calm, above 0.7 m, within 0.2 rad."""
    z, angle = now.qpos[..., 1], now.qpos[..., 2]
    return calm(now) & (z > 0.7) & (angle.abs() < 0.2)


def walker_healthy(now: Snapshot) -> Tensor:
    """Gymnasium's rule for a walker, bool ``[P, B]``: between 0.8 and 2 m, within 1 rad."""
    z, angle = now.qpos[..., 1], now.qpos[..., 2]
    return (z > 0.8) & (z < 2.0) & (angle.abs() < 1.0)


@options_class
class Simulated(ABC):
    """Options of every task with a simulated body.

    Args:
        horizon: control steps of a trial at most, shared evenly by its episodes.
        episodes: episodes of a trial, all on the same task.
        episode_steps: steps of an episode at most in a trial of exactly ``horizon`` steps: bodies
            that fall begin anew, in however many episodes that makes; 0: the trial is over with its
            ``episodes``.
        engine: ``"auto"``, ``"batch"`` (MuJoCo 3.17) or ``"rows"``: the same numbers, on the CPU;
            ``"warp"``: MuJoCo Warp on the run's device, in float32.
        threads: threads that step worlds; with MPI, ranks do the same and 1 is right.
        contact_rule: ``"legacy"`` (margins as before MuJoCo 3.5, as published) or ``"native"``.
        integrator: ``"model"`` or ``"euler"`` (faster, other physics).
        impaired: motors that give no torque, by the names of their joints with commas between them,
            such as ``"hip_4,ankle_4"``; ``"random"``: one, drawn for each trial; ``"none"``.
        impaired_from: the first episode of a trial in which they do not, counted from 1.
        continual: whether every episode of a trial has a task of its own (and a motor of its own
            that fails, if ``impaired`` is ``"random"``); what the agent remembers stays.
    """

    renewable: ClassVar[bool] = True
    """Whether there are tasks to draw for every episode: not if they are in the model."""

    horizon: int = 200
    episodes: int = 1
    episode_steps: int = 0
    engine: str = "auto"
    threads: int = 1
    contact_rule: str = "legacy"
    integrator: str = aid("model")
    impaired: str = "none"
    impaired_from: int = 1
    continual: bool = False

    def __post_init__(self) -> None:
        episode_steps(self.horizon, self.episodes)
        check_int("episode_steps", self.episode_steps, 0, 100_000)
        check_int("threads", self.threads, 1, 1024)
        errors.one_of("engine", self.engine, models.ENGINES)
        self.body()  # checks what is left
        self._check_changes()

    def _check_changes(self) -> None:
        """Refuse motors that are not there, and episodes that cannot differ."""
        if self.episode_steps and (self.episodes > 1 or self.continual):
            given = f"episodes = {self.episodes}" if self.episodes > 1 else "continual = true"
            raise errors.UserError(
                f"{given} with episode_steps = {self.episode_steps}: such a trial has as many "
                "episodes as come, all on one task; write episodes = 1 and continual = false, or "
                "episode_steps = 0"
            )
        most = 1000 if self.episode_steps else self.episodes
        check_int("impaired_from", self.impaired_from, 1, most)
        if self.impaired not in ("none", "random"):
            motors = models.motors(self.body().xml)
            for joint in self.impaired.split(","):
                errors.one_of("impaired", joint, (*motors, "random", "none"))
        if not self.continual:
            return
        if self.episodes == 1:
            raise errors.UserError(
                "continual = true with episodes = 1: there is nothing to change; write for "
                "example episodes = 5"
            )
        if not self.renewable and self.impaired != "random":
            raise errors.UserError(
                "continual = true: the tasks of this family differ in what lasts for a trial; "
                'write continual = false, or impaired = "random"'
            )

    @abstractmethod
    def body(self) -> Body:
        """What is simulated."""

    @abstractmethod
    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks on intact bodies; see :meth:`esmeta.types.Task.sample`."""

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number; with ``impaired`` also ``working`` float64 ``[1, B, episodes, nu]``.

        It is 0 for motors that fail and 1 for the others. With ``continual`` whatever else a task
        is about has an axis of episodes too. With ``episode_steps`` the last one told stands for
        all that follow.
        """
        tasks = self.draw(batch, split, rng)
        if self.impaired == "none":
            return tasks
        return Tasks(tasks.index, {**tasks.data, "working": self._working(tasks.index, split, rng)})

    def draws(self) -> int:
        """How many tasks a trial has."""
        return self.episodes if self.continual else 1

    def _working(self, index: Tensor, split: str, rng: Rng) -> Tensor:
        motors = models.motors(self.body().xml)
        episodes = self.impaired_from if self.episode_steps else self.episodes
        episode = torch.arange(1, episodes + 1, device=index.device)
        if self.impaired == "random":
            failed = rng.fold("impaired", split).integers(index, self.draws(), len(motors))
            fails = torch.nn.functional.one_hot(failed, len(motors)).bool()
        else:
            named = [name in self.impaired.split(",") for name in motors]
            fails = torch.tensor(named, dtype=torch.bool, device=index.device)
        fails = fails & (episode >= self.impaired_from).unsqueeze(-1)
        return (~fails).double().expand(*index.shape, episodes, len(motors))

    @abstractmethod
    def definition(self) -> Definition:
        """What is seen, paid and ended."""

    def kept_definition(self) -> Definition:
        """The same in a form that pickles, as this call."""
        return replace(self.definition(), again=self.kept_definition)

    @property
    @abstractmethod
    def spec(self) -> Spec:
        """Sizes of observation and action."""

    def trial(self, obs_size: int, actions: int) -> Spec:
        """The spec of a trial of these options."""
        return Spec(obs_size, Continuous(actions), self.horizon, self.fewest())

    def fewest(self) -> int:
        """Episodes of a trial in which none ends early."""
        return -(-self.horizon // self.episode_steps) if self.episode_steps else self.episodes

    def single(self, steps: int) -> Simulated:
        """The same bodies in trials of one episode of at most ``steps`` steps.

        Trials that have a number of episodes stay as they are.
        """
        return replace(self, horizon=steps, episode_steps=0) if self.episode_steps else self

    def make_env(self, device: torch.device | str) -> MujocoEnv:
        """The environment; time steps are on ``device``, and so is physics by ``"warp"``."""
        return MujocoEnv(
            self.body(),
            self.kept_definition(),
            horizon=self.episode_steps or episode_steps(self.horizon, self.episodes),
            episodes=self.episodes,
            steps=self.horizon if self.episode_steps else 0,
            continual=self.continual and self.renewable,
            engine=self.engine,
            threads=self.threads,
            device=device,
        )

    def renderer(self) -> Scene:
        """Draws the bodies."""
        return Scene(functools.partial(self.make_env, "cpu"))

    def frame_rate(self) -> float:
        """Control steps per second of real time."""
        return 1.0 / self.make_env("cpu").seconds

    def scores(self, best: float, note: str) -> Reference:
        """References: uniform actions are measured, ``best`` is known from elsewhere.

        Of trials that last for so many steps the measured one is that of an episode times as few
        as there can be: a life of a million steps would be played for an hour.
        """
        # Warp's are the same up to rounding, and would need a GPU.
        one = replace(self, engine="auto") if self.engine == "warp" else self
        if self.episode_steps:
            mean = random_return(one.single(self.episode_steps)) * self.fewest()
        else:
            mean = random_return(one)
        return Reference(mean, best, f"random: uniform actions, {_RANDOM_TRIALS} trials; {note}")


class Plain(Simulated):
    """A body of a model as it is, in the model's own time steps.

    ``xml`` and ``frame_skip`` are those of :class:`esmeta.envs.bodies.Body`; ``sizes`` are how many
    numbers are seen and how many joints are moved.
    """

    xml: ClassVar[str]
    frame_skip: ClassVar[int] = 4
    sizes: ClassVar[tuple[int, int]]

    def body(self) -> Body:
        """The model as it is."""
        return Body(self.xml, self.frame_skip, None, self.integrator, self.contact_rule)

    @property
    def spec(self) -> Spec:
        """Sizes of the observation and the action, and the lengths of a trial."""
        return self.trial(*self.sizes)


@functools.lru_cache(maxsize=64)
def random_return(task: Simulated) -> float:
    """Mean return of a trial under uniform actions."""
    env, batch = task.make_env("cpu"), _RANDOM_TRIALS
    state, _ = env.reset(task.sample(batch, "train", Rng(0)), Rng(1))
    size, horizon = task.spec.action.size, task.spec.horizon
    draws = Rng(2).uniform(torch.arange(batch, device="cpu").unsqueeze(0), horizon * size)
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


def per_episode(draw: Tensor, count: int) -> Tensor:
    """Numbers ``[1, B, count * k]`` as ``[1, B, count, k]``, or ``[1, B, k]`` if there is one."""
    return draw if count == 1 else draw.unflatten(-1, (count, -1))


def directions(
    batch: int | Tensor,
    split: str,
    rng: Rng,
    kind: str,
    *,
    mirrored: bool = False,
    count: int = 1,
) -> Tasks:
    """Unit vectors ``direction`` float64 ``[1, B, (count,) 2]`` in the plane.

    ``"binary"``: (1, 0) or (-1, 0), a fair coin each; ``"circle"``: a uniform angle. With
    ``mirrored`` the tasks 2k and 2k + 1 are twins: directions are opposite and all else is alike,
    noise of starts and actions included. There are only two binary directions, so that the splits
    share them; their streams differ.
    """
    check_split(split)
    index = task_numbers(batch)
    source = index // 2 if mirrored else index
    draw = rng.fold("direction", split).uniform(source, count)
    draw = per_episode(draw, count).squeeze(-1)
    if kind == "binary":
        along = torch.where(draw < 0.5, 1.0, -1.0).double()
        direction = torch.stack([along, torch.zeros_like(along)], dim=-1)
    else:
        angle = 2.0 * torch.pi * draw
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
    if mirrored:
        second = (index % 2 == 1).reshape(*index.shape, *[1] * (direction.ndim - 2))
        direction = torch.where(second, -direction, direction)
    # The address is that of all other randomness.
    return Tasks(source, {"direction": direction})


def speeds(
    batch: int | Tensor, split: str, rng: Rng, low: float, high: float, *, count: int = 1
) -> Tasks:
    """Target speeds ``speed`` float64 ``[1, B(, count)]``, uniform in ``low..high`` m/s."""
    check_split(split)
    index = task_numbers(batch)
    draw = per_episode(rng.fold("speed", split).uniform(index, count), count).squeeze(-1)
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
