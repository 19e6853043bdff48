"""The bandit with environments that fail on one rank, as an environment variable says.

``ESMETA_TEST_ENV_FAULT=KIND:RANK:STEP``, where KIND is raise, hang, exit or kill and STEP counts
the calls of ``step`` of one environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Any

from faulty import hurry

from esmeta.envs import remote
from esmeta.tasks.bandit import BanditEnv
from esmeta.tasks.bandit import Task as Bandit

VARIABLE = "ESMETA_TEST_ENV_FAULT"


class FaultyEnv(BanditEnv):
    calls = 0

    def step(self, state: Any, action: Any) -> Any:
        kind, rank, step = os.environ.get(VARIABLE, "none:0:-1").split(":")
        self.calls += 1
        mine = os.environ.get("PMI_RANK", "0") == rank
        if self.calls == int(step) and kind == "hang" and not mine:
            hurry(remote)
        if self.calls == int(step) and mine:
            if kind == "raise":
                raise ArithmeticError("a world fell apart")
            if kind == "exit":
                sys.exit(0)
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            assert kind == "hang", kind
            while True:
                time.sleep(60)
        return super().step(state, action)


@dataclass(frozen=True)
class Task(Bandit):
    """The bandit, with the fault."""

    def make_env(self, device: Any) -> FaultyEnv:
        return FaultyEnv(self, device)
