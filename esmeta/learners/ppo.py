"""PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347): clipped policy gradient with GAE.

Defaults are EPG's: V is learned in the same minibatches with a coefficient, nothing stops a pass
early, networks are tanh, separate for policy and V, inputs normalised. ``value_epochs``,
``kl_stop`` and ``log_std`` make the recipe of Spinning Up, MetaGenRL's baseline
(https://github.com/openai/spinningup, ``algos/pytorch/ppo``).
"""

from __future__ import annotations

from esmeta import errors
from esmeta.agent.policy import PolicyConfig
from esmeta.learners._options import OnPolicyOptions
from esmeta.options import options_class
from esmeta.rl.losses import Loss
from esmeta.rl.on_policy import SegmentLearner
from esmeta.types import Spec


@options_class
class Learner(OnPolicyOptions):
    """Options of PPO, besides those of every hand-written learner from the newest steps.

    V's own passes are in minibatches of the same size; with any ``value_epochs``, V is not in the
    other loss, and neither is ``value_coef``.

    Attributes:
        clip: of the probability ratio.
        kl_coef: weight of KL(old || new).
        value_coef: weight of V's squared error in that loss.
        kl_stop: passes end before one that begins with a KL(old || new) above it (0: never).
    """

    clip: float = 0.2
    kl_coef: float = 0.0
    value_coef: float = 1.0
    kl_stop: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.finite_positive("clip", self.clip, example=0.2)
        errors.non_negative("kl_coef", self.kl_coef)
        errors.non_negative("value_coef", self.value_coef)
        errors.non_negative("kl_stop", self.kl_stop, example=0.015)

    def make(
        self, spec: Spec, horizon: int, policy: PolicyConfig | None = None
    ) -> tuple[SegmentLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = self.loss(self.clip, self.kl_coef, 0.0 if self.value_epochs else self.value_coef)
        return self.learner(spec, policy, loss, self, self.kl_stop), loss
