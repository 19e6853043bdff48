"""MuJoCo Warp: the worlds of :class:`esmeta.envs.mujoco.MujocoEnv` on a GPU, in float32.

Torch sees Warp's arrays without a copy. A control step is one captured graph, launched on torch's
stream, and nothing waits for the GPU but a look at the buffers every hundred steps. Physics is that
of MuJoCo in C up to rounding; results do not depend on batch mates (Warp's deterministic mode),
but may differ between machines. Finished worlds stay as they are, but are not left out: the time
of a step does not depend on how many there are.

On the CPU Warp replays the same graph, slower than MuJoCo in C: for tests.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esmeta import errors
from esmeta.envs import mujoco_model as models
from esmeta.envs._mujoco_state import HUGE, Going, views_of
from esmeta.envs.bodies import Body, Data, Snapshot

DETERMINISTIC = True
"""Whether new worlds give the same bits on every run, and with any batch mates."""
_CHECK_EVERY = 100  # control steps
_MOST_CONTACTS = 64  # per world, where a model says nothing
# What set_const computes from mass, inertia and size.
_FOLLOWING = ("body_subtreemass", "body_invweight0", "dof_invweight0", "actuator_acc0")
_TENDONS = ("tendon_length0", "tendon_invweight0")
_BOUNDS = ("geom_aabb", "geom_rbound")


class WarpWorlds:
    """N worlds of MuJoCo Warp; see :class:`esmeta.envs._mujoco_state.Worlds`.

    A row of state is time, qpos, qvel, act and the warm start of the solver.

    Args:
        model: a ``MjModel``.
        body: what it was built from.
        worlds: N.
        outputs: names of the derived fields that a snapshot shows.
        changes: names of what :meth:`vary` will be given.
        device: of every tensor.
    """

    def __init__(
        self,
        model: Any,
        body: Body,
        worlds: int,
        outputs: tuple[str, ...],
        changes: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self._parts = parts = models.import_warp()
        self._wp, self._mjw = wp, mjw = parts.wp, parts.mjw
        self._model, self._body, self._where = model, body, device
        wp.init()
        self._device = wp.device_from_torch(device)
        self.changes: Data | None = None
        with wp.ScopedDevice(self._device):
            self._m = m = self._put_model(worlds, outputs, changes)
            pairs = m.nxn_geom_pair_filtered.numpy()
            refuse_boxes(model, body, pairs)
            nconmax, njmax = room(model, body, pairs)
            self._d = d = mjw.make_data(model, nworld=worlds, nconmax=nconmax, njmax=njmax)
            self._rows_used = wp.zeros(worlds, dtype=int)
            self._contacts_used = wp.zeros(1, dtype=int)
            self._step = self._capture(lambda: mjw.step(m, d), body.frame_skip)
            # Contact forces need the whole of it.
            whole = "cfrc_ext" in outputs
            self._derive = self._capture(self._forward if whole else self._kinematics, 1)
            wp.synchronize_device(self._device)
        self._unchecked = 0
        self._held: Tensor | None = None
        see = wp.to_torch
        self._state = [see(d.time).unsqueeze(-1), see(d.qpos), see(d.qvel), see(d.act)]
        self._state.append(see(d.qacc_warmstart))
        self._qpos, self._qvel, self._ctrl = self._state[1], self._state[2], see(d.ctrl)
        self._outputs = {name: see(getattr(d, name)) for name in outputs}
        if "xmat" in outputs:
            self._outputs["xmat"] = self._outputs["xmat"].flatten(-2)
        width = sum(part.shape[1] for part in self._state)
        blank = torch.zeros(width, dtype=torch.float32, device=device)
        blank[1 : 1 + model.nq] = torch.from_numpy(model.qpos0)
        self._blank = self._before = blank.expand(worlds, -1)

    def load(self, rows: Tensor) -> None:
        self._before = rows.flatten(0, 1)
        if rows is not self._held:
            for part, values in zip(self._state, self._split(self._before), strict=True):
                part.copy_(values)
        self._held = None

    def saved(self, shape: torch.Size) -> Tensor:
        self._held = torch.cat(self._state, dim=-1).unflatten(0, shape)
        return self._held

    def step(self, control: Tensor, going: Going | None) -> Tensor:
        control = control.flatten(0, 1)
        if going is None:
            chosen = torch.ones_like(control[:, 0], dtype=torch.bool)
        else:
            chosen = going.worlds
        self._ctrl.copy_(torch.where(chosen.unsqueeze(-1), control, 0.0))
        self._launch(self._step)
        # NaN is not below anything.
        lost = ~(torch.cat([self._qpos, self._qvel], dim=-1).abs().amax(-1) < HUGE)
        self._overwrite(~chosen, self._before)
        # Nobody sees these again, but they are stepped on: NaN would spoil the use of buffers.
        self._overwrite(lost & chosen, self._blank)
        self._unchecked += 1
        if self._unchecked >= _CHECK_EVERY:
            self.check()
        return lost

    def restart(self, starts: Tensor, chosen: Tensor) -> None:
        rest = self._blank[:, 1 + starts.shape[1] :]
        self._overwrite(chosen, torch.cat([self._blank[:, :1], starts, rest], dim=-1))
        self.derive(chosen)

    def derive(self, chosen: Tensor) -> None:
        if not self._outputs:
            return
        before = {name: view.clone() for name, view in self._outputs.items()}
        self._launch(self._derive)
        for name, view in self._outputs.items():
            mine = chosen.view(-1, *[1] * (view.dim() - 1))
            view.copy_(torch.where(mine, view, before[name]))

    def snapshot(self, shape: torch.Size) -> Snapshot:
        return views_of(self._qpos, self._qvel, self._outputs, shape)

    def vary(self, changes: Mapping[str, np.ndarray]) -> None:
        fields = models.world_fields(self._model, changes)
        for name, values in fields.items():
            if name not in _BOUNDS:  # set_const has its own
                holder = self._m.opt if name.startswith("opt.") else self._m
                array = self._wp.to_torch(getattr(holder, name.removeprefix("opt.")))
                # In place: the graphs know where the arrays lie.
                array.copy_(torch.from_numpy(values))
        with self._on_torchs_stream():
            self._mjw.set_const(self._m, self._d, restore=False)

    def check(self) -> None:
        """Raise if there were more contacts or constraints than buffers have room for.

        Raises:
            UserError: with the sizes that were needed; results since the last check are wrong.
        """
        self._unchecked = 0
        see, d, kinds = self._wp.to_torch, self._d, self._mjw.OverflowType
        soft = kinds.ITERATIONS | kinds.LS_ITERATIONS | kinds.NEFC
        other = see(d.overflow) & ~int(soft | kinds.BROADPHASE | kinds.NARROWPHASE)
        used = torch.stack([see(self._rows_used).amax(), see(self._contacts_used)[0], other.amax()])
        rows, contacts, others = used.tolist()  # the one transfer
        if rows <= d.njmax and contacts <= d.naconmax and not others:
            return
        if others:
            raise errors.UserError(
                f"engine = 'warp': {kinds(others)!r} on {self._body.xml!r}, for which there is no "
                "option; write engine = 'auto', which simulates on the CPU"
            )
        each = math.ceil(contacts / d.nworld)
        raise errors.UserError(
            f"engine = 'warp' ran out of room on {self._body.xml!r}: {each} contacts per world "
            f"(nconmax = {d.naconmax // d.nworld}), {rows} constraints in one world (njmax = "
            f"{d.njmax}), and results since are wrong; write at least Body(..., nconmax="
            f"{max(each, d.naconmax // d.nworld)}, njmax={max(rows, d.njmax)})"
        )

    def _put_model(self, worlds: int, outputs: tuple[str, ...], changes: tuple[str, ...]) -> Any:
        """The model on the device, with room for what differs between worlds."""
        mujoco, wp = models.import_mujoco(), self._wp
        own = {models.FACTORS[name][0] for name in changes if name in models.FACTORS}
        if own:
            own |= {*_FOLLOWING, *(_TENDONS if self._model.ntendon else ())}
            own |= set(_BOUNDS) if "size" in changes else set()
        flag = int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)  # which Warp does not have anyway
        flags = self._model.opt.disableflags
        self._model.opt.disableflags = flags & ~flag
        try:
            m = self._mjw.put_model(self._model, batch_sizes=dict.fromkeys(own, worlds))
        finally:
            self._model.opt.disableflags = flags
        if "gravity" in changes:
            m.opt.gravity = wp.array(np.tile(self._model.opt.gravity, (worlds, 1)), dtype=wp.vec3)
        m.opt.warn_overflow = 0  # check() says it
        m.opt.deterministic = DETERMINISTIC
        m.opt.run_rne_postconstraint = "cfrc_ext" in outputs
        # Called in every forward pass, thus in every stage of Runge-Kutta, after the constraints
        # were made: the only place to see them all.
        m.callback.control = self._note_use
        return m

    def _note_use(self, m: Any, d: Any) -> None:
        read = [d.nefc, d.nacon, d.ncollision]
        written = [self._rows_used, self._contacts_used]
        self._wp.launch(self._parts.note_use, dim=d.nworld, inputs=read, outputs=written)

    def _forward(self) -> None:
        self._mjw.forward(self._m, self._d)

    def _kinematics(self) -> None:
        self._mjw.kinematics(self._m, self._d)
        self._mjw.com_pos(self._m, self._d)

    def _capture(self, run: Any, times: int) -> Any:
        run()  # compiles what is new
        with self._wp.ScopedCapture(self._device) as capture:
            for _ in range(times):
                run()
        return capture.graph

    def _launch(self, graph: Any) -> None:
        self._wp.capture_launch(graph, stream=self._stream())

    def _stream(self) -> Any:
        """Torch's present stream; None on the CPU."""
        return self._wp.stream_from_torch(self._where) if self._device.is_cuda else None

    @contextlib.contextmanager
    def _on_torchs_stream(self) -> Iterator[None]:
        with self._wp.ScopedDevice(self._device), self._wp.ScopedStream(self._stream()):
            yield

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split([part.shape[1] for part in self._state], dim=-1)

    def _overwrite(self, chosen: Tensor, rows: Tensor) -> None:
        """Put ``rows [N, S]`` where ``chosen [N]``."""
        mask = chosen.unsqueeze(-1)
        for part, values in zip(self._state, self._split(rows), strict=True):
            part.copy_(torch.where(mask, values, part))


