"""OpenAI-ES, sliced: every rank draws, evaluates and sums only its own part of the population.

Salimans, Ho, Chen, Sidor & Sutskever, "Evolution Strategies as a Scalable Alternative to
Reinforcement Learning", 2017, https://arxiv.org/abs/1703.03864.

    g = 1 / (N sigma) * sum_i u_i eps_i,      theta <- theta + lr * Adam(g - weight_decay * theta)

over N members theta +- sigma eps in mirrored pairs, with utilities u. What differs: noise comes
from a counter (key, generation, pair) instead of a shared table; the partial sums of fixed blocks
of members are rounded to 64-bit integers before they are added over ranks, so theta has the same
bits for any number of ranks; ties share their utility, failed members rank last, and a generation
without information (all equal, or all failed) changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError, finite_positive, non_negative, one_of
from esmeta.optimizers._adam import Adam
from esmeta.optimizers._generation import Scores, Stopwatch, check_popsize, gather_scores
from esmeta.optimizers._noise import pair_noise
from esmeta.optimizers._shaping import SHAPINGS, Shaping, utilities
from esmeta.rng import Rng
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Comm, Metrics, Objective, Params

BLOCK = 16
"""Members per block: the unit that is assigned to ranks, and summed before rounding."""

# |utility| < 1 after scaling and |eps| < 7, so a block stays below 2^7 and 2^36 leaves room for
# 2^20 blocks in an int64.
_FIXED_POINT = 36


@dataclass(frozen=True)
class OpenESState:
    """State between generations: O(D), no population.

    ``theta`` float32 ``[D]``; ``scale`` float64, one unit of search per leaf.
    """

    generation: int
    theta: np.ndarray
    adam: Adam
    scale: np.ndarray
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Slice:
    """This rank's part of one generation; ``blocks`` are lists of rows of ``noise``."""

    noise: np.ndarray
    pairs: np.ndarray
    blocks: list[range]


