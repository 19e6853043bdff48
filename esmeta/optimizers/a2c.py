"""Advantage actor-critic over whole trials (Mnih et al. 2016, arXiv 1602.01783), one step a batch.

The loss is the one MetODS is trained with (arXiv 2202.02363): policy gradient with GAE, squared
value error, entropy bonus; a mean over the steps of each.
The rollout is recorded without a graph and re-evaluated, so that memory costs one scan.
"""

from __future__ import annotations

from esmeta.optimizers._gradient import ActorCritic
from esmeta.options import options_class


@options_class
class Optimizer(ActorCritic):
    """A2C: one gradient step on every batch of trials."""