def refuse_boxes(model: Any, body: Body, pairs: np.ndarray) -> None:
    """Refuse boxes that may touch each other; ``pairs [K, 2]`` are the geoms that may touch.

    Where two come near at their corners MuJoCo Warp finds other contacts than MuJoCo in C, and a
    control step differs by up to 0.03 m/s.
    """
    box = models.import_mujoco().mjtGeom.mjGEOM_BOX
    if any((model.geom_type[pair] == box).all() for pair in pairs):
        raise errors.UserError(
            f"engine = 'warp': boxes of {body.xml!r} may touch each other, where Warp differs "
            "from MuJoCo; write engine = 'auto', which simulates on the CPU"
        )


def room(model: Any, body: Body, pairs: np.ndarray) -> tuple[int, int]:
    """Contacts and constraints that a world of ``model`` has room for.

    By default as many as can be at all: ``pairs [K, 2]`` are the geoms that may touch.
    """
    kind = models.import_mujoco().mjtGeom
    points = {
        (kind.mjGEOM_PLANE, kind.mjGEOM_SPHERE): 1,
        (kind.mjGEOM_PLANE, kind.mjGEOM_CAPSULE): 2,
        (kind.mjGEOM_SPHERE, kind.mjGEOM_SPHERE): 1,
        (kind.mjGEOM_SPHERE, kind.mjGEOM_CAPSULE): 1,
        (kind.mjGEOM_CAPSULE, kind.mjGEOM_CAPSULE): 2,
    }
    known = {tuple(int(geom) for geom in types): number for types, number in points.items()}
    types = [tuple(sorted(int(model.geom_type[geom]) for geom in pair)) for pair in pairs]
    most = min(sum(known.get(pair, 8) for pair in types), _MOST_CONTACTS)
    nconmax = body.nconmax or max(most, 1)
    condim = int(model.geom_condim.max(initial=1))
    elliptic = model.opt.cone == models.import_mujoco().mjtCone.mjCONE_ELLIPTIC
    each = condim if elliptic or condim == 1 else 2 * (condim - 1)
    others = model.jnt_limited.sum() + model.tendon_limited.sum() + 6 * model.neq
    others += (model.dof_frictionloss > 0).sum() + (model.tendon_frictionloss > 0).sum()
    return nconmax, body.njmax or max(nconmax * each + int(others), 1)
