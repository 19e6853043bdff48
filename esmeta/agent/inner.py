"""Agents that learn inside a trial: the networks of EPG and MetaGenRL, or any policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from esmeta import errors
from esmeta.agent.feedforward import Feedforward
from esmeta.agent.heads import Distribution
from esmeta.agent.nets import Net
from esmeta.agent.policy import CRITICS, Inputs, Need, Policy, PolicyConfig
from esmeta.types import Discrete, Spec

Kind = Literal["epg", "metagenrl"]


def inner_policy(
    spec: Spec,
    kind: Kind,
    hidden: tuple[int, ...],
    needs: frozenset[Need],
    *,
    std: float,
    config: PolicyConfig | None = None,
) -> Policy:
    """What learns inside a life, with what its loss ``needs`` beside the actions.

    Without a ``config`` separate networks with layers ``hidden``, which read observations and
    remember nothing. Else the policy that it describes, whose memory begins anew with every
    episode; critics, which read observations and have layers ``hidden``, and the memory unit are
    the published ones. Actions of ``epg`` are Gaussian with a log-std that is learned, ``log(std)``
    at first (of a ``config``: as it says). Those of ``metagenrl`` have a mean that is limited to
    their range, and a spread of ``std`` times half of it that stays.
    """
    critics = _critics(spec, kind, hidden) if "critics" in needs else ()
    more: dict[str, Any] = {"critics": critics, "unit": "unit" in needs}
    if config is not None:
        return _beside(config.make(spec, value="value" in needs), kind, std, more)
    limited, size = kind == "metagenrl", spec.obs_size
    distribution = Distribution(
        spec.action, "fixed" if limited else "learned", std, leaf="log_std", limited=limited
    )
    return Policy(
        spec,
        inputs=Inputs(past=False),
        embed=Net("embed", (size,), kind),
        memory=Feedforward(size, squash=False),
        head=Net("policy", (size, *hidden, distribution.width), kind),
        distribution=distribution,
        value=Net("value", (size, *hidden, 1), kind) if "value" in needs else None,
        **more,
    )


def _beside(policy: Policy, kind: Kind, std: float, more: dict[str, Any]) -> Policy:
    """The policy with ``more``; of a learner that limits its actions, with those limited."""
    if policy.inputs.extra == "time":
        raise errors.UserError(
            "policy.extra = 'time': agents that learn inside a trial go over parts of it, "
            "which do not say when they were; write policy.extra = 'bias' or 'none'"
        )
    distribution = policy.distribution
    if kind == "metagenrl":
        distribution = replace(distribution, std="fixed", first=std, limited=True)
    return Policy(
        policy.spec,
        inputs=policy.inputs,
        embed=policy.embed,
        memory=policy.memory,
        head=replace(policy.head, sizes=(*policy.head.sizes[:-1], distribution.width)),
        distribution=distribution,
        value=policy.value,
        episodic=True,
        config=policy.config,
        **more,
    )


def _critics(spec: Spec, kind: Kind, hidden: tuple[int, ...]) -> tuple[Net, ...]:
    """Two networks Q(s, a); refused for discrete actions, in which they have no derivative."""
    if isinstance(spec.action, Discrete):
        raise errors.UserError(
            f"the task has {spec.action.n} discrete actions, but this learner needs "
            "continuous ones (its critics are differentiated in the action); choose a task "
            "with continuous actions, or a learner such as ppo"
        )
    width = spec.obs_size + spec.action.size
    return tuple(Net(name, (width, *hidden, 1), kind) for name in CRITICS)
