"""Searches from windows of long inner lives instead of whole evaluations: nres and pes.

Members live on from window to window (fast weights, hidden state, environment). Pairs are
staggered (step-unlocked): pair p of n belongs to group ``p T/K // n``, and group j begins a life of
T / K windows at generations j, j + T/K, ...: one group begins and one ends a life in every
generation, so that every generation sees all windows and its gradient points along that of the
whole life. At the start groups begin one after the other and the gradient is averaged over the
pairs that take part. The alternatives are worse: lives that are begun in the middle (a pre-roll)
pay for steps that teach nothing, and lives that all begin at once would have every update see one
window only.

The number of a life is the generation in which it begins; it addresses its tasks and its noise. A
checkpoint holds no inner state: it keeps the last T / K - 1 thetas, and a resumed run lives all
current lives again with them, on any ranks, to the same bits. (Steps that are lived again are not
counted a second time.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.evolution.noise import Noise
from esmeta.evolution.population import Draws, Generation, Stage, joined
from esmeta.evolution.scores import Scores, gather, score_members, scores_of
from esmeta.evolution.search import Rule
from esmeta.evolution.shaping import Failed, Shaping, differences
from esmeta.evolution.state import Arrays
from esmeta.types import Fitness, Lifetimes, Metrics, Objective


@dataclass(frozen=True)
class Group:
    """Pairs of this rank that live the same window of the same life.

    ``kept`` float32 ``[pairs, width]`` is what their gradient is made of; ``lives`` are those of
    their members, two per pair; ``dead`` bool ``[members]`` marks members whose evaluation raised;
    ``rows`` are the scores of the last window.
    """

    birth: int
    pairs: np.ndarray
    kept: np.ndarray | None = None
    lives: Any = None
    dead: np.ndarray | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Windows:
    """Members are scored by one window of their lives per generation.

    Attributes:
        steps: steps per window, K, in the units of the objective's lives; None: a quarter of one.
        fresh: noise is drawn anew for every window, and accumulated (PES).
        sigma: standard deviation in units of search, by the generation in which a life begins.
        failed: what becomes of members without a finite fitness.
    """

    steps: int | None
    fresh: bool
    sigma: Callable[[int], float]
    failed: Failed

    def check(self, objective: Objective) -> None:
        """Refuse an objective without lives, and windows longer than a life."""
        self.lifetimes(objective)

    def lifetimes(self, objective: Objective) -> tuple[Lifetimes, int]:
        """The objective as one that has lives, and the steps of a window."""
        if not isinstance(objective, Lifetimes):
            raise UserError(
                f"{type(objective).__name__} cannot be run in windows (it is no Lifetimes): write "
                "optimizer.name = 'openes', or objective.name = 'return'"
            )
        life = objective.life_steps
        steps = -(-life // 4) if self.steps is None else self.steps
        if steps > life:
            raise UserError(
                f"optimizer.window = {steps}: a life has {life} steps; write at most {life}, or "
                'window = "none" for a quarter of it'
            )
        return objective, steps

    def generation(self, stage: Stage, spread: np.ndarray) -> Generation:
        """Every group of pairs lives one window, around theta with the spread it began with.

        ``state.arrays["thetas"]`` float32 ``[T/K - 1, D]`` holds the thetas before this one, the
        oldest first (fewer at the start); ``state.lives`` the groups of this rank by phase.
        """
        population, state = stage.population, stage.state
        objective, steps = self.lifetimes(stage.objective)
        windows, now = -(-objective.life_steps // steps), state.generation
        phases = np.arange(population.directions) * windows // population.directions
        # Groups begin in the order of their pairs, so that those which take part are the first.
        taking = int((phases <= now).sum())
        births = now - (now - phases[:taking]) % windows
        blocks = [
            [block[block < taking] for block in theirs]
            for theirs in population.deal(stage.comm.size)
        ]
        own = joined(blocks[stage.comm.rank])
        groups = _lived(_Course(self, objective, steps, stage), own, phases[own], windows)
        # A life keeps the sigma it began with: its noise could not be reused otherwise.
        ratio = [self.sigma(now) / self.sigma(birth) for birth in births.tolist()]
        thetas = np.concatenate([state.arrays["thetas"], state.theta[None]])
        draws, scores = self._gathered(stage, blocks, list(groups.values()))
        return Generation(
            draws,
            scores,
            scale=np.repeat(ratio, 2),
            keep={"thetas": thetas[max(0, len(thetas) - windows + 1) :]},
            lives=groups,
            metrics=_whole_lives(scores, births, windows),
        )

    def _gathered(
        self, stage: Stage, blocks: list[list[np.ndarray]], groups: list[Group]
    ) -> tuple[Draws, Scores]:
        """What the update sums over, and the scores of all pairs that take part."""
        population, number = stage.population, stage.state.generation
        noise = Noise(population.noise.shapes) if self.fresh else population.noise
        kept = [np.empty((0, noise.width), dtype=np.float32)]
        kept += [group.kept for group in groups if group.kept is not None]
        rows = [group.rows for group in groups if group.rows is not None]
        draws = Draws(noise, np.concatenate(kept), blocks, stage.comm, stage.watch)
        members = [population.members_of(joined(theirs)) for theirs in blocks]
        table = gather(torch.cat(rows) if rows else None, members, stage.comm, stage.watch)
        return draws, scores_of(table, "mean", self.failed, number)


def _lived(
    course: _Course, pairs: np.ndarray, phases: np.ndarray, windows: int
) -> dict[int, Group]:
    """This rank's groups by phase after one window more; lives that are not there are made up."""
    state = course.stage.state
    now, groups = state.generation, {}
    for phase in np.unique(phases).tolist():
        birth = now - (now - phase) % windows
        group = (state.lives or {}).get(phase)
        if group is None or group.birth != birth:
            group = Group(birth, pairs[phases == phase])
            for past in range(birth, now):
                group = course.window(group, past, state.arrays["thetas"][past - now])
        groups[phase] = course.window(group, now, state.theta)
    return groups


