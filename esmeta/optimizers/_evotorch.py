"""EvoTorch's searchers as esmeta optimizers, replicated in lock-step on every rank.

Toklu et al., "EvoTorch: Scalable Evolutionary Computation in Python", 2023,
https://arxiv.org/abs/2302.12600. Distributions, sampling and update rules are EvoTorch's; what
differs is who drives them. EvoTorch updates at the start of the *next* step, ranks NaN as the
best, breaks ties by memory order and random-walks on flat fitness. Here one step samples,
evaluates (each rank its part), shapes the fitness (:mod:`_shaping`) and updates at once; a
generation without information changes neither centre nor spread. Noise is addressed by
(key, generation): the generator is seeded anew each generation, so there is no generator state,
and a state is a handful of plain tensors without the population.

The import of evotorch takes seconds and pulls in ray and pandas, so it happens at the first step
that needs it. The adapters use a few of its private names (``_distribution``,
``_compute_gradients``, ``_update_distribution``, ``_optimizer``), as of 0.6.1.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from esmeta.errors import UserError, finite_positive, non_negative, non_negative_int, one_of
from esmeta.modes import exact, usual_defaults
from esmeta.optimizers._generation import Scoring, Stopwatch, check_popsize
from esmeta.optimizers._shaping import tail_share, utilities
from esmeta.options import options_class, plain
from esmeta.rng import Rng
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Comm, Fitness, Metrics, Objective, Params

if TYPE_CHECKING:
    from evotorch import Problem

    from esmeta.evaluator import PopulationEvaluator
    from esmeta.optimizers._evotorch_problem import PopulationProblem

MAX_FULL_SIZE = 1500
"""Most parameters for a search with a full covariance matrix."""

_RANKING_OF = {"centered": "centered", "nes": "nes", "zscore": "normalized", "raw": "raw"}

Tensors = dict[str, Tensor]


class Searcher(ABC):
    """One EvoTorch searcher, driven sample by sample; its state goes in and out as tensors."""

    @abstractmethod
    def load(self, tensors: Tensors) -> None:
        """Continue from ``tensors``, which are not written to."""

    @abstractmethod
    def dump(self) -> Tensors:
        """The state; later updates do not write to it. ``center`` float32 ``[D]`` is one of it."""

    @abstractmethod
    def sample(self, problem: PopulationProblem) -> None:
        """Draw and evaluate a population; its results are in ``problem.scores``."""

    @abstractmethod
    def update(self, fitness: Tensor) -> bool:
        """Use the fitness of the last sample; False, and no change, if it was flat."""

    @abstractmethod
    def sigma(self) -> float:
        """Spread of the distribution, averaged over coordinates."""


@dataclass(frozen=True)
class EvoTorchState:
    """State between generations. ``searcher`` is a workspace that is rebuilt when missing."""

    generation: int
    tensors: Tensors
    shapes: dict[str, tuple[int, ...]]
    searcher: tuple[PopulationProblem, Searcher] | None = field(
        default=None, compare=False, repr=False
    )


def new_problem(size: int) -> PopulationProblem:
    """A problem for one searcher; the objective is set generation by generation."""
    os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")
    from esmeta.optimizers._evotorch_problem import PopulationProblem

    return PopulationProblem(_unset, size, seed=0)


def _unset(values: Tensor, step: int | Tensor) -> Fitness:
    raise AssertionError("the objective is set before every evaluation")


@options_class
class EvoTorchOptimizer(ABC):
    """The part of the contract that does not depend on the searcher.

    Attributes:
        popsize: members per generation, even.
        sigma: standard deviation of every coordinate at the start.
        aggregate: fitness of a member from its returns on K tasks: ``mean``, ``worst`` (the
            smallest) or ``cvar:a`` (mean of the smallest share a).
        failed: members without a finite fitness: ``worst`` ranks them last, all equal; ``raise``
            ends the run.
        tasks: ``shared`` by the whole generation, or ``per_pair``: every mirrored pair (or single
            member) has its own.
        weight_decay: share of the centre that every update takes away, besides what EvoTorch does
            (as in AdamW, but without the learning rate); flat generations take nothing.
    """

    gradient: ClassVar[bool] = False
    mirrored: ClassVar[bool] = False

    popsize: int = 256
    sigma: float = 0.05
    aggregate: str = "mean"
    failed: Literal["worst", "raise"] = "worst"
    tasks: Literal["shared", "per_pair"] = "shared"
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_popsize(self.popsize)
        finite_positive("sigma", self.sigma, example=0.05)
        tail_share(self.aggregate)
        one_of("failed", self.failed, ("worst", "raise"))
        one_of("tasks", self.tasks, ("shared", "per_pair"))
        non_negative("weight_decay", self.weight_decay)
        if self.weight_decay >= 1:
            raise UserError(
                f"weight_decay = {self.weight_decay!r}: must be below 1, the share of the centre "
                "that is taken away per generation; write for example 0.001"
            )

    @abstractmethod
    def _searcher(self, problem: PopulationProblem, center: Tensor) -> Searcher: ...

    def check(self, objective: Objective, ranks: int) -> None:
        """Every objective and any number of ranks will do."""
        return

    @usual_defaults()
    def init(self, theta: Params, rng: Rng) -> EvoTorchState:
        """Start at ``theta`` ``[1, ...]``; nothing is drawn."""
        center = ravel(theta)[0].detach().cpu().float().clone()
        problem = new_problem(len(center))
        searcher = self._searcher(problem, center)
        return EvoTorchState(0, searcher.dump(), shapes_of(theta), (problem, searcher))

    @usual_defaults()
    @exact
    def step(
        self, state: EvoTorchState, objective: Objective, comm: Comm, rng: Rng
    ) -> tuple[EvoTorchState, Metrics]:
        """One generation: sample, evaluate, shape, update, compare hashes."""
        watch = Stopwatch()
        problem, searcher = workspace = state.searcher or self._workspace(state)
        searcher.load(state.tensors)
        problem.manual_seed(rng.fold("evotorch", state.generation).key % 2**63)
        problem.bind(objective.fitness, state.generation, comm, watch)
        problem.scoring = Scoring(self.aggregate, self.failed)
        problem.sharing = (2 if self.mirrored else 1) if self.tasks == "per_pair" else 0
        sigma = searcher.sigma()
        searcher.sample(problem)
        assert problem.scores is not None
        moved = searcher.update(problem.scores.fitness)
        tensors = searcher.dump()
        if moved and self.weight_decay:
            tensors["center"] = tensors["center"] * (1 - self.weight_decay)
        if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
            raise FloatingPointError(
                f"the search is not finite after generation {state.generation}; "
                "lower optimizer.sigma or optimizer.learning_rate"
            )
        tensors, resync = _in_step(tensors, comm, watch)
        problem.unbind()
        move = torch.linalg.vector_norm(tensors["center"].double() - state.tensors["center"])
        after = EvoTorchState(state.generation + 1, tensors, state.shapes, workspace)
        return after, {
            **problem.scores.metrics(),
            "flat": float(not moved),
            "sigma": sigma,
            "update_norm": move.item(),
            "resync": float(resync),
            **watch.metrics(),
        }

    def theta(self, state: EvoTorchState) -> Params:
        """The centre of the distribution, leaves ``[1, ...]``."""
        return unravel_shapes(state.tensors["center"].clone().unsqueeze(0), state.shapes)

    def state_dict(self, state: EvoTorchState) -> dict[str, Any]:
        """The generation and the distribution as plain tensors; no population, no pickle."""
        tensors = {name: value.clone() for name, value in state.tensors.items()}
        return {"generation": state.generation, **tensors}

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> EvoTorchState:
        """The inverse of :meth:`state_dict`."""
        tensors = {name: value.clone() for name, value in saved.items() if name != "generation"}
        size = ravel(theta).shape[1]
        if len(tensors["center"]) != size:
            raise UserError(
                f"the checkpoint has {len(tensors['center'])} parameters, the policy has {size}: "
                "resume with the [policy] and [task] sections that the run was started with"
            )
        return EvoTorchState(int(saved["generation"]), tensors, shapes_of(theta))

    def _workspace(self, state: EvoTorchState) -> tuple[PopulationProblem, Searcher]:
        center = state.tensors["center"]
        problem = new_problem(len(center))
        return problem, self._searcher(problem, center.clone())


def _in_step(tensors: Tensors, comm: Comm, watch: Stopwatch) -> tuple[Tensors, bool]:
    """The state of all ranks: one's own if they agree, else rank 0's.

    Floating-point sums may differ between CPU types; EvoTorch's update has no integer form.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    begin = watch.now()
    agree = comm.same(digest.digest())
    if not agree:
        tensors = {name: comm.bcast(tensors[name].contiguous()) for name in sorted(tensors)}
    watch.wait_s += watch.now() - begin
    return tensors, not agree


