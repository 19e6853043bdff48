"""Options that hand-written learners share, and how those become a learner."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

from esmeta import errors
from esmeta.agent.inner import inner_policy
from esmeta.agent.policy import PolicyConfig
from esmeta.options import options_class
from esmeta.rl.losses import Loss, PolicyGradient, ValueTarget
from esmeta.rl.off_policy import ReplayLearner, ReplayOptions
from esmeta.rl.on_policy import SegmentLearner, SegmentOptions, ValuePasses
from esmeta.types import Spec


@options_class
class OnPolicyOptions(SegmentOptions):
    """Options of PPO and REINFORCE, besides those of every learner from the newest steps.

    Attributes:
        gamma: discount.
        gae_lambda: of the advantages.
        value_epochs: passes of V alone after those of the loss.
        value_learning_rate: of V's Adam in these.
        log_std: logarithm of the spread of actions at first.
        value_target: what V learns: ``gae``, the advantages plus V, or ``reward_to_go``.
        normalize: observations are measured in units of what the agent has seen.
        reward_scale: factor on rewards; that of V's errors is its square.
    """

    gamma: float = 0.99
    gae_lambda: float = 0.95
    value_epochs: int = 0
    value_learning_rate: float = 1e-3
    log_std: float = 0.0
    value_target: ValueTarget = "gae"
    normalize: bool = True
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.fraction("gamma", self.gamma)
        errors.fraction("gae_lambda", self.gae_lambda)
        errors.non_negative_int("value_epochs", self.value_epochs, example=80)
        errors.finite_positive("value_learning_rate", self.value_learning_rate, example=0.001)
        errors.finite("log_std", self.log_std, example=-0.5)
        errors.one_of("value_target", self.value_target, get_args(ValueTarget))
        errors.finite_positive("reward_scale", self.reward_scale, example=1.0)

    def loss(self, clip: float, kl_coef: float, value_coef: float) -> PolicyGradient:
        """The hand-written loss with these options."""
        return PolicyGradient(
            clip,
            self.gamma,
            self.gae_lambda,
            kl_coef,
            value_coef,
            reward_scale=self.reward_scale,
            value_target=self.value_target,
        )

    def learner(
        self,
        spec: Spec,
        policy: PolicyConfig | None,
        loss: PolicyGradient,
        steps: SegmentOptions,
        kl_stop: float = 0.0,
    ) -> SegmentLearner:
        """The learner for a loss that takes its ``steps``, and V's passes after them."""
        if policy is not None:
            self._check_read()
        agent = inner_policy(
            spec, "epg", self.hidden, loss.needs, std=math.exp(self.log_std), config=policy
        )
        value = ValuePasses(self.value_epochs, self.minibatch, self.value_learning_rate)
        return SegmentLearner(agent, steps, self.period, self.normalize, kl_stop, value)

    def _check_read(self) -> None:
        """Refuse options of the published networks, which no other policy reads."""
        for name, instead in (("hidden", "hidden=[32]"), ("log_std", "std_value=0.5")):
            value = getattr(self, name)
            if value != getattr(type(self), name):
                raise errors.UserError(
                    f"learner.{name} = {value}: is of the published networks, and agents of "
                    f"--policy do not read it; write --set policy.{instead}, or leave --policy out"
                )


@options_class
class OffPolicyOptions(ReplayOptions):
    """Options of TD3 and off-policy REINFORCE, besides those of every learner from a replay.

    Attributes:
        start: steps of uniformly random actions at first.
        exploration: spread of actions, in units of their limit.
        target_noise: spread of the target's actions, in units of their limit.
        target_clip: limit of that noise.
        twin: the smaller of two critics is the target.
        snippet: steps in a row over which the loss reads the policy.
    """

    start: int = 10_000
    exploration: float = 0.1
    target_noise: float = 0.2
    target_clip: float = 0.5
    twin: bool = True
    snippet: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.non_negative_int("start", self.start, example=1000)
        errors.positive_int("snippet", self.snippet, example=8)
        for name in ("exploration", "target_noise", "target_clip"):
            errors.non_negative(name, getattr(self, name))

    def learner(
        self, spec: Spec, horizon: int, loss: Loss, policy: PolicyConfig | None
    ) -> ReplayLearner:
        """The learner for a loss, which must fit into its replay."""
        agent = inner_policy(
            spec, "metagenrl", self.hidden, loss.needs, std=self.exploration, config=policy
        )
        options = replace(self, capacity=min(self.capacity, horizon))
        learner = ReplayLearner(
            agent, options, self.start, self.target_noise, self.target_clip, self.twin
        )
        learner.check(loss)
        return learner