@dataclass(frozen=True)
class _Course:
    """What all windows of one generation share."""

    how: Windows
    objective: Lifetimes
    steps: int
    stage: Stage

    def window(self, group: Group, generation: int, theta: np.ndarray) -> Group:
        """The group after one window of its life around ``theta``."""
        population, kept, drawn = self.stage.population, group.kept, group.kept
        if self.how.fresh or drawn is None:
            drawn = population.noise.draw(self.stage.rng, generation, group.pairs)
        direction = population.noise.expand(drawn)
        if self.how.fresh:
            kept = direction if kept is None else kept + direction
        spread = (self.how.sigma(group.birth) * self.stage.state.unit).astype(np.float32)
        members = population.members(theta, spread * direction)
        lives, dead = group.lives, group.dead
        with self.stage.watch.on("evaluate_s"):
            if lives is None or dead is None:
                lives = self.objective.begin(members, group.birth)
                dead = np.zeros(len(members), dtype=bool)
            numbers = population.members_of(group.pairs)
            lives, rows = self._advance(lives, members, numbers, generation)
        dead = dead | (rows[:, -1] < 0).numpy()
        rows[torch.from_numpy(dead), :-1] = math.nan
        kept = drawn if kept is None else kept
        return Group(group.birth, group.pairs, kept, lives, dead, rows)

    def _advance(
        self, lives: Any, members: Tensor, numbers: np.ndarray, generation: int
    ) -> tuple[Any, Tensor]:
        """The lives after one window and their rows of scores; members that raise are marked.

        A member that raises is given the inner state of another one, so that its group stays
        together; what it earns from then on counts for nothing.
        """
        objective, parts = self.objective, {}

        def score(rows: slice) -> Fitness:
            whole = rows.stop - rows.start == len(members)
            begun = lives
            if not whole:
                saved = objective.save(lives)
                begun = objective.restore({name: leaf[rows] for name, leaf in saved.items()})
            parts[rows.start, whole], fitness = objective.advance(begun, members[rows], self.steps)
            return fitness

        rows = score_members(score, numbers, generation)
        if (0, True) in parts:
            return parts[0, True], rows
        alone = {row: objective.save(part) for (row, _), part in parts.items()}
        another = next(iter(alone.values()))
        saved = [alone.get(row, another) for row in range(len(members))]
        together = {name: torch.cat([one[name] for one in saved]) for name in another}
        return objective.restore(together), rows


def in_windows(rule: Rule, windows: Windows, shaping: Shaping) -> Rule:
    """The same search from windows of lives, with differences of pairs for utilities."""

    def first(theta: np.ndarray, unit: np.ndarray) -> Arrays:
        return rule.first(theta, unit) | {"thetas": np.empty((0, len(unit)), dtype=np.float32)}

    utilities = functools.partial(differences, kind=shaping)
    return rule._replace(first=first, utilities=utilities, evaluation=windows)


def _whole_lives(scores: Scores, births: np.ndarray, windows: int) -> Metrics:
    """``life_fitness_mean``: mean fitness of the windows added up, once all windows are lived."""
    fitness = scores.fitness.numpy().reshape(-1, 2)
    means = []
    for birth in np.unique(births).tolist():
        found = fitness[births == birth]
        found = found[np.isfinite(found)]
        if len(found):
            means.append(math.fsum(found.tolist()) / len(found))
    return {"life_fitness_mean": math.fsum(means)} if len(means) == windows else {}
