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
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta import errors
from esmeta.agent import heads
from esmeta.agent.heads import half_range
from esmeta.agent.policy import CRITICS, Need, Policy, steps_of
from esmeta.errors import UserError
from esmeta.options import options_class
from esmeta.rl import losses
from esmeta.rl.descent import Adams, descend
from esmeta.rl.losses import Data, Loss
from esmeta.rl.replay import OVERS, Over, Replay
from esmeta.rng import Rng
from esmeta.rollout import Act, Trajectory
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import Continuous, Params, PolicyOut

# --- losses of a policy, by way of its critics ---------------------------------------------------


@options_class
class DeterministicGradient:
    """DDPG's and TD3's: ``-Q_1(s, pi(s))`` (Lillicrap et al. 2016, arXiv 1509.02971, eq. 6).

    Policies with a memory are run over snippets of ``snippet`` steps, others need single ones.
    """

    snippet: int = 1
    needs: frozenset[Need] = field(default=frozenset({"critics"}), init=False)
    context: int = field(default=0, init=False)

    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        """Nothing is held constant but the critic, whose gradient nobody takes."""
        return data

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        """The loss ``[P]``: a mean over the steps of the snippets."""
        steps, inside = data.trajectory.steps, data.constants["inside"]
        action = heads.mode(agent.read(params, data.trajectory.start, steps, value=False))
        worth = agent.critic(params, CRITICS[0], steps_of(steps.obs), action)
        return -(worth * inside).sum(dim=1) / inside.sum(dim=1)


@options_class
class OffPolicyReinforce:
    """MetaGenRL's control: ``A_t mean_d (a_td - pi(s_t)_d)^2``.

    It is ``reinforce`` in the release's ``model.py``: REINFORCE for a Gaussian of fixed variance,
    without importance weights. A is GAE over the snippet with ``V = Q_1(s, pi(s))``, a constant; an
    episode that ended without a terminal state bootstraps from its own last V.
    """

    needs: frozenset[Need] = field(default=frozenset({"critics"}), init=False)
    context: int = field(default=0, init=False)

    length: int = 20
    gamma: float = 0.99
    gae_lambda: float = 0.97

    @property
    def snippet(self) -> int:
        """Steps per snippet."""
        return self.length

    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        """Advantages ``[P, n L]``, 0 behind the end of an episode."""
        snippets = data.trajectory
        value = state_values(agent, params, snippets)
        gamma, lambda_ = self.gamma, self.gae_lambda
        raw = losses.advantages(snippets, value[:-1], value[-1], gamma=gamma, lambda_=lambda_)
        constants = {"advantage": steps_of(raw) * data.constants["inside"]}
        return data._replace(constants=data.constants | constants)

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        """The loss ``[P]``: a mean over the steps of the snippets."""
        snippets, made = data.trajectory, data.constants
        mean = heads.mode(agent.read(params, snippets.start, snippets.steps, value=False))
        error = (steps_of(snippets.action) - mean).square().mean(dim=-1)
        return (made["advantage"] * error).sum(dim=1) / made["inside"].sum(dim=1)


def state_values(agent: Policy, params: Params, snippets: Trajectory) -> Tensor:
    """``V = Q_1(s, pi(s))`` of all steps and what followed the last one, ``[L + 1, P, n]``."""
    steps = snippets.all_steps
    action = heads.mode(agent.read(params, snippets.start, steps, value=False))
    flat = agent.critic(params, CRITICS[0], steps_of(steps.obs), action)
    return flat.unflatten(1, (-1, len(steps.obs))).movedim(2, 0)


# --- the learner ---------------------------------------------------------------------------------


class OffPolicy(NamedTuple):
    """State of P agents that learn by :class:`ReplayLearner`.

    ``target`` are the slow copies of policy and critics, ``updates`` int64 ``[P]`` the critic steps
    done. Its replay is written in place: a state that was learned on is used up.
    """

    params: Params
    target: Params
    adams: Adams
    replay: Replay
    numbers: Tensor
    updates: Tensor


