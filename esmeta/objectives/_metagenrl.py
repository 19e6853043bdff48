"""MetaGenRL's objective: a population of actor-critics, and what alpha is worth to them.

See :mod:`esmeta.objectives.metagenrl`, which has its options.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from esmeta import errors, names
from esmeta.evaluator import on_device, score_agents
from esmeta.learners._loss import Loss
from esmeta.learners._training import Agents, Training
from esmeta.objectives._objective_network import ObjectiveNetwork, value_after
from esmeta.rng import Rng
from esmeta.tasks import task_groups
from esmeta.tree import unravel_shapes
from esmeta.types import Fitness, Hosted, Params, State, Task

if TYPE_CHECKING:
    from esmeta.objectives.metagenrl import Objective


class Group(NamedTuple):
    """The agents of one environment on this rank, and the update rounds they still owe."""

    agents: Agents
    owed: int


class MetaGenRLObjective:
    """What alpha is worth, and where it should go: it is a :class:`esmeta.types.MetaLoss`.

    Agent i lives in training task number i of its environment. Meta-test number k of a seed is a
    fresh agent in held-out task number k.
    """

    policy = None

    def __init__(
        self,
        config: Objective,
        task: Task,
        *,
        trials: int,
        seed: int,
        device: str | torch.device,
    ) -> None:
        self.config = config
        self.task = task
        self.trials = trials
        self.seed = seed
        self.device = torch.device(device)
        self.network = ObjectiveNetwork(
            config.snippet, config.time, config.values, config.bound, config.saturation
        )
        self.shapes = self.network.shapes
        example = '[{name = "pendulum", horizon = 200}]'
        more = [
            names.from_table("task", table, "objective.more_tasks", example)
            for table in config.more_tasks
        ]
        self.trainings = [
            self.training(t, "train", seed, number) for number, t in enumerate([task, *more])
        ]

    def training(self, task: Task, split: str, seed: int, number: int = 0) -> Training:
        """How agents of one environment are trained; ``number`` keeps environments apart."""
        config, learner = self.config, self.config.learner(task)
        seed = Rng(seed).fold("environment", number).key if number else seed
        training = Training(
            learner, task, seed, split, self.device, config.test_episodes,
            config.timeout_is_terminal, config.reward_scale,
        )  # fmt: skip
        training.check()
        learner.check(self.network.loss({}))
        return training

    def init(self, seed: int) -> Params:
        """Fresh alpha, leaves ``[1, ...]``."""
        return self.network.init(Rng(seed).fold("alpha"))

    def explain(self, gradient: bool) -> str:
        """In one line, what runs."""
        config = self.config
        count = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        return (
            f"objective function of {count:,} parameters; environments: {len(self.trainings)}, "
            f"agents in each: {config.agents}, snippets per update: {config.batch}"
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
        for training in self.trainings:
            training.check_room(own + 2 * (training.task is self.task))

    def _own(self, rank: int, size: int) -> range:
        count = self.config.agents
        return range(count * rank // size, count * (rank + 1) // size)

    def start(self, rank: int, size: int) -> list[Group]:
        """Fresh agents: this rank's share of those in each environment."""
        own = self._own(rank, size)
        index = torch.arange(own.start, own.stop, device=self.device)
        return [Group(training.begin(index), 0) for training in self.trainings]

    def rows(self, agents: list[Group]) -> int:
        """Agents of this rank, in all environments."""
        return sum(len(group.agents.state.index) for group in agents)

    def save(self, agents: list[Group]) -> State:
        """Agents with their replays, leaves ``[P, ...]`` under a name per environment."""
        saved: State = {}
        for number, (training, group) in enumerate(zip(self.trainings, agents, strict=True)):
            own = training.save(group.agents)
            own["owed"] = torch.full_like(own["count"], group.owed)
            saved |= {f"{number}/{name}": leaf for name, leaf in own.items()}
        return saved

    def restore(self, saved: State, rank: int, size: int) -> list[Group]:
        """This rank's share of saved agents; goes on bit for bit where it is the share saved."""
        own, groups = self._own(rank, size), []
        for number, training in enumerate(self.trainings):
            mine = {
                name.partition("/")[2]: leaf[own.start : own.stop]
                for name, leaf in saved.items()
                if name.startswith(f"{number}/")
            }
            groups.append(Group(training.restore(mine), int(mine.pop("owed")[0])))
        return groups

    def loss(
        self, params: Params, agents: list[Group]
    ) -> tuple[list[Group], Tensor, dict[str, Tensor]]:
        """``delay`` update rounds, then ``-Q_1(s, pi_phi'(s))`` of each agent (eq. 6).

        See :class:`esmeta.types.MetaLoss`. Agents first act, where their rounds are used up.
        """
        low, groups, losses = 0, [], []
        columns: dict[str, list[Tensor]] = {}
        for training, group in zip(self.trainings, agents, strict=True):
            high = low + len(group.agents.state.index)
            alpha = {name: leaf[low:high] for name, leaf in params.items()}
            before = group.agents.state.replay.count
            group = self._live(training, group, {k: v.detach() for k, v in alpha.items()})
            state, scores = group.agents.state, group.agents.scores
            losses.append(-self._value(training, group.agents, alpha))
            groups.append(group)
            count = state.replay.count
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

    def _live(self, training: Training, group: Group, alpha: Params) -> Group:
        config, (agents, owed) = self.config, group
        if config.lifetime and owed == 0 and agents.state.replay.count >= config.lifetime:
            agents = training.begin(agents.state.index + config.agents)
        elif owed == 0 and self._is_due(agents):
            rng = training.rng().fold("policy", agents.state.replay.count)
            state = training.learner.with_fresh_policies(agents.state, rng)
            agents = agents._replace(state=state)
        while owed == 0:
            agents, new = training.act(agents)
            replay = agents.state.replay.add(new)
            agents = agents._replace(state=agents.state._replace(replay=replay))
            owed = config.period if replay.count >= config.update_after else 0
        loss = self.network.loss(alpha, self.share(agents.state.replay.count))
        state = training.learner.rounds(agents.state, loss, training.rng(), config.delay)
        return Group(agents._replace(state=state), owed - config.delay)

    def _is_due(self, agents: Agents) -> bool:
        """Whether policies are as old as they get."""
        age, count = self.config.policy_lifetime, agents.state.replay.count
        return age > 0 and count >= self.config.update_after and count % age == 0

    def _value(self, training: Training, agents: Agents, alpha: Params) -> Tensor:
        """What critics think of the policies after learning: ``[P]``, differentiable in alpha."""
        config, state = self.config, agents.state
        rng = training.rng().fold("meta", int(state.updates[0]))
        count, size = config.inner_steps, config.batch
        number = count * size + config.extra
        drawn = state.replay.sample(rng, state.index, number, config.snippet, config.snippets)
        batches = [drawn.part(k * size, (k + 1) * size) for k in range(count)]
        return value_after(
            training.learner.agent, state.params, self.network.loss(alpha), batches, drawn,
            rate=config.inner_rate, reduction=config.inner_reduction, clip=config.inner_clip,
        )  # fmt: skip

    # --- meta-test -----------------------------------------------------------------------------

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        """Scores of agents trained by frozen alphas on the training tasks of ``step``."""
        first = torch.as_tensor(step, dtype=torch.int64, device="cpu").unsqueeze(-1) * self.trials
        training = self.training(self.task, "train", Rng(self.seed).fold("fitness").key)
        return self._scores(params, first + torch.arange(self.trials, device="cpu"), training)

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
        training = self.training(self.task, split, self.seed if seed is None else seed)
        return self._scores(params, torch.arange(first, trials, device="cpu"), training)

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Numbers ``[B]``, the same for agents whose tasks share randomness."""
        return task_groups(self.task, index, split)

    def lives(self, loss: Loss, index: Tensor, training: Training) -> Iterator[Agents]:
        """Fresh agents ``index [P]`` after each window of their training by ``loss``."""
        agents = training.begin(index)
        for _ in range(self.config.steps // self.config.period):
            agents, new = training.act(agents)
            state = training.learner.update(agents.state, new, loss, training.rng())
            agents = agents._replace(state=state)
            yield agents

    @torch.no_grad()
    def _scores(self, params: Params | Tensor, index: Tensor, training: Training) -> Fitness:
        tree = unravel_shapes(params, self.shapes) if isinstance(params, Tensor) else params
        tree = on_device({**tree, "number": index}, self.device)
        numbers, trials = tree.pop("number"), index.shape[-1]
        population = len(next(iter(tree.values())))
        numbers = numbers.expand(population, trials).reshape(-1)
        most = self.config.chunk
        if isinstance(training.env, Hosted):  # beside the agents of meta-training
            most = min(most, max(2, training.env.most_worlds))

        def score(rows: Tensor) -> dict[str, Tensor]:
            alpha = {name: leaf[rows // trials] for name, leaf in tree.items()}
            *_, trained = self.lives(self.network.loss(alpha), numbers[rows], training)
            scores = trained.scores
            found = {"return": scores.recent.nanmean(dim=1), "first": scores.first}
            found["steps"] = torch.full_like(scores.episodes, trained.state.replay.count)
            found["life"] = scores.total / scores.episodes
            return found

        held_out = training.split != "train"
        return score_agents(score, (population, trials), most, self.device, held_out)
