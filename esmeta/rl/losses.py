"""Losses: one definition of each by the step, and what agents descend.

The functions at the top take and give tensors of any leading axes. A :class:`Loss` is a function of
(agent, params, data): it can be evaluated on fixed data with any parameters, and gives one number
per agent, ``[P]``. Whatever is constant in it (targets, advantages, the policy before the update)
is made once by ``prepare``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from esmeta.agent import heads
from esmeta.agent.policy import Need, Policy, pick, steps_of
from esmeta.options import options_class
from esmeta.rl.returns import gae
from esmeta.rollout import Trajectory
from esmeta.types import Params, PolicyOut

ValueTarget = Literal["gae", "reward_to_go"]
"""What V learns: advantages plus V, or the discounted rewards to the end of the episode."""


# --- by the step -------------------------------------------------------------------------------


def policy_gradient(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """``-log pi(a) A`` (Williams 1992)."""
    return -(log_prob * advantage)


def clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """``-min(r A, clip(r, 1 - clip, 1 + clip) A)``, r = pi / pi_old.

    Schulman et al. 2017 (PPO), https://arxiv.org/abs/1707.06347, eq. 7.
    """
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)


def value_error(value: Tensor, target: Tensor) -> Tensor:
    """``(V - target)^2``."""
    return (value - target).square()


def kl_estimate(log_ratio: Tensor) -> Tensor:
    """``r - 1 - log r``, whose mean over actions of pi_old is KL(pi_old || pi); never negative."""
    return torch.exp(log_ratio) - 1.0 - log_ratio


def outside(log_ratio: Tensor, clip: float) -> Tensor:
    """Whether PPO's clip holds the ratio, bool."""
    return (torch.exp(log_ratio) - 1.0).abs() > clip


def excess(mean: Tensor) -> Tensor:
    """Squared excess of ``mean [..., A]`` over 1 in size, summed over actions."""
    return (mean.abs() - 1.0).relu().square().sum(dim=-1)


def standardised(x: Tensor) -> Tensor:
    """Zero mean and unit deviation over the steps of each agent, ``[P, M]``."""
    mean = x.mean(dim=1, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dim=1, keepdim=True).sqrt() + 1e-8)


# --- what agents descend -----------------------------------------------------------------------


class Data(NamedTuple):
    """What a loss is evaluated on: all of it is constant.

    ``trajectory`` leaves ``[T, P, B, ...]``: the newest steps of a life (B = 1), or B snippets from
    a replay; observations are normalised where the agent's are. ``constants`` leaves
    ``[P, M, ...]`` by step, trial by trial, M = B T. Those that learners give: ``inside`` (bool) is
    False for rows of an unfilled buffer and for what follows an episode's end in a snippet;
    ``scaled_action`` is the action in units of what this agent has done so far; ``time`` int64 are
    the steps since the episode began, where a replay knows them. ``newest`` is how many of the T
    steps are new since the last update.
    """

    trajectory: Trajectory
    constants: Params
    newest: int

    def rows(self) -> Tensor:
        """Numbers of the newest steps among all, int64 ``[P, B newest]``."""
        length, agents, trials = self.trajectory.active.shape
        device = self.trajectory.active.device
        step = torch.arange(length - self.newest, length, device=device)
        trial = torch.arange(trials, device=device).unsqueeze(1) * length
        return (trial + step).flatten().expand(agents, -1)

    def trials(self, low: int, high: int) -> Data:
        """Trials (or snippets) ``low`` .. ``high`` - 1 of every agent."""
        length, _, trials = self.trajectory.active.shape
        constants = {
            name: leaf.unflatten(1, (trials, length))[:, low:high].flatten(1, 2)
            for name, leaf in self.constants.items()
        }
        return self._replace(trajectory=self.trajectory.between(low, high), constants=constants)


class Loss(Protocol):
    """A loss of P agents at once.

    Attributes:
        needs: what an agent must have beside its actions.
        context: steps in a row that it reads; 0: only the newest ones.
        snippet: length of the snippets it reads from a replay; 0: it reads steps in order.
    """

    @property
    def needs(self) -> frozenset[Need]: ...

    @property
    def context(self) -> int: ...

    @property
    def snippet(self) -> int: ...

    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        """The data with the constants of one update; called without gradient."""
        ...

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        """Loss ``[P]``, a mean over all of the data or ``rows``: int64 ``[P, m]`` of the newest."""
        ...


def advantages(
    trajectory: Trajectory, value: Tensor, last: Tensor, *, gamma: float, lambda_: float
) -> Tensor:
    """GAE advantages of steps ``[T, P, B]`` with V ``value``; ``last [P, B]``: of what followed.

    Where a time limit or the end of the data hides what came next, V of the step itself stands
    for V of the next (:func:`esmeta.rl.returns.gae`).
    """
    ended, terminated = trajectory.ended, trajectory.terminated
    following = torch.where(ended, value, torch.cat([value[1:], last.unsqueeze(0)]))
    cut = ended & ~terminated
    return gae(trajectory.reward, value, following, terminated, cut, gamma=gamma, lambda_=lambda_)


