"""Meta-learning in PyTorch: the public names.

Names are imported when they are first used, so ``import esmeta`` costs milliseconds and loads
neither torch nor an optional package.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esmeta import kernels
    from esmeta.evaluator import PopulationEvaluator
    from esmeta.evolution.evotorch import evotorch_problem
    from esmeta.policy import make_policy, policy_names, unravel
    from esmeta.run.evaluate import load
    from esmeta.tasks import make_task, task_names
    from esmeta.tree import ravel
    from esmeta.types import Fitness

__version__ = "0.1.0"

# Without it the bits of a matrix product depend, on some processors, on where its rows lie in
# memory: the same member in another batch would get another fitness. It costs nothing, and counts
# from MKL's first call on.
os.environ.setdefault("MKL_CBWR", "AUTO")

__all__ = [
    "Fitness",
    "PopulationEvaluator",
    "__version__",
    "evotorch_problem",
    "kernels",
    "load",
    "make_policy",
    "make_task",
    "policy_names",
    "ravel",
    "task_names",
    "unravel",
]

_HOME = {
    "Fitness": "esmeta.types",
    "PopulationEvaluator": "esmeta.evaluator",
    "evotorch_problem": "esmeta.evolution.evotorch",
    "load": "esmeta.run.evaluate",
    "make_policy": "esmeta.policy",
    "make_task": "esmeta.tasks",
    "policy_names": "esmeta.policy",
    "ravel": "esmeta.tree",
    "task_names": "esmeta.tasks",
    "unravel": "esmeta.policy",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("esmeta.kernels")
    if name not in _HOME:
        raise AttributeError(f"module 'esmeta' has no attribute {name!r}; it has {__all__}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
