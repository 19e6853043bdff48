"""MuJoCo on the CPU, in float64: many worlds of one model, by ``mujoco.batch`` or row by row.

A world is a row of MuJoCo's integration state and nothing else. A step loads the row into one of a
few ``MjData`` (one per thread), which stay in the cache, and writes it back; both engines give the
bits of one ``MjData`` per world.

An engine has ``rows`` float64 ``[N, S]``, the states, to be read and written between calls, and
``outputs``, arrays ``[N, ...]`` by the names of derived fields, which every call renews for the
worlds it touches. After a step they are one substep behind the state, as in ``MjData``. ``vary``
gives worlds their own values of the model's arrays, ``[N, ...]``; ``step`` advances worlds (sorted
numbers; None: all) and returns those MuJoCo gave up on; ``forward`` computes all that follows from
their rows, as after a reset.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmeta.envs import mujoco_model as models
from esmeta.envs._mujoco_state import HUGE, Going, views_of
from esmeta.envs.bodies import Data, Snapshot
from esmeta.envs.mujoco_model import import_mujoco


class _Views(NamedTuple):
    """A simulator's memory as ``[P, B, ...]``."""

    rows: Tensor
    control: Tensor
    snapshot: Snapshot


class CpuWorlds:
    """The worlds of :class:`esmeta.envs.mujoco.MujocoEnv` on the CPU: torch views of an engine."""

    def __init__(self, model: Any, engine: BatchEngine | RowsEngine, substeps: int) -> None:
        mujoco = import_mujoco()
        part = mujoco.mjtState
        self._model, self._engine, self._substeps = model, engine, substeps
        self._rows = torch.from_numpy(engine.rows)
        qpos, qvel, ctrl = (
            models.slice_of(model, component)
            for component in (part.mjSTATE_QPOS, part.mjSTATE_QVEL, part.mjSTATE_CTRL)
        )
        self._qpos, self._qvel, self._ctrl = (self._rows[:, each] for each in (qpos, qvel, ctrl))
        assert qpos.stop == qvel.start, (qpos, qvel)
        self._motion = engine.rows[:, qpos.start : qvel.stop]
        self._flat = engine.rows.reshape(-1)
        assert np.shares_memory(self._flat, engine.rows)
        blank = np.empty(self._rows.shape[1])
        mujoco.mj_getState(model, mujoco.MjData(model), blank, part.mjSTATE_INTEGRATION)
        self._blank = torch.from_numpy(blank)
        self._outputs = {name: torch.from_numpy(a) for name, a in engine.outputs.items()}
        self.changes: Data | None = None
        self._held: Tensor | None = None
        self._views: dict[torch.Size, _Views] = {}

    def load(self, rows: Tensor) -> None:
        if rows is not self._held:
            self._seen(rows.shape[:2]).rows.copy_(rows)
        self._held = None

    def saved(self, shape: torch.Size) -> Tensor:
        self._held = self._seen(shape).rows.clone()
        return self._held

    def step(self, control: Tensor, going: Going | None) -> Tensor | None:
        self._seen(control.shape[:2]).control.copy_(control)
        failed = self._engine.step(None if going is None else going.numbers, self._substeps)
        # One number for all worlds is cheap, and NaN is not less than anything.
        if not len(failed) and np.dot(self._flat, self._flat) < HUGE**2:
            return None
        lost = ~(np.abs(self._motion).max(axis=-1) < HUGE)
        lost[failed] = True
        return torch.from_numpy(lost) if lost.any() else None

    def derive(self, chosen: Tensor) -> None:
        self._engine.forward(_numbers(chosen))

    def restart(self, starts: Tensor, chosen: Tensor) -> None:
        self._rows[chosen] = self._blank
        self._motion[chosen.numpy()] = starts[chosen].numpy()
        self.derive(chosen)

    def snapshot(self, shape: torch.Size) -> Snapshot:
        return self._seen(shape).snapshot

    def _seen(self, shape: torch.Size) -> _Views:
        if shape not in self._views:
            now = views_of(self._qpos, self._qvel, self._outputs, shape)
            rows, control = (leaf.unflatten(0, shape) for leaf in (self._rows, self._ctrl))
            self._views[shape] = _Views(rows, control, now)
        return self._views[shape]

    def vary(self, changes: Mapping[str, np.ndarray]) -> None:
        self._engine.vary(models.world_fields(self._model, changes))

    def check(self) -> None:
        """MuJoCo on the CPU makes room when it needs it."""


def _numbers(marked: Tensor) -> np.ndarray:
    return np.flatnonzero(marked.numpy())


def make_engine(
    engine: str, model: Any, worlds: int, threads: int, outputs: tuple[str, ...]
) -> BatchEngine | RowsEngine:
    """``"batch"`` or ``"rows"`` for ``worlds`` worlds, stepped by ``threads`` threads."""
    cls = BatchEngine if engine == "batch" else RowsEngine
    return cls(model, worlds, threads, outputs)


