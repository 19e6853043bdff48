"""The plastic recurrence of MetODS: reading and writing a matrix of fast weights.

``plastic_reference`` is the oracle, ``plastic_step`` one exact step without intermediate matrices,
``plastic_scan`` a differentiable sequence of steps. Hot loops call ``prepare`` once per rollout and
``step_prepared`` once per time step. ``explain`` says which code a call would run.
"""

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
    "Prepared",
    "explain",
    "plastic_reference",
    "plastic_scan",
    "plastic_step",
    "prepare",
    "step_prepared",
]
