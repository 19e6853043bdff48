"""What the benchmarks share: jobs on one or several ranks whose lines of JSON are collected."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esmeta.types import Fitness

ROOT = Path(__file__).resolve().parents[2]


def find_mpirun() -> str:
    """The mpirun beside python, else the one on PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise SystemExit("there is no mpirun: pip install mpich, or load a cluster's MPI")
    return found


def job(script: str, arguments: list[str], ranks: int = 1, timeout: float = 600) -> list[Any]:
    """Run ``script --child arguments``; the JSON lines that its ranks printed."""
    command = [sys.executable, str(Path(script).resolve()), "--child", *arguments]
    if ranks > 1:
        command = [find_mpirun(), "-n", str(ranks), *command]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        command,
        env={**os.environ, **single, "PYTHONPATH": path, "EVOTORCH_VERBOSE_LEVEL": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def timed(step: Callable[[], Any], count: int) -> Iterator[tuple[float, float, Any]]:
    """Wall seconds, CPU seconds of this process and the result of each of ``count`` calls."""
    for _ in range(count):
        wall, cpu = time.perf_counter(), time.process_time()
        result = step()
        yield time.perf_counter() - wall, time.process_time() - cpu, result


def middle(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


class Free:
    """An objective that costs next to nothing: the first parameter."""

    device = torch.device("cpu")

    def fitness(self, params: Any, step: int | Tensor) -> Fitness:
        """Returns float64 ``[P, 1]``."""
        returns = params[:, :1].double()
        return Fitness(returns, torch.ones(returns.shape, dtype=torch.int64))
