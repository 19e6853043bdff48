"""Lives of P agents in one batch: act, learn, act on; afterwards, what the trained policy is worth.

A life is one trial of the task. Agents act by :func:`esmeta.rollout.rollout` in windows between
two updates, so there is no second loop. Everything random is addressed by the number of an agent's
life: agents of one number have the same task, first parameters and noise, whoever they are batched
with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from esmeta import rollout as loop
from esmeta.envs.remote import RemoteTask
from esmeta.errors import UserError
from esmeta.evaluator import place_tasks
from esmeta.learners._agent import Agent
from esmeta.learners._experience import Experience, Keep
from esmeta.learners._loss import Loss
from esmeta.lives import check_can_be_left
from esmeta.rng import Rng
from esmeta.tasks import single
from esmeta.types import BatchedEnv, Hosted, Params, PolicyOut, Task, Tasks, TimeStep


class Learner(Protocol):
    """What trains agents inside a life; see ``_segments.py`` and ``_replay.py``."""

    @property
    def agent(self) -> Agent: ...

    @property
    def period(self) -> int:
        """Environment steps between two calls of :meth:`update`."""
        ...

    def init(self, rng: Rng, index: Tensor) -> Any:
        """State of fresh agents with the numbers ``index`` int64 ``[P]``."""
        ...

    def acting(self, state: Any) -> Params:
        """Leaves ``[P, ...]`` that :class:`Agent` acts with."""
        ...

    def act(self, state: Any) -> loop.Act:
        """How heads and noise become actions now."""
        ...

    def update(self, state: Any, new: Experience, loss: Loss, rng: Rng) -> Any:
        """The state after learning from the ``period`` steps ``new [P, period, ...]``."""
        ...


class Life(NamedTuple):
    """P agents somewhere in their lives.

    ``state`` is the learner's, ``end`` where the rollout was left, ``noise [T, P, 1, k]`` that of
    all actions of the life; ``tasks`` leaves ``[P, 1, ...]``; ``env`` is the environment they are
    in, which some simulators are part of.
    """

    state: Any
    end: loop.End
    noise: Tensor
    tasks: Tasks
    env: BatchedEnv


class EpisodeReturns:
    """Keeps the return of the first episode of each trial, float64 ``[P, B]``, and all steps."""

    def __init__(self, population: int, batch: int, device: torch.device | str) -> None:
        self.returns = torch.zeros(population, batch, dtype=torch.float64, device=device)
        self.steps = torch.zeros(population, batch, dtype=torch.int64, device=device)
        self._first = torch.ones(population, batch, dtype=torch.bool, device=device)

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        self.returns += after.reward * self._first
        self.steps += self._first
        self._first = self._first & ~(after.new_episode | after.new_trial)


@dataclass(frozen=True)
class Lives:
    """Runs lives of agents that one learner trains on one task distribution.

    ``test_episodes`` episodes of at most ``test_steps`` steps are played with the trained policy,
    as it samples its actions, on the task of its life.
    """

    learner: Learner
    task: Task
    seed: int
    device: torch.device
    test_episodes: int = 3
    test_steps: int = 32
    twins: int = 1
    """So many lives in a row share all that is random but their tasks."""

    @property
    def updates(self) -> int:
        """Updates of a whole life."""
        return self.task.spec.horizon // self.learner.period

    def windows(self) -> int:
        """Updates of a life that is left after some of them, which :meth:`check` must allow."""
        self.check()
        return self.updates

    def check_own(self) -> None:
        """Refuse worlds of other ranks, of which every life would make new ones; and as below."""
        if isinstance(self.task, RemoteTask):
            raise UserError(
                "run.remote_envs = true: every life has worlds of its own, which the other ranks "
                "would keep for good; write run.remote_envs = false: ranks then share the lives"
            )
        self.check_length()

    def check(self) -> None:
        """Refuse lives that cannot be left for others, and :meth:`check_length`."""
        check_can_be_left(self.task.make_env(self.device))
        self.check_length()

    def check_length(self) -> None:
        """Refuse a life without an update, or one that ends between two."""
        horizon, period = self.task.spec.horizon, self.learner.period
        if horizon < period or horizon % period:
            raise UserError(
                f"period = {period}: a life of task.horizon = {horizon} steps must be a multiple "
                f"of the steps between updates; write for example task.horizon = "
                f"{max(1, round(horizon / period)) * period}"
            )

    def most_agents(self, agents: int) -> int:
        """How many of ``agents`` may live at a time: all, or as few as simulators allow.

        Each needs one for its life and one for every test episode; refused where not even the two
        agents of a smallest batch have those.
        """
        env = self.task.make_env(self.device)
        if not isinstance(env, Hosted):
            return agents
        each = 1 + self.test_episodes
        found = env.most_worlds // each
        if found < 2:
            raise UserError(
                f"most_worlds is {env.most_worlds}: agents live in batches of at least 2, each in "
                f"{each} simulators (one for its life, {self.test_episodes} for test episodes): "
                f"write most_worlds={2 * each}"
            )
        return min(agents, found)

    def begin(self, index: Tensor, split: str, first: Params | None = None) -> Life:
        """Fresh agents with life numbers ``index`` int64 ``[P]``, at their first step.

        ``first`` are leaves ``[P, ...]`` of their networks that are given instead of drawn.
        """
        rng, tasks = self._rng(split), self.tasks(index, split)
        state = self.learner.init(rng, tasks.index[:, 0])
        if first:
            state = state._replace(params={**state.params, **first})
        agent, acting = self.learner.agent, self.learner.acting(state)
        env = self.task.make_env(self.device)
        _, memory, env_state, ts, noise, t, _ = loop.start(agent, acting, env, tasks, rng)
        if not bool(torch.isfinite(ts.obs).all()):
            raise UserError(
                "the task's first observation is not finite; agents that learn need bounded "
                "observations: clip or rescale them in the task"
            )
        end = loop.End(memory, env_state, ts, t, torch.ones_like(ts.new_trial))
        return Life(state, end, noise, tasks, env)

    def advance(self, life: Life, loss: Loss, split: str) -> tuple[Life, Experience]:
        """One period of acting and the update that follows; also what was lived through."""
        learner, env = self.learner, life.env
        acting = learner.acting(life.state)
        begin = loop.go_on(learner.agent, acting, life.end, life.noise)
        keep = Keep(learner.agent.spec)
        with torch.no_grad():
            until, act = life.end.t + learner.period, learner.act(life.state)
            end = loop.rollout(learner.agent, env, begin, keep, until=until, act=act)
        new = keep.experience()
        state = learner.update(life.state, new, loss, self._rng(split))
        return life._replace(state=state, end=end), new

    @torch.no_grad()
    def score(self, life: Life, split: str) -> tuple[Tensor, Tensor]:
        """Mean return of an episode by the policies as they are, float64 ``[P]``, and the steps."""
        episodes = self.test_episodes
        rng = self._rng(split).fold("test")
        number = torch.arange(episodes, device=life.tasks.index.device)
        index = life.tasks.index * episodes + number
        data = {
            name: leaf.expand(leaf.shape[0], episodes, *leaf.shape[2:])
            for name, leaf in life.tasks.data.items()
        }
        # Where a task has an address of its own for noise, episodes need different ones too.
        data |= {k: x + number for k, x in data.items() if k.rpartition(".")[2] == "start"}
        agent, acting = self.learner.agent, self.learner.acting(life.state)
        steps = min(self.test_steps, self.task.spec.horizon)
        env = single(self.task, steps).make_env(self.device)
        begin = loop.start(agent, acting, env, Tasks(index, data), rng)
        kept = EpisodeReturns(*begin.ts.reward.shape, device=self.device)
        act = self.learner.act(life.state)
        loop.rollout(agent, env, begin, kept, until=steps, act=act)
        return kept.returns.mean(dim=1), kept.steps.sum(dim=1)

    def tasks(self, index: Tensor, split: str) -> Tasks:
        """The task of each agent, leaves ``[P, 1, ...]``."""
        found = self.task.sample(index, split, Rng(self.seed).fold("tasks"))
        data = {k: v.transpose(0, 1) for k, v in found.data.items()}
        number = found.index.transpose(0, 1) // self.twins
        return place_tasks(Tasks(number, data), self.device)

    def _rng(self, split: str) -> Rng:
        return Rng(self.seed).fold("lives", split)
