"""Lives that are run in windows: they can be left, stored, and gone on with.

Two kinds of lives share one loop, :func:`esmeta.rollout.rollout`, and one way of storing:
:class:`TrialLives`, in which a life is a trial of a member and parameters may change between
windows, and :class:`AgentLives`, in which agents learn between windows. Everything random is
addressed by the number of a life: what happens in it does not depend on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from esmeta import rollout as loop
from esmeta.agent.policy import Policy
from esmeta.envs.remote import RemoteTask
from esmeta.errors import UserError
from esmeta.evaluator import (
    OwnEnv,
    PopulationEvaluator,
    join,
    numbers_at,
    on_device,
    place_tasks,
)
from esmeta.rl.losses import Loss
from esmeta.rng import Rng
from esmeta.rollout import Trajectory
from esmeta.tasks import single
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import (
    BatchedEnv,
    Fitness,
    Hosted,
    Params,
    State,
    Task,
    Tasks,
    TimeStep,
)


def check_can_be_left(env: BatchedEnv) -> None:
    """Refuse worlds that cannot be gone back to after others were run in between."""
    if isinstance(env, Hosted):
        raise UserError(
            f"worlds of {type(env).__name__} cannot be left and gone back to, as lives are: write "
            "objective.name = 'return' with optimizer.name = 'openes' or 'ppo', run.remote_envs = "
            "false, or another task"
        )


# --- storing -------------------------------------------------------------------------------------


def stored(end: loop.End, wider: Any) -> State:
    """Where a rollout was left as leaves ``[P, ...]``; ``wider`` is for :func:`_rows_of`."""
    saved = {"t": torch.full_like(end.active[:, 0], end.t, dtype=torch.int64)}
    saved |= {f"ts.{i}": leaf for i, leaf in enumerate([*end.ts, end.active])}
    saved |= {f"memory.{name}": leaf for name, leaf in end.state.items()}
    return saved | _rows_of(end.env_state, wider, len(end.active))


def restored(saved: State, begun: Any) -> loop.End:
    """The inverse of :func:`stored`; ``begun`` is the environment's state where trials begin."""
    *ts, active = numbered(saved, "ts.")
    t = int(saved["t"].max())
    return loop.End(named(saved, "memory."), _with_rows(begun, saved), TimeStep(*ts), t, active)


def _rows_of(env_state: Any, wider: Any, rows: int) -> State:
    """The leaves ``[rows, ...]`` of an environment's state, by their place.

    ``wider`` is a state of one row more: a leaf that is as long there is not the rows' own, but is
    derived from tasks, and left out. Clocks that all share are repeated.
    """
    saved = {}
    pairs = zip(leaves_of(env_state), leaves_of(wider), strict=True)
    for number, (leaf, other) in enumerate(pairs):
        if leaf.ndim == 0:
            saved[f"env.{number}"] = leaf.expand(rows)
        elif leaf.shape[0] != other.shape[0]:
            saved[f"env.{number}"] = leaf
    return saved


def _with_rows(env_state: Any, saved: State) -> Any:
    """A state that has just begun, as it was when :func:`_rows_of` saw it."""
    changed = named(saved, "env.")
    if not changed:  # It was not stored, perhaps as it could not be.
        return env_state
    leaves = leaves_of(env_state)
    for name, leaf in changed.items():
        # A number that all trials of a batch share is a clock. Batches stop early where all their
        # trials have ended, and what has ended stays so: the latest clock serves them all.
        shared = leaves[int(name)].ndim == 0
        leaves[int(name)] = leaf.max() if shared else leaf
    return with_leaves(env_state, leaves)


