"""Options as plain Python values, whichever library their numbers come from.

This is the one place where numbers of numpy are turned into Python's. Everything behind it, such as
configurations, digests, TOML, JSON and random numbers by address, sees Python numbers only.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass, field
from typing import Any, TypeVar, dataclass_transform

_Class = TypeVar("_Class")


def plain(value: Any) -> Any:
    """``value`` with numpy's scalars and arrays in it as Python's numbers and lists.

    Arrays without axes are numbers. Lists, tuples and tables are searched; all else is returned as
    it is. A float32 becomes the float of the same value, so ``np.float32(0.1)`` is not 0.1.
    """
    kind = type(value)
    if kind in (list, tuple):
        return kind(plain(item) for item in value)
    if kind is dict:
        return {key: plain(item) for key, item in value.items()}
    numpy = sys.modules.get("numpy")  # only who has imported it can have made such a value
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        found = value.tolist()
        return plain(found) if type(found) is not kind else value
    return value


def for_json(value: Any) -> Any:
    """Numbers of any library as JSON has them, also inside tables and lists.

    JSON has no numbers that are not finite: those become None (null).
    """
    value = plain(value)
    if isinstance(value, dict):
        return {key: for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fixed(value: Any) -> Any:
    """:func:`plain` with tuples for lists, as options are compared and hashed."""
    value = plain(value)
    if type(value) in (list, tuple):
        return tuple(fixed(item) for item in value)
    return {key: fixed(item) for key, item in value.items()} if type(value) is dict else value


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def options_class(cls: type[_Class]) -> type[_Class]:
    """A frozen dataclass whose fields are options: it takes numpy's numbers, and lists as tuples.

    Objects that are built from numpy's numbers equal those that are built from Python's.
    """
    cls = dataclass(frozen=True)(cls)
    init = cls.__init__

    @functools.wraps(init)
    def plain_init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {name: fixed(value) for name, value in kwargs.items()}
        init(self, *map(fixed, args), **given)

    cls.__init__ = plain_init  # type: ignore[method-assign]
    return cls
