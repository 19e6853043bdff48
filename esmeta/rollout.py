"""The rollout loop: the only one, for evolution, gradients, evaluation and every simulator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from esmeta.agent import heads
from esmeta.agent.policy import Policy
from esmeta.rng import Rng
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import BatchedEnv, Discrete, Params, PolicyOut, State, Tasks, TimeStep

# Looking whether all trials have ended costs a synchronisation on a GPU, so it is done rarely.
_CHECK_EVERY = 4
_LED_TO = ("reward", "terminated", "truncated")


Act = Callable[[PolicyOut, Tensor], Tensor]
"""Heads and noise to actions."""
Intervention = Callable[[State, TimeStep], tuple[State, TimeStep]]
"""Changes memory or inputs before a step."""


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


class EpisodeReturns(Returns):
    """Those of the first episode of each trial alone."""

    def __init__(self, population: int, batch: int, device: torch.device | str) -> None:
        super().__init__(population, batch, device)
        self._first = torch.ones(population, batch, dtype=torch.bool, device=device)

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        first, earned = self._first, after._replace(reward=after.reward * self._first)
        super().record(ts, out, action, earned, first)
        self._first = first & ~(after.new_episode | after.new_trial)


class Trajectory(NamedTuple):
    """A recorded rollout: T transitions of P x B trials.

    ``start`` and ``end`` are the memory before and after it, leaves ``[P, B, ...]``. ``ts`` has
    one row more than there are transitions, ``[T + 1, P, B, ...]``: what followed the last one.
    ``action`` and ``out`` (None where it was not kept) are ``[T, P, B, ...]``; ``active`` is
    set where a transition belongs to the trial: all means are over these.
    """

    start: State
    ts: TimeStep
    action: Tensor
    active: Tensor
    out: PolicyOut | None
    end: State

    @property
    def steps(self) -> TimeStep:
        """The time steps that were acted at, ``[T, P, B, ...]``.

        ``new_trial`` marks those before which memory begins anew: the first, where it is the first
        of the trial, and, only to stay bounded, what follows the end of a trial.
        """
        return TimeStep(*(leaf[:-1] for leaf in self.all_steps))

    @property
    def all_steps(self) -> TimeStep:
        """:attr:`steps` and, behind them, what followed the last transition."""
        stale = torch.cat([self.ts.new_trial[:1], ~self.active])
        return self.ts._replace(new_trial=stale)

    @property
    def after(self) -> TimeStep:
        """The time steps that the transitions led to, ``[T, P, B, ...]``."""
        return TimeStep(*(leaf[1:] for leaf in self.ts))

    @property
    def reward(self) -> Tensor:
        """Of each transition."""
        return self.ts.reward[1:]

    @property
    def over(self) -> Tensor:
        """Whether the trial ended with the transition."""
        return self.ts.new_trial[1:] & self.active

    @property
    def ended(self) -> Tensor:
        """Whether an episode ended with it; so is all that follows the end of a trial."""
        after = self.after
        return after.new_episode | after.new_trial | after.terminated | after.truncated

    @property
    def terminated(self) -> Tensor:
        """Whether what follows it is worth nothing, as the episode ended there by itself."""
        return self.ts.terminated[1:] & self.active

    def last(self, count: int) -> Trajectory:
        """The newest ``count`` transitions; what memory was before them is not known."""
        if count == len(self.action):
            return self
        ts = TimeStep(*(leaf[-count - 1 :] for leaf in self.ts))
        assert self.out is None
        return Trajectory({}, ts, self.action[-count:], self.active[-count:], None, self.end)

    def then(self, later: Trajectory) -> Trajectory:
        """This and what came after it."""

        def joined(first: Tensor, second: Tensor) -> Tensor:
            # Along the time of each member, which is how they lie in memory.
            parts = first.transpose(0, 1), second.transpose(0, 1)
            return torch.cat(parts, dim=1).transpose(0, 1)

        ts = TimeStep(*(joined(a[:-1], b) for a, b in zip(self.ts, later.ts, strict=True)))
        # What the last step here has led to is known here: later ones may be of another trial.
        led = {n: joined(getattr(self.ts, n), getattr(later.ts, n)[1:]) for n in _LED_TO}
        ts = ts._replace(**led)
        action, active = joined(self.action, later.action), joined(self.active, later.active)
        assert self.out is None and later.out is None
        return Trajectory(self.start, ts, action, active, None, later.end)

    def scaled(self, factor: float) -> Trajectory:
        """With rewards times ``factor``."""
        if factor == 1.0:
            return self
        return self._replace(ts=self.ts._replace(reward=self.ts.reward * factor))

    def between(self, low: int, high: int) -> Trajectory:
        """Trials ``low`` .. ``high`` - 1 of every member."""
        return self._some(lambda leaf, axis: leaf.narrow(axis, low, high - low))

    def trials(self, chosen: Tensor) -> Trajectory:
        """Some trials only, by their place in the batch, int64 ``[b]``."""
        return self._some(lambda leaf, axis: leaf.index_select(axis, chosen))

    def _some(self, choose: Callable[[Tensor, int], Tensor]) -> Trajectory:
        def some(tree: Any, axis: int) -> Any:
            return with_leaves(tree, [choose(leaf, axis) for leaf in leaves_of(tree)])

        start, ts, action, active, out, end = self
        ts, action, active, out = (some(leaf, 2) for leaf in (ts, action, active, out))
        return Trajectory(some(start, 1), ts, action, active, out, some(end, 1))


class Recorder:
    """Keeps whole trajectories; ``heads`` says whether what the heads said is kept too."""

    def __init__(self, start: State, heads: bool = True) -> None:
        self._start, self._heads = start, heads
        self._steps: list[TimeStep] = []
        self._outs: list[PolicyOut] = []
        self._actions: list[Tensor] = []
        self._active: list[Tensor] = []

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        self._steps.append(ts)
        self._actions.append(action)
        self._active.append(active)
        if self._heads:
            self._outs.append(out)

    def trajectory(self, end: End) -> Trajectory:
        """All of it; ``end`` is where the rollout was left."""
        ts = TimeStep(*map(_stacked, zip(*self._steps, end.ts, strict=True)))
        out = PolicyOut(*map(_stacked, zip(*self._outs, strict=True))) if self._heads else None
        return Trajectory(
            self._start, ts, _stacked(self._actions), _stacked(self._active), out, end.state
        )


def _stacked(leaves: Sequence[Any]) -> Any:
    """Steps ``[T, P, B, ...]``, those of a member side by side in memory, as losses read them."""
    return None if leaves[0] is None else torch.stack(list(leaves), dim=1).transpose(0, 1)


def start(policy: Policy, params: Params, env: BatchedEnv, tasks: Tasks, rng: Rng) -> Start:
    """Begin one trial per task for each member of ``params``."""
    population = next(iter(params.values())).shape[0]
    index = tasks.index
    env_state, ts = env.reset(tasks, rng, population)
    state = policy.initial_state(params, index.shape[1], rng, index)
    noise = action_noise(policy, index, rng).to(next(iter(params.values())).dtype)
    return Start(policy.bind(params), state, env_state, ts, noise)


def action_noise(policy: Policy, index: Tensor, rng: Rng) -> Tensor:
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


def go_on(policy: Policy, params: Params, end: End, noise: Tensor) -> Start:
    """Trials where a rollout left them, from here on with ``params``; ``noise`` is their own."""
    noise = noise.to(next(iter(params.values())).dtype)
    state, env_state, ts, t, active = end
    return Start(policy.bind(params), state, env_state, ts, noise, t, active)


def rollout(
    policy: Policy,
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