class GaussianSearcher(Searcher):
    """EvoTorch's PGPE, SNES, CEM and XNES: a distribution, its gradient, its update."""

    def __init__(self, search: Any, shaping: str) -> None:
        from evotorch import SolutionBatch

        self.search = search
        self.shaping = shaping
        self.batch = SolutionBatch(search.problem, popsize=search._popsize, empty=True)

    def load(self, tensors: Tensors) -> None:
        """See :class:`Searcher`."""
        search = self.search
        parameters = {"mu": tensors["center"], "sigma": tensors["sigma"]}
        if "sigma_inv" in tensors:
            parameters["sigma_inv"] = tensors["sigma_inv"]
        search._distribution = search._distribution.modified_copy(**parameters)
        load_ascent(search._optimizer, tensors)

    def dump(self) -> Tensors:
        """See :class:`Searcher`."""
        parameters = self.search._distribution.parameters
        tensors = {"center": parameters["mu"], "sigma": parameters["sigma"]}
        if "sigma_inv" in parameters:
            tensors["sigma_inv"] = parameters["sigma_inv"]
        return tensors | dump_ascent(self.search._optimizer)

    def sample(self, problem: PopulationProblem) -> None:
        """See :class:`Searcher`."""
        values = self.batch.access_values()
        self.search._distribution.sample(out=values, generator=problem)
        problem.evaluate(self.batch)

    def update(self, fitness: Tensor) -> bool:
        """See :class:`Searcher`."""
        weights = utilities(fitness, self.shaping)
        if not weights.any():
            return False
        self.apply(weights)
        return True

    def apply(self, weights: Tensor) -> None:
        """Follow the gradients of the last sample; ``weights`` float64 ``[N]``."""
        from esmeta.optimizers._evotorch_problem import values_of

        self.search._update_distribution(self.gradients(values_of(self.batch), weights))

    def gradients(self, samples: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Gradients of the distribution's parameters, by name."""
        # Not compute_gradients(ranking_method="raw"): SNES divides raw weights by their sum of
        # magnitudes, which is another step size than its own ranking has.
        return self.search._distribution._compute_gradients(
            samples, weights.float(), _RANKING_OF[self.shaping]
        )

    def sigma(self) -> float:
        """See :class:`Searcher`."""
        value = self.search._distribution.sigma
        if value.ndim == 1:
            return value.mean().item()
        return (torch.linalg.matrix_norm(value) / len(value) ** 0.5).item()


def dump_ascent(optimizer: Any) -> Tensors:
    """State of the centre's optimizer: Adam's moments, ClipUp's velocity; SGD has none."""
    from evotorch.optimizers import ClipUp

    from esmeta.optimizers._evotorch_problem import PlainAdam

    if isinstance(optimizer, ClipUp):
        assert optimizer._velocity is not None
        return {"velocity": optimizer._velocity.clone()}
    if not isinstance(optimizer, PlainAdam):
        return {}
    names = {"adam_mean": "mean", "adam_square": "square", "adam_updates": "updates"}
    return {name: getattr(optimizer, field).clone() for name, field in names.items()}


def load_ascent(optimizer: Any, tensors: Tensors) -> None:
    """The inverse of :func:`dump_ascent`."""
    if "velocity" in tensors:
        optimizer._velocity = tensors["velocity"].clone()
    if "adam_mean" in tensors:
        optimizer.mean = tensors["adam_mean"].clone()
        optimizer.square = tensors["adam_square"].clone()
        optimizer.updates = tensors["adam_updates"].clone()


def check_full_size(size: int, name: str, cure: str) -> None:
    """Refuse a full covariance matrix for too many parameters."""
    if size > MAX_FULL_SIZE:
        raise UserError(
            f"{name}: the policy has {size} parameters, and a full covariance matrix is allowed "
            f"for at most {MAX_FULL_SIZE}; {cure}"
        )


def evotorch_problem(
    evaluator: PopulationEvaluator, comm: Comm | None = None, *, seed: int = 0
) -> Problem:
    """An ``evotorch.Problem`` for any EvoTorch searcher, single-process or over MPI ranks.

    Objective: the mean return over ``evaluator.trials`` trials, larger is better; solutions are
    float32 vectors of ``evaluator.size`` parameters, initially drawn by the policy's own init.
    Every evaluated batch is scored on fresh training tasks that its members share. Members with a
    NaN or infinite return are reported below the worst finite one.

    Its ``status`` counts environment steps and trials over all ranks (``total_interaction_count``,
    ``total_episode_count``), so ``num_interactions`` works on any number of them. ``best`` is the
    luckiest evaluation so far, on the tasks of its batch: score ``center`` on held-out tasks
    instead. A searcher pickles with its problem but without the ranks; after loading it, set
    ``searcher.problem.comm``.

    Args:
        evaluator: what scores members ``[P, D]``.
        comm: ranks that replicate the search, each evaluating its part of every batch, such as
            ``esmeta.comm.make_comm()``; all must run the same searcher with the same ``seed``, and
            raise if they drift apart. Loggers belong on rank 0 only.
        seed: of the tasks and of the problem's own random generator.
    """
    os.environ.setdefault("EVOTORCH_VERBOSE_LEVEL", "0")
    from esmeta.optimizers._evotorch_problem import PopulationProblem, TrainingTasks

    seed = plain(seed)
    non_negative_int("seed", seed)
    tasks = TrainingTasks(evaluator, seed)
    return PopulationProblem(
        tasks.score, evaluator.size, seed=seed, comm=comm, draw=tasks.draw, free=True
    )
