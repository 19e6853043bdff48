"""The run directory: resolved configuration, metrics, checkpoints, theta, and how to go on.

    config.toml           every option, defaults written out
    metrics.jsonl         one line per logged step
    tensorboard/          the same numbers as events, if wanted
    checkpoint/           current.ckpt and previous.ckpt
    theta.safetensors     what was learned, written at the end
    run.json              versions, hardware, time, steps, hash of theta
    run.lock              who writes here, while a run does

A checkpoint is framed by a format version and a SHA-256, written beside the old one and renamed,
so that a kill at any moment leaves one that loads.
"""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from esmeta import older
from esmeta.errors import UserError
from esmeta.options import for_json
from esmeta.ranks.wire import decode, encode
from esmeta.run import config as configuration
from esmeta.run.config import Config
from esmeta.run.lock import NAME as LOCK
from esmeta.run.lock import RunLock
from esmeta.run.provenance import compare_simulators, environment, simulators
from esmeta.tree import theta_sha256
from esmeta.types import Params


@dataclass(frozen=True)
class Checkpoint:
    """Where a run was after ``step``: theta ``[1, ...]``, the caller's payload, seconds so far.

    ``simulators``: versions of those that made it, as far as it says.
    """

    step: int
    theta: Params
    payload: dict[str, Any]
    seconds: float
    digest: bytes
    config_toml: str
    simulators: dict[str, str | None] = field(default_factory=dict)


