"""MuJoCo: P x B worlds of one body in lockstep, as rows of state.

A step copies the rows into the engine, steps the worlds whose trials go on, and copies them out,
so that an environment's state is plain tensors and a step changes none of them. On the CPU physics
is float64; what an agent sees is float32, and goes to the agent's device in one transfer. With
``engine="warp"`` (:mod:`esmeta.envs.warp`) physics is float32 and takes place on that device.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from esmeta.envs import mujoco_model as models
from esmeta.envs._mujoco_state import Going, Seen, State, Worlds, phase_table
from esmeta.envs.bodies import Body, Data, Definition, Snapshot
from esmeta.envs.mujoco_cpu import CpuWorlds, make_engine
from esmeta.rng import Rng
from esmeta.sharing import MadeAgain, one_at_a_time
from esmeta.tasks import check_int
from esmeta.types import Tasks, TimeStep

_CHANGES = (*models.FACTORS, "gravity")
_LASTING = (*_CHANGES, "start", "pose")  # what all episodes of a trial share
_KEPT_SIZES = 4  # engines that are kept for batches of other sizes
_EPISODES = Rng(0).fold("episodes")  # all else that starts depend on is in the state's addresses
_AHEAD = 16  # episodes that noise is drawn for at a time: the draws of one cost as much


class MujocoEnv(MadeAgain):
    """Batched environment of one :class:`Definition` on one body.

    A trial is ``episodes`` episodes of at most ``horizon`` control steps on the same task. Where an
    episode ends before the last, the world starts the next one in the same step: the time step
    carries the last reward and the new first observation. A trial that has ended costs no physics.
    With ``steps`` a trial is so many control steps instead, in however many episodes that makes:
    all trials end together, the last episode of each where it happens to be (truncated).

    Worlds that MuJoCo cannot go on with (NaN, huge values, errors) end their trial at once,
    terminated with reward 0, and count in the metric ``unstable``. With ``steps`` that ends the
    episode only: a life goes on, and the metric says how often it happened.

    What the tasks' data hold under ``mass``, ``inertia``, ``friction``, ``damping``, ``gear``,
    ``size`` (factors) or ``gravity`` changes the model of each world; see
    :func:`esmeta.envs.mujoco_model.world_fields` for these and more, with shapes.

    Other names with a meaning of their own: ``start`` (int64 ``[Q, B]``) addresses the noise at the
    start instead of the tasks' numbers; ``pose`` (float64 ``[Q, B, nq]``, or
    ``[Q, B, episodes, nq]``) are the positions at the start instead of the model's; ``working``
    (float64 ``[Q, B, episodes, nu]``) multiplies the action, which the agent sees as it gave it.

    Args:
        body: what is simulated.
        definition: what is seen, paid and ended.
        horizon: control steps of an episode at most.
        episodes: episodes of a trial; 1 with ``steps``.
        steps: control steps of a trial; 0: as many as its episodes have.
        continual: whether episodes differ: the tasks' data that are about the task alone (neither
            ``start`` and ``pose`` nor changes of the model) are then ``[Q, B, episodes, ...]``.
        engine: ``"auto"``, ``"batch"`` or ``"rows"``: the same bits; ``"warp"``: float32.
        threads: threads that step worlds; the same bits for any number.
        device: where actions come from and time steps go to; with ``"warp"``, where physics is.
    """

    def __init__(
        self,
        body: Body,
        definition: Definition,
        *,
        horizon: int,
        episodes: int = 1,
        steps: int = 0,
        continual: bool = False,
        engine: str = "auto",
        threads: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        check_int("threads", threads, 1, 1024)
        mujoco = models.import_mujoco()
        self._engine = models.choose_engine(engine, definition.reads)
        self.model = model = models.build_model(body)
        self._body, self._definition = body, definition
        self._horizon, self._episodes, self._continual = horizon, episodes, continual
        self._steps = steps
        # Episodes whose returns are told apart.
        self._told = episodes if episodes > 1 and not steps else 0
        # On a GPU they are drawn in every step, as nobody looks whether they have to be.
        self._ahead = 0 if steps == 0 else 1 if self._engine == "warp" else _AHEAD
        self._threads = threads
        self.seconds = float(model.opt.timestep) * body.frame_skip
        self._like = torch.empty(0, dtype=torch.float32, device=device)
        # What has physics' precision and place.
        on_cpu = torch.empty(0, dtype=torch.float64, device="cpu")
        self._physics = self._like if self._engine == "warp" else on_cpu
        data = mujoco.MjData(model)
        self._pose = torch.from_numpy(np.concatenate([data.qpos, data.qvel]))
        limits = torch.from_numpy(model.actuator_ctrlrange.copy()).to(self._physics)
        self._centre, self._reach = limits.mean(-1), (limits[:, 1] - limits[:, 0]) / 2
        self._unit = bool((self._centre == 0).all() and (self._reach == 1).all())
        self._phase = phase_table(definition, horizon)
        self._phase_there = torch.from_numpy(self._phase).to(self._physics.device)
        self._counts = np.asarray(self._phase.any(axis=1)).tolist()  # step t is in a phase
        self.forget()

    def forget(self) -> None:
        """See :class:`esmeta.sharing.MadeAgain`; trials go on, as their state is all tensors."""
        self._worlds: dict[tuple[int | str, ...], Worlds] = {}
        self._seen: Seen | None = None

    @one_at_a_time
    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Start the first episode of every trial; what the others start from is drawn here."""
        data = {name: leaf.cpu() for name, leaf in tasks.data.items()}
        changes = {name: leaf.double() for name, leaf in data.items() if name in _CHANGES}
        model, definition, there = self.model, self._definition, self._physics.device
        address = data.get("start", tasks.index.cpu())
        starts = self._pose.expand(*address.shape, 1, -1)
        if not self._steps:
            starts = starts + definition.noise.draw(
                rng, address, self._episodes, model.nq, model.nv
            )
        if "pose" in data:
            pose = data["pose"].double()
            pose = pose if pose.ndim == starts.ndim else pose.unsqueeze(2)
            moved = starts[..., : model.nq] + (pose - self._pose[: model.nq])
            still = starts[..., model.nq :].expand(*moved.shape[:-1], -1)
            starts = torch.cat([moved, still], dim=-1)
        shape, starts = torch.Size((population, starts.shape[1])), starts.to(self._physics)
        address = rng.fold("dynamics", "episodes").bits(address, 1).squeeze(-1).to(there)
        data = {name: leaf.to(there) for name, leaf in data.items()}
        worlds = self._at(shape, changes)
        none = torch.zeros(shape, dtype=torch.float64, device=there)
        no = torch.zeros(shape, dtype=torch.bool, device=there)
        zero = torch.zeros(shape, dtype=torch.int64, device=there)
        noise = self._noise(address, zero)
        first = self._first(starts, noise, zero)
        worlds.restart(first.flatten(0, 1), ~no.flatten())
        now = worlds.snapshot(shape)
        paid = none.new_zeros(*shape, self._phase.shape[1])
        rows, place = worlds.saved(shape), definition.place(now).clone()
        state = State(
            rows, place, time=zero, episode=zero, elapsed=zero, over=no, unstable=zero, success=no,
            paid=paid, spent=paid, starts=starts, address=address, noise=noise, data=data,
            changes=changes, earned=none.new_zeros(*shape, self._told),
        )  # fmt: skip
        action = none.unsqueeze(-1).expand(*shape, model.nu)
        begun = torch.ones_like(no)
        obs = definition.observe(now)
        return state, self._shown(obs, action, none, no, no, begun, begun)

    @one_at_a_time
    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """One control step of every world whose trial goes on; actions are clipped to -1..1."""
        definition, over, shape = self._definition, state.over, state.over.shape
        going, common = self._progress(state)
        worlds = self._at(shape, state.changes)
        if action.device != self._physics.device:
            action = action.to(self._physics.device)
        action = action.detach().clamp(-1.0, 1.0)
        data = self.present(state)
        applied = action * data["working"] if "working" in data else action
        worlds.load(state.rows)
        lost = worlds.step(self._torque(applied), going)
        no = over if going is None else going.none
        bad = no if lost is None else lost.unflatten(0, shape) & ~over
        gone = over if lost is None else over | bad
        if definition.current:
            worlds.derive((~gone).flatten())
        now = worlds.snapshot(shape)
        place = definition.place(now).clone()
        velocity = (place - state.place) / self.seconds
        reward = definition.reward(now, velocity, applied.to(self._physics.dtype), data)
        if going is not None or lost is not None:
            reward = reward.masked_fill(gone, 0.0)
        one = 1 if going is None else going.mask
        time = state.time + one
        # Where all are over it stands still.
        common = None if common is None else min(common + 1, self._horizon)
        paid, spent = self._counted(state, time, reward, going, common)
        later = state._replace(time=time, paid=paid, spent=spent)
        if self._told:
            present = _numbers(state.earned) == state.episode.unsqueeze(-1)
            later = later._replace(earned=state.earned + present * reward.unsqueeze(-1))
        if self._steps:
            later = later._replace(elapsed=state.elapsed + one)
        terminated, truncated, ended = self._ends(later, now, bad, no, going, common)
        if lost is not None:
            later = later._replace(unstable=state.unstable + bad)
        if definition.success is not None:
            reached = definition.success(now, data) & ~gone
            later = later._replace(success=state.success | reached)
        later, again = (later, None) if ended is None else self._ended(later, worlds, ended, bad)
        if again is not None:
            place = definition.place(now).clone()
        obs = definition.observe(now)
        if going is not None or lost is not None:
            blank = gone if later.over is over else gone & later.over
            obs = obs.masked_fill(blank.unsqueeze(-1), 0.0)
        later = later._replace(rows=worlds.saved(shape), place=place)
        fresh = later.over if again is None else later.over | again
        self._seen = self._noticed(state, later, time, going, common)
        return later, self._shown(obs, action, reward, terminated, truncated, fresh, later.over)

    def _progress(self, state: State) -> tuple[Going | None, int | None]:
        """``going`` and ``common`` of :class:`Seen`."""
        seen = self._seen
        if seen is not None and seen.over is state.over and seen.time is state.time:
            return seen.going, seen.common
        going = Going(state.over) if self._some(state.over) else None
        if self._engine == "warp" or self._steps:
            return going, None
        times = state.time if going is None else state.time[going.mask]
        found = times.unique()
        return going, int(found) if len(found) == 1 else None

    def _noticed(
        self, state: State, later: State, time: Tensor, going: Going | None, common: int | None
    ) -> Seen | None:
        """What a step has told of the state after it; ``time`` before episodes began anew."""
        if later.over is state.over:
            return Seen(later.over, time, going, common)
        if self._episodes == 1 and common is not None:
            return Seen(later.over, time, Going(later.over), common)
        return None

    def _counted(
        self, state: State, time: Tensor, reward: Tensor, going: Going | None, common: int | None
    ) -> tuple[Tensor, Tensor]:
        """``paid`` and ``spent`` after a step, for the phases that it belongs to."""
        if common is None:
            inside = self._inside(time if going is None else time * going.mask)
        elif self._counts[common]:
            inside = self._phase_there[common]
        else:
            return state.paid, state.spent
        # Factors are 0 and 1, so that it does not matter whether products are rounded; where a
        # trial is over the reward is 0.
        paid = torch.addcmul(state.paid, inside, reward.unsqueeze(-1))
        if going is None or common is None:
            return paid, state.spent + inside
        return paid, torch.addcmul(state.spent, inside, going.factor)

    def _ends(
        self,
        later: State,
        now: Snapshot,
        bad: Tensor,
        no: Tensor,
        going: Going | None,
        common: int | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Which episodes are terminated, which truncated, and both; None where none is.

        ``no`` is False everywhere, and so is ``bad`` if it is the same tensor.
        """
        terminated, healthy = bad, self._definition.healthy
        if healthy is not None:
            terminated = ~healthy(now) if bad is no else bad | ~healthy(now)
            terminated = terminated if going is None else terminated & going.mask
        late = None if common is None else common >= self._horizon
        if late is None:
            marked = later.time >= self._horizon
            if self._steps:
                marked = marked | (later.elapsed >= self._steps)
            truncated = marked & ~(terminated | later.over) if self._some(marked) else no
        elif late:
            truncated = ~terminated if going is None else going.mask & ~terminated
        else:
            truncated = no
        if terminated is no and truncated is no:
            return no, no, None
        return terminated, truncated, terminated | truncated

    def present(self, state: State) -> Data:
        """What the present episodes are about, leaves ``[Q or P, B, ...]``."""
        if not self._continual and "working" not in state.data:
            return state.data
        changing = state.data.keys() - _LASTING if self._continual else {"working"}
        episode = state.episode
        member, trial = (torch.arange(n, device=episode.device) for n in episode.shape)
        member = member.unsqueeze(-1)

        def now(leaf: Tensor) -> Tensor:  # the last told stands for all that follow
            return leaf[member % len(leaf), trial, episode.clamp(max=leaf.shape[2] - 1)]

        return {k: now(leaf) if k in changing else leaf for k, leaf in state.data.items()}

    def _ended(
        self, state: State, worlds: Worlds, ended: Tensor, bad: Tensor
    ) -> tuple[State, Tensor | None]:
        """Count episodes that ended, begin the next ones; also which worlds began one."""
        if not self._some(ended):
            return state, None
        episode = state.episode + ended
        done = state.elapsed >= self._steps if self._steps else bad | (episode >= self._episodes)
        over = state.over | done
        again = ended & ~over
        state = state._replace(episode=episode, over=over)
        if (self._episodes == 1 and not self._steps) or not self._some(again):
            return state, None
        if self._steps and self._some(again & (episode % self._ahead == 0)):
            state = state._replace(noise=self._noise(state.address, episode))
        first = self._first(state.starts, state.noise, episode)
        worlds.restart(first.flatten(0, 1), again.flatten())
        return state._replace(time=state.time.masked_fill(again, 0)), again

    def _first(self, starts: Tensor, noise: Tensor, episode: Tensor) -> Tensor:
        """Where the episodes number ``episode [P, B]`` start, ``[P, B, nq + nv]``."""

        def of(each: Tensor, number: Tensor) -> Tensor:
            chosen = number[..., None, None].expand(-1, -1, 1, each.shape[-1])
            return each.expand(*episode.shape, -1, -1).gather(2, chosen).squeeze(2)

        first = of(starts, episode.clamp(max=starts.shape[2] - 1))
        return first + of(noise, episode % self._ahead) if self._steps else first

    def _noise(self, address: Tensor, episode: Tensor) -> Tensor:
        """Noise of episodes number ``episode [P, B]`` and about, ``[P, B, n, nq + nv]``.

        How many a trial will have is not known, so that each has an address of its own.
        """
        nq, nv, ahead = self.model.nq, self.model.nv, self._ahead
        if ahead == 0:
            return self._physics.new_zeros(*episode.shape, 0, nq + nv)
        first = address + episode // ahead * ahead
        index = first.unsqueeze(-1) + torch.arange(ahead, device=first.device)
        noise = self._definition.noise.draw(_EPISODES, index, 1, nq, nv)
        return noise.squeeze(-2).to(self._physics)

    @one_at_a_time
    def metrics(self, state: State) -> dict[str, Tensor]:
        """Scores of each trial so far, float32 ``[P, B]``.

        ``unstable``: how often MuJoCo lost the world. ``success``, where the definition has it: 1
        where the goal was reached at any step. The definition's phases: mean reward per step in
        that span of the episodes; NaN where no episode came so far. ``return_k`` of each episode
        where a trial has a number of them, NaN for those that did not begin.
        """
        for worlds in self._worlds.values():
            worlds.check()
        scores = {"unstable": state.unstable}
        if self._definition.success is not None:
            scores["success"] = state.success
        means = state.paid / state.spent
        scores |= dict(zip(self._definition.phases, means.unbind(-1), strict=True))
        begun = _numbers(state.earned) < (state.episode + ~state.over).unsqueeze(-1)
        earned = state.earned.masked_fill(~begun, torch.nan)
        scores |= {f"return_{k + 1}": column for k, column in enumerate(earned.unbind(-1))}
        return {name: score.to(self._like) for name, score in scores.items()}

    def _at(self, shape: torch.Size, changes: Data) -> Worlds:
        """So many worlds, with these changes to their models."""
        # A simulator keeps the values of what was changed once.
        key = (shape.numel(), *changes)
        worlds = self._worlds.pop(key, None) or self._make(shape.numel(), tuple(changes))
        self._worlds[key] = worlds  # the youngest comes last
        if len(self._worlds) > _KEPT_SIZES:
            # On a GPU this also waits until nothing uses them any more.
            self._worlds.pop(next(iter(self._worlds))).check()
        if changes and worlds.changes is not changes:
            each = {
                name: leaf.expand(*shape, *leaf.shape[2:]).flatten(0, 1).numpy()
                for name, leaf in changes.items()
            }
            worlds.vary(each)
            worlds.changes = changes
        return worlds

    def _make(self, count: int, changes: tuple[str, ...]) -> Worlds:
        body, reads = self._body, self._definition.reads
        if self._engine == "warp":
            from esmeta.envs.warp import WarpWorlds

            return WarpWorlds(self.model, body, count, reads, changes, self._physics.device)
        engine = make_engine(self._engine, self.model, count, self._threads, reads)
        return CpuWorlds(self.model, engine, body.frame_skip)

    def _some(self, marked: Tensor) -> bool:
        """Whether any is marked; on a GPU yes, as asking would be waiting for it."""
        return self._engine == "warp" or bool(marked.any())

    def _inside(self, time: Tensor) -> Tensor:
        """1 where a step counts for a phase, float64 ``[P, B, K]``."""
        if self._engine == "warp":
            return torch.embedding(self._phase_there, time)
        return torch.from_numpy(self._phase[time.numpy()])  # half the price of torch's look-up

    def _torque(self, action: Tensor) -> Tensor:
        """Actions in -1..1 as controls of the model."""
        return action if self._unit else torch.addcmul(self._centre, action, self._reach)

    def _shown(self, obs: Tensor, action: Tensor, reward: Tensor, *marks: Tensor) -> TimeStep:
        """A time step in float32 on the agent's device, in one transfer."""
        if obs.device == self._like.device:
            return TimeStep(obs.float(), action.float(), reward.float(), *marks)
        flags = torch.stack([reward, *marks], dim=-1)
        sizes = [obs.shape[-1], action.shape[-1], flags.shape[-1]]
        seen = torch.cat([obs, action, flags], dim=-1).to(self._like)
        obs, action, flags = seen.split(sizes, dim=-1)
        reward, *rest = flags.unbind(-1)
        return TimeStep(obs, action, reward, *(mark.bool() for mark in rest))


def _numbers(earned: Tensor) -> Tensor:
    """The numbers of the episodes that returns ``[P, B, E]`` are of."""
    return torch.arange(earned.shape[-1], device=earned.device)
