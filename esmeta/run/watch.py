"""What the outer loop keeps an eye on: signals, time limits, ranks that idle, growth of files."""

from __future__ import annotations

import signal
import statistics
import time
from collections import deque
from collections.abc import Callable

import torch

from esmeta.ranks.comm import MPIComm, SelfComm
from esmeta.run.terminal import wishes_to_stop
from esmeta.types import Metrics

START_S = 600.0
"""Limit (seconds) until the pace of a run is known: ranks start and compile at different times."""

_LEAST_S = 60.0
_TIMES_MEDIAN = 10.0
_FIRST_STEPS = 3
_WINDOW = 20


class Stop:
    """Turns SIGTERM, SIGUSR1 and SIGHUP into a wish to stop after the current step.

    Further signals change nothing: batch systems and launchers send the same one several times,
    and the second must not cost the checkpoint. Ctrl-C (SIGINT) ends a run at once. A run that was
    started to outlive its terminal (nohup) still does.
    """

    def __init__(self) -> None:
        self.noted = False
        self.others: Callable[[], bool] = lambda: False
        """Whether ranks that do not take steps were told to stop."""
        self._before = {n: signal.signal(n, self._note) for n in wishes_to_stop()}

    def end(self, *, leaving: bool) -> None:
        """Give signals back, or if the process is leaving, ignore them.

        Python's handlers are gone while a rank waits to leave MPI.
        """
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if leaving else handler)

    @property
    def wanted(self) -> bool:
        """Whether a signal came, here or to one of the ``others``."""
        return self.noted or self.others()

    def _note(self, *_: object) -> None:
        self.noted = True


class TimeLimit:
    """How long (seconds) a rank waits for the others before it ends the job.

    Args:
        fixed_s: the limit of all collectives; 0: 600 s for the first steps, then 60 s or ten times
            the median of the last 20 steps, whichever is more.
    """

    def __init__(self, fixed_s: float = 0.0) -> None:
        self._fixed = fixed_s
        self._recent: deque[float] = deque(maxlen=_WINDOW)

    def note(self, step_s: float) -> None:
        """Take the duration of a step into account."""
        self._recent.append(step_s)

    def in_step(self) -> float:
        """The limit inside a step of the optimizer."""
        if self._fixed > 0.0:
            return self._fixed
        if len(self._recent) < _FIRST_STEPS:
            return START_S
        return max(_LEAST_S, _TIMES_MEDIAN * statistics.median(self._recent))

    def between_steps(self) -> float:
        """The limit where rank 0 alone scores held-out tasks and writes files, perhaps slowly."""
        return self._fixed if self._fixed > 0.0 else max(START_S, self.in_step())


class Pace:
    """Lets through ``per_second`` on average, and the first thousand however fast they come.

    Small tasks make hundreds of steps a second, and a line of metrics of each, a kilobyte, would
    fill disks. ``per_second`` 0 lets all through.
    """

    BURST = 1000.0

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._clock = per_second, clock
        self._left, self._last = self.BURST, clock()

    def lets(self) -> bool:
        """Whether there is room for one more now, which it then takes."""
        if not self._per_second:
            return True
        now = self._clock()
        self._left = min(self.BURST, self._left + (now - self._last) * self._per_second)
        self._last = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class Idle:
    """The share of time that each rank waits for others, from 0 to 1.

    All time counts, also what the ranks wait while rank 0 scores held-out tasks and writes files.
    """

    def __init__(self, comm: SelfComm | MPIComm) -> None:
        self._comm = comm
        self._first = self._last = self._now()

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), self._comm.waited_s

    def _gather(self, since: tuple[float, float]) -> torch.Tensor:
        now = self._now()
        share = (now[1] - since[1]) / max(now[0] - since[0], 1e-9)
        self._last = now
        own = torch.tensor([[share]], dtype=torch.float64, device="cpu")
        return self._comm.gather_rows(own, [1] * self._comm.size).flatten()

    def metrics(self) -> Metrics:
        """Mean and largest share over the ranks since the last call; all ranks must call it."""
        shares = self._gather(self._last)
        return {"idle_mean": float(shares.mean()), "idle_max": float(shares.max())}

    def by_rank(self) -> list[float]:
        """The share of every rank since the start; all ranks must call it."""
        return [round(share, 4) for share in self._gather(self._first).tolist()]