class BatchEngine:
    """``mujoco.batch.Batch``."""

    def __init__(self, model: Any, worlds: int, threads: int, outputs: tuple[str, ...]) -> None:
        from mujoco import batch

        self._error = batch.SimulationError
        self._batch = batch.Batch(model, worlds, nthread=min(threads, worlds))
        self.rows = self._batch.state
        self.outputs = {name: _writable(self._batch.bind(name)) for name in outputs}

    def vary(self, fields: Mapping[str, np.ndarray]) -> None:
        for name, values in fields.items():
            self._batch.expand(name)[...] = values
        self._batch.set_const()

    def step(self, worlds: np.ndarray | None, substeps: int) -> np.ndarray:
        try:
            self._batch.step(worlds, nstep=substeps)
        except self._error as error:
            return error.ids
        return _NONE

    def forward(self, worlds: np.ndarray | None) -> None:
        self._batch.forward(worlds)


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory; torch takes no array that is marked as read-only."""
    view = array.view()
    view.flags.writeable = True
    return view


class RowsEngine:
    """A loop over rows on one ``MjData`` per thread, for every MuJoCo since 3.3."""

    def __init__(self, model: Any, worlds: int, threads: int, outputs: tuple[str, ...]) -> None:
        self._mujoco = mujoco = import_mujoco()
        self._spec = int(mujoco.mjtState.mjSTATE_INTEGRATION)
        self.rows = np.zeros((worlds, mujoco.mj_stateSize(model, self._spec)))
        threads = min(threads, worlds)
        self._model = _Worker(mujoco, model)  # as it was given
        self._workers = [_Worker(mujoco, model) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None
        data = self._workers[0].data
        self.outputs = {n: np.zeros((worlds, *getattr(data, n).shape)) for n in outputs}
        self._own: dict[str, np.ndarray] = {}

    def vary(self, fields: Mapping[str, np.ndarray]) -> None:
        for worker in self._workers:
            for name in self._own:
                worker.array(name)[...] = self._model.array(name)
        self._own = {**fields, **self._model.constants(fields, len(self.rows))}

    def step(self, worlds: np.ndarray | None, substeps: int) -> np.ndarray:
        return self._run(worlds, substeps)

    def forward(self, worlds: np.ndarray | None) -> None:
        self._run(worlds, 0)

    def _run(self, worlds: np.ndarray | None, substeps: int) -> np.ndarray:
        chosen = np.arange(len(self.rows)) if worlds is None else worlds
        if self._pool is None:
            return self._part(self._workers[0], chosen, substeps)
        parts = np.array_split(chosen, len(self._workers))
        jobs = [
            self._pool.submit(self._part, worker, part, substeps)
            for worker, part in zip(self._workers, parts, strict=True)
        ]
        return np.concatenate([job.result() for job in jobs])

    def _part(self, worker: _Worker, worlds: np.ndarray, substeps: int) -> np.ndarray:
        mujoco, model, data, spec = self._mujoco, worker.model, worker.data, self._spec
        pairs = [(out, getattr(data, name)) for name, out in self.outputs.items()]
        own = [(worker.array(name), values) for name, values in self._own.items()]
        forces = "cfrc_ext" in self.outputs
        failed = []
        for world in worlds.tolist():
            row = self.rows[world]
            for array, values in own:
                array[...] = values[world]
            mujoco.mj_setState(model, data, row, spec)
            try:
                if substeps:
                    mujoco.mj_step(model, data, substeps)
                else:
                    mujoco.mj_forward(model, data)
                if forces:
                    # MuJoCo computes them for sensors only (openai/gym issue 1541).
                    mujoco.mj_rnePostConstraint(model, data)
            except mujoco.FatalError:
                failed.append(world)
                continue
            mujoco.mj_getState(model, data, row, spec)
            for out, array in pairs:
                out[world] = array
        return np.array(failed, dtype=np.int64) if failed else _NONE


class _Worker:
    """A model and an ``MjData`` of a thread's own."""

    def __init__(self, mujoco: Any, model: Any) -> None:
        self._mujoco = mujoco
        self.model = copy.copy(model)
        self.data = mujoco.MjData(self.model)

    def array(self, name: str) -> np.ndarray:
        """An array of the model, by the name that ``mujoco.batch`` gives it."""
        holder = self.model.opt if name.startswith("opt.") else self.model
        return getattr(holder, name.removeprefix("opt."))

    def constants(self, fields: Mapping[str, np.ndarray], worlds: int) -> dict[str, np.ndarray]:
        """All arrays that ``mj_setConst`` changes when ``fields`` are set, ``[N, ...]``."""
        scratch = _Worker(self._mujoco, self.model)
        names = [
            name
            for name in dir(scratch.model)
            if name not in fields
            and isinstance(array := getattr(scratch.model, name), np.ndarray)
            and array.dtype == np.float64
            and array.size
        ]
        arrays = {name: scratch.array(name) for name in names}
        before = {name: array.copy() for name, array in arrays.items()}
        changed: dict[str, np.ndarray] = {}
        for world in range(worlds):
            for name, values in fields.items():
                scratch.array(name)[...] = values[world]
            self._mujoco.mj_setConst(scratch.model, scratch.data)
            for name, array in arrays.items():
                if name not in changed and not np.array_equal(array, before[name]):
                    changed[name] = np.broadcast_to(before[name], (worlds, *array.shape)).copy()
                if name in changed:
                    changed[name][world] = array
        return changed


_NONE = np.zeros(0, dtype=np.int64)
