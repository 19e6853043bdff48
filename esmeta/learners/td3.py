"""TD3 (Fujimoto, van Hoof & Meger 2018, https://arxiv.org/abs/1802.09477), and DDPG.

Sizes, exploration and schedule are MetaGenRL's; DDPG (Lillicrap et al. 2016,
https://arxiv.org/abs/1509.02971) is ``twin = false``, ``delay = 1``, ``target_noise = 0``.
"""

from __future__ import annotations

from esmeta.agent.policy import PolicyConfig
from esmeta.learners._options import OffPolicyOptions
from esmeta.options import options_class
from esmeta.rl.losses import Loss
from esmeta.rl.off_policy import DeterministicGradient, ReplayLearner
from esmeta.types import Spec


@options_class
class Learner(OffPolicyOptions):
    """Options of TD3, all of them shared; policies without a memory need no longer ``snippet``."""

    def make(
        self, spec: Spec, horizon: int, policy: PolicyConfig | None = None
    ) -> tuple[ReplayLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = DeterministicGradient(self.snippet)
        return self.learner(spec, horizon, loss, policy), loss
