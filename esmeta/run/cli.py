"""The command line of a training run: read by ``esmeta.train``, repeated by ``esmeta.launch``.

Nothing here imports torch: ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from esmeta import errors
from esmeta.ranks.launched import speaks
from esmeta.run import config as configs
from esmeta.run.terminal import wishes_to_stop

_LAUNCH = "python -m esmeta.launch -n RANKS --max-restarts K -- PRESET ..."


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong (under mpirun once, not on every rank) and leave."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown and unknown[1].startswith("--max-restarts"):
            message = f"--max-restarts is an option of esmeta.launch; write: {_LAUNCH}"
        elif unknown and unknown[1].startswith("-"):
            flag = unknown[1].partition("=")[0]
            words = (word for word in self._option_string_actions if word.startswith("--"))
            message = f"{flag} is not an option{errors.nearest(flag, words)}; see --help"
        elif unknown:
            message = f"{unknown[1]!r} is one argument too many; see --help"
        raise SystemExit(refuse(message))


def refuse(message: str) -> int:
    """Say once, whatever the number of ranks, what is wrong; returns the exit code."""
    if speaks(os.environ):
        print(f"esmeta: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return 2


def parser() -> argparse.ArgumentParser:
    """The command line; a test freezes its flags."""
    p = Parser(
        prog="python -m esmeta.train",
        description="Meta-train a policy: evolution or policy gradients, one process or mpirun.",
        epilog="Presets are listed by --list. A run's files go to runs/out/ unless --out is given.",
    )
    p.add_argument("preset", nargs="?", help="preset name or TOML file (harlow-ppo)")
    p.add_argument("--task", help="task distribution, or package.module:Class of your own")
    p.add_argument(
        "--optimizer",
        help="openes nres pes pgpe snes sepcma, EvoTorch's evotorch_pgpe evotorch_snes cem xnes "
        "cmaes, a2c ppo, adam, or package.module:Class",
    )
    p.add_argument(
        "--objective",
        help="what theta is worth: return, epg, metagenrl, or package.module:Class",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one key, e.g. optimizer.popsize=128; may be repeated",
    )
    p.add_argument("--seed", type=int, help="seed of everything random (default: the preset's, 0)")
    p.add_argument("--out", type=Path, help="run directory (runs/out/<preset>-<seed>-<time>)")
    p.add_argument("--device", help="cpu (default), cuda, cuda:N")
    p.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="RUN",
        help="go on with this run directory (or the one of --out), on any number of ranks",
    )
    p.add_argument("--list", action="store_true", help="list presets and exit")
    return p


def overrides(args: argparse.Namespace) -> list[str]:
    """All that the flags change in the preset, as ``section.key=value``."""
    flags = (
        ("task.name", args.task),
        ("optimizer.name", args.optimizer),
        ("objective.name", args.objective),
        ("run.seed", args.seed),
        ("run.device", args.device),
    )
    return [*(f"{key}={value}" for key, value in flags if value is not None), *args.set]


def run_folder(args: argparse.Namespace) -> tuple[Path | None, str, bool]:
    """The run directory if one is named, the preset or file to read, and whether to go on."""
    resume = args.resume is not None
    folder: Path | None = args.resume if resume and args.resume != Path() else args.out
    if resume and folder is None:
        raise errors.UserError("--resume needs a run directory; write --resume RUN")
    source = args.preset or (str(folder / "config.toml") if resume and folder else "harlow-ppo")
    return folder, source, resume


def new_folder(source: str, seed: int) -> Path:
    """Where a run goes that was not told where: ``runs/out/<preset>-<seed>-<time>``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / "out" / f"{Path(source).stem}-{seed}-{stamp}"


def configuration(args: argparse.Namespace) -> tuple[configs.Config, Path, bool]:
    """The resolved config, the run directory, and whether it is to be gone on with."""
    folder, source, resume = run_folder(args)
    config = configs.resolve(configs.load(source), overrides(args))
    return config, folder or new_folder(source, config.run.seed), resume


def prepare_process() -> None:
    """What must be set before numpy and torch start their thread pools."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, a quarter of the time of a rollout on a CPU.

    Else the fast weights of every step are given back to the system, and the next step faults each
    of their pages in again; so do tensors of any size of an update, for which no threshold is high
    enough (glibc takes none above 32 MiB). Other C libraries are left as they are.
    """
    trim_threshold, most_mmaps = -1, -4
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(most_mmaps, 0)
        libc.mallopt(trim_threshold, 256 << 20)


def close_simulators() -> None:
    """Close what was opened of Gymnasium's environments; nothing where none was ever used."""
    worlds = sys.modules.get("esmeta.envs.simulators")
    if worlds is not None:
        worlds.close_all()


@contextlib.contextmanager
def simulators_closed() -> Iterator[None]:
    """Close simulators at the end, also one by SIGTERM or SIGHUP, which are ``SystemExit`` here."""
    here = threading.current_thread() is threading.main_thread()
    ends = [n for n in wishes_to_stop() if here and n != signal.SIGUSR1]
    before = {number: signal.signal(number, _leave) for number in ends}
    try:
        yield
    finally:
        close_simulators()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def guarded(command: Callable[[], int], folder: Path | None = None) -> int:
    """The exit code of a command: its own, or 2 after the one line of a ``UserError``.

    What an environment raised is kept in ``folder`` (:func:`esmeta.errors.keep_traceback`).
    """
    try:
        with simulators_closed():
            return command()
    except errors.UserError as error:
        errors.keep_traceback(error, folder)
        print(f"esmeta: error: {error}", file=sys.stderr)
        return 2