def named(saved: State, prefix: str) -> State:
    """Leaves whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}


def _the_one(saved: State, name: str) -> int:
    """What ``saved[name]`` says of all lives that are restored together; refused if they differ."""
    found = saved[name].unique().tolist()
    if len(found) != 1:
        raise ValueError(
            f"{name} = {found}: lives that are restored together must have one {name}; restore "
            "each group by itself"
        )
    return found[0]


def numbered(saved: State, prefix: str) -> list[Tensor]:
    """Leaves ``prefix0``, ``prefix1``, ... in their order."""
    found = named(saved, prefix)
    return [found[str(i)] for i in range(len(found))]


@dataclass(frozen=True)
class Lives:
    """Lives number ``life`` of ``population`` members after ``step`` steps, in batches.

    What a batch in ``parts`` is, and the unit of ``step``, is known to who begins them.
    """

    life: int
    step: int
    population: int
    parts: tuple[Any, ...] = ()

    def joined(self, saved: Iterable[State], *each: int) -> State:
        """The batches' leaves as one, ``[P, *each, ...]`` on the CPU, and where the lives are."""
        batches, count = list(saved), self.population * math.prod(each)
        whole = {name: torch.cat([b[name] for b in batches])[:count].cpu() for name in batches[0]}
        shape = (self.population, *each)
        out = {name: leaf.reshape(*shape, *leaf.shape[1:]) for name, leaf in whole.items()}
        for name, number in (("life", self.life), ("step", self.step)):
            out[name] = torch.full(shape[:1], number, dtype=torch.int64, device="cpu")
        return out

    @classmethod
    def of(cls, saved: State) -> Lives:
        """Which lives were :meth:`joined`, as yet without batches."""
        life, step = (_the_one(saved, name) for name in ("life", "step"))
        return cls(life, step, len(saved["life"]))


# --- trials of members ---------------------------------------------------------------------------


class _Part(NamedTuple):
    """One batch: ``rows [R]`` of the population, where their trials are, and their noise."""

    rows: Tensor
    end: loop.End
    noise: Tensor


class TrialLives:
    """Begins, advances, saves and restores lives whose tasks are addressed by the life's number.

    Life k is lived on training tasks ``k * trials .. (k + 1) * trials - 1`` of ``seed``, by all
    members, with the randomness of those tasks.
    """

    def __init__(self, evaluator: PopulationEvaluator, seed: int) -> None:
        self.evaluator = evaluator
        self.seed = seed

    @property
    def steps(self) -> int:
        """Steps of a whole life: the horizon of the task."""
        check_can_be_left(self.evaluator.env)
        return self.evaluator.policy.spec.horizon

    @torch.no_grad()
    def begin(self, params: Params | Tensor, life: int) -> Lives:
        """Members ``[P, ...]`` (or flat ``[P, D]``) at the first step of life number ``life``."""
        evaluator = self.evaluator
        tree = evaluator.members(params)
        population = next(iter(tree.values())).shape[0]
        tasks, rng = self._trials(life)
        parts = []
        for rows in evaluator.batches(population, tasks.index.shape[1]):
            part = {name: leaf[rows] for name, leaf in tree.items()}
            _, state, env_state, ts, noise, t, _ = loop.start(
                evaluator.policy, part, evaluator.env, tasks, rng
            )
            end = loop.End(state, env_state, ts, t, torch.ones_like(ts.new_trial))
            parts.append(_Part(rows, end, noise))
        return Lives(life, 0, population, tuple(parts))

    @torch.no_grad()
    def advance(self, lives: Lives, params: Params | Tensor, steps: int) -> tuple[Lives, Fitness]:
        """Live on for ``steps`` steps (at most to the end) with ``params``.

        ``lives`` stays as it is. The :class:`Fitness` is that of the window alone: rewards earned
        and steps taken in it, ``[P, trials]``; the task's metrics belong to whole trials and are
        left out.
        """
        evaluator = self.evaluator
        tree = evaluator.members(params)
        until = min(lives.step + steps, self.steps)
        parts, scores = [], []
        for rows, end, noise in lives.parts:
            part = {name: leaf[rows] for name, leaf in tree.items()}
            begin = loop.go_on(evaluator.policy, part, end, noise)
            kept = loop.Returns(*end.active.shape, device=end.active.device)
            end = loop.rollout(evaluator.policy, evaluator.env, begin, kept, until=until)
            parts.append(_Part(rows, end, noise))
            scores.append(Fitness(kept.returns.cpu(), kept.steps.cpu()))
        fitness = join(scores, lives.population, evaluator.trials)
        return replace(lives, step=until, parts=tuple(parts)), fitness

    def save(self, lives: Lives) -> State:
        """Lives as plain tensors ``[P, ...]``: index them by rows to choose members.

        What the environment derives from the tasks alone (tables, maps) is left out: ``restore``
        makes it again. Saving needs an environment whose state is made of tensors.
        """
        tasks, rng = self._trials(lives.life)

        def save(part: _Part) -> State:
            wider, _ = self.evaluator.env.reset(tasks, rng, len(part.rows) + 1)
            return stored(part.end, wider)

        return lives.joined(map(save, lives.parts))

    def restore(self, saved: State) -> Lives:
        """The inverse of :meth:`save`; goes on bit for bit as if never stored.

        The members must be in the same life and at the same step of it; a ``ValueError`` says so.
        """
        lives, evaluator = Lives.of(saved), self.evaluator
        tasks, rng = self._trials(lives.life)
        noise = loop.action_noise(evaluator.policy, tasks.index, rng)
        saved, parts = on_device(saved, noise.device), []
        for rows in evaluator.batches(lives.population, tasks.index.shape[1]):
            begun, _ = evaluator.env.reset(tasks, rng, len(rows))
            part = {name: leaf[rows] for name, leaf in saved.items()}
            parts.append(_Part(rows, restored(part, begun), noise))
        return replace(lives, parts=tuple(parts))

    def _trials(self, life: int) -> Any:
        index = numbers_at(life, self.evaluator.trials)
        return self.evaluator.trial_set(index, self.seed, "train")