@options_class
class ReplayOptions:
    """Options of all that learns from a replay.

    Attributes:
        hidden: widths of the ReLU layers of policy and critics, each with layer norm.
        period: environment steps between updates; as many update rounds follow.
        capacity: steps that the replay holds at most (a life's, where that is less).
        batch: transitions (or snippets) per step.
        critic_batch: transitions per critic step; 0: as many as a policy step sees.
        snippets: whether every whole episode of the replay is as likely to be drawn from
            (``episodes``, as in MetaGenRL's release, where critics learn from the transitions of
            such snippets) or every step (``steps``).
        update_after: steps before the first update.
        gamma: discount.
        polyak: what targets keep of themselves.
        delay: critic steps per policy step.
        learning_rate: of Adam.
        clip: global norm of the policy's gradient at most; 0: no limit.
    """

    hidden: tuple[int, ...] = (350, 350)
    period: int = 50
    capacity: int = 1_000_000
    batch: int = 100
    critic_batch: int = 0
    snippets: Over = "steps"
    update_after: int = 1_000
    gamma: float = 0.99
    polyak: float = 0.995
    delay: int = 2
    learning_rate: float = 1e-3
    clip: float = 0.0

    def __post_init__(self) -> None:
        for width in self.hidden:
            errors.positive_int("hidden", width, example=64)
        for name in ("period", "capacity", "batch", "update_after", "delay"):
            errors.positive_int(name, getattr(self, name), example=100)
        errors.non_negative_int("critic_batch", self.critic_batch, example=1000)
        errors.one_of("snippets", self.snippets, OVERS)
        errors.non_negative("clip", self.clip)
        errors.finite_positive("learning_rate", self.learning_rate, example=0.001)
        errors.fraction("gamma", self.gamma)
        errors.fraction("polyak", self.polyak)


