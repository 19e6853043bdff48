"""NRES, noise-reuse evolution strategies: unbiased gradients from windows of long inner lives.

Li, Harrison, Sohl-Dickstein, Smith & Metz, "Noise-Reuse in Online Evolution Strategies", NeurIPS
2023, https://arxiv.org/abs/2304.12180; the same estimator as ES-Single, Vicol, Kolter & Swersky,
ICML 2023, https://arxiv.org/abs/2304.11153.

    g = 1 / (N sigma) * sum_pairs (R_w(theta + sigma eps) - R_w(theta - sigma eps)) eps

where R_w is the return of one *window* of K steps, the inner state of each member (fast weights,
hidden state, environment) lives on from window to window, and eps is drawn once per life of T
steps: as theta moves under a life, its noise stays. Summed over the T / K windows of a life, g is
the gradient of OpenAI-ES from whole lives; there are T / K updates for the same environment steps.
With K = T it *is* ``openes`` with ``shaping = "raw"``, bit for bit.

Pairs are staggered (step-unlocked): pair p of n belongs to group ``p T/K // n``, and group j begins
a life at generations j, j + T/K, ...: one group begins and one ends a life in every generation, so
that every generation sees all windows and its gradient points along that of the whole life. At the
start groups begin one after the other and the gradient is averaged over the pairs that take part.
The alternatives are worse: lives that are begun in the middle (a pre-roll) pay for steps that teach
nothing, and lives that all begin at once would have every update see one window only.

The number of a life is the generation in which it begins; it addresses its tasks and its noise. A
checkpoint holds no inner state: it keeps the last T / K - 1 thetas, and a resumed run lives all
current lives again with them, on any ranks, to the same bits. (Steps that are lived again are not
counted a second time.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError, one_of, positive_int
from esmeta.optimizers import openes
from esmeta.optimizers._generation import Scores, Stopwatch, gather_scores, score_members
from esmeta.optimizers._noise import Noise
from esmeta.optimizers._population import Draws, Sample, mirrored
from esmeta.optimizers._shaping import Failed, Shaping
from esmeta.optimizers._sliced import Arrays, SearchState
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.types import Comm, Fitness, Lifetimes, Metrics, Objective, Params

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class _Group:
    """Pairs of this rank that live the same window of the same life.

    ``kept`` float32 ``[pairs, width]`` is what their gradient is made of; ``lives`` are those of
    their members, two per pair; ``dead`` bool ``[members]`` marks members whose evaluation raised.
    """

    birth: int
    pairs: np.ndarray
    kept: np.ndarray | None = None
    lives: Any = None
    dead: np.ndarray | None = None


@dataclass(frozen=True)
class State(SearchState):
    """State between generations.

    ``arrays["thetas"]`` float32 ``[T/K - 1, D]`` holds the thetas before this one, the oldest first
    (fewer at the start). ``groups`` are the lives of this rank by phase, not saved: memory for the
    inner states of this rank's members, twice while a step is taken.
    """

    groups: dict[int, _Group] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class _Stage:
    """What all windows of one generation share."""

    objective: Lifetimes
    rng: Rng
    noise: Noise
    unit: np.ndarray
    steps: int
    watch: Stopwatch

    @property
    def windows(self) -> int:
        return -(-self.objective.life_steps // self.steps)


@options_class
class Optimizer(openes.Optimizer):
    """NRES. Options besides those of :class:`openes.Optimizer`.

    Attributes:
        window: steps per window, K, in the units of the objective's lives (environment steps of a
            trial); ``none`` takes a quarter of a life.
        shaping: ``zscore`` divides the differences ``R_w+ - R_w-`` of all pairs by their root mean
            square; ``raw`` leaves them. One scale for all windows keeps the direction; ranks, or a
            scale per window, would weigh early and late windows against each other and so change
            what is optimised.
        failed: ``drop_pair`` gives pairs without a finite return weight 0 (their life goes on and
            ends with their group's); ``raise`` ends the run.
        aggregate: ``mean`` only: the worst trials of the windows are not the windows of the worst.
    """

    fresh: ClassVar[bool] = False
    """Whether noise is drawn anew for every window, and accumulated (PES)."""

    window: int | None = None
    shaping: Shaping = "zscore"
    failed: Failed = "drop_pair"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            positive_int("window", self.window, example=25)
        one_of("shaping", self.shaping, ("zscore", "raw"))
        one_of("failed", self.failed, ("drop_pair", "raise"))
        one_of("aggregate", self.aggregate, ("mean",))
        one_of("tasks", self.tasks, ("shared",))
        for name in ("interactions", "popsize_max"):
            if getattr(self, name):
                raise UserError(
                    f"{name} = {getattr(self, name)}: lives of several generations cannot be "
                    f"added to one; write {name} = 0"
                )

    def init(self, theta: Params, rng: Rng) -> State:
        """Start at ``theta`` ``[1, ...]``; nothing is drawn, no life begins."""
        return State(**vars(super().init(theta, rng)))

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> State:
        """The inverse of :meth:`state_dict`; lives are lived again at the next step."""
        return State(**vars(super().load_state_dict(saved, theta)))

    def step(
        self, state: SearchState, objective: Objective, comm: Comm, rng: Rng
    ) -> tuple[State, Metrics]:
        """One generation: every group of pairs lives one window; then as in every sliced search."""
        assert isinstance(state, State)
        watch = Stopwatch()
        stage = self._stage(state, objective, rng, watch)
        groups, rows = self._live(state, stage, comm)
        draws, scores = self._gathered(state, stage, groups, rows, comm)
        births = self._births(state.generation, stage.windows)[: len(scores.fitness) // 2]
        # A life keeps the sigma it began with: its noise could not be reused otherwise.
        sigma = self._sigma(state.generation)
        ratio = np.array([sigma / self._sigma(birth) for birth in births.tolist()]).repeat(2)
        shaped = self._shaped(scores.fitness).numpy() * ratio
        after, metrics = self._finish(state, shaped, scores, draws, watch)
        past = np.concatenate([state.arrays["thetas"], state.theta[None]])
        past = past[max(0, len(past) - stage.windows + 1) :]
        assert isinstance(after, State)
        after = replace(after, arrays={**after.arrays, "thetas": past}, groups=groups)
        return after, metrics | _whole_lives(scores, births, stage.windows)

    def _first(self, size: int, unit: np.ndarray) -> Arrays:
        return super()._first(size, unit) | {"thetas": np.empty((0, size), dtype=np.float32)}

    def _shaped(self, fitness: Tensor) -> Tensor:
        return shaped_differences(fitness, self.shaping)

    def check(self, objective: Objective, ranks: int) -> None:
        """Refuse an objective without lives, and windows longer than a life."""
        self._lifetimes(objective)

    def _lifetimes(self, objective: Objective) -> tuple[Lifetimes, int]:
        """The objective as one that has lives, and the steps of a window."""
        if not isinstance(objective, Lifetimes):
            raise UserError(
                f"{type(objective).__name__} cannot be run in windows (it is no Lifetimes): write "
                "optimizer.name = 'openes', or objective.name = 'return'"
            )
        life = objective.life_steps
        steps = -(-life // 4) if self.window is None else self.window
        if steps > life:
            raise UserError(
                f"optimizer.window = {steps}: a life has {life} steps; write at most {life}, or "
                'window = "none" for a quarter of it'
            )
        return objective, steps

    def _stage(self, state: State, objective: Objective, rng: Rng, watch: Stopwatch) -> _Stage:
        lifetimes, steps = self._lifetimes(objective)
        return _Stage(lifetimes, rng, self._noise(state.shapes), state.unit, steps, watch)

    def _phases(self, pairs: np.ndarray, windows: int) -> np.ndarray:
        return pairs * windows // (self.popsize // 2)

    def _births(self, generation: int, windows: int) -> np.ndarray:
        """When the current lives of the pairs that take part began, int64 ``[pairs]``."""
        phases = self._phases(np.arange(self.popsize // 2), windows)
        phases = phases[phases <= generation]
        return generation - (generation - phases) % windows

    def _live(
        self, state: State, stage: _Stage, comm: Comm
    ) -> tuple[dict[int, _Group], list[Tensor]]:
        """Every group of this rank one window further, and rows of scores by group."""
        own = _joined(self._plan(stage.noise).blocks(comm.rank, comm.size, 0))
        phases = self._phases(own, stage.windows)
        groups, rows = {}, []
        for phase in np.unique(phases[phases <= state.generation]).tolist():
            birth = state.generation - (state.generation - phase) % stage.windows
            group = state.groups.get(phase)
            if group is None or group.birth != birth:
                group = _Group(birth, own[phases == phase])
                for generation, theta in _past(state, birth):
                    group, _ = self._window(stage, group, generation, theta)
            groups[phase], scored = self._window(stage, group, state.generation, state.theta)
            rows.append(scored)
        return groups, rows

    def _window(
        self, stage: _Stage, group: _Group, generation: int, theta: np.ndarray
    ) -> tuple[_Group, Tensor]:
        """One window of a group's life around ``theta``, and its rows of scores."""
        noise, kept = stage.noise, group.kept
        drawn = kept
        if self.fresh or drawn is None:
            drawn = noise.draw(stage.rng, generation, group.pairs)
        direction = noise.expand(drawn)
        if self.fresh:
            kept = direction if kept is None else kept + direction
        spread = (self._sigma(group.birth) * stage.unit).astype(np.float32)
        members = mirrored(theta, spread * direction)
        begin = stage.watch.now()
        lives, dead = group.lives, group.dead
        if lives is None or dead is None:
            lives = stage.objective.begin(members, group.birth)
            dead = np.zeros(len(members), dtype=bool)
        numbers = (2 * group.pairs[:, None] + np.arange(2)).reshape(-1)
        lives, rows = _advanced(stage, lives, members, numbers, generation)
        stage.watch.evaluate_s += stage.watch.now() - begin
        trials = rows.shape[1] - 1
        dead = dead | (rows[:, -1] < 0).numpy()
        rows[torch.from_numpy(dead), :trials] = math.nan
        return _Group(group.birth, group.pairs, drawn if kept is None else kept, lives, dead), rows

    def _gathered(
        self,
        state: State,
        stage: _Stage,
        groups: dict[int, _Group],
        rows: list[Tensor],
        comm: Comm,
    ) -> tuple[Draws, Scores]:
        """Scores of all pairs that take part, and this rank's share of what they were made of."""
        noise = Noise(state.shapes) if self.fresh else stage.noise
        plan = self._plan(stage.noise)
        # Groups begin in the order of their pairs, so that those which take part are the first.
        taking = len(self._births(state.generation, stage.windows))
        blocks = [
            [block[block < taking] for block in plan.blocks(rank, comm.size, 0)]
            for rank in range(comm.size)
        ]
        owned = [_joined(theirs) for theirs in blocks]
        kept = [group.kept for group in groups.values() if group.kept is not None]
        ends = np.cumsum([0, *map(len, blocks[comm.rank])]).tolist()
        ranges = [range(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        width = np.empty((0, noise.width), dtype=np.float32)
        sample = Sample(np.concatenate([width, *kept]), owned[comm.rank], ranges)
        members = [plan.members_of(pairs) for pairs in owned]
        table, steps, raised = gather_scores(
            torch.cat(rows) if rows else None, members, comm, stage.watch
        )
        scores = self._scoring().scores(table, steps, raised, state.generation)
        return Draws(sample, noise, owned, comm, stage.watch), scores


def _joined(blocks: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([_NONE, *blocks])


def _past(state: State, birth: int) -> Iterator[tuple[int, np.ndarray]]:
    """The generations since ``birth`` and the theta before each of them."""
    thetas = state.arrays["thetas"]
    for generation in range(birth, state.generation):
        yield generation, thetas[len(thetas) - (state.generation - generation)]


def _advanced(
    stage: _Stage, lives: Any, members: Tensor, numbers: np.ndarray, generation: int
) -> tuple[Any, Tensor]:
    """The lives after one window and their rows of scores; members that raise are marked.

    A member that raises is given the inner state of another one, so that its group stays together;
    what it earns from then on counts for nothing.
    """
    objective = stage.objective
    whole, alone = [], {}

    def score(part: Tensor, which: Tensor) -> Fitness:
        if len(which) == len(members):
            after, fitness = objective.advance(lives, part, stage.steps)
            whole.append(after)
        else:
            rows = {name: leaf[which] for name, leaf in objective.save(lives).items()}
            after, fitness = objective.advance(objective.restore(rows), part, stage.steps)
            alone[int(which)] = objective.save(after)
        return fitness

    rows = score_members(score, members, numbers, generation)
    if whole:
        return whole[0], rows
    another = next(iter(alone.values()))
    saved = [alone.get(row, another) for row in range(len(members))]
    joined = {name: torch.cat([one[name] for one in saved]) for name in another}
    return objective.restore(joined), rows


def shaped_differences(fitness: Tensor, shaping: str) -> Tensor:
    """Half the difference of each mirrored pair, with both signs: float64 ``[N]``.

    Pairs in which a member failed (NaN or infinite fitness) have weight 0. ``zscore`` divides by
    the root mean square of the others' differences, ``raw`` by nothing. All zero where no pair
    says anything.
    """
    values = fitness.numpy().reshape(-1, 2)
    with np.errstate(invalid="ignore", over="ignore"):
        change = values[:, 0] - values[:, 1]
    whole = np.isfinite(change)
    change = np.where(whole, change, 0.0)
    if shaping == "zscore" and change.any():
        # Scaling by a power of two first is exact and keeps squares of huge returns finite.
        change = np.ldexp(change, -math.frexp(float(np.abs(change).max()))[1])
        change = change / math.sqrt(math.fsum((change * change).tolist()) / int(whole.sum()))
    return torch.from_numpy(np.stack([change / 2, -change / 2], axis=1).reshape(-1))


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