# --- agents that learn ---------------------------------------------------------------------------


class Learner(Protocol):
    """What trains agents inside a life; see :mod:`esmeta.rl.on_policy` and ``off_policy``."""

    @property
    def agent(self) -> Policy: ...

    @property
    def period(self) -> int:
        """Environment steps between two calls of :meth:`update`."""
        ...

    def init(self, rng: Rng, index: Tensor, first: Params | None = None) -> Any:
        """State of fresh agents with the numbers ``index`` int64 ``[P]``.

        ``first`` are leaves ``[P, ...]`` of their networks that are given instead of drawn.
        """
        ...

    def acting(self, state: Any) -> Params:
        """Leaves ``[P, ...]`` that the agent acts with."""
        ...

    def act(self, state: Any) -> loop.Act:
        """How heads and noise become actions now."""
        ...

    def update(self, state: Any, new: Trajectory, loss: Loss, rng: Rng) -> Any:
        """The state after learning from ``new``: ``period`` steps of each agent, B = 1."""
        ...

    def save(self, state: Any) -> list[Tensor]:
        """All of it as leaves ``[P, ...]``."""
        ...

    def restore(self, fresh: Any, saved: list[Tensor]) -> Any:
        """The inverse of :meth:`save` for agents that are ``fresh``."""
        ...


L = TypeVar("L", bound=Learner)


class Life(NamedTuple):
    """P agents somewhere in their lives.

    ``state`` is the learner's, ``numbers`` int64 ``[P]`` those of the lives, ``end`` where the
    rollout was left, ``noise [T, P, 1, k]`` that of all actions of the trial (None: it is drawn
    window by window); ``tasks`` leaves ``[P, 1, ...]``; ``env`` is the environment they are in,
    which some simulators are part of; ``trial`` counts the trials that were begun before, ``lived``
    the steps of all.
    """

    state: Any
    numbers: Tensor
    end: loop.End
    noise: Tensor | None
    tasks: Tasks
    env: BatchedEnv
    trial: int = 0
    lived: int = 0


