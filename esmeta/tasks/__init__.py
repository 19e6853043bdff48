"""Tasks by name, and the checks that their options share.

A task is one module that defines a frozen dataclass ``Task`` (see ``tasks/README.md``). In a
checkout the modules lie in the folder ``tasks/`` at the top; in a wheel they lie beside this file.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from esmeta import names
from esmeta.errors import UserError
from esmeta.names import SPLITS
from esmeta.options import plain
from esmeta.types import TimeStep

if TYPE_CHECKING:
    from esmeta.types import Task

_CHECKOUT = Path(__file__).resolve().parents[2] / "tasks"
# Only our own folder: in site-packages the same relative path could be anybody's.
if (_CHECKOUT / "harlow.py").is_file() and str(_CHECKOUT) not in __path__:
    __path__.append(str(_CHECKOUT))


@runtime_checkable
class Drawn(Protocol):
    """A task that says how its states are drawn; others have a function ``render`` beside them."""

    def renderer(self) -> Callable[..., Any]:
        """A function ``(state, p, b, scale)`` to pictures uint8 ``[H, W, 3]``."""
        ...

    def frame_rate(self) -> float:
        """Steps per second of real time."""
        ...


@runtime_checkable
class Renewed(Protocol):
    """A task whose trials may be of so many steps, in however many episodes that makes."""

    def single(self, steps: int) -> Task:
        """The same tasks in trials of one episode of at most ``steps`` steps.

        A task whose trials have a number of episodes returns itself.
        """
        ...


@runtime_checkable
class Published(Protocol):
    """A task that is made of others; those say which of their options are aids (:func:`aid`)."""

    def aids(self) -> dict[str, tuple[Any, Any]]:
        """See :func:`aids`."""
        ...

    def published(self) -> Task:
        """The same tasks as published."""
        ...


T = TypeVar("T")
_AID = "esmeta.aid"
_REMARK = "esmeta.remark"


def aid(default: T, *, published: T | None = None, only: T | None = None) -> T:
    """A field of a task that is a training aid: scores are of the task without it.

    ``default`` is that of the field, ``published`` its value in the published task (the same, if
    not given). Every other value is an aid, or if ``only`` is given, that one alone.
    """
    known = (default if published is None else published, only)
    return dataclasses.field(default=default, metadata={_AID: known})


def aids(options: Any) -> dict[str, tuple[Any, Any]]:  # noqa: ANN401 - any dataclass
    """Which training aids are in use: field -> its value, and the published one."""
    if isinstance(options, Published):
        return options.aids()
    found = {}
    for field in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
        if _AID in field.metadata:
            published, only = field.metadata[_AID]
            value = getattr(options, field.name)
            if value != published and only in (None, value):
                found[field.name] = (value, published)
    return found


def remarked(default: T, words: str) -> T:
    """A field of an objective that is no aid, but that scores tell of where it is in use."""
    return dataclasses.field(default=default, metadata={_REMARK: words})


def remarks(options: Any) -> list[str]:  # noqa: ANN401 - any dataclass
    """What scores tell of: fields that are :func:`remarked`, with their values and words."""
    fields = [field for field in dataclasses.fields(options) if _REMARK in field.metadata]
    values = [(field, getattr(options, field.name)) for field in fields]
    return [f"{field.name} = {value!r} {field.metadata[_REMARK]}" for field, value in values
            if value != field.default]  # fmt: skip


def published(options: T, keep: Collection[str] = ()) -> T:
    """A task, or an objective's options, without training aids but for those named in ``keep``.

    Itself if there is none to leave out.
    """
    if isinstance(options, Published):
        return cast("T", options.published())
    changes = {k: value for k, (_, value) in aids(options).items() if k not in keep}
    return cast("T", dataclasses.replace(cast("Any", options), **changes)) if changes else options


@runtime_checkable
class Grouped(Protocol):
    """A task that says which of its trials share randomness; see :func:`task_groups`."""

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Numbers int64 ``[B]``, the same for trials among ``index [B]`` that share randomness."""
        ...


def task_groups(task: Task, index: Tensor, split: str) -> Tensor:
    """Numbers int64 ``[B]`` of the trials ``index``, the same for those that share randomness.

    With an option ``mirrored``, which in all tasks makes twins of 2k and 2k + 1, those are k.
    """
    if isinstance(task, Grouped):
        return task.groups(index, split)
    return index // 2 if getattr(task, "mirrored", False) else index


