"""Errors that are the user's to repair, and the checks of numbers and words that raise them.

A message is one line: what was given, what is allowed, what to write instead. The command line
prints it after ``esmeta: error:`` and exits with code 2; any other exception is a bug.
"""

from __future__ import annotations

import difflib
import math
import sys
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TypeGuard

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


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator could not give what was asked for: Python's, numpy's or torch's."""
    told = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error).lower() for words in told)
    )


_told = 0


def warn(text: str) -> None:
    """One line on stderr, for the first few of a process."""
    global _told
    _told += 1
    if _told <= WARNINGS:
        last = " (further ones are not shown)" if _told == WARNINGS else ""
        print(f"esmeta: warning: {' '.join(text.split())}{last}", file=sys.stderr, flush=True)


def keep_traceback(error: UserError, folder: Path | None = None, name: str = TRACEBACK) -> None:
    """Write the traceback of what an environment, or a lack of memory, made; name it in its line.

    The file lies in ``folder`` where that exists and can be written, else among the temporary
    ones. A second call changes nothing, nor do errors that nothing else made.
    """
    if error.traceback is not None or not _hides_another(error):
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


def _hides_another(error: BaseException | None) -> bool:
    """Whether a line does not say where in whose code it went wrong."""
    while error is not None and not isinstance(error, EnvError) and not out_of_memory(error):
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


def _is_int(value: object) -> TypeGuard[int]:
    value = plain(value)
    # bool is a subclass of int, but `popsize = true` is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number of Python or numpy; true and false are none."""
    value = plain(value)
    if not (_is_int(value) or isinstance(value, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _refuse(name: str, value: object, allowed: str, example: str) -> UserError:
    return UserError(f"{name} = {plain(value)!r}: must be {allowed}; write for example {example}")


def positive_int(name: str, value: object, *, example: int = 1) -> None:
    """Refuse all but integers >= 1."""
    if not (_is_int(value) and value >= 1):
        raise _refuse(name, value, "an integer >= 1", str(example))


def non_negative_int(name: str, value: object, *, example: int = 0) -> None:
    """Refuse all but integers >= 0."""
    if not (_is_int(value) and value >= 0):
        raise _refuse(name, value, "an integer >= 0", str(example))


def finite(name: str, value: object, *, example: float = 0.5) -> None:
    """Refuse all but finite numbers."""
    if not is_number(value):
        raise _refuse(name, value, "a finite number", str(example))


def finite_positive(name: str, value: object, *, example: float = 0.01) -> None:
    """Refuse all but finite numbers > 0."""
    if not (is_number(value) and value > 0):
        raise _refuse(name, value, "a finite number > 0", str(example))


def non_negative(name: str, value: object, *, example: float = 0.0) -> None:
    """Refuse all but finite numbers >= 0."""
    if not (is_number(value) and value >= 0):
        raise _refuse(name, value, "a finite number >= 0", str(example))


def fraction(name: str, value: object, *, example: float = 0.5) -> None:
    """Refuse all but numbers in [0, 1]."""
    if not (is_number(value) and 0 <= value <= 1):
        raise _refuse(name, value, "a number between 0 and 1", str(example))


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse all but the listed words; the nearest one is offered."""
    words = list(allowed)
    if value not in words:
        hint = nearest(str(value), words)
        raise UserError(f"{name} = {value!r}: must be one of {', '.join(words)}{hint}")
