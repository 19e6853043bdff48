"""Learning from a replay: twin critics by temporal differences, a policy by any loss they allow.

Fujimoto, van Hoof & Meger, "Addressing Function Approximation Error in Actor-Critic Methods" (TD3),
2018, https://arxiv.org/abs/1802.09477. What differs: time limits are no terminal states (a step
whose successor is not known is left out of the targets), and P agents with replays of their own
take their steps as one batch. The policy's loss is an argument: TD3's, off-policy REINFORCE, or
one that is learned (MetaGenRL, whose schedule this is).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.agent import heads
from esmeta.errors import UserError
from esmeta.learners._agent import CRITICS, Agent
from esmeta.learners._episodes import Episodes, Over
from esmeta.learners._experience import Experience, nothing
from esmeta.learners._loss import Batch, Loss
from esmeta.learners._segments import descend
from esmeta.learners._state import Adam, adam_step
from esmeta.modes import differentiating
from esmeta.rng import Rng
from esmeta.rollout import Act
from esmeta.types import Continuous, Params, PolicyOut, Spec


class Replay(NamedTuple):
    """The newest ``capacity`` steps of each agent, ``steps`` leaves ``[P, capacity, ...]``.

    ``time`` int64 ``[P, capacity]`` are the steps since the episode began. ``count`` is how many
    steps were ever added, the same for all agents. Step k lies in row ``k % capacity``;
    :meth:`add` writes in place. ``episodes`` are those of which all steps are there.
    """

    steps: Experience
    time: Tensor
    count: int
    episodes: Episodes

    @classmethod
    def empty(cls, agents: int, capacity: int, spec: Spec, device: torch.device | str) -> Replay:
        """No step yet."""
        blank = nothing(agents, capacity, spec, device)
        steps = Experience(*(leaf.clone() for leaf in blank))
        time = torch.zeros_like(steps.reward, dtype=torch.int64)
        return cls(steps, time, 0, Episodes.none(agents, capacity, device))

    def filled(self, kept: Sequence[Tensor], count: int) -> Replay:
        """An empty replay with the ``kept`` rows of one that had ``count`` steps added.

        ``kept`` are the leaves of ``steps`` and ``time``, each ``[P, rows, ...]``.
        """
        for leaf, rows in zip((*self.steps, self.time), kept, strict=True):
            leaf[:, : rows.shape[1]] = rows
        replay = self._replace(count=count)
        number = torch.arange(count - replay.size, count, device=self.time.device)
        rows = number % self.capacity
        time, steps = self.time[:, rows], Experience(*(leaf[:, rows] for leaf in self.steps))
        self.episodes.add(_last_ones(steps, time), number - time, number, count - replay.size)
        return replay

    @property
    def capacity(self) -> int:
        """Rows per agent."""
        return self.steps.reward.shape[1]

    @property
    def size(self) -> int:
        """Steps that are there."""
        return min(self.count, self.capacity)

    def add(self, new: Experience) -> Replay:
        """With T steps more, ``[P, T, ...]``, over the oldest."""
        length = new.reward.shape[1]
        place = torch.arange(length, device=new.reward.device)
        rows, last = (place + self.count) % self.capacity, (self.count - 1) % self.capacity
        since = torch.where(self.steps.ended[:, last], 0, self.time[:, last] + 1)
        since = since if self.count else torch.zeros_like(since)
        # The step after the last end so far; before the first one, as many steps ago as `since`.
        began = torch.where(new.ended, place + 1, -1).cummax(dim=1).values
        began = torch.cat([-since.unsqueeze(1), began[:, :-1]], dim=1)
        began = torch.where(began < 0, -since.unsqueeze(1), began)
        time = place - began
        for leaf, values in zip((*self.steps, self.time), (*new, time), strict=True):
            leaf[:, rows] = values
        total = self.count + length
        self.episodes.add(
            _last_ones(new, time), self.count + began, self.count + place, total - self.capacity
        )
        return self._replace(count=total)

    def cut(self) -> None:
        """What comes next does not follow from the newest steps."""
        if self.count:
            number = torch.tensor([self.count - 1], dtype=torch.int64, device=self.time.device)
            rows = number % self.capacity
            time, open_ = self.time[:, rows], ~self.steps.ended[:, rows]
            self.steps.ended[:, rows] = True
            kept = self.count - self.capacity
            self.episodes.add(open_ & (time > 0), number - time, number, kept)

    def snippets(
        self, rng: Rng, index: Tensor, count: int, length: int, over: Over = "steps"
    ) -> tuple[Experience, Tensor]:
        """Random snippets of each agent: leaves ``[P, count, length, ...]``.

        Also bool ``[P, count, length]``: False for what follows the end of an episode. Agents draw
        at their own addresses ``index [P]``.
        """
        batch = self.sample(rng, index, count, length, over)
        return batch.steps, batch.inside

    def sample(
        self, rng: Rng, index: Tensor, count: int, length: int, over: Over = "steps"
    ) -> Batch:
        """The same with the time since the episode began.

        Over ``episodes``: one of those that are whole, each as likely, and a place in it from where
        the snippet ends with it at the latest (from the first step of a shorter one). Over
        ``steps``: any step but the newest ``length - 1``, each as likely; so it is for all agents
        of which no episode is whole yet.
        """
        oldest = self.count - self.size
        share = rng.uniform(index, count)
        first = oldest + (share * (self.size - length + 1)).long()
        if over == "episodes":
            begun, last = self.episodes.drawn(rng.fold("episode").uniform(index, count))
            within = begun + (share * (last - begun + 2 - length).clamp_min(1)).long()
            some = self.episodes.count > self.episodes.oldest
            first = torch.where(some.unsqueeze(1), within, first)
        rows = (torch.arange(length, device=index.device) + first.unsqueeze(-1)) % self.capacity
        agent = torch.arange(len(index), device=index.device)[:, None, None]
        steps = Experience(*(leaf[agent, rows] for leaf in self.steps))
        ends = steps.ended.long().cumsum(dim=-1) - steps.ended.long()
        return Batch(steps, steps.action, ends == 0, count, self.time[agent, rows])


def _last_ones(steps: Experience, time: Tensor) -> Tensor:
    """Where an episode ends: steps behind the end of a trial are marked as ended, but are none."""
    return steps.ended & (steps.terminated | (time > 0))


class OffPolicy(NamedTuple):
    """State of P agents that learn by :class:`ReplayLearner`.

    ``target`` are the slow copies of policy and critics, ``updates`` int64 ``[P]`` the critic steps
    done. Its replay is written in place: a state that was learned on is used up.
    """

    params: Params
    target: Params
    adam: Adam
    replay: Replay
    index: Tensor
    updates: Tensor


@dataclass(frozen=True)
class ReplayLearner:
    """Acts for ``period`` steps, then takes as many update rounds.

    Attributes:
        agent: the networks, with ``critics``.
        period: environment steps between updates.
        capacity: steps that the replay holds.
        batch: transitions per critic step, and transitions or snippets per policy step.
        critic_batch: transitions per critic step, if other than ``batch`` (0: the same).
        snippets: what snippets are drawn over, ``steps`` or ``episodes`` (see
            :meth:`Replay.sample`). Over episodes critics learn from snippets too, of as many steps
            as the policy's, as in MetaGenRL's release; else from single transitions.
        start: steps of uniformly random actions at first.
        update_after: steps before the first update.
        gamma: discount.
        polyak: what targets keep of themselves per step.
        target_noise: spread of the target's actions, in units of the action limit.
        target_clip: limit of that noise.
        delay: critic steps per step of policy and targets.
        twin: the smaller of two critics is the target (off: the first alone, as in DDPG).
        learning_rate: of all Adams.
        policy_rate: of the policy's, if another (0: the same).
        clip: global norm of a policy gradient at most; 0: no limit.
        terminal_bonus: added to the target of terminal steps, as MetaGenRL's release does with 1.
    """

    agent: Agent
    period: int = 50
    capacity: int = 1_000_000
    batch: int = 100
    critic_batch: int = 0
    snippets: Over = "steps"
    start: int = 10_000
    update_after: int = 1_000
    gamma: float = 0.99
    polyak: float = 0.995
    target_noise: float = 0.2
    target_clip: float = 0.5
    delay: int = 2
    twin: bool = True
    learning_rate: float = 1e-3
    clip: float = 0.0
    terminal_bonus: float = 0.0
    policy_rate: float = 0.0

    def check(self, loss: Loss) -> None:
        """Refuse a replay that cannot hold a batch, or a snippet of the loss."""
        if loss.snippet > min(self.capacity, self.update_after):
            raise UserError(
                f"snippet = {loss.snippet}: longer than the {min(self.capacity, self.update_after)}"
                " steps that the replay holds at the first update (capacity and update_after); "
                f"write for example update_after = {max(self.batch, 10 * loss.snippet)}"
            )
        if self.period > self.capacity:
            raise UserError(
                f"period = {self.period}: more steps than the replay holds (capacity = "
                f"{self.capacity}); write for example capacity = {20 * self.period}"
            )

    def init(self, rng: Rng, index: Tensor) -> OffPolicy:
        """Fresh agents with the numbers ``index`` int64 ``[P]``; their replays are empty."""
        params = self.agent.init(rng.fold("agent"), index)
        replay = Replay.empty(len(index), self.capacity, self.agent.spec, index.device)
        return OffPolicy(
            params, dict(params), Adam.zeros(params), replay, index, torch.zeros_like(index)
        )

    def with_fresh_policies(self, state: OffPolicy, rng: Rng) -> OffPolicy:
        """The agents with policies drawn at ``rng``; critics and replays stay."""
        drawn = self.agent.init(rng, state.index)
        fresh = {name: leaf for name, leaf in drawn.items() if name.startswith("policy.")}
        parts = zip(state.adam, Adam.zeros(fresh), strict=True)
        return state._replace(
            params=state.params | fresh,
            target=state.target | fresh,
            adam=Adam(*(old | new for old, new in parts)),
        )

    def acting(self, state: OffPolicy) -> Params:
        """The policies."""
        return {k: v for k, v in state.params.items() if k.startswith("policy.")}

    def act(self, state: OffPolicy) -> Act:
        """Uniform actions at first; then the policy's with its noise, clipped to the limits."""
        spec = self.agent.spec.action
        assert isinstance(spec, Continuous)
        random = state.replay.count < self.start

        def act(out: PolicyOut, noise: Tensor) -> Tensor:
            if random:
                share = 0.5 * (1.0 + torch.erf(noise / math.sqrt(2.0)))
                return (spec.low + (spec.high - spec.low) * share).expand_as(heads.mode(out))
            return heads.sample(out, noise).clamp(spec.low, spec.high)

        return act

    @torch.no_grad()
    def update(self, state: OffPolicy, new: Experience, loss: Loss, rng: Rng) -> OffPolicy:
        """The agents after one update round per step of ``new [P, period, ...]``."""
        state = state._replace(replay=state.replay.add(new))
        if state.replay.count < self.update_after:
            return state
        return self.rounds(state, loss, rng, self.period)

    @torch.no_grad()
    def rounds(self, state: OffPolicy, loss: Loss, rng: Rng, count: int) -> OffPolicy:
        """``count`` critic steps, with those of policy and targets that fall due."""
        for _ in range(count):
            number = int(state.updates[0])
            draw = rng.fold("replay", number)
            state = self.critic_step(state, draw, max(1, loss.snippet))
            if number % self.delay == self.delay - 1:
                state = self.policy_step(state, loss, draw.fold("policy"))
                target = {
                    name: leaf * self.polyak + state.params[name] * (1.0 - self.polyak)
                    for name, leaf in state.target.items()
                }
                state = state._replace(target=target)
        return state

    @differentiating
    def critic_step(self, state: OffPolicy, rng: Rng, length: int = 1) -> OffPolicy:
        """One Adam step of the critics towards the targets, on transitions drawn at ``rng``.

        Over episodes they are drawn in snippets of ``length`` steps.
        """
        length = length if self.snippets == "episodes" else 1
        count = -(-(self.critic_batch or self.batch) // length)
        drawn, inside = state.replay.snippets(rng, state.index, count, length, self.snippets)
        # What a snippet lacks at the end of its episode counts as a step without a successor.
        drawn = drawn._replace(ended=drawn.ended | ~inside, terminated=drawn.terminated & inside)
        steps, count = Experience(*(leaf.flatten(1, 2) for leaf in drawn)), count * length
        width = self.agent.spec.action.size
        noise = rng.fold("smoothing").normal(state.index, count * width)
        noise = noise.reshape(-1, count, width).to(steps.obs.dtype)
        goal = self.td_target(state.target, steps, noise)
        names = CRITICS if self.twin else CRITICS[:1]
        leaves = {k: v.detach().requires_grad_() for k, v in state.params.items()
                  if k.partition(".")[0] in names}  # fmt: skip
        with torch.enable_grad():
            total = self.critic_loss(leaves, steps, goal).sum()
        found = torch.autograd.grad(total, list(leaves.values()))
        gradients = dict(zip(leaves, found, strict=True))
        params, adam = adam_step(state.adam, state.params, gradients, self.learning_rate)
        return state._replace(params=params, adam=adam, updates=state.updates + 1)

    def td_target(self, target: Params, steps: Experience, noise: Tensor) -> Tensor:
        """``r + gamma (1 - d) min_k Q_k'(s', clip(pi'(s') + clip(noise)))``, ``[P, M]``."""
        spec = self.agent.spec.action
        assert isinstance(spec, Continuous)
        limit = (spec.high - spec.low) / 2
        noise = (noise * self.target_noise).clamp(-self.target_clip, self.target_clip) * limit
        action = heads.mode(self.agent.policy(target, steps.next_obs)) + noise
        action = action.clamp(spec.low, spec.high)
        following = self.agent.critic(target, CRITICS[0], steps.next_obs, action)
        if self.twin:
            second = self.agent.critic(target, CRITICS[1], steps.next_obs, action)
            following = torch.minimum(following, second)
        alive = (~steps.terminated).to(following.dtype)
        bonus = self.terminal_bonus * (1.0 - alive) if self.terminal_bonus else 0.0
        return steps.reward + bonus + self.gamma * alive * following

    def critic_loss(self, params: Params, steps: Experience, goal: Tensor) -> Tensor:
        """Sum over critics of the mean squared error ``[P]``, where the successor is known."""
        weight = (steps.known | steps.terminated).to(goal.dtype)
        weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)
        total = torch.zeros_like(goal[:, 0])
        for name in CRITICS if self.twin else CRITICS[:1]:
            error = self.agent.critic(params, name, steps.obs, steps.action) - goal
            total = total + (error.square() * weight).sum(dim=1)
        return total

    def policy_step(self, state: OffPolicy, loss: Loss, rng: Rng) -> OffPolicy:
        """One Adam step of the policies on ``loss``; critics are constants in it."""
        length = max(1, loss.snippet)
        batch = state.replay.sample(rng, state.index, self.batch, length, self.snippets)
        rows = torch.arange(self.batch, device=state.index.device).expand(len(state.index), -1)
        prepared = loss.prepare(self.agent, state.params, batch)
        params, adam = descend(
            self.agent, loss, batch, prepared, rows, state.params, state.adam,
            self.policy_rate or self.learning_rate, only=("policy",), clip=self.clip,
        )  # fmt: skip
        return state._replace(params=params, adam=adam)
