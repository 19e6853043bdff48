"""Agents that learn from a replay for as long as they are asked to, trial after trial.

Unlike a life (``_life.py``), which is one trial, training has no length that is known beforehand:
when the trial of an agent is over, all begin new ones, on the tasks they have. Random numbers are
drawn window by window, so that nothing grows with the horizon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta import rollout as loop
from esmeta.errors import UserError
from esmeta.evaluator import OwnEnv, on_device, place_tasks
from esmeta.learners._experience import Experience, Keep
from esmeta.learners._replay import OffPolicy, ReplayLearner
from esmeta.rng import Rng
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import Hosted, State, Task, Tasks, TimeStep


class Scores(NamedTuple):
    """Returns of training episodes, exploration included; float64 ``[P]`` unless said otherwise.

    ``earned`` in the present episode; ``recent [P, K]`` of the last K episodes, newest first, NaN
    where there are fewer; ``first`` of the first one; ``total`` of all ``episodes`` (int64).
    """

    earned: Tensor
    recent: Tensor
    first: Tensor
    total: Tensor
    episodes: Tensor

    @classmethod
    def none(cls, agents: int, keep: int, device: torch.device | str) -> Scores:
        """No episode yet."""
        zeros = torch.zeros(agents, dtype=torch.float64, device=device)
        undefined = torch.full((agents, keep), torch.nan, dtype=torch.float64, device=device)
        return cls(zeros, undefined, undefined[:, 0], zeros, zeros.long())

    def then(self, new: Experience) -> Scores:
        """After the steps ``new [P, T, ...]`` too."""
        earned, recent, first, total, episodes = self
        for t in range(new.reward.shape[1]):
            earned = earned + new.reward[:, t].double()
            over = new.ended[:, t]
            if t > 0:  # Steps behind the end of a trial are marked as ended, but are no episodes.
                over = over & (new.terminated[:, t] | ~new.ended[:, t - 1])
            shifted = torch.cat([earned.unsqueeze(1), recent[:, :-1]], dim=1)
            recent = torch.where(over.unsqueeze(1), shifted, recent)
            first = torch.where(over & (episodes == 0), earned, first)
            total = total + torch.where(over, earned, 0.0)
            earned = torch.where(over, 0.0, earned)
            episodes = episodes + over.long()
        return Scores(earned, recent, first, total, episodes)


class Agents(NamedTuple):
    """P agents in training: the learner's state, and where their trials are.

    ``index`` int64 ``[P]`` numbers their tasks and all their randomness; ``trial`` is how many
    trials they have begun, ``t`` the step of the present one.
    """

    state: OffPolicy
    env_state: Any
    ts: TimeStep
    active: Tensor
    trial: int
    t: int
    scores: Scores


@dataclass(frozen=True)
class Training(OwnEnv):
    """Trains agents, one environment each, by one learner on the tasks of one split.

    ``episodes`` is how many of the last ones their scores are a mean of. With
    ``timeout_is_terminal`` agents take the end of an episode by a time limit for a terminal state.
    They learn from rewards times ``reward_scale``; scores are not scaled.
    """

    learner: ReplayLearner
    task: Task
    seed: int
    split: str
    device: torch.device
    episodes: int = 3
    timeout_is_terminal: bool = False
    reward_scale: float = 1.0

    def check(self) -> None:
        """Refuse windows between updates that do not fill a trial."""
        horizon, period = self.task.spec.horizon, self.learner.period
        if horizon % period:
            raise UserError(
                f"period = {period}: trials of task.horizon = {horizon} steps must be a multiple "
                f"of the steps between updates; write for example task.horizon = "
                f"{max(1, round(horizon / period)) * period}"
            )

    def check_room(self, agents: int) -> None:
        """Refuse more agents, each with a simulator of its own, than there may be simulators."""
        env = self.env
        if isinstance(env, Hosted) and env.most_worlds < agents:
            raise UserError(
                f"most_worlds leaves {env.most_worlds} simulators: the agents of a rank, each in "
                f"one of its own, and at least two that are scored need {agents}: write "
                f"most_worlds={agents}"
            )

    def begin(self, index: Tensor) -> Agents:
        """Fresh agents with the numbers ``index`` int64 ``[P]``, at the start of a trial."""
        state = self.learner.init(self._rng(), index)
        scores = Scores.none(len(index), self.episodes, index.device)
        env_state, ts = self._reset(index, 0)
        if not bool(torch.isfinite(ts.obs).all()):
            raise UserError(
                "the task's first observation is not finite; agents that learn need bounded "
                "observations: clip or rescale them in the task"
            )
        return Agents(state, env_state, ts, torch.ones_like(ts.new_trial), 0, 0, scores)

    def act(self, agents: Agents) -> tuple[Agents, Experience]:
        """``period`` steps of all agents, which their replays have yet to be given."""
        learner, state = self.learner, agents.state
        if agents.t >= self.task.spec.horizon or not bool(agents.active.all()):
            state.replay.cut()
            env_state, ts = self._reset(state.index, agents.trial + 1)
            active = torch.ones_like(agents.active)
            # An episode that was cut has no return: its rewards are not the next one's.
            scores = agents.scores._replace(earned=torch.zeros_like(agents.scores.earned))
            agents = agents._replace(
                env_state=env_state, ts=ts, active=active, trial=agents.trial + 1, t=0,
                scores=scores,
            )  # fmt: skip
        width = self.task.spec.action.size
        draw = self._rng().fold("action", state.replay.count)
        noise = draw.normal(state.index, learner.period * width).float()
        noise = noise.reshape(len(state.index), learner.period, 1, width).transpose(0, 1)
        begin = loop.Start(
            learner.agent.bind(learner.acting(state)), {}, agents.env_state, agents.ts, noise,
            0, agents.active,
        )  # fmt: skip
        keep = Keep(learner.agent.spec)
        with torch.no_grad():
            end = loop.rollout(
                learner.agent, self.env, begin, keep, until=learner.period,
                act=learner.act(state),
            )  # fmt: skip
        new = keep.experience()
        if self.timeout_is_terminal:
            new = new._replace(terminated=new.ended)
        agents = agents._replace(
            env_state=end.env_state,
            ts=end.ts,
            active=end.active,
            t=agents.t + learner.period,
            scores=agents.scores.then(new),
        )
        return agents, new._replace(reward=new.reward * self.reward_scale)

    def rng(self) -> Rng:
        """What learning is drawn from."""
        return self._rng().fold("learning")

    def _rng(self) -> Rng:
        return Rng(self.seed).fold("training", self.split)

    def _reset(self, index: Tensor, trial: int) -> tuple[Any, TimeStep]:
        found = self.task.sample(index.cpu(), self.split, Rng(self.seed).fold("tasks"))
        data = {k: v.transpose(0, 1) for k, v in found.data.items()}
        tasks = place_tasks(Tasks(found.index.transpose(0, 1), data), self.device)
        return self.env.reset(tasks, self._rng().fold("trial", trial), len(index))

    # --- storing -------------------------------------------------------------------------------

    def save(self, agents: Agents) -> State:
        """All of them as plain tensors, leaves ``[P, ...]``, of the replay what is filled.

        What an environment derives from its tasks (leaves whose first axis is not the agents') is
        left out: ``restore`` makes it again.
        """
        state = agents.state
        numbers = {"index": state.index, "updates": state.updates}
        for name in ("trial", "t"):
            numbers[name] = torch.full_like(state.index, getattr(agents, name))
        numbers["count"] = torch.full_like(state.index, state.replay.count)
        kept = [leaf[:, : state.replay.size] for leaf in (*state.replay.steps, state.replay.time)]
        learned = leaves_of((state.params, state.target, state.adam))
        parts = {"replay": kept, "learned": learned, "scores": list(agents.scores)}
        parts["where"] = [*agents.ts, agents.active]
        saved = {k: v.to(state.index.device) for k, v in numbers.items()}
        for part, leaves in parts.items():
            saved |= {f"{part}.{i}": leaf for i, leaf in enumerate(leaves)}
        saved |= self._save_env(agents)
        return {name: leaf.cpu().clone() for name, leaf in saved.items()}

    def _save_env(self, agents: Agents) -> State:
        index = agents.state.index
        try:
            leaves = leaves_of(agents.env_state)
        except TypeError:  # A simulator that cannot be stored: its agents begin a new trial.
            return {"t": torch.full_like(index, self.task.spec.horizon)}
        wider = torch.cat([index, index[:1]])
        reference = leaves_of(self._reset(wider, agents.trial)[0])
        saved = {}
        for i, (leaf, other) in enumerate(zip(leaves, reference, strict=True)):
            if leaf.ndim == 0:
                saved[f"env.{i}"] = leaf.expand(len(index))
            elif leaf.shape[0] != other.shape[0]:
                saved[f"env.{i}"] = leaf
        return saved

    def restore(self, saved: State) -> Agents:
        """The inverse of :meth:`save`; goes on bit for bit."""
        saved = on_device(saved, self.device)
        index, trial = saved["index"], int(saved["trial"][0])

        def part(name: str) -> list[Tensor]:
            found = {k: v for k, v in saved.items() if k.startswith(f"{name}.")}
            return [found[f"{name}.{i}"] for i in range(len(found))]

        state = self.learner.init(self._rng(), index)
        learned = with_leaves((state.params, state.target, state.adam), part("learned"))
        replay = state.replay.filled(part("replay"), int(saved["count"][0]))
        params, target, adam = learned
        state = OffPolicy(params, target, adam, replay, index, saved["updates"])
        env_state, _ = self._reset(index, trial)
        changed = {int(k[4:]): leaf for k, leaf in saved.items() if k.startswith("env.")}
        if changed:
            leaves = leaves_of(env_state)
            for number, leaf in changed.items():
                leaves[number] = leaf[0] if leaves[number].ndim == 0 else leaf
            env_state = with_leaves(env_state, leaves)
        *ts, active = part("where")
        return Agents(
            state, env_state, TimeStep(*ts), active, trial,
            int(saved["t"][0]), Scores(*part("scores")),
        )  # fmt: skip
