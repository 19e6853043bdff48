"""The part of an evolution strategy that does not depend on its update: sliced over ranks.

Every rank draws, evaluates and sums only its own part of the population (:mod:`_population`),
takes the same step, and compares a hash of the state with the others. The state is O(D): there is
no population in it, and noise needs none.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError, finite_positive, non_negative, non_negative_int, one_of
from esmeta.optimizers._generation import Scores, Scoring, Stopwatch, check_popsize
from esmeta.optimizers._noise import Noise
from esmeta.optimizers._population import Draws, Plan, sample_and_score
from esmeta.optimizers._shaping import FAILED, Failed, tail_share, weighed
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Comm, Metrics, Objective, Params

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SearchState:
    """State between generations.

    ``theta`` float32 ``[D]``; ``arrays`` whatever else the search keeps, by name; ``unit`` float64
    ``[D]``, one unit of search per coordinate.
    """

    generation: int
    theta: np.ndarray
    arrays: Arrays
    unit: np.ndarray
    shapes: dict[str, tuple[int, ...]] = field(compare=False)

    def digest(self) -> bytes:
        """Hash of everything that the next generation depends on."""
        digest = hashlib.sha256(f"{self.generation}".encode())
        for name in sorted(self.arrays):
            digest.update(name.encode() + self.arrays[name].tobytes())
        digest.update(self.theta.tobytes() + self.unit.tobytes())
        return digest.digest()


@options_class
class SlicedOptimizer(ABC):
    """Options that all sliced searches share, and their one step.

    Attributes:
        popsize: members per generation, even (multiples of 16 split best over ranks).
        sigma: standard deviation of the perturbations (at the start, where it adapts).
        aggregate: fitness of a member from its returns on K tasks: ``mean``, ``worst`` (the
            smallest) or ``cvar:a`` (mean of the smallest share a).
        failed: members without a finite fitness: ``worst`` ranks them last, all equal;
            ``drop_pair`` leaves their mirrored pair out; ``raise`` ends the run.
        tasks: ``shared`` by the whole generation, or ``per_pair``: every mirrored pair (or single
            member) has its own.
        interactions: environment steps per generation at least: ``popsize`` members are added
            until they are reached; 0: no such rule.
        popsize_max: limit for ``interactions``; 0: none.
        sigma_blocks: ``off``; ``scaled``, which searches every leaf in units of the standard
            deviation of its initial values (constant leaves: of the root mean square of the
            others); or a table from leaf names to units (leaves not named: 1). Both sigma and the
            learning rate of a leaf are multiplied by its unit.
    """

    gradient: ClassVar[bool] = False
    mirrored: ClassVar[bool] = True

    popsize: int = 256
    sigma: float = 0.05
    aggregate: str = "mean"
    failed: Failed = "worst"
    tasks: Literal["shared", "per_pair"] = "shared"
    interactions: int = 0
    popsize_max: int = 0
    sigma_blocks: Literal["off", "scaled"] | dict[str, float] = "off"

    def __post_init__(self) -> None:
        check_popsize(self.popsize)
        finite_positive("sigma", self.sigma, example=0.05)
        tail_share(self.aggregate)
        one_of("failed", self.failed, FAILED)
        one_of("tasks", self.tasks, ("shared", "per_pair"))
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

    @abstractmethod
    def _first(self, size: int, unit: np.ndarray) -> Arrays:
        """What the search keeps besides theta, before the first generation."""

    @abstractmethod
    def _spread(self, state: SearchState) -> np.ndarray:
        """Standard deviation of every coordinate, float64 ``[D]``."""

    @abstractmethod
    def _update(
        self, state: SearchState, shaped: np.ndarray, scores: Scores, draws: Draws
    ) -> tuple[np.ndarray, Arrays]:
        """The next theta, float64 ``[D]``, and arrays; ``shaped`` float64 ``[N]`` is not flat."""

    @abstractmethod
    def _shaped(self, fitness: Tensor) -> Tensor:
        """Utilities float64 ``[N]``; all zero for a generation without information."""

    def _noise(self, shapes: Mapping[str, tuple[int, ...]]) -> Noise:
        return Noise(shapes)

    def _weighed(self, fitness: Tensor, shaping: str) -> Tensor:
        return weighed(fitness, shaping, drop_pairs=self.failed == "drop_pair")

    def check(self, objective: Objective, ranks: int) -> None:
        """Every objective and any number of ranks will do."""
        return

    def init(self, theta: Params, rng: Rng) -> SearchState:
        """Start at ``theta`` ``[1, ...]``; nothing is drawn."""
        flat = ravel(theta)[0].detach().cpu().float().numpy().copy()
        unit = units(theta, self.sigma_blocks)
        return SearchState(0, flat, self._first(len(flat), unit), unit, shapes_of(theta))

    def step(
        self, state: SearchState, objective: Objective, comm: Comm, rng: Rng
    ) -> tuple[SearchState, Metrics]:
        """One generation: draw, evaluate, gather, shape, sum exactly, update, compare hashes."""
        watch = Stopwatch()
        noise = self._noise(state.shapes)
        spread = self._spread(state)
        draws, scores = sample_and_score(
            self._plan(noise), self._scoring(), state.theta, spread,
            state.generation, objective, comm, rng, watch,
        )  # fmt: skip
        shaped = self._shaped(scores.fitness).numpy()
        return self._finish(state, shaped, scores, draws, watch)

    def _finish(
        self,
        state: SearchState,
        shaped: np.ndarray,
        scores: Scores,
        draws: Draws,
        watch: Stopwatch,
    ) -> tuple[SearchState, Metrics]:
        """The update of a scored generation, or none where ``shaped`` says nothing."""
        spread = self._spread(state)
        flat = not shaped.any()
        after = replace(state, generation=state.generation + 1)
        if not flat:
            theta, arrays = self._update(state, shaped, scores, draws)
            after = replace(after, theta=_float32(theta, arrays, state.generation), arrays=arrays)
        compare(after, draws.comm, watch)
        move = after.theta.astype(np.float64) - state.theta
        return after, {
            **scores.metrics(),
            "flat": float(flat),
            "sigma": float(spread.mean()),
            "update_norm": math.sqrt(float(np.dot(move, move))),
            **watch.metrics(),
        }

    def _scoring(self) -> Scoring:
        return Scoring(self.aggregate, self.failed)

    def _plan(self, noise: Noise) -> Plan:
        per_pair = self.tasks == "per_pair"
        return Plan(
            self.popsize, noise, self.mirrored, per_pair, self.interactions, self.popsize_max
        )

    def theta(self, state: SearchState) -> Params:
        """The centre of the search, leaves ``[1, ...]``."""
        return unravel_shapes(torch.from_numpy(state.theta.copy()).unsqueeze(0), state.shapes)

    def state_dict(self, state: SearchState) -> dict[str, Any]:
        """Plain tensors, O(D): the noise needs no state."""
        arrays = {name: torch.from_numpy(value.copy()) for name, value in state.arrays.items()}
        theta, unit = torch.from_numpy(state.theta.copy()), torch.from_numpy(_runs(state))
        return {"generation": state.generation, "theta": theta, "unit": unit, **arrays}

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> SearchState:
        """The inverse of :meth:`state_dict`."""
        size, shapes = ravel(theta).shape[1], shapes_of(theta)
        if len(saved["theta"]) != size:
            raise UserError(
                f"the checkpoint has {len(saved['theta'])} parameters, the policy has {size}: "
                "resume with the [policy] and [task] sections that the run was started with"
            )
        arrays = {name: saved[name].numpy().copy() for name in self._first(size, np.ones(size))}
        unit = np.repeat(saved["unit"].numpy(), [math.prod(s) for s in shapes.values()])
        flat = saved["theta"].numpy().copy()
        return SearchState(int(saved["generation"]), flat, arrays, unit, shapes)


def compare(state: SearchState, comm: Comm, watch: Stopwatch) -> None:
    """Raise if the ranks do not have the same state."""
    begin = watch.now()
    if not comm.same(state.digest()):
        raise RuntimeError(
            f"ranks disagree on theta after generation {state.generation - 1}: a rank runs other "
            "code or faulty hardware; resume from the last checkpoint"
        )
    watch.wait_s += watch.now() - begin


def _float32(theta: np.ndarray, arrays: Arrays, generation: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        moved = theta.astype(np.float32)
    if not all(np.isfinite(values).all() for values in (moved, *arrays.values())):
        raise FloatingPointError(
            f"theta is not finite after generation {generation}; lower optimizer.learning_rate "
            "or optimizer.sigma"
        )
    return moved


def _runs(state: SearchState) -> np.ndarray:
    """One unit per leaf."""
    starts = np.cumsum([0, *(math.prod(shape) for shape in state.shapes.values())])[:-1]
    return state.unit[starts]


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


def in_range(name: str, value: object, *, low_open: bool, high_open: bool, example: float) -> None:
    """Refuse all but numbers between 0 and 1, ends as told."""
    non_negative(name, value, example=example)
    assert isinstance(value, int | float)
    if value > 1 or (low_open and value == 0) or (high_open and value == 1):
        low, high = "(" if low_open else "[", ")" if high_open else "]"
        raise UserError(
            f"{name} = {value!r}: must be a number in {low}0, 1{high}; "
            f"write for example {name} = {example}"
        )
