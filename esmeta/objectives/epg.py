"""EPG: evolve the loss that agents learn by.

Houthooft et al., "Evolved Policy Gradients", NeurIPS 2018, https://arxiv.org/abs/1802.04821. Theta
is eta, the parameters of a loss network (:mod:`_loss_network`). One evaluation of a member is
``task.trials`` lives: in each, a fresh agent is given a task, and learns by gradient descent on the
member's loss of its own experience. Fitness is the return of the trained policy after its life. At
first the loss is mixed with PPO's, whose share falls to zero with the generations; held-out lives
never see PPO's.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from esmeta import errors
from esmeta.agent.inner import inner_policy
from esmeta.agent.policy import Need, Policy
from esmeta.evaluator import (
    check_chunk,
    even_batches,
    members_of,
    numbers_at,
    on_device,
    score_agents,
)
from esmeta.lives import AgentLives, Life, Lives
from esmeta.objectives._loss_network import LossNetwork
from esmeta.options import options_class
from esmeta.rl.losses import Loss, Mixture, PolicyGradient
from esmeta.rl.on_policy import SegmentLearner, SegmentOptions
from esmeta.rng import Rng
from esmeta.summary import linked
from esmeta.tasks import aid, remarked, single, task_groups
from esmeta.tree import shapes_of, size_of
from esmeta.types import Fitness, Params, Reference, State, Task


@options_class
class Objective(SegmentOptions):
    """Options of EPG; the defaults are those of its RandomHopper where nothing else is said.

    Those of :class:`esmeta.rl.on_policy.SegmentOptions` are its agents'; a life is the task's
    horizon. ``[policy]`` describes the agents: with ``policy.name = "none"`` they are the published
    ones, separate networks for policy and V that remember nothing, with layers ``hidden``.

    Attributes:
        buffer: steps of the past that the loss network reads, N.
        reward: whether the loss network sees rewards (off: no-reward EPG).
        memory: whether the memory unit learns (off as in the released launcher).
        saturation: factor on the mean squared excess of the policies' means over the limits of the
            actions, added to the learned loss; 0: none, as published. Where all actions are clipped
            to one, members do not differ, and evolution sees nothing.
        evolve_init: evolve the policy's first parameters too.
        ppo_generations: generations over which PPO's share falls from ``ppo_first`` to
            ``ppo_last``; 0: no PPO.
        ppo_first: share of PPO's loss at first.
        ppo_last: share of PPO's loss that stays.
        life_first: share of its updates that a life has in the first generation; short lives are
            many. Held-out lives and those of ``nres`` and ``pes`` are whole ones.
        life_generations: generations over which lives grow from it to their whole length, by the
            same factor in each; 0: they are whole from the start.
        test_episodes: episodes after a life whose mean return is its fitness.
        test_steps: steps of such an episode at most.
        twins: lives in a row that share first networks, noise and minibatches, so that they differ
            by their tasks alone. With twin tasks of opposite rewards (``task.mirrored``) whatever a
            loss does without reading rewards cancels exactly.
        chunk: agents per batch.
    """

    period: int = 64
    epochs: int = 1
    minibatch: int = 32
    buffer: int = 512
    reward: bool = True
    memory: bool = False
    saturation: float = remarked(0.0, "in the agents' loss")
    evolve_init: bool = False
    ppo_generations: int = 250
    ppo_first: float = 1.0
    ppo_last: float = 0.0
    life_first: float = 1.0
    life_generations: int = 0
    test_episodes: int = 3
    test_steps: int = 1000
    twins: int = aid(1)
    chunk: int = 64
    figures: ClassVar[str] = "esmeta.analysis.losses:figures"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("buffer", "test_episodes", "test_steps", "twins"):
            errors.positive_int(name, getattr(self, name), example=64)
        errors.non_negative_int("ppo_generations", self.ppo_generations, example=100)
        errors.fraction("ppo_first", self.ppo_first)
        errors.fraction("ppo_last", self.ppo_last)
        errors.non_negative("saturation", self.saturation)
        errors.fraction("life_first", self.life_first)
        errors.finite_positive("life_first", self.life_first, example=0.25)
        errors.non_negative_int("life_generations", self.life_generations, example=100)
        check_chunk(self.chunk)
        if self.period > self.buffer:
            raise errors.UserError(
                f"period = {self.period}: must not exceed buffer = {self.buffer}, which holds the "
                f"newest steps; write for example buffer = {4 * self.period}"
            )

    def reference(self, task: Task) -> Reference:
        """The task's scores in proportion to the length of a test episode."""
        task = single(task, min(self.test_steps, task.spec.horizon))
        known, horizon = task.reference, task.spec.horizon
        part = min(self.test_steps, horizon) / horizon
        note = f"{known.note}; {self.test_steps} of the {horizon} steps they are given for"
        return Reference(known.random * part, known.best * part, note)

    def make(
        self,
        policy: Policy | None,
        task: Task,
        *,
        trials: int,
        seed: int,
        device: str | torch.device,
    ) -> EpgObjective:
        """Tie the objective to a task distribution; ``policy`` is what its agents are."""
        device = torch.device(device)
        return EpgObjective(self, policy, task, trials=trials, seed=seed, device=device)


