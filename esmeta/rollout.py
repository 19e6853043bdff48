"""The rollout loop: the only one, for evolution, gradients, evaluation and every simulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from esmeta.policy import _heads as heads
from esmeta.rng import Rng
from esmeta.types import BatchedEnv, Discrete, Params, PolicyOut, Spec, State, Tasks, TimeStep

# Looking whether all trials have ended costs a synchronisation on a GPU, so it is done rarely.
_CHECK_EVERY = 4


Act = Callable[[PolicyOut, Tensor], Tensor]
"""Heads and noise to actions."""
Intervention = Callable[[State, TimeStep], tuple[State, TimeStep]]
"""Changes memory or inputs before a step."""


class Actor(Protocol):
    """Who acts: a :class:`esmeta.policy.Policy`, or an agent that learns inside a trial."""

    @property
    def spec(self) -> Spec: ...

    def bind(self, params: Params) -> Any:
        """Parameters ``[P, ...]`` prepared for many steps."""
        ...

    def initial_state(
        self, params: Params, batch: int, rng: Rng | None = None, index: Tensor | None = None
    ) -> State: ...

    def step_bound(
        self, bound: Any, state: State, ts: TimeStep, t: int = 0, *, in_place: bool = False
    ) -> tuple[PolicyOut, State]: ...


class Start(NamedTuple):
    """All that a rollout starts from: parameters, memory and environment at step ``t``."""

    bound: Any
    state: State
    env_state: Any
    ts: TimeStep
    noise: Tensor
    """Action noise ``[T, P or 1, B, k]``, addressed by trial: members share it."""
    t: int = 0
    """Step of the trial, the same for all trials of the batch."""
    active: Tensor | None = None
    """Trials that go on, bool ``[P, B]``; None: all."""


class End(NamedTuple):
    """What a rollout leaves behind: memory, environment and the time step after the last action.

    ``t`` is the number of steps done since the trials began, ``active`` ``[P, B]`` is set where a
    trial goes on.
    """

    state: State
    env_state: Any
    ts: TimeStep
    t: int
    active: Tensor


class Collector(Protocol):
    """What is kept of a rollout."""

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        """One transition; ``active [P, B]`` is False for trials that had ended before it."""
        ...


class Returns:
    """Keeps the sum of rewards and the number of steps of each trial, ``[P, B]``."""

    def __init__(self, population: int, batch: int, device: torch.device | str) -> None:
        self.returns = torch.zeros(population, batch, dtype=torch.float64, device=device)
        self.steps = torch.zeros(population, batch, dtype=torch.int64, device=device)

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        # Finished trials earn 0 by contract, so the sum needs no mask.
        self.returns += after.reward
        self.steps += active


class Trajectory(NamedTuple):
    """A recorded rollout, leaves ``[T, P, B, ...]``."""

    start: State
    ts: TimeStep
    action: Tensor
    out: PolicyOut
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    ended: Tensor
    """Whether the trial ended with this transition."""
    active: Tensor
    """Whether the transition belongs to the trial; all means are over these."""


class Recorder:
    """Keeps whole trajectories, for :class:`Trajectory`."""

    def __init__(self, start: State) -> None:
        self._start = start
        self._rows: list[tuple[TimeStep, PolicyOut, Tensor, TimeStep, Tensor]] = []

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        self._rows.append((ts, out, action, after, active))

    def trajectory(self) -> Trajectory:
        before, outs, actions, after, active = zip(*self._rows, strict=True)
        steps = TimeStep(*(torch.stack(leaves) for leaves in zip(*before, strict=True)))
        out = PolicyOut(
            *(
                None if leaves[0] is None else torch.stack(leaves)
                for leaves in zip(*outs, strict=True)
            )
        )
        mask = torch.stack(active)
        # Inside the trial nothing may reset memory: the first step starts from `start` as it is,
        # and what follows a trial's end is reset only to stay bounded.
        stale = torch.zeros_like(mask)
        stale[1:] = ~mask[:-1]
        return Trajectory(
            start=self._start,
            ts=steps._replace(new_trial=stale),
            action=torch.stack(actions),
            out=out,
            reward=torch.stack([ts.reward for ts in after]),
            terminated=torch.stack([ts.terminated for ts in after]),
            truncated=torch.stack([ts.truncated for ts in after]),
            ended=torch.stack([ts.new_trial for ts in after]) & mask,
            active=mask,
        )


def start(policy: Actor, params: Params, env: BatchedEnv, tasks: Tasks, rng: Rng) -> Start:
    """Begin one trial per task for each member of ``params``."""
    population = next(iter(params.values())).shape[0]
    index = tasks.index
    env_state, ts = env.reset(tasks, rng, population)
    state = policy.initial_state(params, index.shape[1], rng, index)
    noise = action_noise(policy, index, rng).to(next(iter(params.values())).dtype)
    return Start(policy.bind(params), state, env_state, ts, noise)


def action_noise(policy: Actor, index: Tensor, rng: Rng) -> Tensor:
    """What the actions of the trials ``index [P or 1, B]`` are drawn with, ``[T, P or 1, B, k]``.

    Float64: uniform numbers for discrete actions, standard normal ones for continuous actions.
    """
    spec = policy.spec
    width = heads.noise_width(spec.action)
    draw = rng.fold("action").uniform if isinstance(spec.action, Discrete) else None
    # Members of a learned loss may each have the same few trials: every number is drawn once.
    numbers, place = index.unique(return_inverse=True)
    flat = (draw or rng.fold("action").normal)(numbers, spec.horizon * width)[place]
    return flat.reshape(*index.shape, spec.horizon, width).permute(2, 0, 1, 3).contiguous()


def go_on(policy: Actor, params: Params, end: End, noise: Tensor) -> Start:
    """Trials where a rollout left them, from here on with ``params``; ``noise`` is their own."""
    noise = noise.to(next(iter(params.values())).dtype)
    state, env_state, ts, t, active = end
    return Start(policy.bind(params), state, env_state, ts, noise, t, active)


def rollout(
    policy: Actor,
    env: BatchedEnv,
    begin: Start,
    collector: Collector,
    *,
    until: int | None = None,
    ask: bool = True,
    act: Act = heads.sample,
    intervene: Intervention | None = None,
    watch: Callable[[Any], None] | None = None,
) -> End:
    """Run every trial to its end, or to step ``until`` of it.

    A trial that is run in windows (see :func:`go_on`) is the trial run at once, bit for bit, as
    long as the parameters stay the same.

    ``ask`` says to look now and then whether all trials have ended, which waits for a GPU; without
    it finished trials go on to the last step, and earn nothing.

    ``act`` turns heads and noise into actions. ``intervene`` may change memory or inputs before
    each step, for lesion controls. ``watch`` sees the environment's state before the first step
    and after each one, for pictures; it must leave it as it is.
    """
    bound, state, env_state, ts, noise, t, active = begin
    if active is None:
        active = torch.ones_like(ts.new_trial)
    if watch is not None:
        watch(env_state)
    ours = False  # whether the memory was made here, so that nobody else reads it
    last = policy.spec.horizon if until is None else min(until, policy.spec.horizon)
    while t < last:
        # Asked by the step's own number, so that windows stop where the whole trial would.
        if ask and t > 0 and t % _CHECK_EVERY == 0 and not active.any():
            break
        if intervene is not None:
            state, ts = intervene(state, ts)
        out, state = policy.step_bound(bound, state, ts, t, in_place=ours)
        ours = intervene is None
        action = act(out, noise[t])
        env_state, after = env.step(env_state, action)
        if watch is not None:
            watch(env_state)
        collector.record(ts, out, action, after, active)
        active = active & ~after.new_trial
        ts = after
        t += 1
    return End(state, env_state, ts, t, active)
