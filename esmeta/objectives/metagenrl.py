"""MetaGenRL: descend the loss that agents learn by, through their critics.

Kirsch, van Steenkiste & Schmidhuber, "Improving Generalization in Meta Reinforcement Learning using
Learned Objectives", ICLR 2020, https://arxiv.org/abs/1910.04098. Theta is alpha, the parameters of
an objective function (:mod:`_objective_network`). A population of actor-critics lives as long as
the run: critics learn by temporal differences, policies by the objective function, and it learns
from what the critics think of policies that it has just updated. A held-out score is the return of
fresh agents that are trained by the frozen objective function alone.

What differs from the release: time limits are no terminal states and terminal steps earn nothing
extra (options bring both back), all agents act in lockstep for ``period`` steps before as many
update rounds, and the short ends of episodes are masked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

from esmeta import errors
from esmeta.agent.policy import Need, Policy, PolicyConfig
from esmeta.learners import inner_policy
from esmeta.objectives._metagenrl import MetaGenRLObjective
from esmeta.objectives._objective_network import Time, Values
from esmeta.options import options_class
from esmeta.rl.off_policy import ReplayLearner, ReplayOptions
from esmeta.rl.replay import Over
from esmeta.types import Reference, Task


@options_class
class Objective(ReplayOptions):
    """Options of MetaGenRL; the defaults are the paper's.

    Those of :class:`esmeta.rl.off_policy.ReplayOptions` are its agents': ``batch`` counts snippets,
    and critics see ``batch * snippet`` transitions per step if ``critic_batch`` is 0. ``[policy]``
    describes the agents' policies: with ``policy.name = "none"`` they are the published ones, which
    remember nothing, with layers ``hidden``, as the critics always have.

    Attributes:
        agents: in each environment, over all ranks.
        more_tasks: other environments, e.g. ``[{name = "hopper", horizon = 1000}]``, each with as
            many agents as the task of the run.
        steps: environment steps of an agent's training in meta-test.
        snippet: steps of a snippet.
        policy_rate: rate of the policies' Adam, if another (0: the same).
        extra: snippets on which updated policies are judged, besides those they were updated on.
        inner_steps: updates of the policy before it is judged, on snippets of their own.
        inner_rate: learning rate of these.
        inner_reduction: what they descend, the ``sum`` over the batch (the release) or its mean.
        inner_clip: norm of that gradient at most (0: no limit). A limit that is mostly reached has
            theta learn a direction, and agents' own clipped Adam steps use nothing else.
        saturation: factor on the mean squared excess over 1 of what enters the policies' tanh, a
            term of every loss of theirs. Beyond 3 or so no gradient is left, theta's neither.
        anneal: steps over which the share of ``-Q(s, pi(s))`` in the policy's loss falls to zero in
            meta-training.
        anneal_after: steps before that, in which it is the whole loss.
        lifetime: steps after which agents of meta-training are replaced by fresh ones (0: never).
        policy_lifetime: steps after which they begin with a fresh policy, but keep their critics
            and their replay (0: never): theta then meets policies that have yet to learn beside
            critics that know what to tell it.
        random: steps of uniformly random actions at first.
        reward_scale: factor on the rewards that agents learn from; scores are not scaled.
        std: spread of exploring actions, in units of the action limit.
        time: t as ``snippet``, ``episode`` or ``none``.
        values: V as ``both``, ``now`` (no V_{t+1}) or ``none``.
        bound: eta of ``eta tanh(l / eta)``.
        terminal_bonus: added to the critics' target of terminal states (1 in the release).
        timeout_is_terminal: critics take time limits for terminal states (true in the release).
        test_episodes: last episodes of an agent whose mean return is its score.
        chunk: agents per batch in meta-test.
    """

    agents: int = 20
    more_tasks: tuple[dict[str, Any], ...] = ()
    steps: int = 1_000_000
    snippet: int = 20
    snippets: Over = "episodes"
    extra: int = 100
    inner_steps: int = 1
    inner_rate: float = 1e-3
    inner_reduction: Literal["sum", "mean"] = "sum"
    inner_clip: float = 0.0
    saturation: float = 0.0
    policy_rate: float = 0.0
    clip: float = 1.0
    anneal: int = 10_000
    anneal_after: int = 0
    lifetime: int = 0
    policy_lifetime: int = 0
    random: int = 10_000
    reward_scale: float = 1.0
    std: float = 0.1
    time: Time = "snippet"
    values: Values = "both"
    bound: float = 1000.0
    terminal_bonus: float = 0.0
    timeout_is_terminal: bool = False
    test_episodes: int = 5
    chunk: int = 64
    figures: ClassVar[str] = "esmeta.analysis.objectives:figures"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("agents", "steps", "snippet", "inner_steps", "test_episodes"):
            errors.positive_int(name, getattr(self, name), example=20)
        for name in ("extra", "anneal", "anneal_after", "lifetime", "policy_lifetime", "random"):
            errors.non_negative_int(name, getattr(self, name), example=100)
        for name in ("inner_rate", "std", "reward_scale"):
            errors.finite_positive(name, getattr(self, name), example=0.001)
        for name in ("inner_clip", "saturation", "policy_rate", "terminal_bonus"):
            errors.non_negative(name, getattr(self, name), example=1.0)
        errors.one_of("inner_reduction", self.inner_reduction, ("sum", "mean"))
        errors.positive_int("chunk", self.chunk, example=64)
        self._check_lengths()

    def _check_lengths(self) -> None:
        if 0 < self.lifetime <= self.update_after:
            raise errors.UserError(
                f"lifetime = {self.lifetime}: agents would never learn, whose updates begin after "
                f"{self.update_after} steps; write lifetime = {4 * self.update_after}"
            )
        if self.policy_lifetime % self.period:
            raise errors.UserError(
                f"policy_lifetime = {self.policy_lifetime}: must be a multiple of period = "
                f"{self.period}, as policies are replaced between updates; write policy_lifetime = "
                f"{max(1, round(self.policy_lifetime / self.period)) * self.period}"
            )
        if self.chunk < 2:
            raise errors.UserError(
                "chunk = 1: must be at least 2 (one rounds differently); write chunk = 64"
            )
        if self.period % self.delay:
            raise errors.UserError(
                f"period = {self.period}: must be a multiple of delay = {self.delay}, the update "
                f"rounds per step of theta; write for example period = {self.delay * 25}"
            )
        if self.steps < max(self.update_after, self.period):
            raise errors.UserError(
                f"steps = {self.steps}: no agent would be updated, as updates begin after "
                f"update_after = {self.update_after} steps and every period = {self.period}; "
                f"write for example steps = {20 * max(self.update_after, self.period)}"
            )

    def reference(self, task: Task) -> Reference:
        """The task's scores per episode."""
        known, episodes = task.reference, task.spec.episodes_per_trial
        return Reference(known.random / episodes, known.best / episodes, f"{known.note}; each")

    def learner(self, task: Task, policy: PolicyConfig | None) -> ReplayLearner:
        """What trains agents of one task."""
        needs: frozenset[Need] = frozenset({"critics"})
        agent = inner_policy(task.spec, policy, "metagenrl", self.hidden, needs, std=self.std)
        options = replace(self, critic_batch=self.critic_batch or self.batch * self.snippet)
        return ReplayLearner(
            agent,
            options,
            start=self.random,
            policy_rate=self.policy_rate,
            terminal_bonus=self.terminal_bonus,
        )

    def make(
        self,
        policy: Policy | None,
        task: Task,
        *,
        trials: int,
        seed: int,
        device: str | torch.device,
    ) -> MetaGenRLObjective:
        """Tie the objective to its tasks; ``policy`` is what its agents are."""
        return MetaGenRLObjective(self, policy, task, trials=trials, seed=seed, device=device)
