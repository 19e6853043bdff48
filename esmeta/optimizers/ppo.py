"""Proximal policy optimisation over whole trials (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

Minibatches are whole trials and their memory is re-run from its recorded start, so the recurrent
state is never stale and the ratio is exactly 1 before the first step.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from esmeta import errors
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import _gradient as pg
from esmeta.options import options_class
from esmeta.policy import _heads as heads
from esmeta.rng import Rng
from esmeta.types import Comm, Metrics, Params, PolicyOut


@options_class
class Optimizer(pg.GradientConfig):
    """PPO with the clipped objective.

    ``clip`` range of the ratio; ``epochs`` passes over the batch; ``minibatches`` of whole trials
    per pass; ``target_kl``: stop the passes of an update once the approximate KL divergence
    exceeds it (0: never).
    """

    normalize_advantage: bool = True
    clip: float = 0.2
    epochs: int = 4
    minibatches: int = 4
    target_kl: float = 0.0

    gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.finite_positive("clip", self.clip)
        errors.positive_int("epochs", self.epochs)
        errors.positive_int("minibatches", self.minibatches)
        errors.non_negative("target_kl", self.target_kl)

    def check(self, objective: ReturnObjective, ranks: int) -> None:
        """Refuse more minibatches than any rank has trials."""
        super().check(objective, ranks)
        fewest = objective.trials // ranks
        if fewest < self.minibatches:
            raise errors.UserError(
                f"optimizer.minibatches = {self.minibatches}: a rank has only {fewest} trials; "
                f"write at most {fewest}, or raise task.trials"
            )

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
        """Record ``trials`` trials, then ``epochs`` passes of ``minibatches`` Adam steps each."""
        batch, metrics = pg.collect(self, state, objective, comm)
        trials = batch.active.shape[2]
        sums, norms = [], []
        for epoch in range(self.epochs):
            order = rng.fold("minibatches", state.update, epoch, comm.rank).numpy()
            order = torch.from_numpy(order.permutation(trials)).to(batch.active.device)
            for chosen in order.tensor_split(self.minibatches):
                part = batch if self.minibatches == 1 else batch.trials(chosen)
                logged, norm = pg.gradient_step(self, state, objective, part, self._loss, comm)
                sums.append(logged)
                norms.append(norm)
            if self.target_kl > 0.0 and float(sums[-1][3]) > self.target_kl:
                break
        state.update += 1
        names = ("policy_loss", "value_loss", "entropy", "kl", "clip_fraction")
        means = torch.stack(sums).mean(dim=0).tolist()
        losses = dict(zip(names, means, strict=True))
        return state, metrics | losses | {"gradient_norm": sum(norms) / len(norms)}

    def _loss(
        self, batch: pg.Batch, out: PolicyOut, count: Tensor, entropy_coef: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert out.value is not None
        active = batch.active
        log_ratio = heads.log_prob(out, batch.action) - batch.log_prob
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        gain = torch.minimum(ratio * batch.advantage, clipped * batch.advantage)
        policy = -(gain * active).sum()
        value = ((batch.target - out.value) ** 2 * active).sum()
        entropy = (heads.entropy(out) * active).sum()
        loss = policy + self.value_coef * value - entropy_coef * entropy
        # Unbiased, always positive estimate of the divergence from the recorded policy.
        divergence = ((ratio - 1.0 - log_ratio) * active).sum()
        outside = (((ratio - 1.0).abs() > self.clip) * active).sum()
        logged = torch.stack([policy, value, entropy, divergence, outside]).detach()
        return loss / count, logged
