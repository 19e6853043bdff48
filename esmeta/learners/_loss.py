"""What agents descend: one interface for hand-written and learned losses.

A loss says which heads an agent must have and which steps it must see; it is then a function of
the parameters of P agents and their batch, one number per agent. Whatever must be held constant
(targets, advantages, the policy before the update) is made once per update by ``prepare``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from esmeta.learners._agent import Agent, Head
from esmeta.learners._experience import Experience
from esmeta.options import options_class
from esmeta.rl.returns import gae
from esmeta.types import Params, PolicyOut


class Batch(NamedTuple):
    """What a loss sees of each agent's experience.

    ``steps`` leaves ``[P, T, ...]`` in order of time, or ``[P, n, L, ...]`` snippets of L steps
    from a replay; observations are normalised where the agent's are. ``scaled_action`` is the
    action in units of what this agent has done so far. ``inside`` (bool) is False for rows of an
    unfilled buffer and for what follows an episode's end in a snippet. ``newest`` is how many of
    the T steps are new since the last update. ``time`` int64 are the steps since the episode began,
    where a replay knows them.
    """

    steps: Experience
    scaled_action: Tensor
    inside: Tensor
    newest: int
    time: Tensor | None = None

    def part(self, low: int, high: int) -> Batch:
        """Snippets ``low`` .. ``high`` - 1 of every agent."""
        steps = Experience(*(leaf[:, low:high] for leaf in self.steps))
        scaled, inside = self.scaled_action[:, low:high], self.inside[:, low:high]
        time = None if self.time is None else self.time[:, low:high]
        return Batch(steps, scaled, inside, high - low, time)


class Loss(Protocol):
    """A loss of P agents at once.

    Attributes:
        heads: that an agent must have beside its policy.
        context: steps in a row that it reads; 0: only the newest ones.
        snippet: length of the snippets it reads from a replay; 0: it reads steps in order.
    """

    @property
    def heads(self) -> frozenset[Head]: ...

    @property
    def context(self) -> int: ...

    @property
    def snippet(self) -> int: ...

    def prepare(self, agent: Agent, params: Params, batch: Batch) -> Params:
        """Constants of one update, leaves ``[P, ...]``; called without gradient."""
        ...

    def __call__(
        self, agent: Agent, params: Params, batch: Batch, prepared: Params, rows: Tensor
    ) -> Tensor:
        """Loss ``[P]``, a mean over ``rows``: int64 ``[P, m]`` of the newest steps or snippets."""
        ...


def pick(leaf: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[P, m]`` of a leaf ``[P, M, ...]``."""
    return leaf.gather(1, rows.reshape(*rows.shape, *[1] * (leaf.ndim - 2)).expand(
        *rows.shape, *leaf.shape[2:]))  # fmt: skip


def log_prob(out: PolicyOut, action: Tensor) -> Tensor:
    """Log-probability ``[P, M]`` of actions ``[P, M, A]`` (one-hot for discrete ones)."""
    if out.logits is not None:
        return (torch.log_softmax(out.logits, dim=-1) * action).sum(dim=-1)
    assert out.mean is not None and out.std is not None
    z = (action - out.mean) / out.std
    return (-0.5 * z * z - torch.log(out.std) - 0.9189385332046727).sum(dim=-1)


def kl_divergence(old: PolicyOut, new: PolicyOut) -> Tensor:
    """KL(old || new) ``[P, M]``."""
    if old.logits is not None and new.logits is not None:
        before = torch.log_softmax(old.logits, dim=-1)
        return (before.exp() * (before - torch.log_softmax(new.logits, dim=-1))).sum(dim=-1)
    assert old.mean is not None and old.std is not None
    assert new.mean is not None and new.std is not None
    ratio = (old.std / new.std).square()
    shift = ((old.mean - new.mean) / new.std).square()
    return 0.5 * (ratio + shift - 1.0 - torch.log(ratio)).sum(dim=-1)


def advantages(
    agent: Agent, params: Params, steps: Experience, *, gamma: float, lambda_: float
) -> tuple[Tensor, Tensor]:
    """GAE advantages and value targets ``[P, M]`` of steps in order (:func:`esmeta.rl.returns.gae`).

    Where a time limit or the end of the batch hides what came next, V of the step itself stands
    for V of the next.
    """
    value = agent.value(params, steps.obs)
    last = agent.value(params, steps.next_obs[:, -1:])
    following = torch.cat([value[:, 1:], last], dim=1)
    following = torch.where(steps.known, following, value)
    raw = gae(
        steps.reward.T,
        value.T,
        following.T,
        steps.terminated.T,
        (steps.ended & ~steps.terminated).T,
        gamma=gamma,
        lambda_=lambda_,
    ).T
    return raw, raw + value


def standardised(x: Tensor) -> Tensor:
    """Zero mean and unit deviation over the steps of each agent, ``[P, M]``."""
    mean = x.mean(dim=1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=1, keepdim=True).sqrt() + 1e-8)


ValueTarget = Literal["gae", "reward_to_go"]


