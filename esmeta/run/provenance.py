"""Where results come from: versions, commit, hardware and command of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SIMULATORS = ("mujoco", "mujoco_warp")


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "--verify", "--quiet", "HEAD")
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if dirty else "") if commit else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _without_folders(argument: str) -> str:
    """Paths shortened to their last part: run.json is made to be shown to others."""
    head, equals, tail = argument.rpartition("=")
    return f"{head}{equals}{Path(tail).name}" if os.path.isabs(tail) else argument


def simulators() -> dict[str, str | None]:
    """Versions of the simulators in use: another version may be other physics."""
    return {name: _version(name) for name in SIMULATORS if name in sys.modules}


def compare_simulators(theirs: Mapping[str, str | None]) -> None:
    """Warn where a run goes on with another simulator than it was made with."""
    for name, version in simulators().items():
        before = theirs.get(name, version)
        if before != version:
            print(
                f"esmeta: warning: the checkpoint was made with {name} {before}, this is "
                f"{version}; numbers may differ from here on",
                file=sys.stderr,
            )


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware, without the names of machines, people or folders."""
    packages = ["torch", "numpy", "esmeta", *(["evotorch"] if "evotorch" in sys.modules else [])]
    packages += simulators()
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "commit": _git_commit(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "command": [_without_folders(argument) for argument in sys.argv[1:]],
    }
