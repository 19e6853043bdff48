"""A point that moves in the plane towards a goal it is not shown; what its tasks share."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.rng import Rng
from esmeta.types import Continuous, Reference, Spec, Tasks, TimeStep

_WALKS = 16_384
_WALK_STEPS = 1 << 21  # of all walks together, to bound memory


class Rules(NamedTuple):
    """How a point moves, and what pays.

    ``reward`` maps (position - goal, goal), each ``[..., 2]``, to ``[...]``. An episode has
    ``steps`` steps at most and starts uniformly in a square of half width ``start_width``; it
    terminates where both coordinates are closer to the goal than ``arrival`` (0: never).
    ``near`` is the distance that counts as a success.
    """

    reward: Callable[[Tensor, Tensor], Tensor]
    step_size: float
    steps: int
    episodes: int
    near: float
    start_width: float = 0.0
    arrival: float = 0.0

    def arrived(self, offset: Tensor) -> Tensor:
        """Whether a point so far (``[..., 2]``) from its goal ends its episode, bool ``[...]``."""
        return (offset.abs() < self.arrival).all(-1)


class State(NamedTuple):
    """State of P x B trials.

    ``position`` float32 ``[P, B, 2]``; ``episode`` and ``clock`` (steps of the episode) int64 and
    ``over`` bool ``[P, B]``; ``distance`` to the goal after the last move, before any new start,
    and ``closest`` after any move float32 ``[P, B]``; ``returns`` of the episodes ``[P, B, E]``;
    ``goal`` ``[Q, B, 2]`` and ``starts`` ``[Q, B, E, 2]``.
    """

    position: Tensor
    episode: Tensor
    clock: Tensor
    over: Tensor
    distance: Tensor
    closest: Tensor
    returns: Tensor
    goal: Tensor
    starts: Tensor


class PlaneEnv:
    """P x B points in lockstep. Observation: the position; actions are clipped to -1 .. 1.

    An episode that ends before the trial does is followed by the next one in the same step: the
    observation is then the next start, and ``new_episode`` is set.
    """

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._width = rules.episodes

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Put every point on its first start; the starts of all episodes are drawn here."""
        goal, rules = tasks.data["goal"], self._rules
        draws = rng.fold("dynamics").uniform(tasks.index, 2 * rules.episodes)
        starts = (2.0 * draws - 1.0) * rules.start_width
        starts = starts.to(torch.float32).unflatten(-1, (rules.episodes, 2))
        position = starts[..., 0, :].expand(population, -1, -1).contiguous()
        distance = torch.linalg.vector_norm(position - goal, dim=-1)
        count = torch.zeros_like(distance, dtype=torch.int64)
        no = torch.zeros_like(distance, dtype=torch.bool)
        none = torch.zeros_like(distance)
        returns = none.unsqueeze(-1).repeat(1, 1, rules.episodes)
        never = torch.full_like(distance, torch.inf)
        state = State(position, count, count, no, distance, never, returns, goal, starts)
        yes = ~no
        return state, TimeStep(position, torch.zeros_like(position), none, no, no, yes, yes)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """Move every point by ``step_size`` times its clipped action."""
        rules, alive = self._rules, ~state.over
        moved = state.position + rules.step_size * action.clamp(-1.0, 1.0)
        moved = torch.where(alive.unsqueeze(-1), moved, state.position)
        offset = moved - state.goal
        reward = rules.reward(offset, state.goal) * alive
        clock = state.clock + alive
        terminated = rules.arrived(offset) & alive
        truncated = (clock >= rules.steps) & alive & ~terminated
        ended = terminated | truncated
        again = ended & (state.episode < rules.episodes - 1)
        over = state.over | (ended & ~again)
        episode = state.episode + again
        position = torch.where(again.unsqueeze(-1), self._start(state.starts, episode), moved)
        distance = torch.linalg.vector_norm(offset, dim=-1)
        number = torch.arange(self._width, device=reward.device)
        mine = number == state.episode.unsqueeze(-1)
        after = State(
            position,
            episode,
            clock.masked_fill(again, 0),
            over,
            distance,
            torch.minimum(state.closest, distance),
            state.returns + reward.unsqueeze(-1) * mine,
            state.goal,
            state.starts,
        )
        new_episode = again | over
        return after, TimeStep(position, action, reward, terminated, truncated, new_episode, over)

    def _start(self, starts: Tensor, episode: Tensor) -> Tensor:
        starts = starts.expand(episode.shape[0], -1, -1, -1)
        number = episode[..., None, None].expand(-1, -1, 1, 2)
        return starts.gather(2, number).squeeze(2)

    def metrics(self, state: State) -> dict[str, Tensor]:
        """``distance`` after the last move, ``success`` (1 if ever near), float32 ``[P, B]``.

        With several episodes also ``return_k`` of each, NaN for those that did not begin.
        """
        near = (state.closest <= self._rules.near).to(torch.float32)
        result = {"distance": state.distance, "success": near}
        if self._width > 1:
            for k in range(self._width):
                begun = state.episode >= k
                returns = torch.where(begun, state.returns[..., k], torch.nan)
                result[f"return_{k + 1}"] = returns
        return result


class OnPlane(ABC):
    """What tasks of such points share; an option ``horizon`` is shared by ``episodes``."""

    horizon: int
    episodes: int

    @abstractmethod
    def rules(self) -> Rules:
        """How the point moves, and what pays."""

    @abstractmethod
    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``goal`` float32 ``[1, B, 2]``."""

    @property
    def spec(self) -> Spec:
        """The position, two real actions in -1 .. 1."""
        return Spec(2, Continuous(2), self.horizon, self.episodes)

    @property
    def reference(self) -> Reference:
        """Means over many goals."""
        return _reference(self)

    def make_env(self, device: torch.device | str) -> PlaneEnv:
        """The environment; it runs where the tasks given to it lie."""
        return PlaneEnv(self.rules())


@functools.cache
def _reference(task: OnPlane) -> Reference:
    """Scores of uniform actions and of the straight way, over many goals.

    The distances along both axes shrink independently of each other, so that moving each as fast as
    allowed makes every reward as large as it can be at that step.
    """
    rules = task.rules()
    count = max(256, min(_WALKS, _WALK_STEPS // rules.steps))
    goals = task.sample(count, "test", Rng(0)).data["goal"][0].double()
    numbers = torch.arange(count, device="cpu")
    draws = Rng(0).fold("reference").uniform(numbers, 2 * (rules.steps + 1))
    draws = (2.0 * draws - 1.0).unflatten(-1, (rules.steps + 1, 2))
    start = (draws[:, 0] * rules.start_width - goals).unsqueeze(1)
    walk = start + rules.step_size * draws[:, 1:].cumsum(1)
    time = torch.arange(1, rules.steps + 1, device="cpu").unsqueeze(-1)
    straight = (start.abs() - rules.step_size * time).clamp_min(0.0)
    scores = []
    for offset in (walk, straight):
        rewards = rules.reward(offset, goals.unsqueeze(1))
        arrived = rules.arrived(offset)
        gone = arrived.cumsum(1) - arrived.long() > 0
        scores.append(rewards.masked_fill(gone, 0.0).sum(1) * rules.episodes)
    error = float(scores[0].std()) / count**0.5
    return Reference(
        float(scores[0].mean()),
        float(scores[1].mean()),
        f"mean over {count} goals; random: uniform actions (s.e. {error:.2g}); best: straight to "
        "the goal, which must be known",
    )