@dataclass(frozen=True)
class ReplayLearner:
    """Acts for ``period`` steps, then takes as many update rounds.

    Attributes:
        agent: the networks, with critics.
        options: see :class:`ReplayOptions`.
        start: steps of uniformly random actions at first.
        target_noise: spread of the target's actions, in units of the action limit.
        target_clip: limit of that noise.
        twin: the smaller of two critics is the target (off: the first alone, as in DDPG).
        policy_rate: Adam's rate of the policy, if another (0: the same).
        terminal_bonus: added to the target of terminal steps, as MetaGenRL's release does with 1.
    """

    agent: Policy
    options: ReplayOptions
    start: int = 10_000
    target_noise: float = 0.2
    target_clip: float = 0.5
    twin: bool = True
    policy_rate: float = 0.0
    terminal_bonus: float = 0.0

    @property
    def period(self) -> int:
        """Environment steps between updates."""
        return self.options.period

    def check(self, loss: Loss) -> None:
        """Refuse a replay that cannot hold a batch, or a snippet of the loss."""
        options = self.options
        held = min(options.capacity, options.update_after)
        if loss.snippet > held:
            raise UserError(
                f"snippet = {loss.snippet}: longer than the {held}"
                " steps that the replay holds at the first update (capacity and update_after); "
                f"write for example update_after = {max(options.batch, 10 * loss.snippet)}"
            )
        if options.period > options.capacity:
            raise UserError(
                f"period = {options.period}: more steps than the replay holds (capacity = "
                f"{options.capacity}); write for example capacity = {20 * options.period}"
            )

    def init(self, rng: Rng, index: Tensor, first: Params | None = None) -> OffPolicy:
        """Fresh agents with the numbers ``index`` int64 ``[P]``; their replays are empty.

        ``first`` are leaves ``[P, ...]`` of their networks that are given instead of drawn.
        """
        params = self.agent.init_at(rng.fold("agent"), index) | (first or {})
        replay = Replay.empty(len(index), self.options.capacity, self.agent.spec, index.device)
        adams = Adams.zeros(self.agent, params)
        return OffPolicy(params, dict(params), adams, replay, index, torch.zeros_like(index))

    def with_fresh_policies(self, state: OffPolicy, rng: Rng) -> OffPolicy:
        """The agents with policies drawn at ``rng``; critics and replays stay."""
        fresh = self.agent.part(self.agent.init_at(rng, state.numbers), "actor")
        return state._replace(
            params=state.params | fresh,
            target=state.target | fresh,
            adams=state.adams.renewed(self.agent, fresh),
        )

    def acting(self, state: OffPolicy) -> Params:
        """The policies."""
        return self.agent.part(state.params, "actor")

    def act(self, state: OffPolicy) -> Act:
        """Uniform actions at first; then the policy's with its noise, clipped to the limits."""
        spec = self.agent.spec.action
        assert isinstance(spec, Continuous)
        random = state.replay.added < self.start

        def act(out: PolicyOut, noise: Tensor) -> Tensor:
            if random:
                share = 0.5 * (1.0 + torch.erf(noise / math.sqrt(2.0)))
                return (spec.low + (spec.high - spec.low) * share).expand_as(heads.mode(out))
            return heads.sample(out, noise).clamp(spec.low, spec.high)

        return act

    @torch.no_grad()
    def update(self, state: OffPolicy, new: Trajectory, loss: Loss, rng: Rng) -> OffPolicy:
        """The agents after one update round per step of ``new``, ``period`` steps of each."""
        state = self.keep(state, new)
        return self.rounds(state, loss, rng, self.period) if self.learns(state) else state

    def keep(self, state: OffPolicy, new: Trajectory) -> OffPolicy:
        """The agents with the steps ``new`` in their replays, from which they have yet to learn."""
        return state._replace(replay=state.replay.add(new))

    def learns(self, state: OffPolicy) -> bool:
        """Whether there are steps enough to learn from."""
        return state.replay.added >= self.options.update_after

    @torch.no_grad()
    def rounds(self, state: OffPolicy, loss: Loss, rng: Rng, count: int) -> OffPolicy:
        """``count`` critic steps, with those of policy and targets that fall due."""
        delay, keep = self.options.delay, self.options.polyak
        for _ in range(count):
            number = int(state.updates[0])
            draw = rng.fold("replay", number)
            state = self.critic_step(state, draw, max(1, loss.snippet))
            if number % delay == delay - 1:
                state = self.policy_step(state, loss, draw.fold("policy"))
                target = {
                    name: leaf * keep + state.params[name] * (1.0 - keep)
                    for name, leaf in state.target.items()
                }
                state = state._replace(target=target)
        return state

    # --- storing -------------------------------------------------------------------------------

    def save(self, state: OffPolicy) -> list[Tensor]:
        """All of it but the agents' numbers, leaves ``[P, ...]``; of the replay what is filled."""
        count = torch.full_like(state.numbers, state.replay.added)
        learned = leaves_of((state.params, state.target, state.adams))
        return [count, state.updates, *state.replay.kept(), *learned]

    def restore(self, fresh: OffPolicy, saved: Sequence[Tensor]) -> OffPolicy:
        """The inverse of :meth:`save` for agents that are ``fresh``."""
        count, updates, *rest = saved
        rows = len(fresh.replay.rows)
        tree = (fresh.params, fresh.target, fresh.adams)
        params, target, adams = with_leaves(tree, rest[rows:])
        replay = fresh.replay.filled(rest[:rows], int(count[0]))
        return OffPolicy(params, target, adams, replay, fresh.numbers, updates)

    # --- one round -----------------------------------------------------------------------------

    def draw(self, state: OffPolicy, rng: Rng, count: int, length: int) -> Data:
        """Snippets of each agent's replay."""
        spec, over = self.agent.spec, self.options.snippets
        data = state.replay.draw(rng, state.numbers, count, length, spec, over)
        if self.agent.stateless:
            return data
        numbers = state.numbers.unsqueeze(1).expand(-1, count)
        start = self.agent.initial_state(state.params, count, rng, numbers)
        return data._replace(trajectory=data.trajectory._replace(start=start))

    def critic_step(self, state: OffPolicy, rng: Rng, length: int = 1) -> OffPolicy:
        """One Adam step of the critics towards the targets, on transitions drawn at ``rng``.

        As many as a policy sees in snippets of ``length`` steps, if no other number is set; over
        episodes they are drawn in such snippets.
        """
        options = self.options
        wanted = options.critic_batch or options.batch * length
        length = length if options.snippets == "episodes" else 1
        count = -(-wanted // length)
        data, count = self.draw(state, rng, count, length), count * length
        width = self.agent.spec.action.size
        noise = rng.fold("smoothing").normal(state.numbers, count * width)
        noise = noise.reshape(-1, count, width).to(data.trajectory.reward.dtype)
        goal, weight = self.td_target(state.target, data, noise)

        def loss(params: Params) -> Tensor:
            return self.critic_loss(params, data, goal, weight)

        # Without a twin the second critic gets no gradient, and stays.
        params, adams = descend(
            self.agent, loss, state.params, state.adams, options.learning_rate, only=("critics",)
        )
        return state._replace(params=params, adams=adams, updates=state.updates + 1)

    def td_target(self, target: Params, data: Data, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Targets ``[P, M]`` and the weights of their errors, which add up to 1.

        ``r + gamma (1 - d) min_k Q_k'(s', clip(pi'(s') + clip(noise)))``. What a snippet lacks at
        the end of its episode counts as a step without a successor, and has no weight.
        """
        spec, options = self.agent.spec.action, self.options
        assert isinstance(spec, Continuous)
        snippets, inside = data.trajectory, data.constants["inside"]
        noise = (noise * self.target_noise).clamp(-self.target_clip, self.target_clip)
        action = self._following(target, snippets) + noise * half_range(spec)
        action = action.clamp(spec.low, spec.high)
        obs = steps_of(snippets.after.obs)
        following = self.agent.critic(target, CRITICS[0], obs, action)
        if self.twin:
            second = self.agent.critic(target, CRITICS[1], obs, action)
            following = torch.minimum(following, second)
        terminated, ended = (
            steps_of(leaf) & inside for leaf in (snippets.terminated, snippets.ended)
        )
        alive = (~terminated).to(following.dtype)
        bonus = self.terminal_bonus * (1.0 - alive) if self.terminal_bonus else 0.0
        goal = steps_of(snippets.reward) + bonus + options.gamma * alive * following
        weight = (inside & (~ended | terminated)).to(goal.dtype)
        return goal, weight / weight.sum(dim=1, keepdim=True).clamp_min(1.0)

    def _following(self, target: Params, snippets: Trajectory) -> Tensor:
        """What the target would do at the steps that follow, ``[P, M, A]``."""
        if self.agent.stateless:
            out = self.agent.read(target, snippets.start, snippets.after, value=False)
            return heads.mode(out)
        # A memory has come to step k + 1 of a snippet through all before it.
        out = self.agent.read(target, snippets.start, snippets.all_steps, value=False)
        return heads.mode(out).unflatten(1, (-1, len(snippets.ts.obs)))[:, :, 1:].flatten(1, 2)

    def critic_loss(self, params: Params, data: Data, goal: Tensor, weight: Tensor) -> Tensor:
        """Sum over critics of the weighted squared error ``[P]``."""
        obs, action = steps_of(data.trajectory.steps.obs), steps_of(data.trajectory.action)
        total = torch.zeros_like(goal[:, 0])
        for name in CRITICS if self.twin else CRITICS[:1]:
            error = losses.value_error(self.agent.critic(params, name, obs, action), goal)
            total = total + (error * weight).sum(dim=1)
        return total

    def policy_step(self, state: OffPolicy, loss: Loss, rng: Rng) -> OffPolicy:
        """One Adam step of the policies on ``loss``; critics are constants in it."""
        options = self.options
        data = self.draw(state, rng, options.batch, max(1, loss.snippet))
        data = loss.prepare(self.agent, state.params, data)
        params, adams = descend(
            self.agent,
            lambda params: loss(self.agent, params, data),
            state.params,
            state.adams,
            self.policy_rate or options.learning_rate,
            only=("actor",),
            clip=options.clip,
        )
        return state._replace(params=params, adams=adams)
