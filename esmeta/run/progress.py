"""What a running job shows on stderr: a live bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

LINE_SECONDS = 5.0


class Progress:
    """A context manager that shows nothing: what ranks other than 0 have."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def update(self, step: int, fraction: float, **numbers: float) -> None:
        """Tell how many steps are done, which share of the budget is used, and some numbers."""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Clock:
    """Time left, from the share of the budget that was used since the first update."""

    def __init__(self) -> None:
        self._start = 0.0
        self._first: float | None = None

    def text(self, fraction: float, numbers: dict[str, float]) -> str:
        if self._first is None:
            self._first, self._start = fraction, time.monotonic()
        parts = [f"{name} {value:.4g}" for name, value in numbers.items()]
        used = fraction - self._first
        if used > 0.0:
            left = (time.monotonic() - self._start) * max(1.0 - fraction, 0.0) / used
            parts.append(f"{_duration(left)} left")
        return "  ".join(parts)


class _Lines(Progress):
    """A line at most every few seconds, and one at the end: for files and batch systems."""

    def __init__(self, total: int | None, label: str) -> None:
        self._label = label
        self._total = total
        self._clock = _Clock()
        self._printed_at = float("-inf")
        self._pending = ""

    def __exit__(self, *_: object) -> None:
        if self._pending:
            self._print()

    def update(self, step: int, fraction: float, **numbers: float) -> None:
        done = f"{step}" if self._total is None else f"{step}/{self._total}"
        self._pending = f"{self._label} {done}  {self._clock.text(fraction, numbers)}"
        if time.monotonic() - self._printed_at >= LINE_SECONDS:
            self._print()

    def _print(self) -> None:
        print(self._pending, file=sys.stderr, flush=True)
        self._printed_at = time.monotonic()
        self._pending = ""


class _Bar(Progress):
    """One live line on a terminal."""

    def __init__(self, total: int | None, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._clock = _Clock()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        # Redirection off: the loop's own prints must reach stderr as they are.
        self._bar = RichProgress(
            *columns,
            console=Console(stderr=True),
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
        )
        self._task: Any = self._bar.add_task(label, total=total, text="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, step: int, fraction: float, **numbers: float) -> None:
        text = self._clock.text(fraction, numbers)
        self._bar.update(self._task, completed=step, text=text)


def progress(total: int | None, label: str, *, rank: int = 0) -> Progress:
    """Progress over ``total`` steps (None: unknown); silent on every rank but 0."""
    if rank != 0:
        return Progress()
    return _Bar(total, label) if sys.stderr.isatty() else _Lines(total, label)
