"""Numbers that change in the course of a run, such as learning rates."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def scheduled(kind: Schedule, step: int, length: int, first: float, last: float) -> float:
    """A number at ``step``: ``first``, or on its way to ``last``, which it is from ``length`` on.

    ``length`` 0 is ``constant`` too.
    """
    if kind == "constant" or not length:
        return first
    done = min(1.0, step / length)
    if kind == "cosine":
        return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * done))
    return first + (last - first) * done
