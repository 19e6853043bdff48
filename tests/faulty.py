"""An objective that fails on one rank at one generation, as an environment variable says.

``ESMETA_TEST_FAULT=KIND:RANK:GENERATION[:FILE]``, where KIND is raise, hang, exit or kill. With
FILE, which is created by it, the failure happens once only. The variable is no part of the
configuration, so that a run can go on without it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esmeta.objectives.return_ import ReturnObjective
from esmeta.policy import Policy
from esmeta.ranks import comm
from esmeta.types import Fitness, Params, Reference, Task

_raised: set[int] = set()
VARIABLE = "ESMETA_TEST_FAULT"
KINDS = ("raise", "hang", "exit", "kill")


def fail_if_due(step: int) -> None:
    kind, rank, generation, *once = os.environ.get(VARIABLE, "none:0:-1").split(":")
    if step != int(generation):
        return
    if os.environ.get("PMI_RANK", "0") != rank:
        if kind == "hang":
            hurry(comm)
        return
    if once and step not in _raised:
        if Path(once[0]).exists():
            return
        Path(once[0]).touch()
    if kind == "raise":
        # Also when the members are evaluated one by one: otherwise nothing has failed.
        _raised.add(step)
        raise RuntimeError("a fault for the test")
    if kind == "exit":
        sys.exit(0)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    assert kind == "hang", kind
    while True:
        time.sleep(60)


def hurry(module: Any) -> None:
    """Let this process wait a hundredth of its limits from now on.

    For whoever waits for one that hangs: limits that are short from the start would end runs on a
    machine that is slow.
    """
    plain = module.poll
    module.poll = lambda ready, seconds, *more, **names: plain(ready, seconds / 100, *more, **names)


class FaultyReturn(ReturnObjective):
    def fitness(self, params: Params | Tensor, step: int) -> Fitness:
        fail_if_due(step)
        return super().fitness(params, step)


@dataclass(frozen=True)
class Objective:
    """``return``, with the fault."""

    def reference(self, task: Task) -> Reference:
        return task.reference

    def make(
        self, policy: Policy, task: Task, *, trials: int, seed: int, device: str | torch.device
    ) -> FaultyReturn:
        return FaultyReturn(policy, task, trials=trials, seed=seed, device=device)