class Part(NamedTuple):
    """One batch of agents: ``rows`` of all agents, their lives, and their last score ``[A]``."""

    rows: Tensor
    life: Life
    score: Tensor


@dataclass(eq=False)
class EpgObjective:
    """What eta is worth; agents of all members are rows of one batch, as ``inner`` describes them.

    Step k uses lives k * trials .. (k + 1) * trials - 1 of the run's seed, on all ranks and for all
    members. They can be run in windows of updates: it is a :class:`esmeta.types.Lifetimes`.
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
        config, task = self.config, self.task
        self.network = LossNetwork(
            task.spec, config.buffer, config.reward, config.memory, config.saturation
        )
        self._ppo = PolicyGradient(clip=0.2, kl_coef=0.001)
        agent = self._agent(value=config.ppo_generations > 0)
        self.learner = SegmentLearner(agent, config, config.buffer)
        self.lives = AgentLives(
            self.learner,
            task,
            self.seed,
            self.device,
            test_episodes=config.test_episodes,
            test_steps=config.test_steps,
            twins=config.twins,
        )
        self.lives.check_own()
        self.lives.check_length()
        self._chunk = self.lives.most_agents(config.chunk)
        first = shapes_of(self._init_leaves()) if config.evolve_init else {}
        self.shapes = {**self.network.shapes, **first}

    # --- theta ---------------------------------------------------------------------------------

    def init(self, seed: int) -> Params:
        """Fresh eta, leaves ``[1, ...]``."""
        rng = Rng(seed).fold("eta")
        eta = self.network.init(rng)
        return {**eta, **self._init_leaves()} if self.config.evolve_init else eta

    def _init_leaves(self) -> Params:
        agent = self.learner.agent
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        return agent.part(agent.init_at(Rng(self.seed).fold("eta"), first), "actor")

    def explain(self, gradient: bool) -> str:
        """In one line, what runs."""
        updates, period = self.lives.updates, self.config.period
        return (
            f"loss network of {size_of(self.shapes):,} parameters; {self.trials} lives of "
            f"{updates} updates every {period} steps"
        )

    def with_value(self) -> AgentLives:
        """Its lives with agents that also have V, as hand-written losses need it."""
        return replace(self.lives, learner=replace(self.learner, agent=self._agent(value=True)))

    def _agent(self, *, value: bool) -> Policy:
        needs: frozenset[Need] = frozenset({"unit", "value"} if value else {"unit"})
        hidden, config = self.config.hidden, self.inner and self.inner.config
        return inner_policy(self.task.spec, "epg", hidden, needs, std=1.0, config=config)

    def share(self, generation: int) -> float:
        """PPO's share of the loss in a generation."""
        first, last = self.config.ppo_first, self.config.ppo_last
        if self.config.ppo_generations == 0:
            return 0.0
        return last + (first - last) * max(0.0, 1.0 - generation / self.config.ppo_generations)

    def updates(self, generation: int) -> int:
        """Updates of a life in a generation."""
        whole, first = self.lives.updates, self.config.life_first
        if self.config.life_generations == 0:
            return whole
        left = max(0.0, 1.0 - generation / self.config.life_generations)
        return max(1, round(whole * first**left))

    # --- fitness -------------------------------------------------------------------------------

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        """Returns after lives on the tasks of ``step``."""
        if isinstance(step, Tensor):
            for option in ("ppo_generations", "life_generations"):
                if getattr(self.config, option):
                    raise errors.UserError(
                        "optimizer.tasks = 'per_pair' does not say which generation it is, which "
                        f"{option} counts; write optimizer.tasks = 'shared', or "
                        f"objective.{option} = 0"
                    )
            share, updates = 0.0, self.lives.updates
        else:
            share, updates = self.share(step), self.updates(step)
        index = numbers_at(step, self.trials)
        return self._scores(self._members(params), index, "train", share, updates=updates)

    def heldout(
        self,
        params: Params | Tensor,
        trials: int,
        seed: int | None = None,
        first: int = 0,
        split: str = "test",
    ) -> Fitness:
        """Returns after lives ``first`` .. ``trials`` - 1 of a split, by the learned loss alone.

        Metrics: ``untrained``, the return of the agents before they learned, and ``life``, the
        mean reward per step while they did.
        """
        lives = self.lives if seed is None else replace(self.lives, seed=seed)
        index = torch.arange(first, trials, device="cpu")
        return self._scores(self._members(params), index, split, 0.0, lives, more=True)

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Numbers ``[B]``, the same for lives that share a task's randomness or first networks."""
        return linked(task_groups(self.task, index, split), index // self.config.twins)

    def _members(self, params: Params | Tensor) -> Params:
        return members_of(params, self.shapes, self.device)

    def _eta(self, params: Params, members: Tensor) -> tuple[Params, Params]:
        """The loss network's leaves and the policy's first ones of agents, by whose they are."""
        own = {name: leaf[members] for name, leaf in params.items()}
        loss = {name: leaf for name, leaf in own.items() if name in self.network.shapes}
        return loss, {name: leaf for name, leaf in own.items() if name not in loss}

    def loss(self, eta: Params, share: float) -> Loss:
        """The loss of agents with ``eta [P, ...]``, mixed with PPO's."""
        learned = self.network.loss(eta)
        return Mixture(learned, self._ppo, share) if share > 0 else learned

    def _scores(
        self,
        params: Params,
        index: Tensor,
        split: str,
        share: float,
        lives: AgentLives | None = None,
        *,
        updates: int = 0,
        more: bool = False,
    ) -> Fitness:
        lives = lives or self.lives
        updates = updates or lives.updates

        def score(members: Tensor, numbers: Tensor) -> dict[str, Tensor]:
            eta, first = self._eta(params, members)
            life = lives.begin(numbers, split, first)
            found: dict[str, Tensor] = {}
            if more:
                found["untrained"], _ = lives.score(life, split)
            total = torch.zeros(len(numbers), dtype=torch.float64, device=self.device)
            for _ in range(updates):
                life, new = lives.advance(life, self.loss(eta, share), split)
                total = total + new.reward[..., 0].double().sum(dim=0)
            found["return"], found["steps"] = lives.score(life, split)
            found["steps"] = found["steps"] + life.end.t
            if more:
                found["life"] = total / life.end.t
            return found

        population = len(next(iter(params.values())))
        return score_agents(score, population, index, self._chunk, self.device, more)

    # --- lives in windows ------------------------------------------------------------------------

    @property
    def life_steps(self) -> int:
        """Updates of an agent's life."""
        self.lives.check_left()
        return self.lives.updates

    def begin(self, params: Params | Tensor, life: int) -> Lives:
        """Members ``[P, ...]`` at the start of life number ``life`` (``trials`` agents each)."""
        members = self._members(params)
        population = len(next(iter(members.values())))
        numbers = self._numbers(population, life)
        parts = []
        for rows in even_batches(len(numbers), self._chunk, self.device):
            _, first = self._eta(members, rows // self.trials)
            started = self.lives.begin(numbers[rows], "train", first)
            score = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
            parts.append(Part(rows, started, score))
        return Lives(life, 0, population, tuple(parts))

    def _numbers(self, population: int, life: int) -> Tensor:
        index = on_device({"life": numbers_at(life, self.trials)}, self.device)["life"]
        return index.expand(population, -1).flatten()

    def advance(self, lives: Lives, params: Params | Tensor, steps: int) -> tuple[Lives, Fitness]:
        """The lives after ``steps`` more updates.

        The fitness of a window is by how much it raised the score of the policy (from 0 in the
        first), so that the windows of a life add up to the score after it.
        """
        members = self._members(params)
        until = min(lives.step + steps, self.lives.updates)
        parts, gains, taken = [], [], []
        for rows, life, before in lives.parts:
            eta, _ = self._eta(members, rows // self.trials)
            loss, began = self.loss(eta, self.share(lives.life)), life.end.t
            for _ in range(until - lives.step):
                life, _ = self.lives.advance(life, loss, "train")
            score, test_steps = self.lives.score(life, "train")
            parts.append(Part(rows, life, score))
            gains.append(score - before)
            taken.append(test_steps + life.end.t - began)
        shape = (lives.population, self.trials)
        count = lives.population * self.trials
        returns, counts = (torch.cat(x)[:count].reshape(shape).cpu() for x in (gains, taken))
        return replace(lives, step=until, parts=tuple(parts)), Fitness(returns, counts)

    def save(self, lives: Lives) -> State:
        """Lives as plain tensors, leaves ``[P, trials, ...]``; tasks and noise are drawn again."""
        saved = [self.lives.save(p.life, "train") | {"score": p.score} for p in lives.parts]
        return lives.joined(saved, self.trials)

    def restore(self, saved: State) -> Lives:
        """The inverse of :meth:`save`; members must be in one life and at one update of it."""
        lives = Lives.of(saved)
        numbers = self._numbers(lives.population, lives.life)
        flat = on_device({k: v.flatten(0, 1) for k, v in saved.items() if v.ndim > 1}, self.device)
        parts = []
        for rows in even_batches(len(numbers), self._chunk, self.device):
            begun = self.lives.begin(numbers[rows], "train")
            own = {name: leaf[rows] for name, leaf in flat.items()}
            parts.append(Part(rows, self.lives.restore(begun, own, "train"), own["score"]))
        return replace(lives, parts=tuple(parts))
