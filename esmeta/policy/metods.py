"""MetODS: meta-optimised dynamical synapses (Chalvidal et al. 2022), fast weights as the memory."""

from __future__ import annotations

from typing import Literal

from esmeta import errors
from esmeta.agent.plastic import Plastic
from esmeta.agent.policy import PolicyConfig
from esmeta.options import options_class


@options_class
class Config(PolicyConfig):
    """Options of a MetODS policy, on top of those that every policy has.

    ``depth`` rounds S of reading and writing per step; ``variant`` of the write (``base``:
    alpha v v^T, ``no-alpha``: v v^T, ``linear``: alpha v (A v)^T, ``mlp``: alpha v m(v)^T);
    ``init`` ``identity`` for quick runs or ``paper`` for replication; ``w0`` ``learned``,
    ``sampled`` per trial or ``fixed``; standard deviations of alpha and W0; ``skip``: start of
    kappa[s, 0] under ``identity``.
    """

    depth: int = 2
    variant: Literal["base", "no-alpha", "linear", "mlp"] = "base"
    init: Literal["identity", "paper"] = "identity"
    w0: Literal["learned", "sampled", "fixed"] = "learned"
    alpha_std: float = 1e-3
    w0_std: float = 1e-3
    skip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.positive_int("depth", self.depth)
        errors.finite_positive("alpha_std", self.alpha_std)
        errors.finite_positive("w0_std", self.w0_std)

    def memory(self) -> Plastic:
        return Plastic(
            self.neurons,
            self.depth,
            variant=self.variant,
            init=self.init,
            w0=self.w0,
            alpha_std=self.alpha_std,
            w0_std=self.w0_std,
            skip=self.skip,
        )
