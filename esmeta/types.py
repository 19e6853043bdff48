"""Central types, and the axes that every boundary of esmeta is written in.

Three axes, in this order:

* ``T``: time steps;
* ``P``: distinct parameter sets (the members of a population; 1 for a gradient update);
* ``B``: parallel trials per parameter set.

Parameters have leaves ``[P, ...]``, the state of a trial has leaves ``[P, B, ...]`` and recorded
sequences have leaves ``[T, P, B, ...]``. Data that describe tasks have leaves ``[P or 1, B, ...]``:
a leading 1 means that all members face the same tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from esmeta.options import options_class

if TYPE_CHECKING:
    from esmeta.rng import Rng

Params = dict[str, Tensor]
"""Parameter tree: a flat mapping from dotted names to leaves ``[P, ...]``."""

State = dict[str, Tensor]
"""Memory of an agent inside a trial: leaves ``[P, B, ...]``. Fast weights are state."""

Metrics = dict[str, float]

LARGEST_REWARD = 1e12
"""Squares of sums of a million such rewards fit into float32, which has 3.4e38 at most."""


@options_class
class Discrete:
    """``n`` actions, numbered 0..n-1. An action tensor is int64 ``[P, B]``."""

    n: int

    @property
    def size(self) -> int:
        """Width of the action as an input of the policy (one-hot)."""
        return self.n


@options_class
class Continuous:
    """Real vectors; an action tensor is float ``[P, B, size]``, clipped by the environment."""

    size: int
    low: float = -1.0
    high: float = 1.0


@options_class
class Spec:
    """What a policy must know of a task.

    ``horizon`` is the number of environment steps of a whole trial at most.
    """

    obs_size: int
    action: Discrete | Continuous
    horizon: int
    episodes_per_trial: int = 1


@options_class
class Reference:
    """Scores (mean return of a trial) that results are read against."""

    random: float
    best: float
    note: str

    def words(self) -> str:
        """Both scores for people to read; tasks may not know the best one (``nan``)."""
        best = (
            "best not known" if math.isnan(self.best) else f"best possible or known {self.best:.4g}"
        )
        return f"random {self.random:.4g}, {best}"


class TimeStep(NamedTuple):
    """All that an agent may see before it acts; leaves ``[P, B, ...]``.

    ``reward``, ``terminated`` and ``truncated`` belong to the transition that led here, and
    ``prev_action`` (one-hot, or the raw vector) is the action that caused it; all are zero at the
    first step of a trial. ``new_episode`` marks the first step of an episode and ``new_trial`` the
    first step of a trial: only ``new_trial`` resets an agent's memory. When a trial ends, the time
    step that carries its last reward is marked ``new_trial``: what follows is not part of it.
    """

    obs: Tensor
    prev_action: Tensor
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    new_episode: Tensor
    new_trial: Tensor


@dataclass(frozen=True)
class Tasks:
    """A set of tasks as data.

    ``index`` (int64 ``[P or 1, B]``) together with the seed is the address of each task;
    ``data`` holds what the environment needs, leaves ``[P or 1, B, ...]``.
    """

    index: Tensor
    data: dict[str, Tensor] = field(default_factory=dict)


class BatchedEnv(Protocol):
    """P x B environments in lockstep; one trial each."""

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[Any, TimeStep]:
        """Start one trial per task for each of ``population`` members.

        All randomness of the dynamics is drawn from ``rng`` addressed by ``tasks.index``, so a
        trial does not depend on its batch mates, and members face the same randomness.
        """
        ...

    def step(self, state: Any, action: Tensor) -> tuple[Any, TimeStep]:
        """Advance every trial by one step; finished trials stay finished with reward 0."""
        ...

    def metrics(self, state: Any) -> dict[str, Tensor]:
        """Task-specific scores of each trial so far, float ``[P, B]``; NaN where undefined."""
        ...


@runtime_checkable
class Hosted(Protocol):
    """A :class:`BatchedEnv` whose worlds live outside the state it returns.

    Simulators of another library, or on other ranks, cannot be copied: only the state that was
    returned last can be stepped, so that trials can neither be stored nor run by turns.
    """

    @property
    def most_worlds(self) -> int:
        """How many trials, P x B, may be begun at a time."""
        ...

    def close(self) -> None:
        """Close what simulates; a later reset begins anew."""
        ...


class Task(Protocol):
    """A distribution of tasks. Implementations are frozen dataclasses; fields are options."""

    @property
    def spec(self) -> Spec: ...

    @property
    def reference(self) -> Reference: ...

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks number 0..batch-1, or those of an int64 tensor of numbers ``[B]``.

        ``split`` is ``"train"``, ``"validation"`` (to select on: when to stop, which theta) or
        ``"test"`` (to report); they never share a task where the distribution is rich enough to
        keep them apart (each task's page says so).
        """
        ...

    def make_env(self, device: torch.device | str) -> BatchedEnv: ...


