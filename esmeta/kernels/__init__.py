"""The plastic recurrence of MetODS: reading and writing a matrix of fast weights.

``plastic_reference`` is the oracle, ``plastic_step`` one exact step without intermediate matrices,
``plastic_scan`` a differentiable sequence of steps. Hot loops call ``prepare`` once per rollout and
``step_prepared`` once per time step. ``explain`` says which code a call would run. ``network`` and
``dense`` are the layers around it, compiled for the CPU.
"""

from esmeta.kernels._dense import Network, dense, network
from esmeta.kernels._dispatch import (
    Prepared,
    explain,
    plastic_scan,
    plastic_step,
    prepare,
    step_prepared,
)
from esmeta.kernels._reference import plastic_reference

__all__ = [
    "Network",
    "Prepared",
    "dense",
    "explain",
    "network",
    "plastic_reference",
    "plastic_scan",
    "plastic_step",
    "prepare",
    "step_prepared",
]
