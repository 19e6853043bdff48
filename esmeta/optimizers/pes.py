"""PES, persistent evolution strategies: the older estimator that NRES is compared with.

Vicol, Metz & Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with
Persistent Evolution Strategies", ICML 2021, https://arxiv.org/abs/2112.13835.

    g = 1 / (N sigma) * sum_pairs (R_w(theta + sigma eps_w) - R_w(theta - sigma eps_w)) xi_w,
    xi_w = eps_1 + ... + eps_w

with noise eps_w drawn anew for every window w of a life and accumulated in xi. Unbiased, as NRES,
and of larger variance wherever windows pull theta into different directions, because every return
is multiplied by all the noise since its life began. All else is as in
:mod:`esmeta.optimizers.nres`.
"""

from __future__ import annotations

from typing import ClassVar

from esmeta.optimizers import nres
from esmeta.options import options_class


@options_class
class Optimizer(nres.Optimizer):
    """PES: noise is drawn anew for every window, and accumulated."""

    fresh: ClassVar[bool] = True
