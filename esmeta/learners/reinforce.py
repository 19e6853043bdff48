"""On-policy REINFORCE with GAE (Schulman et al. 2016, https://arxiv.org/abs/1506.02438).

One full-batch policy step per period, then V alone for some passes, as in the "VPG" that MetaGenRL
compares with (Spinning Up's ``algos/pytorch/vpg``); networks are EPG's (tanh, inputs normalised).
"""

from __future__ import annotations

from typing import get_args

from esmeta import errors
from esmeta.agent.policy import PolicyConfig
from esmeta.learners import inner_policy
from esmeta.options import options_class
from esmeta.rl.losses import Loss, PolicyGradient, ValueTarget
from esmeta.rl.on_policy import SegmentLearner, SegmentOptions, ValuePasses
from esmeta.types import Spec


@options_class
class Learner:
    """Options of REINFORCE.

    Attributes:
        period: environment steps between updates.
        value_epochs: passes of V over them.
        minibatch: steps per gradient of V.
        learning_rate: of the policy's Adam.
        value_learning_rate: of V's.
        hidden: widths of the layers of policy and V.
        gamma: discount.
        gae_lambda: of the advantages.
        log_std: logarithm of the spread of actions at first.
        value_target: what V learns: ``gae``, the advantages plus V, or ``reward_to_go``.
        normalize: observations are measured in units of what the agent has seen.
        reward_scale: factor on rewards.
    """

    period: int = 4000
    value_epochs: int = 10
    minibatch: int = 200
    learning_rate: float = 3e-3
    value_learning_rate: float = 1e-3
    hidden: tuple[int, ...] = (64, 64)
    gamma: float = 0.99
    gae_lambda: float = 0.97
    log_std: float = 0.0
    value_target: ValueTarget = "gae"
    normalize: bool = True
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        errors.positive_int("minibatch", self.minibatch, example=50)
        errors.positive_int("value_epochs", self.value_epochs, example=10)
        self._steps()  # refuses what is no size
        errors.finite_positive("value_learning_rate", self.value_learning_rate, example=0.001)
        errors.fraction("gamma", self.gamma)
        errors.fraction("gae_lambda", self.gae_lambda)
        errors.finite("log_std", self.log_std, example=-0.5)
        errors.one_of("value_target", self.value_target, get_args(ValueTarget))
        errors.finite_positive("reward_scale", self.reward_scale, example=1.0)

    def _steps(self) -> SegmentOptions:
        """One step of the policy on all of a period."""
        return SegmentOptions(self.period, 1, self.period, self.learning_rate, self.hidden)

    def make(
        self, spec: Spec, horizon: int, policy: PolicyConfig | None = None
    ) -> tuple[SegmentLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = PolicyGradient(
            0.0,
            self.gamma,
            self.gae_lambda,
            value_coef=0.0,
            reward_scale=self.reward_scale,
            value_target=self.value_target,
        )
        agent = inner_policy(spec, policy, "epg", self.hidden, loss.needs, log_std=self.log_std)
        value = ValuePasses(self.value_epochs, self.minibatch, self.value_learning_rate)
        return SegmentLearner(agent, self._steps(), self.period, self.normalize, 0.0, value), loss
