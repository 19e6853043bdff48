"""PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347): clipped policy gradient with GAE.

Defaults are EPG's: V is learned in the same minibatches with a coefficient, nothing stops a pass
early, networks are tanh, separate for policy and V, inputs normalised. ``value_epochs``,
``kl_stop`` and ``log_std`` make the recipe of Spinning Up, MetaGenRL's baseline
(https://github.com/openai/spinningup, ``algos/pytorch/ppo``).
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
class Learner(SegmentOptions):
    """Options of PPO, besides those of every learner from the newest steps.

    Attributes:
        clip: of the probability ratio.
        gamma: discount.
        gae_lambda: of the advantages.
        kl_coef: weight of KL(old || new).
        value_coef: weight of V's squared error in that loss.
        value_epochs: passes of V alone afterwards, in minibatches of the same size; with any, V is
            not in the other loss, and neither is ``value_coef``.
        value_learning_rate: of V's Adam in these.
        kl_stop: passes end before one that begins with a KL(old || new) above it (0: never).
        log_std: logarithm of the spread of actions at first.
        value_target: what V learns: ``gae``, the advantages plus V, or ``reward_to_go``.
        normalize: observations are measured in units of what the agent has seen.
        reward_scale: factor on rewards; that of V's errors is its square.
    """

    clip: float = 0.2
    gamma: float = 0.99
    gae_lambda: float = 0.95
    kl_coef: float = 0.0
    value_coef: float = 1.0
    value_epochs: int = 0
    value_learning_rate: float = 1e-3
    kl_stop: float = 0.0
    log_std: float = 0.0
    value_target: ValueTarget = "gae"
    normalize: bool = True
    reward_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.finite_positive("clip", self.clip, example=0.2)
        errors.fraction("gamma", self.gamma)
        errors.fraction("gae_lambda", self.gae_lambda)
        errors.non_negative("kl_coef", self.kl_coef)
        errors.non_negative("value_coef", self.value_coef)
        errors.non_negative_int("value_epochs", self.value_epochs, example=80)
        errors.finite_positive("value_learning_rate", self.value_learning_rate, example=0.001)
        errors.non_negative("kl_stop", self.kl_stop, example=0.015)
        errors.finite("log_std", self.log_std, example=-0.5)
        errors.one_of("value_target", self.value_target, get_args(ValueTarget))
        errors.finite_positive("reward_scale", self.reward_scale, example=1.0)

    def make(
        self, spec: Spec, horizon: int, policy: PolicyConfig | None = None
    ) -> tuple[SegmentLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = PolicyGradient(
            self.clip,
            self.gamma,
            self.gae_lambda,
            self.kl_coef,
            0.0 if self.value_epochs else self.value_coef,
            reward_scale=self.reward_scale,
            value_target=self.value_target,
        )
        agent = inner_policy(spec, policy, "epg", self.hidden, loss.needs, log_std=self.log_std)
        value = ValuePasses(self.value_epochs, self.minibatch, self.value_learning_rate)
        learner = SegmentLearner(agent, self, self.period, self.normalize, self.kl_stop, value)
        return learner, loss
