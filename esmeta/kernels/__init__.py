"""The plastic recurrence of MetODS: reading and writing a matrix of fast weights.

``plastic_reference`` is the oracle, ``plastic_step`` one exact step without intermediate matrices,
``plastic_scan`` a differentiable sequence of steps. Who takes many steps calls ``prepare`` once and
``step_prepared`` or ``scan_prepared`` with the ``Rule`` that it gives. ``explain`` says which code
a call would run. ``network`` and ``dense`` are the layers around it, compiled for the CPU.
"""

from esmeta.kernels._dense import Network, dense, network
from esmeta.kernels._dispatch import (
    explain,
    plastic_scan,
    plastic_step,
    prepare,
    scan_prepared,
    step_prepared,
)
from esmeta.kernels._reference import plastic_reference
from esmeta.kernels._rule import Rule

__all__ = [
    "Network",
    "Rule",
    "dense",
    "explain",
    "network",
    "plastic_reference",
    "plastic_scan",
    "plastic_step",
    "prepare",
    "scan_prepared",
    "step_prepared",
]