@options_class
class PolicyGradient:
    """REINFORCE with GAE and PPO: hand-written losses on the newest steps.

    ``clip`` > 0 is PPO's clipped gain, with ``kl_coef KL(old || new)`` added; 0 is REINFORCE.
    ``value_coef`` times the squared error of V is added (``policy = False``: that
    alone). Rewards are multiplied by ``reward_scale``. Advantages are GAE
    (``gamma``, ``gae_lambda``), standardised over the newest steps; ``A`` and ``old`` are constant.
    V's targets are ``A + V`` (``gae``), or the discounted rewards to the end of the episode, with V
    of what follows where it was cut (``reward_to_go``: ``gae`` at lambda 1).
    """

    needs: frozenset[Need] = field(default=frozenset({"value"}), init=False)
    context: int = field(default=0, init=False)
    snippet: int = field(default=0, init=False)

    clip: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.95
    kl_coef: float = 0.0
    value_coef: float = 1.0
    policy: bool = True
    reward_scale: float = 1.0
    value_target: ValueTarget = "gae"

    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        """Advantages, value targets, and the policy before the update."""
        whole, new = data.trajectory, data.trajectory.last(data.newest)
        shape = new.active.shape
        out = agent.read(params, whole.start, whole.steps, data.rows())
        assert out.value is not None
        value = out.value.unflatten(1, (shape[2], shape[0])).movedim(2, 0)
        last = _last_value(agent, params, whole)
        new = new.scaled(self.reward_scale)
        gamma, lambda_ = self.gamma, self.gae_lambda
        raw = target = steps_of(advantages(new, value, last, gamma=gamma, lambda_=lambda_))
        if self.value_target == "reward_to_go":
            target = steps_of(advantages(new, value, last, gamma=gamma, lambda_=1.0))
        constants = {"advantage": standardised(raw), "target": target + out.value}
        names = ("logits", "mean", "std")
        for name, leaf in zip(names, out[:3], strict=True):
            if leaf is not None:
                constants[f"old.{name}"] = leaf.expand(*out.value.shape, -1)
        return data._replace(constants=data.constants | constants)

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        """The loss ``[P]`` on ``rows`` of the newest steps."""
        where, whole, made = data.rows(), data.trajectory, data.constants
        made = {k: v for k, v in made.items() if k in ("advantage", "target") or k[:4] == "old."}
        if rows is not None:
            where, made = pick(where, rows), {k: pick(v, rows) for k, v in made.items()}
        read = {"action": self.policy, "value": self.value_coef > 0}
        new = agent.read(params, whole.start, whole.steps, where, **read)
        loss = torch.zeros_like(made["advantage"][:, 0])
        if self.value_coef > 0:
            assert new.value is not None
            error = value_error(new.value, made["target"])
            loss = loss + self.value_coef * error.mean(dim=1)
        if not self.policy:
            return loss
        action = pick(steps_of(whole.action), where)
        log_prob = heads.log_prob(new, action)
        if self.clip == 0:
            return loss + policy_gradient(log_prob, made["advantage"]).mean(dim=1)
        old = _policy_before(made)
        ratio = log_prob - heads.log_prob(old, action)
        loss = loss + clipped(ratio, made["advantage"], self.clip).mean(dim=1)
        return loss + self.kl_coef * heads.kl(old, new).mean(dim=1)

    def moved(self, agent: Policy, params: Params, data: Data) -> Tensor:
        """Mean of ``log old - log pi`` of the actions taken, ``[P]``: KL(old || pi), estimated."""
        whole, rows = data.trajectory, data.rows()
        action = pick(steps_of(whole.action), rows)
        new = agent.read(params, whole.start, whole.steps, rows, value=False)
        before = heads.log_prob(_policy_before(data.constants), action)
        return (before - heads.log_prob(new, action)).mean(dim=1)


def _last_value(agent: Policy, params: Params, trajectory: Trajectory) -> Tensor:
    """V ``[P, B]`` of what followed the last transition."""
    length, agents, trials = trajectory.active.shape
    steps = trajectory.all_steps
    if agent.stateless:  # nothing of the past is needed
        steps, length = type(steps)(*(leaf[-1:] for leaf in steps)), 0
    trial = torch.arange(trials, device=trajectory.active.device)
    rows = (trial * (length + 1) + length).expand(agents, -1)
    value = agent.read(params, trajectory.start, steps, rows, action=False).value
    assert value is not None
    return value


def _policy_before(made: Params) -> PolicyOut:
    return PolicyOut(made.get("old.logits"), made.get("old.mean"), made.get("old.std"), None)


@dataclass(frozen=True)
class Mixture:
    """``(1 - share) first + share second``; a loss whose weight is 0 is not computed at all."""

    first: Loss
    second: Loss
    share: float

    @property
    def needs(self) -> frozenset[Need]:
        """What both need."""
        return self.first.needs | self.second.needs

    @property
    def context(self) -> int:
        """The longer one."""
        return max(self.first.context, self.second.context)

    @property
    def snippet(self) -> int:
        """That of the first; both must agree."""
        assert self.first.snippet == self.second.snippet
        return self.first.snippet

    def _parts(self) -> list[tuple[float, Loss]]:
        parts = [(1.0 - self.share, self.first), (self.share, self.second)]
        return [part for part in parts if part[0] > 0]

    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        """The constants of both."""
        for _, loss in self._parts():
            data = loss.prepare(agent, params, data)
        return data

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        """The weighted sum ``[P]``."""
        total = torch.zeros_like(data.trajectory.reward[0, :, 0])
        for weight, loss in self._parts():
            total = total + weight * loss(agent, params, data, rows)
        return total
