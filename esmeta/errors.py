"""Errors that are the user's to repair, and the checks that raise them.

A message is one line: what was given, what is allowed, what to write instead. The command line
prints it after ``esmeta: error:`` and exits with code 2; any other exception is a bug.
"""

from __future__ import annotations

import builtins
import dataclasses
import difflib
import math
import sys
import tempfile
import traceback
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal, Union

from esmeta.options import plain

TRACEBACK = "environment-error.txt"
"""File of a run directory with the traceback of an environment's error."""

WARNINGS = 20
"""How many warnings about environments a process prints."""


class UserError(ValueError):
    """Something outside the program must change: an option, a file, an installation."""

    traceback: Path | None = None
    """Where its traceback was kept, if it was."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class EnvError(UserError):
    """A user's environment did what it must not; what it raised, if anything, is ``__cause__``."""


class EnvFailure(EnvError):
    """A user's environment raised an exception, or gave numbers that are not finite.

    Unlike a wrong shape or type this may be gone when its trial is run again.
    """


_told = 0


def warn(text: str) -> None:
    """One line on stderr, for the first few of a process."""
    global _told
    _told += 1
    if _told <= WARNINGS:
        last = " (further ones are not shown)" if _told == WARNINGS else ""
        print(f"esmeta: warning: {' '.join(text.split())}{last}", file=sys.stderr, flush=True)


def keep_traceback(error: UserError, folder: Path | None = None, name: str = TRACEBACK) -> None:
    """Write the traceback of an error that an environment made, and name the file in its line.

    The file lies in ``folder`` where that exists and can be written, else among the temporary
    ones. A second call changes nothing, nor do errors that no environment made.
    """
    if error.traceback is not None or not _made_by_environment(error):
        return
    text = "".join(traceback.format_exception(error))
    file = None if folder is None else folder / name
    try:
        if file is None or not file.parent.is_dir():
            raise FileNotFoundError
        file.write_text(text, encoding="utf-8")
    except OSError:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix="esmeta-", suffix=f"-{name}", delete=False
        ) as opened:
            opened.write(text)
        file = Path(opened.name)
    error.traceback = file
    error.args = (f"{error}; traceback: {file}",)


def _made_by_environment(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, EnvError):
        error = error.__cause__
    return error is not None


def nearest(word: str, words: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the most similar of ``words``, or an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in words}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[found[0]]!r}?)" if found else ""


def listed(words: Iterable[str]) -> str:
    """Names for a message, in order: ``a, b, c`` or ``(none)``."""
    return ", ".join(sorted(words)) or "(none)"


def _is_int(value: object) -> bool:
    value = plain(value)
    # bool is a subclass of int, but `popsize = true` is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    value = plain(value)
    if not (_is_int(value) or isinstance(value, float)):
        return False
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer beyond the largest float
        return False


def _refuse(name: str, value: object, allowed: str, example: str) -> UserError:
    return UserError(f"{name} = {plain(value)!r}: must be {allowed}; write for example {example}")


def positive_int(name: str, value: object, *, example: int = 1) -> None:
    """Refuse all but integers >= 1."""
    if not (_is_int(value) and value >= 1):  # type: ignore[operator]
        raise _refuse(name, value, "an integer >= 1", str(example))


def non_negative_int(name: str, value: object, *, example: int = 0) -> None:
    """Refuse all but integers >= 0."""
    if not (_is_int(value) and value >= 0):  # type: ignore[operator]
        raise _refuse(name, value, "an integer >= 0", str(example))


def finite(name: str, value: object, *, example: float = 0.5) -> None:
    """Refuse all but finite numbers."""
    if not _is_number(value):
        raise _refuse(name, value, "a finite number", str(example))


def finite_positive(name: str, value: object, *, example: float = 0.01) -> None:
    """Refuse all but finite numbers > 0."""
    if not (_is_number(value) and value > 0):  # type: ignore[operator]
        raise _refuse(name, value, "a finite number > 0", str(example))