@options_class
class PolicyGradient:
    """REINFORCE with GAE and PPO: hand-written losses on the newest steps.

    ``clip`` > 0 is PPO's (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7):
    ``-min(r A, clip(r, 1 - clip, 1 + clip) A) + kl_coef KL(old || new)``; 0 is REINFORCE,
    ``-log pi A``. ``value_coef`` times the squared error of V is added (``policy = False``: that
    alone). Rewards are multiplied by ``reward_scale``. Advantages are GAE
    (``gamma``, ``gae_lambda``), standardised over the newest steps; ``A`` and ``old`` are constant.
    V's targets are ``A + V`` (``gae``), or the discounted rewards to the end of the episode, with V
    of what follows where it was cut (``reward_to_go``: ``gae`` at lambda 1).
    """

    clip: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.95
    kl_coef: float = 0.0
    value_coef: float = 1.0
    policy: bool = True
    reward_scale: float = 1.0
    value_target: ValueTarget = "gae"

    @property
    def heads(self) -> frozenset[Head]:
        """V, and a spread of actions that is learned."""
        return frozenset({"value", "log_std"})

    @property
    def context(self) -> int:
        """Only the newest steps."""
        return 0

    @property
    def snippet(self) -> int:
        """Steps in order."""
        return 0

    def prepare(self, agent: Agent, params: Params, batch: Batch) -> Params:
        """Advantages, value targets, and the policy before the update."""
        steps = batch.steps.last(batch.newest)
        steps = steps._replace(reward=steps.reward * self.reward_scale)
        raw, target = advantages(agent, params, steps, gamma=self.gamma, lambda_=self.gae_lambda)
        if self.value_target == "reward_to_go":
            _, target = advantages(agent, params, steps, gamma=self.gamma, lambda_=1.0)
        out = agent.policy(params, steps.obs)
        first, second = (out.logits, out.logits) if out.mean is None else (out.mean, out.std)
        assert first is not None and second is not None
        return {
            "advantage": standardised(raw),
            "target": target,
            "old": first,
            "old_std": second.expand_as(first),
        }

    def __call__(
        self, agent: Agent, params: Params, batch: Batch, prepared: Params, rows: Tensor
    ) -> Tensor:
        """The loss ``[P]`` on ``rows`` of the newest steps."""
        steps = batch.steps.last(batch.newest)
        obs, action = pick(steps.obs, rows), pick(steps.action, rows)
        loss = torch.zeros_like(obs[:, 0, 0])
        if self.value_coef > 0:
            error = agent.value(params, obs) - pick(prepared["target"], rows)
            loss = loss + self.value_coef * error.square().mean(dim=1)
        if not self.policy:
            return loss
        new = agent.policy(params, obs)
        advantage = pick(prepared["advantage"], rows)
        log_new = log_prob(new, action)
        if self.clip == 0:
            return loss - (log_new * advantage).mean(dim=1)
        old = _policy_before(agent, prepared, rows)
        ratio = torch.exp(log_new - log_prob(old, action))
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        loss = loss - torch.minimum(ratio * advantage, clipped * advantage).mean(dim=1)
        return loss + self.kl_coef * kl_divergence(old, new).mean(dim=1)

    def moved(self, agent: Agent, params: Params, batch: Batch, prepared: Params) -> Tensor:
        """Mean of ``log old - log pi`` of the actions taken, ``[P]``: KL(old || pi), estimated."""
        steps = batch.steps.last(batch.newest)
        rows = torch.arange(batch.newest, device=steps.reward.device).expand(len(steps.reward), -1)
        old, new = _policy_before(agent, prepared, rows), agent.policy(params, steps.obs)
        return (log_prob(old, steps.action) - log_prob(new, steps.action)).mean(dim=1)


def _policy_before(agent: Agent, prepared: Params, rows: Tensor) -> PolicyOut:
    first, second = pick(prepared["old"], rows), pick(prepared["old_std"], rows)
    if agent.statistics == agent.outputs:
        return PolicyOut(first, None, None, None)
    return PolicyOut(None, first, second, None)


@dataclass(frozen=True)
class Mixture:
    """``(1 - share) first + share second``; a loss whose weight is 0 is not computed at all."""

    first: Loss
    second: Loss
    share: float

    @property
    def heads(self) -> frozenset[Head]:
        """Those of both."""
        return self.first.heads | self.second.heads

    @property
    def context(self) -> int:
        """The longer one."""
        return max(self.first.context, self.second.context)

    @property
    def snippet(self) -> int:
        """That of the first; both must agree."""
        assert self.first.snippet == self.second.snippet
        return self.first.snippet

    def _parts(self) -> list[tuple[str, float, Loss]]:
        parts = [("first.", 1.0 - self.share, self.first), ("second.", self.share, self.second)]
        return [part for part in parts if part[1] > 0]

    def prepare(self, agent: Agent, params: Params, batch: Batch) -> Params:
        """The constants of both, each under a name of its own."""
        return {
            prefix + name: leaf
            for prefix, _, loss in self._parts()
            for name, leaf in loss.prepare(agent, params, batch).items()
        }

    def __call__(
        self, agent: Agent, params: Params, batch: Batch, prepared: Params, rows: Tensor
    ) -> Tensor:
        """The weighted sum ``[P]``."""
        total = torch.zeros(len(rows), dtype=batch.steps.reward.dtype, device=rows.device)
        for prefix, weight, loss in self._parts():
            own = {k.removeprefix(prefix): v for k, v in prepared.items() if k.startswith(prefix)}
            total = total + weight * loss(agent, params, batch, own, rows)
        return total
