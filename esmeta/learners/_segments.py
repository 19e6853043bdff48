"""Learning from the newest steps: every M environment steps, some passes over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta.agent import heads
from esmeta.learners._agent import Agent
from esmeta.learners._experience import Experience, nothing
from esmeta.learners._loss import Batch, Loss, PolicyGradient
from esmeta.learners._state import Adam, Statistics, adam_step, clip_norm
from esmeta.modes import differentiating
from esmeta.rng import Rng
from esmeta.rollout import Act
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import Params

_VALUE = PolicyGradient(policy=False)


class Segments(NamedTuple):
    """State of P agents that learn by :class:`SegmentLearner`, leaves ``[P, ...]``.

    ``params`` their networks; ``buffer`` the newest steps, zeros where there are none yet;
    ``index`` int64 ``[P]`` the numbers that address their randomness; ``updates`` int64 ``[P]``.
    """

    params: Params
    adam: Adam
    statistics: Statistics
    buffer: Experience
    index: Tensor
    updates: Tensor


@differentiating
def descend(
    agent: Agent,
    loss: Loss,
    batch: Batch,
    prepared: Params,
    rows: Tensor,
    params: Params,
    adam: Adam,
    rate: float,
    *,
    only: tuple[str, ...] = (),
    clip: float = 0.0,
) -> tuple[Params, Adam]:
    """One Adam step of every agent on its own loss; leaves that it does not depend on stay.

    ``only`` names the networks that may move (default: all); ``clip`` limits the global norm of
    each agent's gradient (0: no limit).
    """
    leaves = {
        name: leaf.detach().requires_grad_()
        for name, leaf in params.items()
        if not only or name.partition(".")[0] in only
    }
    with torch.enable_grad():
        # Agents share no parameter, so the gradient of the sum is each agent's own.
        total = loss(agent, {**params, **leaves}, batch, prepared, rows).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    return adam_step(adam, params, clip_norm(gradients, clip), rate)


def _chosen(where: Tensor, first: Any, second: Any) -> Any:
    """Leaves ``[P, ...]`` of ``first`` for agents ``where [P]`` is set, else of ``second``."""
    pairs = zip(leaves_of(first), leaves_of(second), strict=True)
    leaves = [torch.where(where.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs]
    return with_leaves(second, leaves)


@dataclass(frozen=True)
class SegmentLearner:
    """Every ``period`` steps ``epochs`` passes over them in minibatches, one Adam step each.

    Attributes:
        agent: the networks.
        period: environment steps between updates, M.
        context: steps that the loss may look back, N; at least M.
        epochs: passes over the newest M steps.
        minibatch: steps per gradient; the last ones of a pass that do not fill one are left out.
        learning_rate: of Adam.
        normalize: inputs of the networks are measured in units of what the agent has seen.
        kl_stop: an agent's passes over PPO's loss end before the one that begins with a KL(old ||
            new) above it (0: never).
        value_epochs: passes of V alone afterwards, towards the targets of a hand-written loss, in
            minibatches of ``value_minibatch`` with Adam's rate ``value_learning_rate``.
    """

    agent: Agent
    period: int
    context: int
    epochs: int = 1
    minibatch: int = 32
    learning_rate: float = 1e-3
    normalize: bool = True
    kl_stop: float = 0.0
    value_epochs: int = 0
    value_minibatch: int = 32
    value_learning_rate: float = 1e-3

    def init(self, rng: Rng, index: Tensor) -> Segments:
        """Fresh agents with the numbers ``index`` int64 ``[P]``: nothing learned, nothing seen."""
        spec, device = self.agent.spec, index.device
        params = self.agent.init(rng.fold("agent"), index)
        width = spec.obs_size + spec.action.size
        return Segments(
            params,
            Adam.zeros(params),
            Statistics.fresh(len(index), width, device),
            nothing(len(index), self.context, spec, device),
            index,
            torch.zeros_like(index),
        )

    def acting(self, state: Segments) -> Params:
        """What the rollout needs of the agents: the policy and the statistics of observations."""
        names = ("policy", "log_std")
        params = {k: v for k, v in state.params.items() if k.partition(".")[0] in names}
        if not self.normalize:
            return params
        mean, std = state.statistics.mean_std()
        size = self.agent.spec.obs_size
        return {**params, "norm.mean": mean[:, :size], "norm.std": std[:, :size]}

    def act(self, state: Segments) -> Act:
        """Actions are sampled, and clipped by the environment only."""
        return heads.sample

    @torch.no_grad()
    def update(self, state: Segments, new: Experience, loss: Loss, rng: Rng) -> Segments:
        """The agents after learning from ``new``, their last ``period`` steps ``[P, M, ...]``."""
        width = torch.cat([new.obs, new.action], dim=-1)
        statistics = state.statistics.add(width)
        buffer = state.buffer.then(new).last(self.context)
        updates = state.updates + 1
        batch = self.batch(buffer, statistics, updates)
        params, adam = state.params, state.adam
        prepared = loss.prepare(self.agent, params, batch)
        passes = [
            (loss, self.epochs, self.minibatch, self.learning_rate),
            (_VALUE, self.value_epochs, self.value_minibatch, self.value_learning_rate),
        ]
        for part, (what, epochs, size, rate) in enumerate(passes):
            for epoch in range(epochs):
                before, far = (params, adam), None
                if what is loss and self.kl_stop > 0:
                    far = self._far(loss, params, batch, prepared)
                    if bool(far.all()):
                        break
                draw = rng.fold("rows", int(updates[0]), part, epoch)
                for rows in self._minibatches(state.index, draw, size):
                    params, adam = descend(
                        self.agent, what, batch, prepared, rows, params, adam, rate
                    )
                if far is not None:
                    params, adam = _chosen(far, before, (params, adam))
        return Segments(params, adam, statistics, buffer, state.index, updates)

    def _far(self, loss: Loss, params: Params, batch: Batch, prepared: Params) -> Tensor:
        """Agents whose policy has moved away from the one that acted, bool ``[P]``."""
        assert isinstance(loss, PolicyGradient), "others do not keep the policy before"
        return loss.moved(self.agent, params, batch, prepared) > self.kl_stop

    def _minibatches(self, index: Tensor, rng: Rng, size: int) -> Iterator[Tensor]:
        """Rows ``[P, size]`` of the newest steps in random order, in order if all are taken."""
        if size >= self.period:
            yield torch.arange(self.period, device=index.device).expand(len(index), -1)
            return
        numbers, place = index.unique(return_inverse=True)
        order = rng.uniform(numbers, self.period).argsort(dim=1, stable=True)[place]
        for first in range(0, self.period - size + 1, size):
            yield order[:, first : first + size]

    def batch(self, buffer: Experience, statistics: Statistics, updates: Tensor) -> Batch:
        """The buffer as losses see it: scaled where it is filled, zeros elsewhere."""
        steps, count = self.context, updates[:, None] * self.period
        place = torch.arange(steps, device=count.device)
        inside = place >= steps - count.clamp_max(steps)
        mean, std = (x.unsqueeze(1) for x in statistics.mean_std())
        size = self.agent.spec.obs_size
        filled = inside.unsqueeze(-1)
        action = (buffer.action - mean[..., size:]) / std[..., size:] * filled
        if self.normalize:
            mean, std = mean[..., :size], std[..., :size]
            obs = (buffer.obs - mean) / std * filled
            following = (buffer.next_obs - mean) / std * filled
            buffer = buffer._replace(obs=obs, next_obs=following)
        return Batch(buffer, action, inside, self.period)
