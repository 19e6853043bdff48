"""Hand-written losses of a policy on steps from a replay, by way of its critics."""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.agent import heads
from esmeta.learners._agent import CRITICS, Agent, Head
from esmeta.learners._loss import Batch, pick
from esmeta.options import options_class
from esmeta.types import Params


def flat(leaf: Tensor) -> Tensor:
    """Snippets ``[P, n, L, ...]`` as rows ``[P, n * L, ...]``."""
    return leaf.flatten(1, 2)


@options_class
class DeterministicGradient:
    """DDPG's and TD3's: ``-Q_1(s, pi(s))`` (Lillicrap et al. 2016, arXiv 1509.02971, eq. 6)."""

    @property
    def heads(self) -> frozenset[Head]:
        """Critics."""
        return frozenset({"critics"})

    @property
    def context(self) -> int:
        """None."""
        return 0

    @property
    def snippet(self) -> int:
        """Single transitions."""
        return 1

    def prepare(self, agent: Agent, params: Params, batch: Batch) -> Params:
        """Nothing is held constant but the critic, whose gradient nobody takes."""
        return {}

    def __call__(
        self, agent: Agent, params: Params, batch: Batch, prepared: Params, rows: Tensor
    ) -> Tensor:
        """The loss ``[P]`` on ``rows`` of the transitions."""
        obs = pick(flat(batch.steps.obs), rows)
        action = heads.mode(agent.policy(params, obs))
        return -agent.critic(params, CRITICS[0], obs, action).mean(dim=1)


@options_class
class OffPolicyReinforce:
    """MetaGenRL's control: ``A_t mean_d (a_td - pi(s_t)_d)^2``.

    It is ``reinforce`` in the release's ``model.py``: REINFORCE for a Gaussian of fixed variance,
    without importance weights. A is GAE over the snippet with ``V = Q_1(s, pi(s))``, a constant; an
    episode that ended without a terminal state bootstraps from its own last V.
    """

    length: int = 20
    gamma: float = 0.99
    gae_lambda: float = 0.97

    @property
    def heads(self) -> frozenset[Head]:
        """Critics."""
        return frozenset({"critics"})

    @property
    def context(self) -> int:
        """None."""
        return 0

    @property
    def snippet(self) -> int:
        """Steps per snippet."""
        return self.length

    def prepare(self, agent: Agent, params: Params, batch: Batch) -> Params:
        """Advantages ``[P, n, L]``, 0 behind the end of an episode."""
        steps, inside = batch.steps, batch.inside
        value = state_values(agent, params, steps.obs)
        last = state_values(agent, params, steps.next_obs[:, :, -1:])
        following = torch.cat([value[..., 1:], last], dim=-1)
        following = torch.where(steps.known, following, value)
        alive = (~steps.terminated).to(value.dtype)
        delta = steps.reward + self.gamma * alive * following - value
        carry = self.gamma * self.gae_lambda * (~steps.ended).to(value.dtype)
        running, columns = torch.zeros_like(value[..., 0]), []
        for t in range(value.shape[-1] - 1, -1, -1):
            running = delta[..., t] + carry[..., t] * running
            columns.append(running)
        return {"advantage": torch.stack(columns[::-1], dim=-1) * inside}

    def __call__(
        self, agent: Agent, params: Params, batch: Batch, prepared: Params, rows: Tensor
    ) -> Tensor:
        """The loss ``[P]``: a mean over the steps of the snippets ``rows``."""
        steps = batch.steps
        obs, action = pick(steps.obs, rows), pick(steps.action, rows)
        advantage, inside = pick(prepared["advantage"], rows), pick(batch.inside, rows)
        mean = heads.mode(agent.policy(params, flat(obs)))
        error = (flat(action) - mean).square().mean(dim=-1)
        return (flat(advantage) * error).sum(dim=1) / flat(inside).sum(dim=1)


def state_values(agent: Agent, params: Params, obs: Tensor) -> Tensor:
    """``V = Q_1(s, pi(s))`` of snippets, ``[P, n, L]`` of ``obs [P, n, L, S]``."""
    rows = flat(obs)
    action = heads.mode(agent.policy(params, rows))
    return agent.critic(params, CRITICS[0], rows, action).reshape(obs.shape[:3])
