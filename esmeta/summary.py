"""How scores of trials are summed up.

Trials that share randomness are no independent evidence: standard errors are over groups of them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Summary(NamedTuple):
    """Of the entries that are not NaN: their mean, its standard error, their standard deviation.

    ``trials`` is how many there are, ``independent`` how many groups they are of.
    """

    mean: float
    se: float
    sd: float
    trials: int
    independent: int


def summary(values: Tensor, groups: Tensor | None = None) -> Summary:
    """Sum up values ``[N]``; those with one number in ``groups`` int64 ``[N]`` share randomness.

    The standard error is the cluster-robust one (Liang & Zeger 1986) with the factor G / (G - 1)
    for G groups; for groups of one it is the standard deviation over the root of N.
    """
    known = ~values.isnan()
    kept = values[known].double()
    if not kept.numel():
        return Summary(math.nan, math.nan, math.nan, 0, 0)
    mean, count = float(kept.mean()), kept.numel()
    numbers = torch.arange(count, device=values.device)
    labels = numbers if groups is None else groups.to(values.device)[known]
    names, place = labels.unique(return_inverse=True)
    independent = len(names)
    if count < 2 or independent < 2:
        return Summary(mean, math.nan, math.nan, count, independent)
    sums = kept.new_zeros(independent).index_add(0, place.to(kept.device), kept - mean)
    variance = float(sums.square().sum()) * independent / (independent - 1)
    return Summary(mean, math.sqrt(variance) / count, float(kept.std()), count, independent)


def linked(*labels: Tensor) -> Tensor:
    """One number for all that any of the labellings int64 ``[N]`` puts together, int64 ``[N]``."""
    found = torch.arange(len(labels[0]), device="cpu")
    while True:
        before = found
        for each in labels:
            _, place = each.unique(return_inverse=True)
            # The least number travels until nothing changes.
            least = found.new_full((len(found),), len(found))
            found = least.scatter_reduce(0, place, found, "amin")[place]
        if torch.equal(found, before):
            return found
