"""Off-policy REINFORCE with GAE: MetaGenRL's own control (https://arxiv.org/abs/1910.04098).

Agent, replay, critics and schedule are MetaGenRL's, so that only the policy's loss is another: it
pulls towards actions of the replay whose advantage is positive (``reinforce`` in ``model.py`` of
https://github.com/louiskirsch/metagenrl).
"""

from __future__ import annotations

from esmeta import errors
from esmeta.agent.policy import PolicyConfig
from esmeta.learners._options import OffPolicyOptions
from esmeta.options import options_class
from esmeta.rl.losses import Loss
from esmeta.rl.off_policy import OffPolicyReinforce, ReplayLearner
from esmeta.rl.replay import Over
from esmeta.types import Spec


@options_class
class Learner(OffPolicyOptions):
    """Options of off-policy REINFORCE, besides those of every hand-written learner from a replay.

    Attributes:
        gae_lambda: of the advantages, which are estimated within a ``snippet``.
    """

    snippets: Over = "episodes"
    clip: float = 1.0
    snippet: int = 20
    gae_lambda: float = 0.97

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.fraction("gae_lambda", self.gae_lambda)

    def make(
        self, spec: Spec, horizon: int, policy: PolicyConfig | None = None
    ) -> tuple[ReplayLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = OffPolicyReinforce(self.snippet, self.gamma, self.gae_lambda)
        return self.learner(spec, horizon, loss, policy), loss