class PolicyOut(NamedTuple):
    """What the heads say; leaves ``[(T,) P, B, ...]``.

    ``logits`` for discrete actions, ``mean`` and ``std`` for continuous ones (the others are
    None); ``value`` where the policy has a value head.
    """

    logits: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    value: Tensor | None


class Memory(Protocol):
    """What carries information between the time steps of a trial."""

    size: int

    def init(self, rng: Rng) -> Params:
        """Parameters of one member, leaves without the axis P."""
        ...

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State: ...

    def explain(self, device: torch.device | str, requires_grad: bool) -> str:
        """In one line, which code runs it there."""
        ...

    def prepare(self, params: Params) -> Any:
        """Whatever a rollout should compute once instead of at every step."""
        ...

    def reset(self, prepared: Any, state: State, new_trial: Tensor) -> State:
        """The state with every trial marked in ``new_trial [P, B]`` started anew."""
        ...

    def step(
        self, prepared: Any, state: State, x: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, State]:
        """One step: ``x [P, B, n]`` to output ``[P, B, size]``; may overwrite ``state`` if told."""
        ...

    def scan(
        self, prepared: Any, state: State, x: Tensor, new_trial: Tensor | None
    ) -> tuple[Tensor, State]:
        """A sequence ``x [T, P, B, n]``; the same numbers as :meth:`step` in a loop."""
        ...


@dataclass(frozen=True)
class Fitness:
    """Scores of a population. Larger is better.

    ``returns`` float64 ``[P, B]``, ``steps`` int64 ``[P, B]`` (environment steps until the trial
    ended), ``metrics`` the task's own scores, each float64 ``[P, B]``.
    """

    returns: Tensor
    steps: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def mean(self) -> Tensor:
        """Mean return over trials, float64 ``[P]``."""
        return self.returns.mean(dim=1)


class Comm(Protocol):
    """Buffer collectives over ranks. Every call has a time limit and never pickles."""

    rank: int
    size: int

    def gather_rows(self, local: Tensor, counts: list[int]) -> Tensor:
        """Concatenate float64 blocks ``[counts[r], K]`` of all ranks in rank order."""
        ...

    def sum_exact(self, value: Tensor) -> Tensor:
        """Elementwise int64 sum over ranks: exact, whatever the number of ranks."""
        ...

    def sum_ordered(self, value: Tensor) -> Tensor:
        """Floating-point sum over ranks in rank order: the same bits on every rank."""
        ...

    def bcast(self, value: Tensor) -> Tensor:
        """Rank 0's tensor on every rank (shape and dtype must agree)."""
        ...

    def same(self, digest: bytes) -> bool:
        """Whether all ranks passed the same bytes (compared by their first 32)."""
        ...

    def abort(self, code: int, message: str) -> None:
        """Say why on stderr with the rank, and end the whole job with ``code``."""
        ...


class Objective(Protocol):
    """What a meta-parameter vector is worth, on the tasks of a given step."""

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        """Score members ``[P, ...]`` (or flat vectors ``[P, D]``) on the tasks of ``step``.

        ``step`` int64 ``[P]`` gives every member the tasks of a step of its own.
        """
        ...


class RunObjective(Objective, Protocol):
    """An objective that a run is built around: theta is whatever it says."""

    @property
    def policy(self) -> Any:
        """The :class:`esmeta.policy.Policy` that theta is; None where a trial trains agents by it.

        With one, :meth:`heldout` also takes ``act`` and ``intervene`` (:mod:`esmeta.rollout`).
        """
        ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Leaves of theta, without the axis P."""
        ...

    def init(self, seed: int) -> Params:
        """Fresh theta, leaves ``[1, ...]``."""
        ...

    def heldout(
        self,
        params: Params | Tensor,
        trials: int,
        seed: int | None = None,
        first: int = 0,
        split: str = "test",
    ) -> Fitness:
        """Scores ``[1, trials - first]`` on the tasks ``first`` .. ``trials`` - 1 of a split."""
        ...

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Numbers int64 ``[B]`` of the trials ``index [B]``, one for those that share randomness.

        Their scores are not independent.
        """
        ...

    def explain(self, gradient: bool) -> str:
        """In one line, what runs there."""
        ...


