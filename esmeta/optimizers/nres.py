"""NRES, noise-reuse evolution strategies: unbiased gradients from windows of long inner lives.

Li, Harrison, Sohl-Dickstein, Smith & Metz, "Noise-Reuse in Online Evolution Strategies", NeurIPS
2023, https://arxiv.org/abs/2304.12180; the same estimator as ES-Single, Vicol, Kolter & Swersky,
ICML 2023, https://arxiv.org/abs/2304.11153.

    g = 1 / (N sigma) * sum_pairs (R_w(theta + sigma eps) - R_w(theta - sigma eps)) eps

where R_w is the return of one *window* of K steps, the inner state of each member lives on from
window to window, and eps is drawn once per life of T steps: as theta moves under a life, its noise
stays. Summed over the T / K windows of a life, g is the gradient of OpenAI-ES from whole lives;
there are T / K updates for the same environment steps. With K = T it *is* ``openes`` with
``shaping = "raw"``, bit for bit. :mod:`esmeta.evolution.windows` says how lives are staggered and
what a resumed run does.
"""

from __future__ import annotations

from typing import ClassVar

from esmeta.errors import UserError, one_of, positive_int
from esmeta.evolution.search import Rule
from esmeta.evolution.shaping import Failed, Shaping
from esmeta.evolution.windows import Windows, in_windows
from esmeta.optimizers import openes
from esmeta.options import options_class

# Of these one value is all that windows allow: lives of several generations cannot be added to
# one, and the worst trials of the windows are not the windows of the worst.
ONLY = {"aggregate": "mean", "tasks": "shared", "interactions": 0, "popsize_max": 0}


@options_class
class Optimizer(openes.Optimizer):
    """NRES, with the options of ``openes`` too.

    Attributes:
        window: steps per window, K, in the units of the objective's lives (environment steps of a
            trial); ``none`` takes a quarter of a life.
        shaping: ``zscore`` divides the differences ``R_w+ - R_w-`` of all pairs by their root mean
            square; ``raw`` leaves them. One scale for all windows keeps the direction; ranks, or a
            scale per window, would weigh early and late windows against each other and so change
            what is optimised.
        failed: ``drop_pair`` gives pairs without a finite return weight 0 (their life goes on and
            ends with their group's); ``raise`` ends the run.
    """

    fresh: ClassVar[bool] = False
    """Whether noise is drawn anew for every window, and accumulated."""

    window: int | None = None
    shaping: Shaping = "zscore"
    failed: Failed = "drop_pair"

    def __post_init__(self) -> None:
        if self.window is not None:
            positive_int("window", self.window, example=25)
        one_of("shaping", self.shaping, ("zscore", "raw"))
        one_of("failed", self.failed, ("drop_pair", "raise"))
        for name, only in ONLY.items():
            if getattr(self, name) != only:
                raise UserError(
                    f"{name} = {getattr(self, name)!r}: searches from windows of lives take "
                    f"{only!r} only; write {name} = {only!r}"
                )
        super().__post_init__()

    def rule(self) -> Rule:
        """OpenAI-ES from windows."""
        windows = Windows(self.window, self.fresh, self.sigma_at, self.failed)
        return in_windows(super().rule(), windows, self.shaping)
