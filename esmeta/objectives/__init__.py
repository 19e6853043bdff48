"""What theta is worth: one module per value of ``--objective``."""

from __future__ import annotations

from typing import Any

from esmeta.errors import UserError
from esmeta.tasks import make_task
from esmeta.types import Task


def refuse_policy(policy: object, objective: str) -> None:
    """Refuse a ``[policy]`` section for an objective that trains agents of its own."""
    if policy is not None:
        raise UserError(
            f"objective.name = {objective!r} trains agents of its own, described in [objective]; "
            'write policy.name = "none" (--set policy.name=none)'
        )


def further_task(options: dict[str, Any]) -> Task:
    """A task beside that of the run, from a table of its name and options."""
    table = dict(options)
    name = table.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"objective.more_tasks: {options!r} has no name; write for example "
            'more_tasks = [{name = "pendulum", horizon = 200}]'
        )
    # A list in a file is a tuple in Python.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
    return make_task(name, **values)
