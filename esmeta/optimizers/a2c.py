"""Advantage actor-critic over whole trials (Mnih et al. 2016, arXiv 1602.01783), one step a batch.

The loss is the one MetODS is trained with (arXiv 2202.02363): policy gradient with GAE, squared
value error, entropy bonus; a mean over the steps of each.
The rollout is recorded without a graph and re-evaluated, so that memory costs one scan.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import _gradient as pg
from esmeta.options import options_class
from esmeta.policy import _heads as heads
from esmeta.rng import Rng
from esmeta.types import Comm, Metrics, Params, PolicyOut


@options_class
class Optimizer(pg.GradientConfig):
    """A2C: one gradient step on every batch of trials."""

    gradient: ClassVar[bool] = True

    def init(self, theta: Params, rng: Rng) -> pg.GradientState:
        return pg.init_state(theta)

    def theta(self, state: pg.GradientState) -> Params:
        return state.params()

    def state_dict(self, state: pg.GradientState) -> dict[str, Any]:
        return pg.save_state(state)

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> pg.GradientState:
        return pg.load_state(saved, theta)

    def step(
        self, state: pg.GradientState, objective: ReturnObjective, comm: Comm, rng: Rng
    ) -> tuple[pg.GradientState, Metrics]:
        """Record ``trials`` trials, take one Adam step."""
        batch, metrics = pg.collect(self, state, objective, comm)
        sums, norm = pg.gradient_step(self, state, objective, batch, self._loss, comm)
        state.update += 1
        losses = dict(zip(("policy_loss", "value_loss", "entropy"), sums.tolist(), strict=True))
        return state, metrics | losses | {"gradient_norm": norm}

    def _loss(
        self, batch: pg.Batch, out: PolicyOut, count: Tensor, entropy_coef: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert out.value is not None
        active = batch.active
        policy = -(heads.log_prob(out, batch.action) * batch.advantage * active).sum()
        value = ((batch.target - out.value) ** 2 * active).sum()
        entropy = (heads.entropy(out) * active).sum()
        loss = policy + self.value_coef * value - entropy_coef * entropy
        return loss / count, torch.stack([policy, value, entropy]).detach()
