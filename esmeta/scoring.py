"""What scores are of, and how they are summed up.

Theta is scored on the published task, whatever training aids it was trained with. Trials that share
randomness are no independent evidence: standard errors are over groups of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta.config import Config
from esmeta.tasks import aids, published


def training_aids(config: Config) -> dict[str, tuple[Any, Any]]:
    """Training aids of task and objective in use: option -> its value, and the published one."""
    sections = {"task": config.task.instance, "objective": config.objective.instance}
    return {f"{s}.{k}": v for s, options in sections.items() for k, v in aids(options).items()}


def scored_config(
    config: Config, keep: Collection[str] = (), *, as_trained: bool | None = None
) -> Config:
    """The configuration that scores are of: without training aids but for those in ``keep``.

    Itself if there is none to leave out, or if it is scored ``as_trained`` (by default as
    ``run.evaluate_as_trained`` says).
    """
    as_trained = config.run.evaluate_as_trained if as_trained is None else as_trained
    if as_trained or not training_aids(config):
        return config
    sections = {
        name: replace(section, instance=published(section.instance, keep))
        for name, section in (("task", config.task), ("objective", config.objective))
    }
    return replace(config, **sections)


def variant(trained: Config, scored: Config) -> str:
    """How the tasks that scores are of differ from those of training, for a sentence."""
    used, left = training_aids(trained), training_aids(scored)
    dropped = [f"{name} = {value!r}" for name, (value, _) in used.items() if name not in left]
    kept = [f"{name} = {value!r}" for name, (value, _) in left.items()]
    penalty = getattr(scored.objective.instance, "saturation", 0.0)
    if penalty > 0:  # written by hand: agents do not learn by the learned loss alone
        kept.append(f"objective.saturation = {penalty!r} in the agents' loss")
    words = (("without", dropped), ("with", kept))
    return "".join(f", {word} {', '.join(names)}" for word, names in words if names)


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
