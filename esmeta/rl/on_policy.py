"""Learning from the newest steps: every M environment steps, some passes over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta import errors
from esmeta.agent import heads
from esmeta.agent.policy import Policy, steps_of
from esmeta.errors import UserError
from esmeta.options import options_class
from esmeta.rl.descent import Adams, descend
from esmeta.rl.losses import Data, Loss, PolicyGradient
from esmeta.rng import Rng
from esmeta.rollout import Act, Trajectory
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import Discrete, Params, Spec, State, TimeStep

_VALUE = PolicyGradient(policy=False)


class Statistics(NamedTuple):
    """Running moments of each agent's inputs: ``seen [P, 1]``, ``total`` and ``squares [P, K]``.

    float64: sums of many steps lose nothing.
    """

    seen: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def fresh(cls, agents: int, size: int, device: torch.device | str) -> Statistics:
        """Nothing seen: a hundredth of a step with mean 0 and variance 1."""
        count = torch.full((agents, 1), 1e-2, dtype=torch.float64, device=device)
        total = torch.zeros(agents, size, dtype=torch.float64, device=device)
        return cls(count, total, total + 1e-2)

    def add(self, x: Tensor) -> Statistics:
        """With ``x [P, T, K]`` seen too."""
        x = x.double()
        return Statistics(
            self.seen + x.shape[1], self.total + x.sum(dim=1), self.squares + (x * x).sum(dim=1)
        )

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (at least 0.1), float32 ``[P, K]``."""
        mean = self.total / self.seen
        variance = (self.squares / self.seen - mean * mean).clamp_min(1e-2)
        return mean.float(), variance.sqrt().float()


class OnPolicy(NamedTuple):
    """State of P agents that learn by :class:`SegmentLearner`, leaves ``[P, ...]``.

    ``params`` their networks; ``buffer`` the newest steps, zeros where there are none yet;
    ``past`` what their memories were before each period of it, oldest first; ``numbers`` int64
    ``[P]`` the numbers that address their randomness; ``updates`` int64 ``[P]``.
    """

    params: Params
    adams: Adams
    statistics: Statistics
    buffer: Trajectory
    past: tuple[State, ...]
    numbers: Tensor
    updates: Tensor


@options_class
class SegmentOptions:
    """Options of all that learns from the newest steps.

    Attributes:
        period: environment steps between updates, M.
        epochs: passes over the newest M steps.
        minibatch: steps per gradient; the last ones of a pass that do not fill one are left out.
        learning_rate: of Adam.
        hidden: widths of the tanh layers of policy and V.
    """

    period: int = 2000
    epochs: int = 10
    minibatch: int = 50
    learning_rate: float = 1e-3
    hidden: tuple[int, ...] = (64, 64)

    def __post_init__(self) -> None:
        errors.positive_int("period", self.period, example=2000)
        errors.positive_int("epochs", self.epochs, example=10)
        errors.positive_int("minibatch", self.minibatch, example=50)
        errors.finite_positive("learning_rate", self.learning_rate, example=0.001)
        for width in self.hidden:
            errors.positive_int("hidden", width, example=64)


