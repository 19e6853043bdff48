"""What agents have lived through: leaves ``[P, T, ...]``, one environment per agent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.types import Discrete, PolicyOut, Spec, TimeStep


class Experience(NamedTuple):
    """T consecutive steps of P agents, float32 and bool ``[P, T, ...]``.

    ``action`` is one-hot, or the raw vector; ``ended`` marks the last step of an episode and
    ``terminated`` those of them whose future is worth nothing. Where an episode ended otherwise
    (a time limit) ``next_obs`` may belong to the next episode and must not be used.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    next_obs: Tensor
    terminated: Tensor
    ended: Tensor

    @property
    def known(self) -> Tensor:
        """Whether ``next_obs`` is what the step led to, bool ``[P, T]``."""
        return ~self.ended

    def last(self, count: int) -> Experience:
        """The newest ``count`` steps."""
        return Experience(*(leaf[:, leaf.shape[1] - count :] for leaf in self))

    def then(self, later: Experience) -> Experience:
        """This and what came after it."""
        return Experience(*(torch.cat(two, dim=1) for two in zip(self, later, strict=True)))


def nothing(agents: int, steps: int, spec: Spec, device: torch.device | str) -> Experience:
    """``steps`` steps of zeros, as in a buffer that is not yet filled."""
    blank = torch.zeros(agents, steps, dtype=torch.float32, device=device)
    obs = blank.unsqueeze(-1).expand(-1, -1, spec.obs_size)
    action = blank.unsqueeze(-1).expand(-1, -1, spec.action.size)
    return Experience(obs, action, blank, obs, blank > 0, blank > 0)


class Keep:
    """Collects a rollout of agents with one environment each (B = 1) as :class:`Experience`."""

    def __init__(self, spec: Spec) -> None:
        self._classes = spec.action.n if isinstance(spec.action, Discrete) else 0
        self._rows: list[Experience] = []

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        if self._classes:
            action = torch.nn.functional.one_hot(action, self._classes).to(ts.obs.dtype)
        ended = after.new_episode | after.new_trial | after.terminated | after.truncated
        # What follows the end of a trial leads nowhere, and says nothing of the future's worth.
        terminated = after.terminated & active
        row = (ts.obs, action, after.reward, after.obs, terminated, ended)
        self._rows.append(Experience(*(leaf[:, 0] for leaf in row)))

    def experience(self) -> Experience:
        """All steps so far."""
        return Experience(*(torch.stack(leaf, dim=1) for leaf in zip(*self._rows, strict=True)))