# --- reading and writing files -----------------------------------------------------------------


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_beside(path: Path, data: bytes) -> Path:
    """Write and sync a temporary file in the folder of ``path``."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _replace(path: Path, data: bytes) -> None:
    os.replace(_write_beside(path, data), path)
    _sync_folder(path.parent)


def _read_checkpoint(path: Path) -> Checkpoint:
    saved = older.checkpoint(decode(path.read_bytes()))
    return Checkpoint(**{name: saved[name] for name in Checkpoint.__dataclass_fields__})


def _newest(run_dir: Path) -> tuple[Checkpoint | None, str]:
    """The newest readable checkpoint and the name of its file."""
    folder = run_dir / "checkpoint"
    troubles = []
    for name in ("current.ckpt", "previous.ckpt"):
        try:
            checkpoint = _read_checkpoint(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError) as error:
            troubles.append(f"{folder / name}: {error}")
            continue
        if troubles:
            text = f"{troubles[0]}; going on from {name}, step {checkpoint.step}"
            print(f"esmeta: warning: {text}", file=sys.stderr)
        return checkpoint, name
    if troubles:
        raise UserError(
            f"no checkpoint can be read: {'; '.join(troubles)}; restore one of these files from a "
            "backup, or start again with another --out"
        )
    return None, ""


def load_checkpoint(run_dir: Path | str) -> Checkpoint | None:
    """The newest checkpoint that can be read; None if none was ever written."""
    return _newest(Path(run_dir))[0]


def save_theta(path: Path | str, params: Params, meta: Mapping[str, str]) -> None:
    """Write parameters ``[1, ...]`` and text about them as one safetensors file."""
    from safetensors.torch import save

    plain = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in params.items()}
    # The file sorts leaves by dtype and name; the flat vector and its hash need the tree's order.
    _replace(Path(path), save(plain, {**meta, "leaves": json.dumps(list(plain))}))


def load_theta(path: Path | str) -> tuple[Params, dict[str, str]]:
    """Parameters ``[1, ...]`` and their text from a file, or from a run directory."""
    from safetensors import SafetensorError, safe_open

    file = Path(path) / "theta.safetensors" if Path(path).is_dir() else Path(path)
    try:
        with safe_open(file, framework="pt") as opened:
            meta = dict(opened.metadata() or {})
            names = json.loads(meta.pop("leaves", "null")) or list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, meta
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; give the directory of a finished run") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read ({error}); give a run's theta.safetensors"
        ) from error


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """All lines of ``metrics.jsonl`` in order; a line cut off by a kill is left out."""
    return [older.metrics(line) for line in written_lines(run_dir)]


def written_lines(run_dir: Path | str) -> list[dict[str, Any]]:
    """:func:`read_metrics` in the words in which they were written."""
    records = []
    try:
        text = (Path(run_dir) / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


# --- writers ---------------------------------------------------------------------------------


def _check_finite(theta: Params, step: int) -> None:
    bad = [name for name, leaf in theta.items() if not bool(torch.isfinite(leaf).all())]
    if bad:
        raise UserError(
            f"theta is not finite after step {step} (in {', '.join(bad)}) and was not saved; the "
            "last checkpoint is good: start anew with a smaller optimizer.learning_rate"
        )


def _differences(ours: str, theirs: str) -> str:
    """The keys in which two resolved configurations differ, with both values."""
    flat = [
        {
            f"{section}.{key}": value
            for section, table in tomllib.loads(text).items()
            for key, value in table.items()
            if section != "budget" and key not in configuration.NOT_IN_DIGEST
        }
        for text in (ours, theirs)
    ]
    keys = [k for k in flat[0] | flat[1] if flat[0].get(k) != flat[1].get(k)]
    return "; ".join(f"{k} = {flat[1].get(k)!r} there, {flat[0].get(k)!r} here" for k in keys)


def _same_course(checkpoint: Checkpoint, config: Config) -> bool:
    """Whether a run was made with this configuration, as what it wrote is read today."""
    if checkpoint.digest == configuration.digest(config):
        return True
    try:
        made = configuration.resolve(configuration.parse(checkpoint.config_toml))
    except UserError:  # an option is no longer there
        return False
    return configuration.digest(made) == configuration.digest(config)


def unborn(path: Path | str) -> bool:
    """Whether a folder is empty but for what a kill leaves before ``config.toml`` is written."""
    path = Path(path)
    if not path.is_dir():
        return False
    leftovers = {"checkpoint", "config.toml.tmp"}
    found = {entry.name for entry in path.iterdir() if not entry.name.startswith(LOCK)}
    return found <= leftovers and not (
        (path / "checkpoint").exists() and any((path / "checkpoint").iterdir())
    )


def _check_place(path: Path, resume: bool) -> None:
    fresh = not path.exists() or unborn(path)
    if not resume and not fresh:
        raise UserError(f"{path} exists; pass --resume to go on, or another --out")
    if resume and not (path / "config.toml").exists() and not unborn(path):
        raise UserError(f"{path} is not a run to go on with; leave out --resume")


class RunDir:
    """Writer of one run directory, for rank 0. ``resumed`` is the checkpoint to go on from."""

    def __init__(
        self, path: Path, config: Config, resumed: Checkpoint | None, good: bool, lock: RunLock
    ) -> None:
        self.path = path
        self._lock = lock
        self.resumed = resumed
        self._config = config
        # Whether current.ckpt may become previous.ckpt: a damaged one must not.
        self._current_is_good = good
        self._start = time.monotonic() - (resumed.seconds if resumed else 0.0)
        self._metrics = open(path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._events = self._open_events() if config.run.tensorboard else None

    @classmethod
    def create(cls, path: Path | str, config: Config, *, resume: bool = False) -> RunDir:
        """A new run directory, or with ``resume`` an old one, cut back to its last checkpoint.

        It is locked until :meth:`close`: see :mod:`esmeta.run.lock`.
        """
        path = Path(path)
        try:
            _check_place(path, resume)  # also before: what is refused is not touched
            path.mkdir(parents=True, exist_ok=True)
            lock = RunLock(path)
            try:
                _check_place(path, resume)
                return cls._begin(path, config, resume, lock)
            except BaseException:
                lock.release()
                raise
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path} cannot be written ({reason}); give another --out") from error

    @classmethod
    def _begin(cls, path: Path, config: Config, resume: bool, lock: RunLock) -> RunDir:
        resumed, source = _newest(path) if resume else (None, "")
        if resumed and not _same_course(resumed, config):
            keys = _differences(configuration.to_toml(config), resumed.config_toml)
            raise UserError(
                f"{path} was made with another configuration: {keys}; pass the "
                "same values, or another --out"
            )
        if resumed:
            compare_simulators(resumed.simulators)
        (path / "checkpoint").mkdir(parents=True, exist_ok=True)
        _replace(path / "config.toml", configuration.to_toml(config).encode())
        last = resumed.step if resumed else -1
        kept = [json.dumps(r) + "\n" for r in written_lines(path) if r["step"] <= last]
        _replace(path / "metrics.jsonl", "".join(kept).encode())
        run = cls(path, config, resumed, source == "current.ckpt", lock)
        run._write_summary({"stopped_by": None, "steps": max(last, 0)})
        return run

    @property
    def seconds(self) -> float:
        """Wall time of this run so far, earlier parts included."""
        return time.monotonic() - self._start

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Append one line to the metrics, and the same numbers to the events."""
        plain = for_json(dict(numbers))
        with self._writing("metrics.jsonl"):
            self._metrics.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
            self._metrics.flush()
        if self._events is not None:
            with self._writing("tensorboard"):
                for name, value in plain.items():
                    if isinstance(value, int | float):
                        self._events.add_scalar(name, value, step)

    def save_checkpoint(self, step: int, theta: Params, payload: Mapping[str, Any]) -> None:
        """Write the state after ``step``; the checkpoint before it stays as ``previous.ckpt``."""
        _check_finite(theta, step)
        block = encode(
            {
                "step": step,
                "theta": theta,
                "payload": dict(payload),
                "seconds": self.seconds,
                "digest": configuration.digest(self._config),
                "config_toml": configuration.to_toml(self._config),
                "simulators": simulators(),
            }
        )
        current = self.path / "checkpoint" / "current.ckpt"
        with self._writing("checkpoint/current.ckpt"):
            temporary = _write_beside(current, block)
            if self._current_is_good:
                os.replace(current, current.with_name("previous.ckpt"))
            os.replace(temporary, current)
            _sync_folder(current.parent)
        self._current_is_good = True

    def save_best(self, step: int, theta: Params, score: float) -> None:
        """Write ``theta`` as the best so far, by mean return of validation."""
        _check_finite(theta, step)
        meta = {"theta_sha256": theta_sha256(theta), "step": str(step), "validation": repr(score)}
        with self._writing("best.safetensors"):
            save_theta(self.path / "best.safetensors", theta, meta)

    def finish(
        self,
        step: int,
        theta: Params,
        *,
        env_steps: int,
        ranks: int,
        stopped_by: str,
        restarts: int = 0,
        idle: Sequence[float] = (),
        memory: str = "",
    ) -> None:
        """Write theta and the summary of the whole run; :meth:`close` is still to be called.

        ``idle`` is the share of time that each rank waited for others, since it was started;
        ``memory`` says which code ran the memory.
        """
        _check_finite(theta, step)
        meta = {"theta_sha256": theta_sha256(theta), "step": str(step)}
        with self._writing("theta.safetensors"):
            save_theta(self.path / "theta.safetensors", theta, meta)
        facts = {"stopped_by": stopped_by, "steps": step, "env_steps": env_steps, "ranks": ranks}
        facts |= {
            "restarts": restarts,
            "memory": memory,
            "idle": [*idle],
            "theta_sha256": meta["theta_sha256"],
        }
        self._write_summary(facts)

    def add_scores(self, scores: Mapping[str, Any]) -> None:
        """Put what a finished run's theta is worth on the test split into the summary."""
        path = self.path / "run.json"
        with self._writing("run.json"):
            summary = json.loads(path.read_text(encoding="utf-8"))
            table = {**summary, "test": for_json(dict(scores))}
            _replace(path, (json.dumps(table, indent=2) + "\n").encode())

    def close(self) -> None:
        """Close all files and let go of the directory; also when the run fails, and once more."""
        try:
            with self._disk("metrics.jsonl"):
                self._metrics.close()
            with self._disk("tensorboard"):
                if self._events is not None:
                    self._events.close()
        finally:
            self._events = None
            self._lock.release()

    def _write_summary(self, facts: Mapping[str, Any]) -> None:
        run = self._config.run
        timing = {"seconds": round(self.seconds, 3), "threads": run.threads}
        text = json.dumps({**facts, **timing, **environment(run.device)}, indent=2) + "\n"
        with self._writing("run.json"):
            _replace(self.path / "run.json", text.encode())

    def _open_events(self) -> Any:
        try:
            # Slow to import, so only where it is wanted.
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            print(f"esmeta: warning: no TensorBoard events: {error}", file=sys.stderr)
            return None
        purge = self.resumed.step + 1 if self.resumed else None
        return SummaryWriter(str(self.path / "tensorboard"), purge_step=purge)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        with self._disk(name):
            self._lock.check()
            yield

    @contextmanager
    def _disk(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path / name} cannot be written ({error.strerror or error}); the last "
                "checkpoint is intact: make room, then go on with --resume"
            ) from error


class NullRun:
    """The run directory of every rank but 0: nothing is written."""

    path = None
    resumed: Checkpoint | None = None
    seconds = 0.0

    def log(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Nothing."""

    def save_checkpoint(self, step: int, theta: Params, payload: Mapping[str, Any]) -> None:
        """Nothing."""

    def save_best(self, step: int, theta: Params, score: float) -> None:
        """Nothing."""

    def finish(self, step: int, theta: Params, **facts: Any) -> None:
        """Nothing."""

    def add_scores(self, scores: Mapping[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""
