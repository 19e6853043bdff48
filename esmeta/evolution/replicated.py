"""EvoTorch's searches, replicated in lock-step on every rank.

Toklu et al., "EvoTorch: Scalable Evolutionary Computation in Python", 2023,
https://arxiv.org/abs/2302.12600. Sampling and updates are EvoTorch's (0.6.1), operation for
operation in float32, so that a search from here and EvoTorch's own agree bit for bit where nothing
fails or ties; they are functions on a few tensors, and EvoTorch is not imported. What differs:
EvoTorch updates at the start of the *next* step, ranks NaN as the best, breaks ties by memory order
and random-walks on flat fitness. Here one step samples, evaluates (each rank its part), shapes the
fitness (:mod:`esmeta.evolution.shaping`) and updates at once; a generation without information
changes nothing. Noise is addressed by (key, generation): the generator is seeded anew each
generation, so there is no generator state, and a state is a handful of plain tensors without the
population.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmeta.errors import UserError, non_negative, one_of
from esmeta.evolution.population import Generation, Stage, score_on_tasks
from esmeta.evolution.scores import gather, scores_of
from esmeta.evolution.search import Rule, Search
from esmeta.evolution.shaping import Shaping, utilities
from esmeta.evolution.state import Arrays, SearchState
from esmeta.options import options_class
from esmeta.types import Objective

MAX_FULL_SIZE = 1500
"""Most parameters for a search with a full covariance matrix."""

Tensors = dict[str, Tensor]
"""``center`` float32 ``[D]`` is theta; the others have the names of the state's arrays."""


class Sampled(NamedTuple):
    """``directions`` that were drawn and the ``members`` made of them, float32 ``[N, D]``."""

    directions: Tensor
    members: Tensor
    fitness: Tensor


@dataclass(frozen=True)
class Everywhere:
    """Every rank draws the whole population, and scores a contiguous part of it."""

    options: Search
    sample: Callable[[Tensors, Tensor], Tensor]

    def check(self, objective: Objective) -> None:
        """Every objective will do."""

    def generation(self, stage: Stage, spread: np.ndarray) -> Generation:
        """Draw and score; ``spread`` is for people to read."""
        population, state, comm = stage.population, stage.state, stage.comm
        directions = _directions(stage)
        members = self.sample(tensors_of(state), directions)
        owned, rows = np.array_split(np.arange(len(members)), comm.size), None
        mine = owned[comm.rank]
        if len(mine):
            part = members[mine[0] : mine[-1] + 1].clone()
            per_pair = self.options.tasks == "per_pair"
            rows = score_on_tasks(stage, part, mine, population.directions * per_pair)
        table = gather(rows, list(owned), comm, stage.watch)
        scores = scores_of(table, self.options.aggregate, self.options.failed, state.generation)
        return Generation(Sampled(directions, members, scores.fitness), scores)


def _directions(stage: Stage) -> Tensor:
    population = stage.population
    seed = stage.rng.fold("evotorch", stage.state.generation).key % 2**63
    generator = torch.Generator(device="cpu").manual_seed(seed)
    shape = population.popsize, population.noise.size
    directions = torch.empty(shape, dtype=torch.float32, device="cpu")
    if not population.mirrored:
        return directions.normal_(generator=generator)
    directions[0::2].normal_(generator=generator)
    directions[1::2] = -directions[0::2]
    return directions


def tensors_of(state: SearchState) -> Tensors:
    """The state as an update of EvoTorch's sees it; nothing may write to it."""
    arrays = {"center": state.theta, **state.arrays}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@options_class
class Replicated(Search):
    """An EvoTorch search.

    Attributes:
        weight_decay: share of the centre that every update takes away, besides what EvoTorch does
            (as in AdamW, but without the learning rate); flat generations take nothing.
    """

    mirrored: ClassVar[bool] = False

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("failed", self.failed, ("worst", "raise"))
        non_negative("weight_decay", self.weight_decay)
        if self.weight_decay >= 1:
            raise UserError(
                f"weight_decay = {self.weight_decay!r}: must be below 1, the share of the centre "
                "that is taken away per generation; write for example 0.001"
            )

    def replicated(
        self,
        first: Callable[[Tensor], Tensors],
        sample: Callable[[Tensors, Tensor], Tensor],
        shaping: Shaping,
        update: Callable[[Tensors, Sampled, Tensor], Tensors],
        sigma: Callable[[Tensors], Tensor],
    ) -> Rule:
        """A rule from functions on tensors, none of which writes to what it is given.

        Args:
            first: what the search keeps besides ``center``, from that; may refuse its size.
            sample: members float32 ``[N, D]`` from the state and directions ``[N, D]``.
            shaping: of the utilities.
            update: the state after a generation, with utilities float64 ``[N]``.
            sigma: spread of the distribution, averaged over coordinates.
        """

        def updated(
            state: SearchState, utilities: np.ndarray, generation: Generation
        ) -> tuple[np.ndarray, Arrays]:
            weights = torch.from_numpy(utilities)
            arrays = _arrays(update(tensors_of(state), generation.drawn, weights))
            theta = arrays.pop("center")
            return (
                theta * np.float32(1 - self.weight_decay) if self.weight_decay else theta
            ), arrays

        return Rule(
            first=lambda theta, unit: _arrays(first(torch.from_numpy(theta))),
            spread=lambda state: sigma(tensors_of(state)).double().numpy(),
            utilities=lambda fitness: utilities(fitness, shaping),
            update=updated,
            evaluation=Everywhere(self, sample),
            exact=False,
        )

    def diagonal(
        self,
        shaping: Shaping,
        update: Callable[[Tensors, Sampled, Tensor], Tensors],
        more: Callable[[Tensor], Tensors] = lambda center: {},
    ) -> Rule:
        """A rule for a Gaussian with standard deviations ``sigma [D]``; ``more`` is kept too."""
        return self.replicated(
            first=lambda center: {"sigma": torch.full_like(center, self.sigma), **more(center)},
            sample=lambda kept, directions: directions * kept["sigma"] + kept["center"],
            shaping=shaping,
            update=update,
            sigma=lambda kept: kept["sigma"].mean(),
        )


def _arrays(tensors: Tensors) -> Arrays:
    # In the order of memory that they have: a product of matrices rounds by it.
    return {name: tensor.numpy() for name, tensor in tensors.items()}


# --- parts of rules --------------------------------------------------------------------------


def held(old: Tensor, new: Tensor, floor: float | None, change: float | None) -> Tensor:
    """Standard deviations ``new`` with a floor and a largest relative change."""
    low = torch.full_like(old, -math.inf if floor is None else floor)
    if change is None:
        return torch.max(new, low)
    most = old.abs() * torch.tensor(change, dtype=old.dtype, device="cpu")
    return torch.min(torch.max(new, torch.max(low, old - most)), old + most)


def check_full_size(size: int, name: str, cure: str) -> None:
    """Refuse a full covariance matrix for too many parameters."""
    if size > MAX_FULL_SIZE:
        raise UserError(
            f"{name}: the policy has {size} parameters, and a full covariance matrix is allowed "
            f"for at most {MAX_FULL_SIZE}; {cure}"
        )
