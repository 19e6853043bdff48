"""Two ways to step many worlds of one model: ``mujoco.batch`` (3.17 or newer) and a row loop.

A world is a row of MuJoCo's integration state and nothing else. A step loads the row into one of a
few ``MjData`` (one per thread), which stay in the cache, and writes it back; both engines give the
bits of one ``MjData`` per world.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from esmeta import errors
from esmeta.envs._mujoco_model import import_mujoco, import_warp, mujoco_version

ENGINES = ("auto", "batch", "rows", "warp")
_BATCH_SINCE = (3, 17)


class Engine(Protocol):
    """N worlds of one model.

    ``rows`` float64 ``[N, S]`` are the states, to be read and written between calls;
    ``outputs`` maps the names of derived fields to arrays ``[N, ...]`` that every call renews for
    the worlds it touches. After a step they are one substep behind the state, as in ``MjData``.
    """

    rows: np.ndarray
    outputs: dict[str, np.ndarray]

    def vary(self, fields: Mapping[str, np.ndarray]) -> None:
        """Give worlds their own values of the model's arrays, ``[N, ...]``."""
        ...

    def step(self, worlds: np.ndarray | None, substeps: int) -> np.ndarray:
        """Advance ``worlds`` (sorted numbers; None: all). Returns those MuJoCo gave up on."""
        ...

    def forward(self, worlds: np.ndarray | None) -> None:
        """Compute everything that follows from the rows of ``worlds``, as after a reset."""
        ...


def choose_engine(engine: str, outputs: tuple[str, ...]) -> str:
    """``"batch"``, ``"rows"`` or ``"warp"``, for what was asked and what is installed.

    On the CPU, contact forces as gymnasium has them (``cfrc_ext`` after the step) only the row loop
    can give.
    """
    errors.one_of("engine", engine, ENGINES)
    if engine == "warp":
        import_warp()
        return engine
    there = mujoco_version() >= _BATCH_SINCE
    if engine == "auto":
        return "batch" if there and "cfrc_ext" not in outputs else "rows"
    if engine == "batch" and not there:
        version = import_mujoco().__version__
        raise errors.UserError(
            f"engine = 'batch' needs MuJoCo 3.17 or newer, this is {version}; write "
            "engine = 'rows', which gives the same numbers, or: pip install 'mujoco>=3.17,<4'"
        )
    if engine == "batch" and "cfrc_ext" in outputs:
        raise errors.UserError(
            "engine = 'batch' has no contact forces; write engine = 'rows', or contact = 'zero'"
        )
    return engine


def make_engine(
    engine: str, model: Any, worlds: int, threads: int, outputs: tuple[str, ...]
) -> Engine:
    """The engine that :func:`choose_engine` names, for ``worlds`` worlds on ``threads`` threads."""
    cls = BatchEngine if choose_engine(engine, outputs) == "batch" else RowsEngine
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
