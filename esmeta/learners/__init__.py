"""Hand-written learners, which train agents inside their lives. One module per learner."""

from __future__ import annotations

import math
from typing import Literal

from esmeta.agent.policy import Need, Policy, PolicyConfig, published_policy
from esmeta.types import Spec


def inner_policy(
    spec: Spec,
    config: PolicyConfig | None,
    kind: Literal["epg", "metagenrl"],
    hidden: tuple[int, ...],
    needs: frozenset[Need],
    *,
    std: float = 0.1,
    log_std: float = 0.0,
) -> Policy:
    """What learns inside a life: the published networks, or a policy with any memory.

    Without a ``config`` the separate networks of ``kind`` with layers ``hidden``. Else the policy
    that it describes, with a head for V where the loss ``needs`` it; critics, which read
    observations, and EPG's memory unit are the published ones. Agents of MetaGenRL act by a mean
    that is limited to the range of the actions, with a spread of ``std`` times half that range;
    ``log_std`` is where the learned spread of EPG's begins.
    """
    if config is None:
        first = std if kind == "metagenrl" else math.exp(log_std)
        return published_policy(spec, kind, hidden, needs, std=first)
    policy = config.make(spec, value="value" in needs)
    return policy.extended(kind, hidden, needs, std=std)