@dataclass(frozen=True)
class Optimizer:
    """OpenAI-ES with Adam.

    Attributes:
        popsize: members per generation, even (multiples of 16 split best over ranks).
        sigma: standard deviation of the perturbations.
        learning_rate: Adam's step size.
        weight_decay: pull towards zero, added to the gradient as in the paper (not decoupled).
        beta1: decay of Adam's mean.
        beta2: decay of Adam's mean square.
        eps: Adam's denominator offset.
        shaping: ``centered``, ``nes``, ``zscore`` or ``raw``.
        sigma_decay: factor on sigma per generation.
        sigma_min: floor of sigma.
        learning_rate_decay: factor on the learning rate per generation.
        learning_rate_min: floor of the learning rate.
        sigma_blocks: ``off``; ``scaled``, which searches every leaf in units of the standard
            deviation of its initial values (constant leaves: of the root mean square of the
            others); or a table from leaf names to units (leaves not named: 1). Both sigma and the
            learning rate of a leaf are multiplied by its unit.
    """

    gradient: ClassVar[bool] = False

    popsize: int = 256
    sigma: float = 0.05
    learning_rate: float = 0.02
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    shaping: Shaping = "centered"
    sigma_decay: float = 1.0
    sigma_min: float = 0.0
    learning_rate_decay: float = 1.0
    learning_rate_min: float = 0.0
    sigma_blocks: Literal["off", "scaled"] | dict[str, float] = "off"

    def __post_init__(self) -> None:
        check_popsize(self.popsize)
        finite_positive("sigma", self.sigma, example=0.05)
        finite_positive("learning_rate", self.learning_rate, example=0.02)
        finite_positive("eps", self.eps, example=1e-8)
        for name in ("weight_decay", "sigma_min", "learning_rate_min"):
            non_negative(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            _in_range(name, getattr(self, name), low_open=False, high_open=True, example=0.9)
        for name in ("sigma_decay", "learning_rate_decay"):
            _in_range(name, getattr(self, name), low_open=True, high_open=False, example=0.999)
        one_of("shaping", self.shaping, SHAPINGS)
        if isinstance(self.sigma_blocks, str):
            one_of("sigma_blocks", self.sigma_blocks, ("off", "scaled"))
        else:
            for leaf, unit in self.sigma_blocks.items():
                finite_positive(f"sigma_blocks.{leaf}", unit, example=1.0)

    def init(self, theta: Params, rng: Rng) -> OpenESState:
        """Start at ``theta`` ``[1, ...]``; nothing is drawn."""
        flat = ravel(theta)[0].detach().cpu().float().numpy().copy()
        scale = _units(theta, self.sigma_blocks)
        return OpenESState(0, flat, Adam.zeros(len(flat)), scale, shapes_of(theta))

    def step(
        self, state: OpenESState, objective: Objective, comm: Comm, rng: Rng
    ) -> tuple[OpenESState, Metrics]:
        """One generation: draw, evaluate, gather, shape, sum exactly, ascend, compare hashes."""
        watch = Stopwatch()
        sigma = max(self.sigma_min, self.sigma * self.sigma_decay**state.generation)
        unit = _per_coordinate(state)
        part, scores = self._evaluate(state, objective, comm, rng, sigma * unit, watch)
        shaped = utilities(scores.fitness, self.shaping).numpy()
        flat = not shaped.any()
        after = replace(state, generation=state.generation + 1)
        if not flat:
            gradient = self._gradient(shaped, part, sigma, comm, watch)
            after = self._ascend(after, gradient, unit)
        begin = watch.now()
        if not comm.same(_digest(after)):
            raise RuntimeError(
                f"openes: ranks disagree on theta after generation {state.generation}: "
                "a rank runs other code or faulty hardware; resume from the last checkpoint"
            )
        watch.wait_s += watch.now() - begin
        move = after.theta.astype(np.float64) - state.theta
        return after, {
            **scores.metrics(),
            "flat": float(flat),
            "sigma": sigma,
            "update_norm": math.sqrt(float(np.dot(move, move))),
            **watch.metrics(),
        }

    def theta(self, state: OpenESState) -> Params:
        """The centre of the search, leaves ``[1, ...]``."""
        return unravel_shapes(torch.from_numpy(state.theta.copy()).unsqueeze(0), state.shapes)

    def state_dict(self, state: OpenESState) -> dict[str, Any]:
        """20 bytes per parameter; the noise needs no state."""
        return {
            "generation": state.generation,
            "theta": torch.from_numpy(state.theta.copy()),
            "adam_mean": torch.from_numpy(state.adam.mean.copy()),
            "adam_square": torch.from_numpy(state.adam.square.copy()),
            "adam_updates": state.adam.updates,
            "scale": torch.from_numpy(state.scale.copy()),
        }

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> OpenESState:
        """The inverse of :meth:`state_dict`."""
        mean, square = saved["adam_mean"].numpy().copy(), saved["adam_square"].numpy().copy()
        adam = Adam(mean, square, int(saved["adam_updates"]))
        flat, scale = saved["theta"].numpy().copy(), saved["scale"].numpy().copy()
        size = ravel(theta).shape[1]
        if len(flat) != size:
            raise UserError(
                f"the checkpoint has {len(flat)} parameters, the policy has {size}: resume with "
                "the [policy] and [task] sections that the run was started with"
            )
        return OpenESState(int(saved["generation"]), flat, adam, scale, shapes_of(theta))

    def _evaluate(
        self,
        state: OpenESState,
        objective: Objective,
        comm: Comm,
        rng: Rng,
        spread: np.ndarray,
        watch: Stopwatch,
    ) -> tuple[_Slice, Scores]:
        pairs = [_pairs_of(rank, comm.size, self.popsize) for rank in range(comm.size)]
        own = np.array([p for block in pairs[comm.rank] for p in block], dtype=np.int64)
        noise = pair_noise(rng, state.generation, own, len(state.theta))
        fitness = None
        if len(own):
            members = np.empty((2 * len(own), len(state.theta)), dtype=np.float32)
            step = noise * spread.astype(np.float32)
            np.add(state.theta, step, out=members[0::2])
            np.subtract(state.theta, step, out=members[1::2])
            begin = watch.now()
            fitness = objective.fitness(torch.from_numpy(members), state.generation)
            watch.evaluate_s += watch.now() - begin
        owned = [_members([p for block in blocks for p in block]) for blocks in pairs]
        scores = gather_scores(fitness, owned, comm, watch)
        ends = np.cumsum([0, *map(len, pairs[comm.rank])]).tolist()
        blocks = [range(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        return _Slice(noise, own, blocks), scores

    def _gradient(
        self, shaped: np.ndarray, part: _Slice, sigma: float, comm: Comm, watch: Stopwatch
    ) -> np.ndarray:
        # Scaling by a power of two is exact: it keeps raw fitness inside the fixed point's range
        # and spends the range on small utilities.
        exponent = math.frexp(float(np.abs(shaped).max()))[1]
        total = partial_sum(np.ldexp(shaped, -exponent), part.noise, part.pairs, part.blocks)
        begin = watch.now()
        total = comm.sum_exact(total)
        watch.wait_s += watch.now() - begin
        value = np.ldexp(total.numpy().astype(np.float64), exponent - _FIXED_POINT)
        return value / (self.popsize * sigma)

    def _ascend(self, state: OpenESState, gradient: np.ndarray, unit: np.ndarray) -> OpenESState:
        theta = state.theta.astype(np.float64)
        if self.weight_decay:
            gradient = gradient - self.weight_decay * (theta / unit)
        step, adam = state.adam.ascend(gradient, self.beta1, self.beta2, self.eps)
        # The generation was counted before the ascent; its own number starts the schedule at 0.
        rate = self.learning_rate * self.learning_rate_decay ** (state.generation - 1)
        rate = max(self.learning_rate_min, rate)
        with np.errstate(over="ignore"):
            moved = (theta + rate * unit * step).astype(np.float32)
        if not np.isfinite(moved).all():
            raise FloatingPointError(
                f"openes: theta is not finite after generation {state.generation - 1}; "
                "lower optimizer.learning_rate"
            )
        return replace(state, theta=moved, adam=adam)


def partial_sum(
    shaped: np.ndarray, noise: np.ndarray, pairs: np.ndarray, blocks: list[range]
) -> Tensor:
    """Sum of ``(u+ - u-) eps`` over one rank's pairs as 2^-36 fixed point, int64 ``[D]``.

    Every block is accumulated in float64 in the order of its pairs and rounded once, so the total
    over ranks does not depend on which rank had which block. ``shaped`` float64 ``[N]`` with
    magnitudes below 1; ``noise`` float32 ``[len(pairs), D]``; ``blocks`` ranges of its rows.
    """
    total = np.zeros(noise.shape[1], dtype=np.int64)
    for block in blocks:
        value = np.zeros(noise.shape[1])
        for row in block:
            pair = pairs[row]
            value += (shaped[2 * pair] - shaped[2 * pair + 1]) * noise[row].astype(np.float64)
        total += np.rint(np.ldexp(value, _FIXED_POINT)).astype(np.int64)
    return torch.from_numpy(total)


def _pairs_of(rank: int, ranks: int, popsize: int) -> list[range]:
    """The blocks of pairs of one rank: round-robin, the last block may be smaller."""
    count, width = popsize // 2, BLOCK // 2
    starts = range(rank * width, count, ranks * width)
    return [range(start, min(start + width, count)) for start in starts]


def _members(pairs: list[int]) -> np.ndarray:
    first = 2 * np.array(pairs, dtype=np.int64)
    return np.stack([first, first + 1], axis=1).reshape(-1)


def _units(theta: Params, blocks: str | Mapping[str, float]) -> np.ndarray:
    if isinstance(blocks, Mapping):
        unknown = sorted(set(blocks) - set(theta))
        if unknown:
            raise UserError(
                f"sigma_blocks: no leaf is named {unknown[0]!r}; the leaves are {', '.join(theta)}"
            )
        return np.array([float(blocks.get(name, 1.0)) for name in theta])
    if blocks == "off":
        return np.ones(len(theta))
    leaves = [leaf[0].detach().cpu().double().numpy().reshape(-1) for leaf in theta.values()]
    std = np.array([float(leaf.std()) if leaf.size > 1 else 0.0 for leaf in leaves])
    varied = std[std > 0]
    usual = math.sqrt(float((varied**2).mean())) if len(varied) else 1.0
    return np.where(std > 0, std, usual)


def _per_coordinate(state: OpenESState) -> np.ndarray:
    return np.repeat(state.scale, [math.prod(shape) for shape in state.shapes.values()])


def _digest(state: OpenESState) -> bytes:
    digest = hashlib.sha256(f"{state.generation} {state.adam.updates}".encode())
    for part in (state.theta, state.adam.mean, state.adam.square, state.scale):
        digest.update(part.tobytes())
    return digest.digest()


def _in_range(name: str, value: object, *, low_open: bool, high_open: bool, example: float) -> None:
    non_negative(name, value, example=example)
    assert isinstance(value, int | float)
    if value > 1 or (low_open and value == 0) or (high_open and value == 1):
        low, high = "(" if low_open else "[", ")" if high_open else "]"
        raise UserError(
            f"{name} = {value!r}: must be a number in {low}0, 1{high}; "
            f"write for example {name} = {example}"
        )
