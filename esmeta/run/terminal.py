"""Standard streams that cannot end a run: what they cannot show is spelled, who left is not missed.

* A letter that the encoding does not have is written otherwise: ``+-`` for plus-minus, else ``?``.
* A reader that is gone (``| head``, a terminal that was closed) changes nothing: the rest goes
  nowhere, the work is done to its end, and the exit code is what it would have been.
* Streams that were closed by whoever started this (``>&-``) are opened on nothing, before a file of
  ours gets their number and what is printed.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
from typing import Any, TextIO

_SPELLED = {"\u00b1": "+-", "\u2026": "...", "\u2013": "-", "\u2014": "-"}
# A pipe without a reader; a terminal that is gone.
_GONE = {errno.EPIPE, errno.EIO}


class _Output(io.FileIO):
    """A file descriptor whose reader may leave."""

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(memoryview(data).cast("B"))


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    return "".join(_SPELLED.get(letter, "?") for letter in letters), error.end


def prepare_streams() -> None:
    """Make stdout and stderr of this process such streams; to be called first of all.

    Streams that stand for something else, as in tests and notebooks, are left as they are.
    """
    codecs.register_error("esmeta", _spell)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
    sys.stdout = _patient(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _patient(sys.stderr, sys.__stderr__, 2)


def _patient(stream: TextIO | None, first: TextIO | None, number: int) -> TextIO:
    if stream is not first or (stream is not None and not isinstance(stream, io.TextIOWrapper)):
        assert stream is not None
        return stream
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(number, "wb", closefd=False)),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="esmeta",
        line_buffering=number == 2 or (stream is not None and stream.line_buffering),
        write_through=stream is not None and stream.write_through,
    )


def wishes_to_stop() -> list[signal.Signals]:
    """The signals that ask a run to save and leave; SIGHUP not where nohup has had it ignored."""
    numbers = [signal.SIGTERM, signal.SIGUSR1]
    heard = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [*numbers, signal.SIGHUP] if heard else numbers
