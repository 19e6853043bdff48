"""Bandit with dependent arms: a probe of memory whose best score is known in closed form.

With two arms the good one pays 1 with probability p and the other with probability 1 - p. Either
arm then tells equally much about which is good, so that playing the likelier arm is optimal (no
exploration is needed), and the number of hints for each arm is a binomial walk. With more arms
one pays 1 at every pull and the others nothing: the best play tries one after the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_int, check_split, task_numbers
from esmeta.types import Discrete, Reference, Spec, Tasks, TimeStep


class _Tables(NamedTuple):
    """Everything that can happen, flat ``[(horizon + 1) * R * arms]`` for ``R`` tasks.

    The last slice in time is all zero: there the finished trials stay.
    """

    reward: Tensor
    best: Tensor


class State(NamedTuple):
    """State of P x B trials.

    ``cursor`` int64 ``[P, B]`` points into the tables, ``best`` float32 ``[P, B]`` counts pulls of
    the good arm and ``time`` int64 ``[]`` the steps of all trials.
    """

    cursor: Tensor
    best: Tensor
    time: Tensor
    end: Tensor
    tables: _Tables


@options_class
class Task:
    """Bandit of fixed length. Observation ``[1]``: always 0; only reward and action inform.

    Args:
        arms: number of arms; more than 2 need ``reward_probability=1``.
        reward_probability: of the good arm of two; the other pays with the complement.
        horizon: pulls per trial.
    """

    arms: int = 2
    reward_probability: float = 0.8
    horizon: int = 20

    def __post_init__(self) -> None:
        check_int("arms", self.arms, 2, 100)
        check_int("horizon", self.horizon, 1, 10_000)
        p = self.reward_probability
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0.5 < p <= 1.0:
            raise ValueError(
                f"reward_probability is {p!r}; it must be above 0.5 (where both arms are alike) "
                f"and at most 1: write reward_probability=0.8"
            )
        if self.arms > 2 and p != 1.0:
            raise ValueError(
                f"reward_probability is {p!r} with {self.arms} arms; more than two arms are "
                f"deterministic: write reward_probability=1.0 or arms=2"
            )

    @property
    def spec(self) -> Spec:
        """One constant observation, as many actions as arms, one episode per trial."""
        return Spec(obs_size=1, action=Discrete(self.arms), horizon=self.horizon)

    @property
    def reference(self) -> Reference:
        """Both scores are exact."""
        p = float(self.reward_probability)
        memoryless = 0.5 + (self.horizon - 1) * (p * p + (1.0 - p) * (1.0 - p))
        note = "both exact; best: Bayes-optimal play"
        if self.arms == 2:
            note += f"; win-stay, lose-shift, best from one step of memory: {memoryless:.2f}"
        return Reference(self.horizon / self.arms, self.optimum(), note)

    def optimum(self) -> float:
        """Mean return of the best possible play, in closed form.

        Two arms: ``sum_t P_t p + (1 - P_t)(1 - p)`` for ``t = 0 .. horizon-1``, where ``P_t`` is
        the probability that a binomial walk of ``t`` hints, each right with probability ``p``,
        favours the good arm (a tie counts half). Otherwise the number of failures before the first
        success is uniform in ``0 .. arms-1``.
        """
        arms, horizon, p = self.arms, self.horizon, float(self.reward_probability)
        if arms > 2:
            if horizon < arms:
                return horizon * (horizon + 1) / (2 * arms)
            return horizon - (arms - 1) / 2
        total = 0.0
        for t in range(horizon):
            right = _majority(t, p)
            total += right * p + (1.0 - right) * (1.0 - p)
        return total

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``good`` int64 ``[1, B]``, the arm that pays more.

        There are only ``arms`` different tasks, so that ``train`` and ``test`` share them; their
        streams differ.
        """
        check_split(split)
        index = task_numbers(batch)
        good = rng.fold("bandit", split).integers(index, 1, self.arms)
        return Tasks(index, {"good": good.squeeze(-1)})

    def make_env(self, device: torch.device | str) -> BanditEnv:
        """The environment on ``device``; tasks given to it must lie there too."""
        return BanditEnv(self, device)


class BanditEnv:
    """P x B bandits in lockstep; what every pull would pay is drawn at reset."""

    def __init__(self, task: Task, device: torch.device | str) -> None:
        self._task = task
        self._eye = torch.eye(task.arms, dtype=torch.float32, device=device)

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Start the trials; all members meet the same luck."""
        task, good = self._task, tasks.data["good"]
        rows, batch = tasks.index.shape
        width = rows * batch * task.arms
        luck = rng.fold("dynamics").uniform(tasks.index, task.horizon) < task.reward_probability
        is_good = (torch.arange(task.arms, device=good.device) == good.unsqueeze(-1)).unsqueeze(2)
        pays = is_good == luck.unsqueeze(-1) if task.arms == 2 else is_good & luck.unsqueeze(-1)
        end = torch.arange(0, width, task.arms, device=good.device).view(rows, batch)
        cursor = end.expand(population, batch).contiguous()
        none = torch.zeros_like(cursor, dtype=torch.float32)
        time = torch.zeros((), dtype=torch.int64, device=good.device)
        tables = _Tables(_by_time(pays), _by_time(is_good.expand_as(pays)))
        state = State(cursor, none, time, end + task.horizon * width, tables)
        no = torch.zeros_like(cursor, dtype=torch.bool)
        yes = torch.ones_like(no)
        blank = none.unsqueeze(-1)
        prev_action = blank.expand(-1, -1, task.arms)
        return state, TimeStep(blank, prev_action, none, no, no, yes, yes)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """Pull one arm in every trial; the last pull terminates the trial."""
        tables, task = state.tables, self._task
        pull = state.cursor + action
        reward = torch.take(tables.reward, pull)
        width = tables.reward.shape[0] // (task.horizon + 1)
        cursor = torch.minimum(state.cursor + width, state.end)
        time = state.time + 1
        over = (time >= task.horizon).expand(reward.shape)
        step = TimeStep(
            obs=torch.zeros_like(reward).unsqueeze(-1),
            prev_action=torch.embedding(self._eye, action),
            reward=reward,
            terminated=(time == task.horizon).expand(reward.shape),
            truncated=torch.zeros_like(over),
            new_episode=over,
            new_trial=over,
        )
        best = state.best + torch.take(tables.best, pull)
        return State(cursor, best, time, state.end, tables), step

    def metrics(self, state: State) -> dict[str, Tensor]:
        """``best_arm``: share of the pulls so far on the good arm, float32 ``[P, B]``."""
        return {"best_arm": state.best / state.time.clamp(max=self._task.horizon)}


def _by_time(table: Tensor) -> Tensor:
    """Reorder bool ``[Q, B, T, arms]`` to flat float32, time first, and end it with zeros."""
    flat = table.permute(2, 0, 1, 3).flatten(1).to(torch.float32)
    return torch.cat([flat, torch.zeros_like(flat[:1])]).flatten()


def _majority(hints: int, p: float) -> float:
    """Probability that more than half of ``hints`` are right, ties counted half."""
    total = 0.0
    for right in range((hints + 1) // 2, hints + 1):
        log_ways = math.lgamma(hints + 1) - math.lgamma(right + 1) - math.lgamma(hints - right + 1)
        log_lost = (hints - right) * math.log(1.0 - p) if p < 1.0 else 0.0
        if p == 1.0 and right < hints:
            continue
        chance = math.exp(log_ways + right * math.log(p) + log_lost)
        total += chance / 2 if 2 * right == hints else chance
    return total
