"""Proximal policy optimisation over whole trials (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

Minibatches are whole trials and their memory is re-run from its recorded start, so the recurrent
state is never stale and the ratio is exactly 1 before the first step.
"""

from __future__ import annotations

from esmeta import errors
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers._gradient import ActorCritic, Passes
from esmeta.options import options_class


@options_class
class Optimizer(ActorCritic):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.finite_positive("clip", self.clip)
        errors.positive_int("epochs", self.epochs)
        errors.positive_int("minibatches", self.minibatches)
        errors.non_negative("target_kl", self.target_kl)

    @property
    def passes(self) -> Passes:
        """Passes of minibatches."""
        return Passes(self.epochs, self.minibatches, self.clip, self.target_kl)

    def check(self, objective: ReturnObjective, ranks: int) -> None:
        """Refuse more minibatches than any rank has trials."""
        super().check(objective, ranks)
        fewest = objective.trials // ranks
        if fewest < self.minibatches:
            raise errors.UserError(
                f"optimizer.minibatches = {self.minibatches}: a rank has only {fewest} trials; "
                f"write at most {fewest}, or raise task.trials"
            )
