"""What :class:`esmeta.envs.mujoco.MujocoEnv` asks of a simulator, and MuJoCo on the CPU as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from esmeta.envs import _mujoco_engines as engines
from esmeta.envs import _mujoco_model as models
from esmeta.envs._mujoco_state import Going
from esmeta.envs.bodies import Data, Snapshot

HUGE = 1e10  # mjMAXVAL: MuJoCo calls positions and velocities beyond it unstable


class Worlds(Protocol):
    """N worlds of one model. Time, positions and velocities come first in the rows of state."""

    changes: Data | None
    """The tasks' data that :meth:`vary` was last given, for the caller to remember."""

    def load(self, rows: Tensor) -> None:
        """Put the worlds into the states ``rows [P, B, S]``."""
        ...

    def saved(self, shape: torch.Size) -> Tensor:
        """A copy of their states, ``[P, B, S]``."""
        ...

    def step(self, control: Tensor, going: Going | None) -> Tensor | None:
        """One control step with ``control [P, B, nu]`` of the worlds of ``going`` (None: all).

        The others keep their states. Returns bool ``[N]``: worlds that are lost, by an error, NaN
        or huge numbers; None where none is.
        """
        ...

    def derive(self, chosen: Tensor) -> None:
        """Compute what follows from the states of the worlds marked in ``chosen [N]``."""
        ...

    def restart(self, starts: Tensor, chosen: Tensor) -> None:
        """Put the worlds marked in ``chosen [N]`` at ``starts [N, nq + nv]``."""
        ...

    def snapshot(self, shape: torch.Size) -> Snapshot:
        """Views ``[P, B, ...]`` of what the simulator holds."""
        ...

    def vary(self, changes: Mapping[str, np.ndarray]) -> None:
        """Models of their own; see :func:`esmeta.envs._mujoco_model.world_fields`."""
        ...

    def check(self) -> None:
        """Raise where results are wrong because the simulator ran out of room."""
        ...


class _Views(NamedTuple):
    """A simulator's memory as ``[P, B, ...]``."""

    rows: Tensor
    control: Tensor
    snapshot: Snapshot


class CpuWorlds:
    """An engine of :mod:`esmeta.envs._mujoco_engines`, and torch views of its memory."""

    def __init__(self, model: Any, engine: engines.Engine, substeps: int) -> None:
        mujoco = models.import_mujoco()
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


def views_of(
    qpos: Tensor, qvel: Tensor, outputs: Mapping[str, Tensor], shape: torch.Size
) -> Snapshot:
    """Leaves ``[N, ...]`` seen as ``[P, B, ...]``; those that are not there are empty."""
    empty = qpos.new_empty(len(qpos), 0)
    derived = (outputs.get(name, empty) for name in Snapshot._fields[2:])
    return Snapshot(*(leaf.unflatten(0, shape) for leaf in (qpos, qvel, *derived)))
