"""TD3 (Fujimoto, van Hoof & Meger 2018, https://arxiv.org/abs/1802.09477), and DDPG.

Sizes, exploration and schedule are MetaGenRL's; DDPG (Lillicrap et al. 2016,
https://arxiv.org/abs/1509.02971) is ``twin = false``, ``delay = 1``, ``target_noise = 0``.
"""

from __future__ import annotations

from dataclasses import replace

from esmeta import errors
from esmeta.agent.policy import PolicyConfig
from esmeta.learners import inner_policy
from esmeta.options import options_class
from esmeta.rl.losses import Loss
from esmeta.rl.off_policy import DeterministicGradient, ReplayLearner, ReplayOptions
from esmeta.types import Spec


@options_class
class OffPolicyOptions(ReplayOptions):
    """Options of hand-written learners, besides those of every learner from a replay.

    Attributes:
        start: steps of uniformly random actions at first.
        exploration: spread of actions, in units of their limit.
        target_noise: spread of the target's actions, in units of their limit.
        target_clip: limit of that noise.
        twin: the smaller of two critics is the target.
    """

    start: int = 10_000
    exploration: float = 0.1
    target_noise: float = 0.2
    target_clip: float = 0.5
    twin: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.non_negative_int("start", self.start, example=1000)
        for name in ("exploration", "target_noise", "target_clip"):
            errors.non_negative(name, getattr(self, name))

    def learner(
        self, spec: Spec, horizon: int, loss: Loss, policy: PolicyConfig | None
    ) -> ReplayLearner:
        """The learner for a loss, which must fit into its replay."""
        agent = inner_policy(
            spec, policy, "metagenrl", self.hidden, loss.needs, std=self.exploration
        )
        options = replace(
            self,
            capacity=min(self.capacity, horizon),
            critic_batch=self.critic_batch or self.batch * loss.snippet,
        )
        learner = ReplayLearner(
            agent, options, self.start, self.target_noise, self.target_clip, self.twin
        )
        learner.check(loss)
        return learner


@options_class
class Learner(OffPolicyOptions):
    """Options of TD3, besides those of every hand-written learner from a replay.

    Attributes:
        snippet: steps in a row over which a policy with a memory is run; others need one.
    """

    snippet: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.positive_int("snippet", self.snippet, example=8)

    def make(
        self, spec: Spec, horizon: int, policy: PolicyConfig | None = None
    ) -> tuple[ReplayLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = DeterministicGradient(self.snippet)
        return self.learner(spec, horizon, loss, policy), loss
