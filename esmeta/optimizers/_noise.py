"""Noise by address: a mirrored pair's perturbation is a function of (key, generation, pair).

Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
https://doi.org/10.1145/2063384.2063405. A shared noise table (Salimans et al. 2017) is faster but
correlates members whose slices overlap, and costs a gigabyte per machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esmeta.rng import Rng

_WORD = (1 << 64) - 1


def pair_noise(
    rng: Rng, generation: int, pairs: Sequence[int] | np.ndarray, size: int
) -> np.ndarray:
    """Standard normal noise of the given pairs, float32 ``[len(pairs), size]``.

    Every pair has a Philox key of its own, so the bits of a pair do not depend on which others
    are drawn with it, nor on the rank that draws them.
    """
    stream = rng.fold("noise", generation).key & _WORD
    noise = np.empty((len(pairs), size), dtype=np.float32)
    for row, pair in enumerate(pairs):
        generator = np.random.Generator(np.random.Philox(key=(stream << 64) | int(pair)))
        generator.standard_normal(dtype=np.float32, out=noise[row])
    return noise