def single(task: Task, steps: int) -> Task:
    """For one episode of each trial: what comes after it need not be lived (:class:`Renewed`)."""
    return task.single(steps) if isinstance(task, Renewed) else task


def task_names() -> list[str]:
    """Names of the tasks that ship with esmeta, sorted: the modules of the folder."""
    return names.known("task")


def make_task(name: str, **options: object) -> Task:
    """Build the task ``name`` with ``options``, the fields of its ``Task`` dataclass.

    A hyphen in ``name`` counts as an underscore. ``"package.module:Name"`` loads a class from
    outside esmeta. A wrong name, option or value raises ``ValueError``.
    """
    return names.make("task", name, options)


def renderer(task: Task) -> Callable[..., Any] | None:
    """The function ``(state, p, b, scale)`` that draws a task's states, uint8 ``[H, W, 3]``.

    That of the task (:class:`Drawn`), or ``render`` beside its class; None without.
    """
    if isinstance(task, Drawn):
        return task.renderer()
    return getattr(importlib.import_module(type(task).__module__), "render", None)


def check_int(option: str, value: object, low: int, high: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a whole number in ``low..high``."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        cure = low
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            cure = int(min(max(value, low), high))
        raise ValueError(
            f"{option} is {value!r}; it must be a whole number from {low} to {high}: "
            f"write {option}={cure}"
        )


def check_span(option: str, value: Any, usual: tuple[float, float]) -> None:
    """Raise ``ValueError`` unless ``value`` is a lowest and a highest number above 0."""
    good = len(value) == 2 and all(math.isfinite(number) and number > 0 for number in value)
    if not good or value[0] > value[1]:
        raise ValueError(
            f"{option} is {value!r}; it must be the lowest and the highest value, both above 0: "
            f"write {option}={usual}"
        )


def episode_steps(horizon: int, episodes: int) -> int:
    """Steps of each of the ``episodes`` that share the ``horizon`` of a trial evenly."""
    check_int("episodes", episodes, 1, 1000)
    check_int("horizon", horizon, 1, 10_000_000)
    if horizon % episodes:
        raise ValueError(
            f"horizon is {horizon} (steps per trial), which {episodes} episodes cannot share "
            f"evenly: write horizon={episodes * max(1, horizon // episodes)}"
        )
    return horizon // episodes


def check_split(split: str) -> None:
    """Raise ``ValueError`` unless ``split`` is one of the three task sets."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; write 'train', 'validation' or 'test'")


def numbers_of(index: Any) -> Tensor:  # noqa: ANN401 - whatever holds whole numbers
    """Numbers of tasks as an int64 tensor, from a tensor, an array of numpy's or a list."""
    if isinstance(index, Tensor):
        return index
    array = np.asarray(plain(index))
    if array.dtype.kind != "i":
        raise UserError(
            f"index is {str(index)[:100]}; it must hold whole numbers, for example "
            "index=torch.arange(16)"
        )
    return torch.from_numpy(array.astype(np.int64))


def task_numbers(batch: int | Tensor) -> Tensor:
    """The numbers of the tasks asked for, int64 ``[1, B]``, on the device of ``batch``."""
    batch = batch if isinstance(batch, Tensor) else plain(batch)
    if isinstance(batch, list | tuple):
        batch = numbers_of(batch)
    if isinstance(batch, Tensor):
        if batch.dim() != 1 or batch.dtype != torch.int64 or batch.numel() == 0:
            raise ValueError(
                f"task numbers are {batch.dtype} of shape {list(batch.shape)}; they must be a "
                f"non-empty int64 tensor [B]: write torch.arange(first, last)"
            )
        return batch.unsqueeze(0)
    check_int("batch", batch, 1, 2**40)
    return torch.arange(batch, dtype=torch.int64, device="cpu").unsqueeze(0)


def timed_step(
    obs: Tensor, action: Tensor, reward: Tensor, time: Tensor, horizon: int, episode_steps: int
) -> TimeStep:
    """What all trials show after step ``time`` (int64 ``[]``) where nothing but time ends them.

    Each is truncated by its ``horizon``, and begins an episode anew every ``episode_steps``.
    """
    over = (time >= horizon).expand(reward.shape)
    return TimeStep(
        obs=obs,
        prev_action=action,
        reward=reward,
        terminated=torch.zeros_like(over),
        truncated=(time == horizon).expand(reward.shape),
        new_episode=over | (time % episode_steps == 0),
        new_trial=over,
    )
