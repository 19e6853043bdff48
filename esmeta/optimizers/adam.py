"""Adam on a meta-loss: theta descends what agents that learn by it tell (MetaGenRL, algorithm 1).

Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, algorithm 1. The gradient of each agent is
clipped by itself before the mean over all agents of all ranks is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from esmeta import errors
from esmeta.modes import differentiating
from esmeta.optimizers import _gradient as pg
from esmeta.optimizers._schedule import scheduled
from esmeta.options import options_class
from esmeta.rl.steppers import shortened
from esmeta.rng import Rng
from esmeta.types import Comm, MetaLoss, Metrics, Params, State


@dataclass(frozen=True)
class AdamState(pg.GradientState):
    """Also ``agents`` of this rank (None: not yet begun) and those of all ranks as saved."""

    agents: Any = None
    saved: State | None = None


@options_class
class Optimizer(pg.GradientOptimizer):
    """One Adam step on the mean of the agents' gradients.

    Attributes:
        learning_rate: of Adam, at first.
        learning_rate_final: of Adam after ``schedule_updates``, linear in between.
        schedule_updates: see there; 0: the learning rate stays.
        max_grad_norm: norm of an agent's gradient at most; 0: no limit.
        adam_eps: Adam's epsilon.
    """

    learning_rate: float = 1e-3
    learning_rate_final: float = 1e-4
    schedule_updates: int = 0
    max_grad_norm: float = 1.0
    adam_eps: float = 1e-8

    def __post_init__(self) -> None:
        errors.finite_positive("learning_rate", self.learning_rate)
        errors.finite_positive("learning_rate_final", self.learning_rate_final)
        errors.non_negative_int("schedule_updates", self.schedule_updates, example=1000)
        errors.non_negative("max_grad_norm", self.max_grad_norm)
        errors.finite_positive("adam_eps", self.adam_eps)

    def rate_at(self, update: int) -> float:
        """Learning rate."""
        first, last = self.learning_rate, self.learning_rate_final
        return scheduled("linear", update, self.schedule_updates, first, last)

    def check(self, objective: Any, ranks: int) -> None:
        """Refuse an objective without a differentiable loss."""
        if not isinstance(objective, MetaLoss):
            raise errors.UserError(
                f"{type(objective).__name__} has no loss that theta could be differentiated in; "
                "write objective.name = 'metagenrl', or optimizer.name = 'openes'"
            )
        objective.check_ranks(ranks)

    def init(self, theta: Params, rng: Rng) -> AdamState:
        """The state before the first update."""
        return AdamState(**vars(super().init(theta, rng)))

    def gather(self, state: AdamState, objective: MetaLoss, comm: Comm) -> AdamState:
        """The state with the agents of all ranks saved in rank order."""
        if state.agents is None:
            return state
        own = objective.save(state.agents)
        return replace(state, saved={name: _gathered(leaf, comm) for name, leaf in own.items()})

    def state_dict(self, state: AdamState) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return super().state_dict(state) | {"agents": state.saved or {}}

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> AdamState:
        """The inverse of :meth:`state_dict`."""
        numbers = vars(super().load_state_dict(saved, theta))
        return AdamState(**numbers, saved=saved["agents"] or None)

    @differentiating
    @torch.enable_grad()
    def step(
        self, state: AdamState, objective: MetaLoss, comm: Comm, rng: Rng
    ) -> tuple[AdamState, Metrics]:
        """Let the agents live on, and step along the mean of their clipped gradients."""
        agents = state.agents
        if agents is None and state.saved is not None:
            agents = objective.restore(state.saved, comm.rank, comm.size)
        elif agents is None:
            agents = objective.start(comm.rank, comm.size)
        count = objective.rows(agents)
        leaves = {
            name: leaf.expand(count, *leaf.shape[1:]).clone().requires_grad_()
            for name, leaf in state.params().items()
        }
        agents, loss, metrics = objective.loss(leaves, agents)
        gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
        rows = torch.cat([gradient.reshape(count, -1) for gradient in gradients], dim=1)
        known = {"meta_loss": loss.detach(), "gradient_norm": rows.norm(dim=1), **metrics}
        rows = shortened(rows, self.max_grad_norm)
        sums = [torch.stack([v.double().nansum(), (~v.isnan()).sum().double()])
                for v in known.values()]  # fmt: skip
        own = torch.cat([rows.sum(dim=0).double(), *(pair.to(rows.device) for pair in sums)])
        joint = comm.sum_ordered(own)
        pairs = joint[rows.shape[1] :].reshape(-1, 2).tolist()
        means = {name: total / n if n else float("nan")
                 for name, (total, n) in zip(known, pairs, strict=True)}  # fmt: skip
        means["env_steps"] = pairs[list(known).index("env_steps")][0]
        living = pairs[0][1]
        mean = joint[: rows.shape[1]] / living
        if not bool(torch.isfinite(mean).all()) or living == 0:
            raise FloatingPointError(
                f"update {state.update}: the gradient of an agent is not finite (its critics or "
                "the learned loss exploded); lower optimizer.learning_rate or objective.inner_rate"
            )
        rate = self.rate_at(state.update)
        state = state.along(mean.unsqueeze(0).to(state.theta.dtype), rate, self.adam_eps)
        return replace(state, update=state.update + 1, agents=agents, saved=None), means


def _gathered(leaf: Tensor, comm: Comm) -> Tensor:
    """Rows of all ranks in rank order, bit for bit."""
    if comm.size == 1:
        return leaf
    counts = torch.zeros(comm.size, dtype=torch.int64, device="cpu")
    counts[comm.rank] = len(leaf)
    counts = comm.sum_exact(counts).tolist()
    flat = leaf.reshape(len(leaf), -1)
    # Whole numbers of 64 bits travel as what their bits would be as floats.
    whole = leaf.dtype == torch.int64
    flat = flat.contiguous().view(torch.float64) if whole else flat.double()
    rows = comm.gather_rows(flat, counts)
    rows = rows.contiguous().view(torch.int64) if whole else rows.to(leaf.dtype)
    return rows.reshape(-1, *leaf.shape[1:])
