"""What to write where memory ran out."""

from __future__ import annotations

import math
import re
from typing import Any

from esmeta.errors import UserError
from esmeta.run.config import Config


def too_large(error: BaseException, config: Config, where: str) -> UserError:
    """The one line for a user whose run asked for more memory than there is.

    It names what the need grows with, and a size that would fit where both the memory that was
    asked for and what is free are known.
    """
    sizes = {"task.trials": config.trials}
    sizes |= _options("policy", config.policy.instance, ("neurons",))
    sizes |= _options("objective", config.objective.instance, ("agents",))
    sizes |= _options("optimizer", config.optimizer.instance, ("popsize", "minibatches"))
    said = ", ".join(f"{name} = {value}" for name, value in sizes.items())
    asked, free = _asked(str(error)), _free()
    words = f" ({asked / 1e9:.1f} GB more, {free / 1e9:.1f} GB free)" if asked and free else ""
    return UserError(
        f"out of memory at {where}{words} with {said}; write {_smaller(sizes, asked, free)}"
    )


def _options(section: str, options: Any, names: tuple[str, ...]) -> dict[str, int]:
    found = {f"{section}.{name}": getattr(options, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _smaller(sizes: dict[str, int], asked: float, free: float) -> str:
    # Half of what is free: what was asked for is seldom the last.
    times = 2 ** math.ceil(math.log2(max(2.0, 2 * asked / free))) if asked and free else 2
    others = [
        name for name in ("policy.neurons", "objective.agents", "task.trials") if name in sizes
    ]
    fewer = f"fewer {' or '.join(others)}"
    parts = sizes.get("optimizer.minibatches", sizes["task.trials"])
    if parts < sizes["task.trials"]:
        parts = min(parts * times, sizes["task.trials"])
        return f"for example optimizer.minibatches = {parts}, or {fewer}"
    if sizes.get("optimizer.popsize", 0) > 2:
        members = max(2, sizes["optimizer.popsize"] // times // 2 * 2)
        return f"for example optimizer.popsize = {members}, or {fewer}"
    return fewer


def _asked(text: str) -> float:
    """Bytes that an allocator could not give, by its message; 0 if it does not say."""
    found = re.search(r"tried to allocate (\d+) bytes", text)
    return float(found[1]) if found else 0.0


def _free() -> float:
    """Bytes of memory that this machine can still give; 0 if it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"MemAvailable:\s*(\d+) kB", file.read())
    except OSError:
        return 0.0
    return float(found[1]) * 1024 if found else 0.0
