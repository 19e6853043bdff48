"""What theta is worth: one module per value of ``--objective``."""

from __future__ import annotations

from esmeta.errors import UserError


def refuse_policy(policy: object, objective: str) -> None:
    """Refuse a ``[policy]`` section for an objective that trains agents of its own."""
    if policy is not None:
        raise UserError(
            f"objective.name = {objective!r} trains agents of its own, described in [objective]; "
            'write policy.name = "none" (--set policy.name=none)'
        )