@dataclass(frozen=True)
class AgentLives(OwnEnv, Generic[L]):
    """Lives of agents, one environment each, that one learner trains on one task distribution.

    A life is one trial; or, where it is ``endless``, as many as are asked for: when the trial of an
    agent is over, all begin new ones, on the tasks they have, and random numbers are drawn window
    by window, so that nothing grows with the horizon.

    ``test_episodes`` episodes of at most ``test_steps`` steps are played with the trained policy,
    as it samples its actions, on the task of its life. ``twins`` lives in a row share all that is
    random but their tasks. With ``timeout_is_terminal`` agents take the end of an episode by a time
    limit for a terminal state; they learn from rewards times ``reward_scale``.
    """

    learner: L
    task: Task
    seed: int
    device: torch.device
    test_episodes: int = 0
    test_steps: int = 32
    twins: int = 1
    endless: bool = False
    timeout_is_terminal: bool = False
    reward_scale: float = 1.0

    # --- what can be lived ---------------------------------------------------------------------

    @property
    def updates(self) -> int:
        """Updates of a whole trial."""
        return self.task.spec.horizon // self.learner.period

    def check_own(self) -> None:
        """Refuse worlds of other ranks, of which every life would make new ones."""
        if isinstance(self.task, RemoteTask):
            raise UserError(
                "run.remote_envs = true: every life has worlds of its own, which the other ranks "
                "would keep for good; write run.remote_envs = false: ranks then share the lives"
            )

    def check_left(self) -> None:
        """Refuse lives that cannot be left for others."""
        check_can_be_left(self.env)

    def check_length(self) -> None:
        """Refuse a trial without an update, or one that ends between two."""
        horizon, period = self.task.spec.horizon, self.learner.period
        if horizon % period or (horizon < period and not self.endless):
            what = "trials" if self.endless else "a life"
            raise UserError(
                f"period = {period}: {what} of task.horizon = {horizon} steps must be a multiple "
                f"of the steps between updates; write for example task.horizon = "
                f"{max(1, round(horizon / period)) * period}"
            )

    def most_agents(self, agents: int) -> int:
        """How many of ``agents`` may live at a time: all, or as few as simulators allow.

        Each needs one for its life and one for every test episode; refused where not even the two
        agents of a smallest batch have those.
        """
        each = 1 + self.test_episodes
        self.check_room(
            2 * each,
            f"agents live in batches of at least 2, each in {each} of them (one for its life, "
            f"{self.test_episodes} for test episodes)",
        )
        return self.room(agents, each)

    # --- living --------------------------------------------------------------------------------

    def begin(self, index: Tensor, split: str, first: Params | None = None) -> Life:
        """Fresh agents with life numbers ``index`` int64 ``[P]``, at their first step.

        ``first`` are leaves ``[P, ...]`` of their networks that are given instead of drawn.
        """
        rng, tasks = self.rng(split), self.tasks(index, split)
        number = tasks.index[:, 0]
        state = self.learner.init(rng, number, first)
        env = self.env if self.endless else self.task.make_env(self.device)
        noise = None if self.endless else loop.action_noise(self.learner.agent, tasks.index, rng)
        end = self._first(env, tasks, state, 0, split)
        if not bool(torch.isfinite(end.ts.obs).all()):
            raise UserError(
                "the task's first observation is not finite; agents that learn need bounded "
                "observations: clip or rescale them in the task"
            )
        return Life(state, number, end, noise, tasks, env)

    def _first(self, env: BatchedEnv, tasks: Tasks, state: Any, trial: int, split: str) -> loop.End:
        """Where trial number ``trial`` of the lives begins."""
        rng = self.rng(split).fold("trial", trial) if self.endless else self.rng(split)
        env_state, ts = env.reset(tasks, rng, len(tasks.index))
        acting = self.learner.acting(state)
        memory = self.learner.agent.initial_state(acting, 1, rng, tasks.index)
        return loop.End(memory, env_state, ts, 0, torch.ones_like(ts.new_trial))

    def act(self, life: Life, split: str) -> tuple[Life, Trajectory]:
        """One period of acting, from which the agents have yet to learn."""
        learner = self.learner
        over = life.end.t >= self.task.spec.horizon or not bool(life.end.active.all())
        if self.endless and over:
            trial = life.trial + 1
            end = self._first(life.env, life.tasks, life.state, trial, split)
            life = life._replace(end=end, trial=trial)
        acting, noise, end = learner.acting(life.state), life.noise, life.end
        if noise is None:
            noise, end = self._drawn(life, split), end._replace(t=0)
        begin = loop.go_on(learner.agent, acting, end, noise)
        recorder = loop.Recorder(end.state, heads=False)
        with torch.no_grad():
            until, act = end.t + learner.period, learner.act(life.state)
            end = loop.rollout(
                learner.agent, life.env, begin, recorder, until=until, act=act, ask=False
            )
        done, lived = life.end.t + learner.period, life.lived + learner.period
        life = life._replace(end=end._replace(t=done), lived=lived)
        return life, recorder.trajectory(end)

    def _drawn(self, life: Life, split: str) -> Tensor:
        """What the actions of a window are drawn with, ``[period, P, 1, k]``."""
        width, period = self.task.spec.action.size, self.learner.period
        draw = self.rng(split).fold("action", life.lived)
        noise = draw.normal(life.numbers, period * width)
        return noise.reshape(len(life.numbers), period, 1, width).transpose(0, 1)

    def advance(self, life: Life, loss: Loss, split: str) -> tuple[Life, Trajectory]:
        """One period of acting and the update that follows; also what was lived through."""
        life, new = self.act(life, split)
        state = self.learner.update(life.state, self.taught(new), loss, self.learning(split))
        return life._replace(state=state), new

    def taught(self, new: Trajectory) -> Trajectory:
        """What agents take for what they lived through."""
        if self.timeout_is_terminal:
            ended = torch.cat([new.ts.terminated[:1], new.ended])
            new = new._replace(ts=new.ts._replace(terminated=ended))
        return new.scaled(self.reward_scale)

    def learning(self, split: str) -> Rng:
        """What updates are drawn from."""
        return self.rng(split).fold("learning") if self.endless else self.rng(split)

    @torch.no_grad()
    def score(self, life: Life, split: str) -> tuple[Tensor, Tensor]:
        """Mean return of an episode by the policies as they are, float64 ``[P]``, and the steps."""
        episodes = self.test_episodes
        rng = self.rng(split).fold("test")
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
        kept = loop.EpisodeReturns(*begin.ts.reward.shape, device=self.device)
        act = self.learner.act(life.state)
        loop.rollout(agent, env, begin, kept, until=steps, act=act)
        return kept.returns.mean(dim=1), kept.steps.sum(dim=1)

    def tasks(self, index: Tensor, split: str) -> Tasks:
        """The task of each agent, leaves ``[P, 1, ...]``."""
        found = self.task.sample(index.cpu(), split, Rng(self.seed).fold("tasks"))
        data = {k: v.transpose(0, 1) for k, v in found.data.items()}
        number = found.index.transpose(0, 1) // self.twins
        return place_tasks(Tasks(number, data), self.device)

    def rng(self, split: str) -> Rng:
        """What lives of a split are drawn from."""
        return Rng(self.seed).fold("training" if self.endless else "lives", split)

    # --- storing -------------------------------------------------------------------------------

    def save(self, life: Life, split: str) -> State:
        """All that changes as plain tensors, leaves ``[P, ...]``."""
        counts = {"trial": life.trial, "lived": life.lived}
        saved = {name: torch.full_like(life.numbers, n) for name, n in counts.items()}
        state = self.learner.save(life.state)
        saved |= {"index": life.numbers} | {f"state.{i}": leaf for i, leaf in enumerate(state)}
        end, wider = life.end, ()
        try:
            leaves_of(end.env_state)
        except TypeError:  # A simulator that cannot be stored: its agents begin a new trial.
            end = end._replace(env_state=(), t=self.task.spec.horizon)
        else:
            wider = self._wider(life, split)
        saved |= stored(end, wider)
        return {name: leaf.cpu().clone() for name, leaf in saved.items()}

    def _wider(self, life: Life, split: str) -> Any:
        tasks = life.tasks
        index = torch.cat([tasks.index, tasks.index[:1]])
        data = {name: torch.cat([leaf, leaf[:1]]) for name, leaf in tasks.data.items()}
        return life.env.reset(Tasks(index, data), self.rng(split), len(index))[0]

    def restore(self, begun: Life, saved: State, split: str) -> Life:
        """Lives that have just :meth:`begin` as they were saved; goes on bit for bit."""
        saved = on_device(saved, self.device)
        state = self.learner.restore(begun.state, numbered(saved, "state."))
        trial, lived = (int(saved[name][0]) for name in ("trial", "lived"))
        first = self._first(begun.env, begun.tasks, state, trial, split)
        end = restored(saved, first.env_state)
        return begun._replace(state=state, end=end, trial=trial, lived=lived)