@runtime_checkable
class Illustrated(Protocol):
    """Options that name who draws reports' figures of them, as ``package.module:function``.

    Of a task, ``(policy, params, task, out, *, seed)`` draws trials of the test split on one page
    ``out``. Of an objective, ``(objective, theta, reference, place)`` draws files, each at
    ``place(name)``, and gives pairs of a file and its caption.
    """

    figures: ClassVar[str]


@runtime_checkable
class Lifetimes(Protocol):
    """An objective whose inner lifetimes can be run in windows, as nres and pes do.

    A life is all that one evaluation of a member goes through: a trial with its fast weights, or
    the training of an agent by a learned loss. It is addressed by its number, so that members of
    one number meet the same tasks and randomness, and what happens in it depends on that number
    and the parameters given for each window alone: not on other members, calls or ranks.
    ``lives`` are those of P members at one step of one life, and known to these methods alone.
    """

    @property
    def life_steps(self) -> int:
        """Steps of a whole life (environment steps of a trial, or updates of an agent)."""
        ...

    def begin(self, params: Params | Tensor, life: int) -> Any:
        """Lives number ``life`` of members ``[P, ...]`` (or flat ``[P, D]``) at their start."""
        ...

    def advance(self, lives: Any, params: Params | Tensor, steps: int) -> tuple[Any, Fitness]:
        """The lives after ``steps`` more steps with ``params``, and the fitness of that window.

        The given ``lives`` are left as they are. The fitness of all windows of a life adds up to
        that of the life; :attr:`Fitness.steps` counts environment steps really taken.
        """
        ...

    def save(self, lives: Any) -> State:
        """Lives as plain tensors with leaves ``[P, ...]``; rows are members."""
        ...

    def restore(self, saved: State) -> Any:
        """The inverse of :meth:`save`, bit for bit, also for some of the rows."""
        ...


@runtime_checkable
class MetaLoss(Protocol):
    """An objective that is differentiable: agents learn by theta, and tell how to improve it.

    The ``agents`` live as long as the run; their rows are spread over the ranks, and nothing but
    these methods looks into them.
    """

    def check_ranks(self, ranks: int) -> None:
        """Refuse more ranks than can be given agents."""
        ...

    def start(self, rank: int, size: int) -> Any:
        """This rank's share of the agents, fresh."""
        ...

    def rows(self, agents: Any) -> int:
        """How many they are, P."""
        ...

    def loss(self, params: Params, agents: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
        """The agents after living and learning on, the loss ``[P]`` of each, and its metrics.

        Differentiable in ``params``, leaves ``[P, ...]``: a copy of theta for each agent. Metrics
        are ``[P]`` (NaN where undefined); ``env_steps`` are the environment steps taken.
        """
        ...

    def save(self, agents: Any) -> State:
        """Agents as plain tensors; rows are agents."""
        ...

    def restore(self, saved: State, rank: int, size: int) -> Any:
        """This rank's share of the agents of all ranks, saved and joined."""
        ...


@runtime_checkable
class Spread(Protocol):
    """An optimizer whose state lies on all ranks; it is collected before it is saved."""

    def gather(self, state: Any, objective: Any, comm: Comm) -> Any:
        """The state with all that :meth:`Optimizer.state_dict` needs, on rank 0."""
        ...


class Optimizer(Protocol):
    """One way to improve theta. Implementations are frozen dataclasses; fields are options.

    ``gradient`` says whether it differentiates: the policy then needs a value head.
    """

    gradient: ClassVar[bool]

    def check(self, objective: Any, ranks: int) -> None:
        """Refuse an objective that this cannot train on so many ranks; before any file is made."""
        ...

    def init(self, theta: Params, rng: Rng) -> Any: ...

    def step(self, state: Any, objective: Any, comm: Comm, rng: Rng) -> tuple[Any, Metrics]: ...

    def theta(self, state: Any) -> Params:
        """The meta-parameters that are evaluated and saved, leaves ``[1, ...]``."""
        ...

    def state_dict(self, state: Any) -> dict[str, Any]:
        """Everything a resumed run needs: tensors, numbers, strings, bytes; nothing else."""
        ...

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> Any:
        """The inverse of ``state_dict``; ``theta`` gives names and shapes."""
        ...