@dataclass(frozen=True)
class ValuePasses:
    """Passes of V alone after those of the loss, towards the targets of a hand-written one."""

    epochs: int = 0
    minibatch: int = 32
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class SegmentLearner:
    """Every ``period`` steps ``epochs`` passes over them in minibatches, one Adam step each.

    Attributes:
        agent: the networks.
        options: see :class:`SegmentOptions`.
        context: steps that the loss may look back, N; at least M.
        normalize: inputs of the networks are measured in units of what the agent has seen.
        kl_stop: an agent's passes over PPO's loss end before the one that begins with a KL(old ||
            new) above it (0: never).
        value: passes of V alone.
    """

    agent: Policy
    options: SegmentOptions
    context: int
    normalize: bool = True
    kl_stop: float = 0.0
    value: ValuePasses = ValuePasses()

    def __post_init__(self) -> None:
        if not self.agent.stateless and self.context % self.period:
            raise UserError(
                f"buffer = {self.context}: agents with a memory need a multiple of period = "
                f"{self.period}, as their memory is kept once per period; write for example "
                f"buffer = {self.period * max(1, round(self.context / self.period))}"
            )

    @property
    def period(self) -> int:
        """Environment steps between updates."""
        return self.options.period

    def init(self, rng: Rng, index: Tensor, first: Params | None = None) -> OnPolicy:
        """Fresh agents with the numbers ``index`` int64 ``[P]``: nothing learned, nothing seen.

        ``first`` are leaves ``[P, ...]`` of their networks that are given instead of drawn.
        """
        spec, device, agents = self.agent.spec, index.device, len(index)
        params = self.agent.init_at(rng.fold("agent"), index) | (first or {})
        memory = self.agent.initial_state(params, 1, rng, index.unsqueeze(1))
        periods = 1 if self.agent.stateless else self.context // self.period
        return OnPolicy(
            params,
            Adams.zeros(self.agent, params),
            Statistics.fresh(agents, spec.obs_size + spec.action.size, device),
            nothing(agents, self.context, spec, device),
            (memory,) * periods,
            index,
            torch.zeros_like(index),
        )

    def acting(self, state: OnPolicy) -> Params:
        """What the rollout needs of the agents: the policy and the statistics of observations."""
        params = self.agent.part(state.params, "actor")
        if not self.normalize:
            return params
        mean, std = state.statistics.mean_std()
        size = self.agent.spec.obs_size
        return {**params, "norm.mean": mean[:, :size], "norm.std": std[:, :size]}

    def act(self, state: OnPolicy) -> Act:
        """Actions are sampled, and clipped by the environment only."""
        return heads.sample

    @torch.no_grad()
    def update(self, state: OnPolicy, new: Trajectory, loss: Loss, rng: Rng) -> OnPolicy:
        """The agents after learning from ``new``, their last ``period`` steps (B = 1)."""
        seen = torch.cat([steps_of(new.steps.obs), self._encoded(new)], dim=-1)
        statistics = state.statistics.add(seen)
        past = (*state.past[1:], new.start)
        buffer = state.buffer.then(new).last(self.context)
        state = state._replace(
            statistics=statistics, buffer=buffer, past=past, updates=state.updates + 1
        )
        data = loss.prepare(self.agent, state.params, self.data(state))
        passes = [(loss, self.options), (_VALUE, self.value)]
        for part, (what, options) in enumerate(passes):
            for epoch in range(options.epochs):
                far = None
                if what is loss and self.kl_stop > 0:
                    far = self._far(loss, state.params, data)
                    if bool(far.all()):
                        break
                draw = rng.fold("rows", int(state.updates[0]), part, epoch)
                size, rate = options.minibatch, options.learning_rate
                after = self._pass(state, what, data, draw, size, rate)
                if far is not None:
                    after = _chosen(far, (state.params, state.adams), after)
                state = state._replace(params=after[0], adams=after[1])
        return state

    def _pass(
        self, state: OnPolicy, loss: Loss, data: Data, rng: Rng, size: int, rate: float
    ) -> tuple[Params, Adams]:
        """One pass over the newest steps."""
        params, adams = state.params, state.adams
        # V alone must not move a memory that the policy reads too.
        only = ("value",) if loss is _VALUE else ()
        for rows in self._minibatches(state.numbers, rng, size):

            def on_rows(params: Params, rows: Tensor = rows) -> Tensor:
                return loss(self.agent, params, data, rows)

            params, adams = descend(self.agent, on_rows, params, adams, rate, only=only)
        return params, adams

    def _far(self, loss: Loss, params: Params, data: Data) -> Tensor:
        """Agents whose policy has moved away from the one that acted, bool ``[P]``."""
        assert isinstance(loss, PolicyGradient), "others do not keep the policy before"
        return loss.moved(self.agent, params, data) > self.kl_stop

    def _minibatches(self, index: Tensor, rng: Rng, size: int) -> Iterator[Tensor]:
        """Rows ``[P, size]`` of the newest steps in random order, in order if all are taken."""
        if size >= self.period:
            yield torch.arange(self.period, device=index.device).expand(len(index), -1)
            return
        numbers, place = index.unique(return_inverse=True)
        order = rng.uniform(numbers, self.period).argsort(dim=1, stable=True)[place]
        for first in range(0, self.period - size + 1, size):
            yield order[:, first : first + size]

    def _encoded(self, steps: Trajectory) -> Tensor:
        """Actions as statistics and losses read them, ``[P, T, A]``."""
        action = heads.encode(steps.action, self.agent.spec.action, steps.reward.dtype)
        return steps_of(action)

    def data(self, state: OnPolicy) -> Data:
        """The buffer as losses see it: scaled where it is filled, zeros elsewhere."""
        buffer, count = state.buffer, state.updates[:, None] * self.period
        place = torch.arange(self.context, device=count.device)
        inside = place >= self.context - count.clamp_max(self.context)
        mean, std = (x.unsqueeze(1) for x in state.statistics.mean_std())
        size, filled = self.agent.spec.obs_size, inside.unsqueeze(-1)
        action = (self._encoded(buffer) - mean[..., size:]) / std[..., size:] * filled
        if self.normalize:
            behind = torch.cat([filled, filled[:, -1:]], dim=1)
            obs = steps_of(buffer.ts.obs)
            obs = (obs - mean[..., :size]) / std[..., :size] * behind
            buffer = buffer._replace(ts=buffer.ts._replace(obs=obs.unsqueeze(2).transpose(0, 1)))
        constants = {"inside": inside, "scaled_action": action}
        return Data(buffer._replace(start=state.past[0]), constants, self.period)

    # --- storing -------------------------------------------------------------------------------

    def save(self, state: OnPolicy) -> list[Tensor]:
        """All of it, leaves ``[P, ...]``."""
        steps = (*state.buffer.ts, state.buffer.action, state.buffer.active)
        kept = state._replace(buffer=[leaf.transpose(0, 1) for leaf in steps])
        return leaves_of(kept)

    def restore(self, fresh: OnPolicy, saved: Sequence[Tensor]) -> OnPolicy:
        """The inverse of :meth:`save`; ``fresh`` has the leaves' places."""
        steps = (*fresh.buffer.ts, fresh.buffer.action, fresh.buffer.active)
        state = with_leaves(fresh._replace(buffer=list(steps)), saved)
        *ts, action, active = (leaf.transpose(0, 1) for leaf in state.buffer)
        buffer = fresh.buffer._replace(ts=TimeStep(*ts), action=action, active=active)
        return state._replace(buffer=buffer)


def nothing(agents: int, steps: int, spec: Spec, device: torch.device | str) -> Trajectory:
    """``steps`` steps of zeros, as in a buffer that is not yet filled; none is of a trial."""
    blank = torch.zeros(agents, steps + 1, 1, dtype=torch.float32, device=device).transpose(0, 1)
    flag, width = blank > 0, spec.action.size
    obs = blank.unsqueeze(-1).expand(-1, -1, -1, spec.obs_size)
    past = blank.unsqueeze(-1).expand(-1, -1, -1, width)
    action = blank[1:].long() if isinstance(spec.action, Discrete) else past[1:]
    ts = TimeStep(obs, past, blank, flag, flag, flag, flag)
    return Trajectory({}, ts, action, flag[1:], None, {})


def _chosen(where: Tensor, first: Any, second: Any) -> Any:
    """Leaves ``[P, ...]`` of ``first`` for agents ``where [P]`` is set, else of ``second``."""
    pairs = zip(leaves_of(first), leaves_of(second), strict=True)
    leaves = [torch.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs]
    return with_leaves(second, leaves)
