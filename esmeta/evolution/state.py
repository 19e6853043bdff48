"""What a search keeps between generations."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SearchState:
    """State between generations.

    ``theta`` float32 ``[D]``; ``arrays`` whatever else the search keeps, by name; ``unit`` float64
    ``[D]``, one unit of search per coordinate; ``lives`` what this rank's members are in the middle
    of (see :mod:`esmeta.evolution.windows`), which is not saved.
    """

    generation: int
    theta: np.ndarray
    arrays: Arrays
    unit: np.ndarray
    shapes: dict[str, tuple[int, ...]] = field(compare=False)
    lives: Any = field(default=None, compare=False, repr=False)

    def digest(self) -> bytes:
        """Hash of everything that the next generation depends on."""
        digest = hashlib.sha256(f"{self.generation}".encode())
        for name in sorted(self.arrays):
            digest.update(name.encode() + self.arrays[name].tobytes())
        digest.update(self.theta.tobytes() + self.unit.tobytes())
        return digest.digest()
