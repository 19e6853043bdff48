"""One evolution search; what differs between searches is a :class:`Rule`.

Every rank draws, evaluates and sums only its own part of the population
(:mod:`esmeta.evolution.population`), takes the same step, and compares a hash of the state with the
others. The state is O(D): there is no population in it, and noise needs none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmeta import older
from esmeta.errors import UserError, finite_positive, non_negative_int, one_of
from esmeta.evolution.noise import Noise, noise_rank
from esmeta.evolution.population import (
    Draws,
    Evaluation,
    Generation,
    Population,
    Stage,
    draw_in_parts,
    joined,
    score_on_tasks,
)
from esmeta.evolution.scores import Stopwatch, gather, scores_of, steps_of
from esmeta.evolution.shaping import FAILED, Failed, Shaping, tail_share, weighed
from esmeta.evolution.state import Arrays, SearchState
from esmeta.modes import exact
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Comm, Metrics, Objective, Params

# Numbers of tasks kept apart for a generation that may grow.
_MANY = 1 << 20


class Rule(NamedTuple):
    """What one search does in its own way.

    Attributes:
        first: what it keeps besides theta before the first generation, from theta (float32
            ``[D]``) and its units of search (float64 ``[D]``).
        spread: standard deviation of every coordinate in a state, float64 ``[D]``.
        utilities: float64 ``[N]`` from fitness ``[N]``; all zero for a generation without
            information.
        update: theta, float ``[D]``, and the arrays after a generation with utilities (float64
            ``[N]``) that are not all zero.
        evaluation: how members are drawn and scored.
        noise_rank: of the perturbation of matrices; 0 for full rank.
        blocks: units of search; see ``sigma_blocks``.
        exact: whether updates have the same bits on every machine. Where they have not, ranks that
            differ take rank 0's state.
    """

    first: Callable[[np.ndarray, np.ndarray], Arrays]
    spread: Callable[[SearchState], np.ndarray]
    utilities: Callable[[Tensor], Tensor]
    update: Callable[[SearchState, np.ndarray, Generation], tuple[np.ndarray, Arrays]]
    evaluation: Evaluation
    noise_rank: int = 0
    blocks: str | Mapping[str, float] = "off"
    exact: bool = True


@options_class
class Search(ABC):
    """Options that all searches have, and their one step; each has a :class:`Rule` of its own.

    Attributes:
        popsize: members per generation, even (multiples of 16 split best over ranks).
        sigma: standard deviation of the perturbations (at the start, where it adapts).
        aggregate: fitness of a member from its returns on K tasks: ``mean``, ``worst`` (the
            smallest) or ``cvar:a`` (mean of the smallest share a).
        failed: members without a finite fitness: ``worst`` ranks them last, all equal;
            ``drop_pair`` leaves their mirrored pair out (not EvoTorch's); ``raise`` ends the run.
        tasks: ``shared`` by the whole generation, or ``per_pair``: every mirrored pair (or single
            member) has its own.
    """

    gradient: ClassVar[bool] = False
    mirrored: ClassVar[bool] = True
    """Whether members come in pairs theta +- step."""

    popsize: int = 256
    sigma: float = 0.05
    aggregate: str = "mean"
    failed: Failed = "worst"
    tasks: Literal["shared", "per_pair"] = "shared"

    def __post_init__(self) -> None:
        size = self.popsize
        if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
            raise UserError(
                f"popsize = {size!r}: must be an even integer >= 2 (members come in mirrored "
                "pairs, and one member alone cannot be ranked); write for example popsize = 256"
            )
        finite_positive("sigma", self.sigma, example=0.05)
        tail_share(self.aggregate)
        one_of("failed", self.failed, FAILED)
        one_of("tasks", self.tasks, ("shared", "per_pair"))

    @abstractmethod
    def rule(self) -> Rule:
        """What this search does in its own way."""

    def check(self, objective: Objective, ranks: int) -> None:
        """Refuse an objective that this search cannot evaluate; any number of ranks will do."""
        self.rule().evaluation.check(objective)

    def init(self, theta: Params, rng: Rng) -> SearchState:
        """Start at ``theta`` ``[1, ...]``; nothing is drawn."""
        rule, flat = self.rule(), ravel(theta)[0].detach().cpu().float().numpy().copy()
        unit = units(theta, rule.blocks)
        return SearchState(0, flat, rule.first(flat, unit), unit, shapes_of(theta))

    @exact
    def step(
        self, state: SearchState, objective: Objective, comm: Comm, rng: Rng
    ) -> tuple[SearchState, Metrics]:
        """One generation: draw, evaluate, gather, shape, sum exactly, update, compare hashes."""
        rule, watch = self.rule(), Stopwatch()
        population = Population(self.popsize, self.mirrored, Noise(state.shapes, rule.noise_rank))
        spread = rule.spread(state)
        stage = Stage(population, state, objective, comm, rng, watch)
        found = rule.evaluation.generation(stage, spread)
        utilities = rule.utilities(found.scores.fitness).numpy() * found.scale
        after = replace(state, generation=state.generation + 1, lives=found.lives)
        informed = bool(utilities.any())
        if informed:
            theta, arrays = rule.update(state, utilities, found)
            after = replace(after, theta=_float32(theta, arrays, state.generation), arrays=arrays)
        after = replace(after, arrays={**after.arrays, **found.keep})
        with watch.on("wait_s"):
            same = comm.same(after.digest())
            after = after if same else _brought_together(after, rule, comm)
        move = after.theta.astype(np.float64) - state.theta
        return after, {
            **found.scores.metrics(),
            "flat": float(not informed),
            "sigma": float(spread.mean()),
            "update_norm": math.sqrt(float(np.dot(move, move))),
            **found.metrics,
            **({} if rule.exact else {"resync": float(not same)}),
            **watch.metrics(),
        }

    def theta(self, state: SearchState) -> Params:
        """The centre of the search, leaves ``[1, ...]``."""
        return unravel_shapes(torch.from_numpy(state.theta.copy()).unsqueeze(0), state.shapes)

    def state_dict(self, state: SearchState) -> dict[str, Any]:
        """Plain tensors, O(D) (O(D^2) with a covariance matrix): the noise needs no state."""
        # One unit per leaf.
        starts = np.cumsum([0, *(math.prod(shape) for shape in state.shapes.values())])[:-1]
        arrays = {"theta": state.theta, "unit": state.unit[starts], **state.arrays}
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
        return {"generation": state.generation, **tensors}

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> SearchState:
        """The inverse of :meth:`state_dict`; lives are lived again at the next step."""
        arrays = {
            name: np.array(value.numpy()) for name, value in saved.items() if name != "generation"
        }
        arrays = older.search(arrays)
        flat, unit = arrays.pop("theta"), arrays.pop("unit")
        size, shapes = ravel(theta).shape[1], shapes_of(theta)
        if len(flat) != size:
            raise UserError(
                f"the checkpoint has {len(flat)} parameters, the policy has {size}: "
                "resume with the [policy] and [task] sections that the run was started with"
            )
        unit = np.repeat(
            np.broadcast_to(unit, len(shapes)), [math.prod(shape) for shape in shapes.values()]
        )
        return SearchState(int(saved["generation"]), flat, arrays, unit, shapes)


@options_class
class Sliced(Search):
    """A search of which every rank draws, evaluates and sums only its own part of the population.

    Attributes:
        interactions: environment steps per generation at least: ``popsize`` members are added
            until they are reached; 0: no such rule.
        popsize_max: limit for ``interactions``; 0: none.
        sigma_blocks: ``off``; ``scaled``, which searches every leaf in units of the standard
            deviation of its initial values (constant leaves: of the root mean square of the
            others); or a table from leaf names to units (leaves not named: 1). Both sigma and the
            learning rate of a leaf are multiplied by its unit.
    """

    interactions: int = 0
    popsize_max: int = 0
    sigma_blocks: Literal["off", "scaled"] | dict[str, float] = "off"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.failed == "drop_pair" and not self.mirrored:
            raise UserError(
                "failed = 'drop_pair': this search has no mirrored pairs; write failed = 'worst'"
            )
        non_negative_int("interactions", self.interactions)
        non_negative_int("popsize_max", self.popsize_max, example=4096)
        if 0 < self.popsize_max < self.popsize:
            raise UserError(
                f"popsize_max = {self.popsize_max}: must be 0 (no limit) or at least popsize = "
                f"{self.popsize}; write for example popsize_max = {4 * self.popsize}"
            )
        if isinstance(self.sigma_blocks, str):
            one_of("sigma_blocks", self.sigma_blocks, ("off", "scaled"))
        else:
            for leaf, unit in self.sigma_blocks.items():
                finite_positive(f"sigma_blocks.{leaf}", unit, example=1.0)

    def sliced(
        self,
        first: Callable[[np.ndarray], Arrays],
        spread: Callable[[SearchState], np.ndarray],
        shaping: Shaping,
        update: Callable[[SearchState, np.ndarray, Generation], tuple[np.ndarray, Arrays]],
        noise: str = "full",
    ) -> Rule:
        """A rule with whole evaluations and utilities of one kind; ``first`` takes the units."""
        return Rule(
            first=lambda theta, unit: first(unit),
            spread=spread,
            utilities=lambda fitness: weighed(
                fitness, shaping, drop_pairs=self.failed == "drop_pair"
            ),
            update=update,
            evaluation=Whole(self),
            noise_rank=noise_rank(noise),
            blocks=self.sigma_blocks,
        )


@dataclass(frozen=True)
class Whole:
    """Every member is scored by whole evaluations, as the options of its search say."""

    options: Sliced

    def check(self, objective: Objective) -> None:
        """Every objective will do."""

    def generation(self, stage: Stage, spread: np.ndarray) -> Generation:
        """Draw and score round after round; one, if not told otherwise by ``interactions``."""
        population, comm, options = stage.population, stage.comm, self.options
        popsize, most = population.popsize, options.popsize_max or math.inf
        spread = spread.astype(np.float32)
        parts, tables, owned = [], [], [[] for _ in range(comm.size)]
        steps = taken = round_ = 0
        while not round_ or (
            taken and steps < options.interactions and (round_ + 1) * popsize <= most
        ):
            dealt = population.deal(comm.size, round_)
            members = [population.members_of(joined(b)) - round_ * popsize for b in dealt]
            kept, rows = self._drawn_and_scored(stage, spread, joined(dealt[comm.rank]))
            parts.append(kept)
            tables.append(gather(rows, members, comm, stage.watch))
            for blocks, more in zip(owned, dealt, strict=True):
                blocks.extend(more)
            taken = steps_of(tables[-1])
            steps, round_ = steps + taken, round_ + 1
        # A copy of the noise would double a rank's memory.
        kept = parts[0] if len(parts) == 1 else np.concatenate(parts)
        table, number = np.concatenate(tables), stage.state.generation
        draws = Draws(population.noise, kept, owned, comm, stage.watch)
        return Generation(draws, scores_of(table, options.aggregate, options.failed, number))

    def _drawn_and_scored(
        self, stage: Stage, spread: np.ndarray, numbers: np.ndarray
    ) -> tuple[np.ndarray, Tensor | None]:
        """What is kept of the given directions, and the rows of scores of their members."""
        population, theta = stage.population, stage.state.theta
        kept = np.empty((len(numbers), population.noise.width), dtype=np.float32)
        stride = _MANY if self.options.interactions else population.directions
        stride *= self.options.tasks == "per_pair"
        rows = []
        for part in draw_in_parts(stage, numbers, kept):
            members = population.members(theta, spread * population.noise.expand(kept[part]))
            rows.append(
                score_on_tasks(stage, members, population.members_of(numbers[part]), stride)
            )
        return kept, torch.cat(rows) if rows else None


def _brought_together(state: SearchState, rule: Rule, comm: Comm) -> SearchState:
    """Rank 0's state, if the bits of this search may differ; else raise."""
    if rule.exact:
        raise RuntimeError(
            f"ranks disagree on theta after generation {state.generation - 1}: a rank runs other "
            "code or faulty hardware; resume from the last checkpoint"
        )

    def from_first(value: np.ndarray) -> np.ndarray:
        return comm.bcast(torch.from_numpy(np.array(value, order="C"))).numpy()

    arrays = {name: from_first(state.arrays[name]) for name in sorted(state.arrays)}
    return replace(state, theta=from_first(state.theta), arrays=arrays)


def _float32(theta: np.ndarray, arrays: Arrays, generation: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        moved = theta.astype(np.float32)
    if not all(np.isfinite(values).all() for values in (moved, *arrays.values())):
        raise FloatingPointError(
            f"theta is not finite after generation {generation}; lower optimizer.learning_rate "
            "or optimizer.sigma"
        )
    return moved


def units(theta: Params, blocks: str | Mapping[str, float]) -> np.ndarray:
    """One unit of search per coordinate, float64 ``[D]``; see ``sigma_blocks``."""
    sizes = [leaf[0].numel() for leaf in theta.values()]
    if isinstance(blocks, Mapping):
        unknown = sorted(set(blocks) - set(theta))
        if unknown:
            raise UserError(
                f"sigma_blocks: no leaf is named {unknown[0]!r}; the leaves are {', '.join(theta)}"
            )
        return np.repeat([float(blocks.get(name, 1.0)) for name in theta], sizes)
    if blocks == "off":
        return np.ones(sum(sizes))
    leaves = [leaf[0].detach().cpu().double().numpy().reshape(-1) for leaf in theta.values()]
    std = np.array([float(leaf.std()) if leaf.size > 1 else 0.0 for leaf in leaves])
    varied = std[std > 0]
    usual = math.sqrt(float((varied**2).mean())) if len(varied) else 1.0
    return np.repeat(np.where(std > 0, std, usual), sizes)
