"""Randomness by address: no generator state, no global generator, the same bits on any device.

A draw is a function of (key, index, counter). Splitting a batch, or giving it to other ranks,
therefore cannot change what a trial sees. The bits come from two rounds of the SplitMix64
finaliser (Steele, Lea & Flood, OOPSLA 2014), which passes BigCrush on sequential counters.
"""

from __future__ import annotations

import hashlib
import math
import operator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same 64 bits: torch has no unsigned 64-bit arithmetic."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # int64 shifts are arithmetic; the mask makes them logical.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


@dataclass(frozen=True)
class Rng:
    """A named stream of random numbers. ``Rng(seed)`` is the root; ``fold`` derives streams."""

    key: int

    def __post_init__(self) -> None:
        if type(self.key) is not int:  # arithmetic on 64 bits overflows in numpy's integers
            object.__setattr__(self, "key", operator.index(self.key))

    def fold(self, *names: int | str) -> Rng:
        """A stream of its own for every sequence of names, e.g. ``rng.fold("noise", 3)``."""
        key = _mix_int((self.key * _GAMMA + 0x632BE59BD9B4E019) & _MASK)
        for name in names:
            if isinstance(name, str):
                word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
            else:
                word = _mix_int((int(name) + _GAMMA) & _MASK)
            key = _mix_int((key ^ word) + _GAMMA & _MASK)
        return Rng(key)

    def bits(self, index: Tensor, count: int) -> Tensor:
        """64 random bits as int64, shape ``[*index.shape, count]``, one row per address."""
        counter = torch.arange(1, count + 1, dtype=torch.int64, device=index.device)
        row = _mix(index.to(torch.int64) * _signed(_GAMMA) + _signed(_mix_int(self.key & _MASK)))
        return _mix(_mix(row.unsqueeze(-1) + counter * _signed(_GAMMA)))

    def uniform(self, index: Tensor, count: int) -> Tensor:
        """Uniform draws in [0, 1), float64 ``[*index.shape, count]``."""
        return _shift_right(self.bits(index, count), 11).to(torch.float64) * 2.0**-53

    def integers(self, index: Tensor, count: int, bound: int) -> Tensor:
        """Uniform draws from 0..bound-1, int64 ``[*index.shape, count]``."""
        return (self.uniform(index, count) * bound).to(torch.int64)

    def normal(self, index: Tensor, count: int) -> Tensor:
        """Standard normal draws (Box-Muller), float64 ``[*index.shape, count]``."""
        u = self.uniform(index, 2 * count)
        radius = torch.sqrt(-2.0 * torch.log1p(-u[..., :count]))
        return radius * torch.cos((2.0 * math.pi) * u[..., count:])

    def numpy(self) -> np.random.Generator:
        """A numpy generator (Philox) for bulk draws that need no address per row."""
        return np.random.Generator(np.random.Philox(key=self.key & _MASK))