def non_negative(name: str, value: object, *, example: float = 0.0) -> None:
    """Refuse all but finite numbers >= 0."""
    if not (_is_number(value) and value >= 0):  # type: ignore[operator]
        raise _refuse(name, value, "a finite number >= 0", str(example))


def fraction(name: str, value: object, *, example: float = 0.5) -> None:
    """Refuse all but numbers in [0, 1]."""
    if not (_is_number(value) and 0 <= value <= 1):  # type: ignore[operator]
        raise _refuse(name, value, "a number between 0 and 1", str(example))


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse all but the listed words; the nearest one is offered."""
    words = list(allowed)
    if value not in words:
        hint = nearest(str(value), words)
        raise UserError(f"{name} = {value!r}: must be one of {', '.join(words)}{hint}")


# --- options against annotations -------------------------------------------------------------


class _Scope(dict[str, Any]):
    """Names of a module; those that are imported for type checkers only count as Any."""

    def __init__(self, module: str) -> None:
        super().__init__(vars(builtins) | vars(sys.modules[module]))

    def __missing__(self, key: str) -> Any:
        return Any


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return typing.get_type_hints(cls, localns=_Scope(cls.__module__))


class _Mismatch(Exception):
    """What a value should have been; private to the conversion below."""


def _scalar(value: Any, hint: type) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if hint is int and is_int:
        return value
    if hint is float and _is_number(value):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    words = {bool: "true or false", int: "an integer, for example 8", str: 'text, for example "x"'}
    raise _Mismatch(words.get(hint, "a finite number, for example 0.5"))


def _sequence(value: Any, hint: Any, origin: type) -> Any:
    if not isinstance(value, list | tuple):
        raise _Mismatch("a list, for example [1, 2]")
    kinds = typing.get_args(hint) or (Any, ...)
    if origin is tuple and Ellipsis not in kinds:
        if len(kinds) != len(value):
            raise _Mismatch(f"a list of {len(kinds)} values")
        return tuple(_convert(v, k) for v, k in zip(value, kinds, strict=True))
    return origin(_convert(item, kinds[0]) for item in value)


def _union(value: Any, kinds: tuple[Any, ...]) -> Any:
    expected = []
    # TOML has no null; the word "none" stands for it wherever None is allowed.
    if type(None) in kinds and (value is None or value == "none"):
        return None
    for kind in kinds:
        if kind is type(None):
            expected.append('"none"')
            continue
        try:
            return _convert(value, kind)
        except _Mismatch as error:
            expected.append(str(error))
    raise _Mismatch(" or ".join(expected))


def _convert(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if any(value == word and type(value) is type(word) for word in allowed):
            return value
        hint_text = nearest(str(value), [str(word) for word in allowed])
        raise _Mismatch(f"one of {', '.join(map(str, allowed))}{hint_text}")
    if origin in (Union, types.UnionType):
        return _union(value, typing.get_args(hint))
    for container in (tuple, list):
        if hint is container or origin is container:
            return _sequence(value, hint, container)
    if hint in (bool, int, float, str):
        return _scalar(value, hint)
    return value


def check_options(cls: type, options: Mapping[str, Any], section: str) -> Any:
    """An instance of the dataclass ``cls`` from the ``options`` of a TOML section.

    Unknown keys, wrong types and values that the class itself refuses are reported with the
    section in front, as ``section.key``.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = _hints(cls)
    values = {}
    for key, value in plain(dict(options)).items():
        if key not in fields:
            raise UserError(
                f"{section}.{key} is not an option{nearest(key, fields)}; options are: "
                f"{listed(fields)}"
            )
        try:
            values[key] = _convert(value, hints.get(key, Any))
        except _Mismatch as error:
            raise UserError(f"{section}.{key} = {value!r}: must be {error}") from None
    for key, item in fields.items():
        if key not in values and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{section}.{key} is missing; it has no default, so write a value")
    try:
        return cls(**values)
    except ValueError as error:
        text = str(error)
        names_a_field = text.split(" ", 1)[0].rstrip(":,=") in fields
        raise UserError(f"{section}.{text}" if names_a_field else f"{section}: {text}") from error
