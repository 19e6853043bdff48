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

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from esmeta import errors, names, older
from esmeta.agent.inner import inner_policy
from esmeta.agent.policy import Need, Policy, PolicyConfig
from esmeta.evaluator import check_chunk, members_of, numbers_at, on_device, score_agents
from esmeta.lives import AgentLives, Life, named, numbered
from esmeta.objectives._objective_network import ObjectiveNetwork, Time, Values, value_after
from esmeta.options import options_class
from esmeta.rl.diary import Scores
from esmeta.rl.losses import Loss
from esmeta.rl.off_policy import OffPolicy, ReplayLearner, ReplayOptions
from esmeta.rl.replay import Over
from esmeta.rng import Rng
from esmeta.tasks import remarked, task_groups
from esmeta.tree import size_of
from esmeta.types import Fitness, Params, Reference, State, Task


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
    saturation: float = remarked(0.0, "in the agents' loss")
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
        check_chunk(self.chunk)
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
        agent = inner_policy(
            task.spec, "metagenrl", self.hidden, needs, std=self.std, config=policy
        )
        return ReplayLearner(
            agent,
            self,
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
        device = torch.device(device)
        return MetaGenRLObjective(self, policy, task, trials=trials, seed=seed, device=device)


class Group(NamedTuple):
    """The agents of one environment on this rank, what they earned, and the rounds they owe."""

    life: Life
    scores: Scores
    owed: int


@dataclass(eq=False)
class MetaGenRLObjective:
    """What alpha is worth, and where it should go: it is a :class:`esmeta.types.MetaLoss`.

    Agent i lives in training task number i of its environment. Meta-test number k of a seed is a
    fresh agent in held-out task number k. ``inner`` is what agents are.
    """

    policy: ClassVar[None] = None

    config: Objective
    inner: Policy | None
    task: Task
    _: KW_ONLY
    trials: int
    seed: int
    device: torch.device

    def __post_init__(self) -> None:
        config = self.config
        self.network = ObjectiveNetwork(
            config.snippet, config.time, config.values, config.bound, config.saturation
        )
        self.shapes = self.network.shapes
        example = '[{name = "pendulum", horizon = 200}]'
        more = [
            names.from_table("task", table, "objective.more_tasks", example)
            for table in config.more_tasks
        ]
        self.environments = [
            self.agent_lives(task, self.seed, number)
            for number, task in enumerate([self.task, *more])
        ]

    def agent_lives(self, task: Task, seed: int, number: int = 0) -> AgentLives[ReplayLearner]:
        """Lives in one environment; ``number`` keeps environments apart."""
        config, learner = self.config, self.config.learner(task, self.inner and self.inner.config)
        lives = AgentLives(
            learner,
            task,
            Rng(seed).fold("environment", number).key if number else seed,
            self.device,
            endless=True,
            timeout_is_terminal=config.timeout_is_terminal,
            reward_scale=config.reward_scale,
        )
        lives.check_length()
        learner.check(self.network.loss({}))
        return lives

    def init(self, seed: int) -> Params:
        """Fresh alpha, leaves ``[1, ...]``."""
        return self.network.init(Rng(seed).fold("alpha"))

    def explain(self, gradient: bool) -> str:
        """In one line, what runs."""
        config = self.config
        return (
            f"objective function of {size_of(self.shapes):,} parameters; environments: "
            f"{len(self.environments)}, agents in each: {config.agents}, snippets per update: "
            f"{config.batch}"
        )

    # --- meta-training -------------------------------------------------------------------------

    def check_ranks(self, ranks: int) -> None:
        """Refuse more ranks than agents in an environment."""
        if ranks > self.config.agents:
            raise errors.UserError(
                f"objective.agents = {self.config.agents} is fewer than the {ranks} ranks; write "
                f"at least objective.agents = {ranks}, or start fewer ranks"
            )
        own = -(-self.config.agents // ranks)
        for lives in self.environments:
            lives.check_room(
                own + 2 * (lives.task is self.task),
                "the agents of a rank live on in one each, and at least two more are scored",
            )

    def _own(self, rank: int, size: int) -> range:
        count = self.config.agents
        return range(count * rank // size, count * (rank + 1) // size)

    def start(self, rank: int, size: int) -> list[Group]:
        """Fresh agents: this rank's share of those in each environment."""
        own = self._own(rank, size)
        index = torch.arange(own.start, own.stop, device=self.device)
        return [self._begun(lives, index) for lives in self.environments]

    def _begun(self, lives: AgentLives, index: Tensor) -> Group:
        scores = Scores.none(len(index), self.config.test_episodes, index.device)
        return Group(lives.begin(index, "train"), scores, 0)

    def rows(self, agents: list[Group]) -> int:
        """Agents of this rank, in all environments."""
        return sum(len(group.life.numbers) for group in agents)

    def save(self, agents: list[Group]) -> State:
        """Agents with their replays, leaves ``[P, ...]`` under a name per environment."""
        saved: State = {}
        for number, (lives, group) in enumerate(zip(self.environments, agents, strict=True)):
            own = lives.save(group.life, "train")
            own["owed"] = torch.full_like(own["index"], group.owed)
            own |= {f"scores.{i}": leaf.cpu() for i, leaf in enumerate(group.scores)}
            saved |= {f"{number}/{name}": leaf for name, leaf in own.items()}
        return saved

    def restore(self, saved: State, rank: int, size: int) -> list[Group]:
        """This rank's share of saved agents; goes on bit for bit where it is the share saved."""
        own, groups = self._own(rank, size), []
        for number, lives in enumerate(self.environments):
            mine = {
                name: leaf[own.start : own.stop]
                for name, leaf in named(saved, f"{number}/").items()
            }
            mine = on_device(older.agents(mine), self.device)
            begun = lives.begin(mine["index"], "train")
            scores = Scores(*numbered(mine, "scores."))
            life = lives.restore(begun, mine, "train")
            groups.append(Group(life, scores, int(mine["owed"][0])))
        return groups

    def loss(
        self, params: Params, agents: list[Group]
    ) -> tuple[list[Group], Tensor, dict[str, Tensor]]:
        """``delay`` update rounds, then ``-Q_1(s, pi_phi'(s))`` of each agent (eq. 6).

        See :class:`esmeta.types.MetaLoss`. Agents first act, where their rounds are used up.
        """
        low, groups, losses = 0, [], []
        columns: dict[str, list[Tensor]] = {}
        for lives, group in zip(self.environments, agents, strict=True):
            high = low + len(group.life.numbers)
            alpha = {name: leaf[low:high] for name, leaf in params.items()}
            before = group.life.lived
            group = self._live(lives, group, {k: v.detach() for k, v in alpha.items()})
            losses.append(-self._value(lives, group.life.state, alpha))
            groups.append(group)
            count, scores = group.life.lived, group.scores
            taken = torch.full_like(scores.earned, count - before * (count >= before))
            found = {"env_steps": taken, "return": scores.recent.nanmean(dim=1)}
            for name, column in found.items():
                columns.setdefault(name, []).append(column)
            low = high
        return groups, torch.cat(losses), {k: torch.cat(v) for k, v in columns.items()}

    def share(self, steps: int) -> float:
        """The learned loss's share of the policies' after so many steps of meta-training."""
        done = steps - self.config.anneal_after
        if done >= self.config.anneal:
            return 1.0
        return max(0.0, done / max(1, self.config.anneal))

    def _live(self, lives: AgentLives[ReplayLearner], group: Group, alpha: Params) -> Group:
        config, (life, scores, owed) = self.config, group
        learner, rng = lives.learner, lives.learning("train")
        if config.lifetime and owed == 0 and life.lived >= config.lifetime:
            life, scores, owed = self._begun(lives, life.numbers + config.agents)
        elif owed == 0 and self._is_due(life.lived):
            draw = rng.fold("policy", life.lived)
            life = life._replace(state=learner.with_fresh_policies(life.state, draw))
        while owed == 0:
            life, new = lives.act(life, "train")
            state = learner.keep(life.state, lives.taught(new))
            life, scores = life._replace(state=state), scores.then(new)
            owed = config.period if learner.learns(life.state) else 0
        loss = self.network.loss(alpha, self.share(life.lived))
        state = learner.rounds(life.state, loss, rng, config.delay)
        return Group(life._replace(state=state), scores, owed - config.delay)

    def _is_due(self, lived: int) -> bool:
        """Whether policies are as old as they get."""
        age = self.config.policy_lifetime
        return age > 0 and lived >= self.config.update_after and lived % age == 0

    def _value(self, lives: AgentLives[ReplayLearner], state: OffPolicy, alpha: Params) -> Tensor:
        """What critics think of the policies after learning: ``[P]``, differentiable in alpha."""
        config, learner = self.config, lives.learner
        rng = lives.learning("train").fold("meta", int(state.updates[0]))
        count, size = config.inner_steps, config.batch
        drawn = learner.draw(state, rng, count * size + config.extra, config.snippet)
        batches = [drawn.trials(k * size, (k + 1) * size) for k in range(count)]
        return value_after(
            learner.agent, state.params, self.network.loss(alpha), batches, drawn,
            rate=config.inner_rate, reduction=config.inner_reduction, clip=config.inner_clip,
        )  # fmt: skip

    # --- meta-test -----------------------------------------------------------------------------

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        """Scores of agents trained by frozen alphas on the training tasks of ``step``."""
        lives = self.agent_lives(self.task, Rng(self.seed).fold("fitness").key)
        return self._scores(params, numbers_at(step, self.trials), lives, "train")

    def heldout(
        self,
        params: Params | Tensor,
        trials: int,
        seed: int | None = None,
        first: int = 0,
        split: str = "test",
    ) -> Fitness:
        """Scores of agents ``first`` .. ``trials`` - 1 of a split, trained by frozen alphas.

        The return is the mean of the agent's last ``test_episodes`` training episodes, exploration
        included. Metrics: ``first``, the return of its first episode (random actions, where
        ``random`` is long enough), and ``life``, the mean over all episodes.
        """
        lives = self.agent_lives(self.task, self.seed if seed is None else seed)
        return self._scores(params, torch.arange(first, trials, device="cpu"), lives, split)

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Numbers ``[B]``, the same for agents whose tasks share randomness."""
        return task_groups(self.task, index, split)

    def trained(
        self, loss: Loss, index: Tensor, lives: AgentLives, split: str
    ) -> tuple[Life, Scores]:
        """Fresh agents ``index [P]`` after their training by ``loss``, and what they earned."""
        life = lives.begin(index, split)
        scores = Scores.none(len(index), self.config.test_episodes, self.device)
        for _ in range(self.config.steps // self.config.period):
            life, new = lives.advance(life, loss, split)
            scores = scores.then(new)
        return life, scores

    @torch.no_grad()
    def _scores(
        self, params: Params | Tensor, index: Tensor, lives: AgentLives, split: str
    ) -> Fitness:
        tree = members_of(params, self.shapes, self.device)
        most = max(2, lives.room(self.config.chunk))  # beside the agents of meta-training

        def score(members: Tensor, numbers: Tensor) -> dict[str, Tensor]:
            loss = self.network.loss({name: leaf[members] for name, leaf in tree.items()})
            life, scores = self.trained(loss, numbers, lives, split)
            found = {"return": scores.recent.nanmean(dim=1), "first": scores.first}
            found["steps"] = torch.full_like(scores.episodes, life.lived)
            found["life"] = scores.total / scores.episodes
            return found

        population = len(next(iter(tree.values())))
        return score_agents(score, population, index, most, self.device, split != "train")
