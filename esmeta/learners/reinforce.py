"""On-policy REINFORCE with GAE (Schulman et al. 2016, https://arxiv.org/abs/1506.02438).

One full-batch policy step per period, then V alone for some passes, as in the "VPG" that MetaGenRL
compares with (Spinning Up's ``algos/pytorch/vpg``); networks are EPG's (tanh, inputs normalised).
"""

from __future__ import annotations

from dataclasses import field, replace

from esmeta import errors
from esmeta.agent.policy import PolicyConfig
from esmeta.learners._options import OnPolicyOptions
from esmeta.options import options_class
from esmeta.rl.losses import Loss
from esmeta.rl.on_policy import SegmentLearner
from esmeta.types import Spec


@options_class
class Learner(OnPolicyOptions):
    """Options of REINFORCE, all of them shared; ``minibatch`` is that of V's passes."""

    period: int = 4000
    epochs: int = field(default=1, init=False)
    minibatch: int = 200
    learning_rate: float = 3e-3
    gae_lambda: float = 0.97
    value_epochs: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.positive_int("value_epochs", self.value_epochs, example=10)

    def make(
        self, spec: Spec, horizon: int, policy: PolicyConfig | None = None
    ) -> tuple[SegmentLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = self.loss(clip=0.0, kl_coef=0.0, value_coef=0.0)
        return self.learner(spec, policy, loss, replace(self, minibatch=self.period)), loss
