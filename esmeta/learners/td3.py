"""TD3 (Fujimoto, van Hoof & Meger 2018, https://arxiv.org/abs/1802.09477), and DDPG.

Sizes, exploration and schedule are MetaGenRL's; DDPG (Lillicrap et al. 2016,
https://arxiv.org/abs/1509.02971) is ``twin = false``, ``delay = 1``, ``target_noise = 0``.
"""

from __future__ import annotations

from esmeta import errors
from esmeta.learners._agent import Agent
from esmeta.learners._episodes import OVERS, Over
from esmeta.learners._loss import Loss
from esmeta.learners._off_policy_losses import DeterministicGradient
from esmeta.learners._replay import ReplayLearner
from esmeta.options import options_class
from esmeta.types import Spec


@options_class
class OffPolicyOptions:
    """Options of learners from a replay; see :class:`esmeta.learners._replay.ReplayLearner`.

    Attributes:
        hidden: widths of the ReLU layers of policy and critics, each with layer norm.
        period: environment steps between updates; as many update rounds follow.
        capacity: steps that the replay holds at most (a life's, where that is less).
        batch: transitions (or snippets) per step.
        critic_batch: transitions per critic step; 0: as many as a policy step sees.
        snippets: whether every whole episode of the replay is as likely to be drawn from
            (``episodes``, as in MetaGenRL's release) or every step (``steps``).
        start: steps of uniformly random actions at first.
        update_after: steps before the first update.
        gamma: discount.
        polyak: what targets keep of themselves.
        exploration: spread of actions, in units of their limit.
        target_noise: spread of the target's actions, in units of their limit.
        target_clip: limit of that noise.
        delay: critic steps per policy step.
        twin: the smaller of two critics is the target.
        learning_rate: of Adam.
        clip: global norm of the policy's gradient at most; 0: no limit.
    """

    hidden: tuple[int, ...] = (350, 350)
    period: int = 50
    capacity: int = 1_000_000
    batch: int = 100
    critic_batch: int = 0
    snippets: Over = "steps"
    start: int = 10_000
    update_after: int = 1_000
    gamma: float = 0.99
    polyak: float = 0.995
    exploration: float = 0.1
    target_noise: float = 0.2
    target_clip: float = 0.5
    delay: int = 2
    twin: bool = True
    learning_rate: float = 1e-3
    clip: float = 0.0

    def __post_init__(self) -> None:
        for width in self.hidden:
            errors.positive_int("hidden", width, example=64)
        for name in ("period", "capacity", "batch", "update_after", "delay"):
            errors.positive_int(name, getattr(self, name), example=100)
        for name in ("start", "critic_batch"):
            errors.non_negative_int(name, getattr(self, name), example=1000)
        errors.one_of("snippets", self.snippets, OVERS)
        for name in ("exploration", "target_noise", "target_clip", "clip"):
            errors.non_negative(name, getattr(self, name))
        errors.finite_positive("learning_rate", self.learning_rate, example=0.001)
        errors.fraction("gamma", self.gamma)
        errors.fraction("polyak", self.polyak)

    def learner(self, spec: Spec, horizon: int, loss: Loss) -> ReplayLearner:
        """The learner for a loss, which must fit into its replay."""
        agent = Agent(spec, self.hidden, style="relu", heads=loss.heads, std=self.exploration)
        learner = ReplayLearner(
            agent,
            period=self.period,
            capacity=min(self.capacity, horizon),
            batch=self.batch,
            critic_batch=self.critic_batch or self.batch * loss.snippet,
            snippets=self.snippets,
            start=self.start,
            update_after=self.update_after,
            gamma=self.gamma,
            polyak=self.polyak,
            target_noise=self.target_noise,
            target_clip=self.target_clip,
            delay=self.delay,
            twin=self.twin,
            learning_rate=self.learning_rate,
            clip=self.clip,
        )
        learner.check(loss)
        return learner


@options_class
class Learner(OffPolicyOptions):
    """Options of TD3: those of every learner from a replay."""

    def make(self, spec: Spec, horizon: int) -> tuple[ReplayLearner, Loss]:
        """The learner and its loss for tasks of ``spec``, lives of ``horizon`` steps."""
        loss = DeterministicGradient()
        return self.learner(spec, horizon, loss), loss
