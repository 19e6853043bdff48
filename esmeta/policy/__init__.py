"""Policies: embed -> memory -> heads. One module per value of ``policy.name``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from esmeta import names
from esmeta.agent.policy import Bound, Policy, PolicyConfig
from esmeta.tree import unravel_shapes
from esmeta.types import Params, Spec

__all__ = ["Bound", "Policy", "PolicyConfig", "make_policy", "policy_names", "unravel"]


def policy_names() -> list[str]:
    """Names that :func:`make_policy` and ``policy.name`` take."""
    return names.known("policy")


def make_policy(name: str, spec: Spec, *, value: bool = False, **options: Any) -> Policy:
    """Build a policy by name for a task's ``spec``.

    ``value`` adds a value head (A2C and PPO need one; evolution does not). Options are the fields
    of the policy's ``Config``. Raises ``ValueError`` naming unknown names and values out of range.
    """
    return names.make("policy", name, options).make(spec, value=value)


def unravel(vector: Tensor, policy: Policy) -> Params:
    """Parameter tree of flat vectors ``[P, D]``, in the policy's own order."""
    return unravel_shapes(vector, policy.shapes)
