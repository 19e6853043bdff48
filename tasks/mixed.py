"""Several tasks as one: a distribution over environments of different sizes.

Multi-environment training as in MetaGenRL (Kirsch, van Steenkiste & Schmidhuber, ICLR 2020,
https://arxiv.org/abs/1910.04098), whose EPG and RL2 baselines are meta-trained on two environments
at once: observations and actions are padded with zeros to the widest. What differs: which
environment a trial is in is not drawn; trials take turns, so that every batch is balanced.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta import names
from esmeta.envs import mixed
from esmeta.errors import UserError, finite_positive
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import (
    aids,
    check_int,
    check_split,
    published,
    single,
    task_groups,
    task_numbers,
)
from esmeta.types import Continuous, Hosted, Reference, Spec, Tasks
from esmeta.types import Task as AnyTask

Table = dict[str, Any]
_OWN = {"label", "factor"}
_EXAMPLE = '[{name = "half_cheetah"}, {name = "hopper"}]'


class _Part(NamedTuple):
    label: str
    task: AnyTask
    factor: float


@options_class
class Task:
    """Trial number k is of part k mod n, and is the part's own trial number k div n.

    So any multiple of n trials is balanced. Parts have continuous actions; the first numbers of an
    observation are its part's own and the others zero, the first numbers of an action are read.
    The return of a trial is the sum of scaled rewards; metrics ``return_LABEL`` are not scaled.

    Args:
        parts: tables of a task's name and options; two more keys are the mixture's: ``label``, in
            the names of metrics (default: the name), and ``factor``, on the part's rewards (1).
        test_parts: what the split ``test`` is of; empty: the same. The validation split is of
            ``parts``, whose tasks of that split are others than those of training.
        horizon: steps of a trial at most, of every part.
        obs_size: width of observations; 0: of the widest part, training or test.
        action_size: width of actions; 0: the same.
    """

    parts: tuple[Table, ...] = ({"name": "half_cheetah"}, {"name": "hopper"})
    test_parts: tuple[Table, ...] = ()
    horizon: int = 1000
    obs_size: int = 0
    action_size: int = 0

    def __post_init__(self) -> None:
        check_int("horizon", self.horizon, 1, 10_000_000)
        for option in ("parts", "test_parts"):
            tables = getattr(self, option)
            if not all(isinstance(table, dict) for table in tables) or not self.parts:
                raise UserError(
                    f"{option} is {tables!r}; it must be tables of a name and options, at least "
                    f"one for training: write {option} = {_EXAMPLE}"
                )
        for one, other in itertools.combinations(self._all, 2):
            if one.label == other.label:
                raise UserError(
                    f"parts: two are called {one.label!r}, and metrics would be too; give one of "
                    f'them a label: write {{name = "...", label = "{one.label}_2"}}'
                )
        for option, widest in (("obs_size", self._widest[0]), ("action_size", self._widest[1])):
            given = getattr(self, option)
            check_int(option, given, 0, 1_000_000)
            if 0 < given < widest:
                raise UserError(
                    f"{option} is {given}, but the widest part has {widest}: write {option} = "
                    f"{widest}, or 0 to have it chosen"
                )

    @property
    def _tables(self) -> list[Table]:
        """Of all different parts: those of training, then those of test alone."""
        tables = [*self.parts, *self.test_parts]
        return [table for k, table in enumerate(tables) if table not in tables[:k]]

    @functools.cached_property
    def _all(self) -> tuple[_Part, ...]:
        return tuple(_make(table, self.horizon) for table in self._tables)

    def _numbers(self, split: str) -> list[int]:
        """Which of all parts a split is of, in order."""
        chosen = self.test_parts if split == "test" and self.test_parts else self.parts
        return [self._tables.index(table) for table in chosen]

    @property
    def _widest(self) -> tuple[int, int]:
        specs = [part.task.spec for part in self._all]
        return max(s.obs_size for s in specs), max(s.action.size for s in specs)

    @property
    def spec(self) -> Spec:
        """The widest observation and action; as many episodes as the part with fewest has."""
        specs = [part.task.spec for part in self._all]
        bounds = [s.action for s in specs if isinstance(s.action, Continuous)]
        low, high = min(b.low for b in bounds), max(b.high for b in bounds)
        obs_size, action_size = self._widest
        action = Continuous(self.action_size or action_size, low, high)
        episodes = min(s.episodes_per_trial for s in specs)
        return Spec(self.obs_size or obs_size, action, self.horizon, episodes)

    @property
    def reference(self) -> Reference:
        """Means over the held-out parts, scaled as their rewards."""
        parts = [self._all[number] for number in self._numbers("test")]
        # A part that stays as it is in `single` has longer trials.
        known = [
            (part.factor * self.horizon / part.task.spec.horizon, part.task.reference)
            for part in parts
        ]
        return Reference(
            sum(factor * one.random for factor, one in known) / len(known),
            sum(factor * one.best for factor, one in known) / len(known),
            "mean of " + ", ".join(part.label for part in parts) + ", rewards scaled",
        )

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Trials of two parts share nothing; see :func:`esmeta.tasks.task_groups`."""
        chosen = self._numbers(split)
        count = len(chosen)
        own = [task_groups(self._all[k].task, index // count, split) for k in chosen]
        part = index % count
        return torch.stack(own).gather(0, part.unsqueeze(0))[0] * count + part

    def aids(self) -> dict[str, tuple[Any, Any]]:
        """Training aids in use, by ``label.option``; see :func:`esmeta.tasks.aids`."""
        return {f"{p.label}.{k}": v for p in self._all for k, v in aids(p.task).items()}

    def published(self) -> Task:
        """The same with every part as published, in its table too: by those mixtures are equal."""
        found = tuple(part._replace(task=published(part.task)) for part in self._all)
        tables = [
            {**table, **_changes(old.task, new.task)}
            for table, old, new in zip(self._tables, self._all, found, strict=True)
        ]
        told = {
            option: tuple(tables[self._tables.index(table)] for table in getattr(self, option))
            for option in ("parts", "test_parts")
        }
        return self._with(found, **told)

    def single(self, steps: int) -> Task:
        """The same tasks in trials of one episode of at most ``steps`` steps, where parts can.

        Parts whose trials have a number of episodes stay as they are.
        """
        parts = tuple(part._replace(task=single(part.task, steps)) for part in self._all)
        return self._with(parts, horizon=steps)

    def _with(self, found: tuple[_Part, ...], **changes: Any) -> Task:
        if found == self._all:
            return self
        one = copy.copy(self)
        # Tables do not say how parts were made single.
        vars(one).update(changes, _all=found)
        return one

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number. Data: ``part`` int64 ``[1, B]``; ``"k.name"`` is what part k needs.

        Every part's data are there for every trial, so that batches have one form; those of
        other parts are not used.
        """
        check_split(split)
        index = task_numbers(batch)
        chosen = torch.tensor(self._numbers(split), dtype=torch.int64, device=index.device)
        data = {"part": chosen[index % len(chosen)]}
        for number, part in enumerate(self._all):
            own = part.task.sample(index[0] // len(chosen), split, rng.fold("part", number))
            data |= {f"{number}.{name}": leaf for name, leaf in own.data.items()}
        return Tasks(index, data)

    def make_env(self, device: torch.device | str) -> mixed.MixedEnv:
        """One environment per part; time steps are on ``device``."""
        spec = self.spec
        parts = tuple(
            mixed.Part(
                label, task.make_env(device), task.spec.obs_size, task.spec.action.size, factor
            )
            for label, task, factor in self._all
        )
        hosted = any(isinstance(part.env, Hosted) for part in parts)
        kind = mixed.HostedMixedEnv if hosted else mixed.MixedEnv
        return kind(parts, spec.obs_size, spec.action.size)


def _changes(old: Any, new: Any) -> Table:
    """The options in which two tasks of one kind differ, with the values of ``new``."""
    names = [field.name for field in dataclasses.fields(new) if field.init]
    return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}


def _make(table: Table, horizon: int) -> _Part:
    """A part of trials of ``horizon`` steps, or an error that names its table."""
    if "horizon" in table:
        raise UserError(
            f"parts: {table!r} has a horizon; trials of all parts have one: write it once, as "
            f"horizon = {table['horizon']!r} of the task itself"
        )
    label, factor = table.get("label", table.get("name")), table.get("factor", 1.0)
    finite_positive(f"parts: {table!r}: factor", factor, example=1.0)
    options = {key: value for key, value in table.items() if key not in _OWN}
    task = names.from_table("task", {**options, "horizon": horizon}, "parts", _EXAMPLE)
    label = label.replace("-", "_") if isinstance(label, str) else ""
    if not label.isidentifier():
        raise UserError(
            f"parts: {table!r} has the label {label!r}, which goes into the names of metrics; "
            'write a word: label = "mine"'
        )
    if not isinstance(task.spec.action, Continuous):
        raise UserError(
            f"parts: {label!r} has {task.spec.action.size} discrete actions; parts of a mixture "
            f"must have continuous ones: write for example parts = {_EXAMPLE}"
        )
    if task.spec.horizon != horizon:
        raise UserError(
            f"parts: trials of {label!r} have {task.spec.horizon} steps instead of horizon = "
            f"{horizon}; trials of all parts have one horizon: write horizon = {task.spec.horizon}"
        )
    return _Part(label, task, float(factor))
