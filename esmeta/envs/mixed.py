"""Several environments as one: each trial is simulated by that of its part, and by no other.

Observations and actions are padded with zeros to one width. Which part a trial is of stands in the
tasks' data, so that it stays with the trial whatever batch, chunk or rank it is in. Each part's
trials are one batch of its environment, one trial per row; its state is kept in the shape of all
trials, ``[P, B, ...]``, so that it can be stored and cut by members as any other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.rng import Rng
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import BatchedEnv, Hosted, Tasks, TimeStep


class Part(NamedTuple):
    """One of the environments: its ``label``, the sizes of its own, and a factor on its rewards."""

    label: str
    env: BatchedEnv
    obs_size: int
    action_size: int
    factor: float


class State(NamedTuple):
    """P x B trials: the ``part`` of each, int64 ``[P, B]``, and what it ``earned``, float64.

    ``inner`` are the states of all parts, leaves ``[P, B, ...]``, zero where a trial is another
    part's; clocks, tables that follow from the tasks, and the states of hosted worlds are the
    parts' own.
    """

    part: Tensor
    earned: Tensor
    inner: tuple[Any, ...]


class _Places(NamedTuple):
    """Where the trials of one part are among all ``P * B``.

    ``rows`` int64 ``[n]``, on the agent's device, and ``host`` the same on the CPU. A part with no
    trial (``used`` 0) has one row, which is never stepped: it gives its state and metrics a form.
    Parts with simulators need none.
    """

    rows: Tensor
    host: Tensor
    used: int

    def take(self, leaf: Tensor) -> Tensor:
        """Leaves ``[P or 1, B, ...]`` as ``[n, 1, ...]``."""
        rows = self.host if leaf.device.type == "cpu" else self.rows
        batch = leaf.shape[1]
        return leaf[rows // batch % len(leaf), rows % batch].unsqueeze(1)

    def spread(self, leaf: Tensor, shape: torch.Size) -> Tensor:
        """Leaves ``[n, 1, ...]`` as ``[P, B, ...]``, zero elsewhere."""
        rows = self.host if leaf.device.type == "cpu" else self.rows
        whole = leaf.new_zeros(shape.numel(), *leaf.shape[2:])
        whole[rows[: self.used]] = leaf[: self.used, 0]
        return whole.unflatten(0, shape)


class _Last(NamedTuple):
    """The newest state, and what was found out about it: places, and the parts' own states."""

    state: State
    places: tuple[_Places, ...]
    back: Tensor
    own: tuple[Any, ...]


class MixedEnv:
    """Batched environment of trials that differ in their environment.

    A part reads the first numbers of an action, as many as it has; the others do nothing. Its
    rewards are multiplied by its factor, and its return without it is the metric ``return_LABEL``;
    its own metrics are ``NAME_LABEL``; all are NaN for trials of other parts.

    With a part whose worlds cannot be copied it must be a :class:`HostedMixedEnv`.

    Args:
        parts: the environments, in the order of the numbers in the tasks' data.
        obs_size: width of observations, at least the widest part's.
        action_size: width of actions.
    """

    def __init__(self, parts: tuple[Part, ...], obs_size: int, action_size: int) -> None:
        self._parts, self._obs_size, self._action_size = parts, obs_size, action_size
        self._last: _Last | None = None
        self._forms: dict[int, list[bool]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": None}

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Start every trial in the environment of its part.

        ``tasks.data`` hold ``part`` (int64 ``[Q, B]``) and, under ``"k.name"``, the data of part k.
        """
        part = tasks.data["part"].expand(population, -1)
        places, back = self._find(part)
        steps, inner, own = [], [], []
        for number, (one, place) in enumerate(zip(self._parts, places, strict=True)):
            if number not in self._forms:
                self._forms[number] = self._form(number, tasks, rng)
            state, ts = self._begin(number, place, tasks, rng)
            own.append(state)
            inner.append(self._spread(number, place, part.shape, state))
            steps.append(self._padded(one, place, ts))
        earned = torch.zeros(part.shape, dtype=torch.float64, device=part.device)
        state = State(part, earned, tuple(inner))
        self._last = _Last(state, places, back, tuple(own))
        return state, self._joined(steps, back, part.shape)[0]

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """One step of every trial by its part's own numbers of the action ``[P, B, A]``."""
        last, shape = self._recall(state), state.part.shape
        steps, inner, own = [], list(state.inner), list(last.own)
        for number, (one, place) in enumerate(zip(self._parts, last.places, strict=True)):
            if place.used == 0:
                continue
            given = place.take(action.detach())
            after, ts = one.env.step(last.own[number], given[..., : one.action_size])
            known = (last.own[number], state.inner[number])
            own[number] = after
            inner[number] = self._spread(number, place, shape, after, known)
            steps.append(self._padded(one, place, ts, given))
        ts, paid = self._joined(steps, last.back, shape)
        later = State(state.part, state.earned + paid, tuple(inner))
        self._last = _Last(later, last.places, last.back, tuple(own))
        return later, ts

    def metrics(self, state: State) -> dict[str, Tensor]:
        """The parts' returns, not scaled, and their own metrics; float32 ``[P, B]``."""
        last, shape = self._recall(state), state.part.shape
        scores = {}
        for number, (one, place) in enumerate(zip(self._parts, last.places, strict=True)):
            found = {"return": place.take(state.earned), **one.env.metrics(last.own[number])}
            here = state.part == number
            for name, values in found.items():
                whole = place.spread(values, shape).float()
                scores[f"{name}_{one.label}"] = whole.masked_fill(~here, torch.nan)
        return scores

    # --- layout ----------------------------------------------------------------------------------

    def _begin(self, number: int, place: _Places, tasks: Tasks, rng: Rng) -> tuple[Any, TimeStep]:
        """Start a part's trials, one per row: leaves ``[n, 1, ...]``."""
        data = {
            name.partition(".")[2]: place.take(leaf)
            for name, leaf in tasks.data.items()
            if name.partition(".")[0] == str(number)
        }
        mine = Tasks(place.take(tasks.index), data)
        return self._parts[number].env.reset(mine, rng.fold("part", number), len(place.rows))

    def _form(self, number: int, tasks: Tasks, rng: Rng) -> list[bool]:
        """Of each leaf of a part's state, whether it is the trials' own."""
        part = self._parts[number]
        if isinstance(part.env, Hosted):
            return []
        rows = tasks.index.new_zeros(2)
        one, two = (
            leaves_of(self._begin(number, _Places(own, own.cpu(), 0), tasks, rng)[0])
            for own in (rows[:1], rows)
        )
        for leaf, other in zip(one, two, strict=True):
            if leaf.shape[:1] != other.shape[:1] and other.shape[:2] != (2, 1):
                raise UserError(
                    f"parts: the environment of {part.label!r} keeps a leaf {list(other.shape)} "
                    "for 2 x 1 trials, which is neither [P, B, ...] nor one for all: mixtures "
                    "cannot take it; write another part"
                )
        # A table may have one row too; with two trials it still has.
        return [leaf.shape[:1] != other.shape[:1] for leaf, other in zip(one, two, strict=True)]

    def _find(self, part: Tensor) -> tuple[tuple[_Places, ...], Tensor]:
        """Places of all parts, and the permutation from parts one after the other to places."""
        if part.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UserError(
                "capture = true: a mixture looks up whose trials it is given, which cannot be "
                "captured; write objective.capture = false"
            )
        found = []
        for number in range(len(self._parts)):
            rows = (part.flatten() == number).nonzero().squeeze(1)
            count = len(rows)
            if not count and not isinstance(self._parts[number].env, Hosted):
                rows = rows.new_zeros(1)
            found.append(_Places(rows, rows.cpu(), count))
        back = torch.cat([place.rows[: place.used] for place in found]).argsort()
        return tuple(found), back

    def _recall(self, state: State) -> _Last:
        """What belongs to a state: known of the newest, gathered where trials were left."""
        last = self._last  # once, as another thread may bring a newer one
        if last is not None and last.state is state:
            return last
        places, back = self._find(state.part)
        own = []
        for number, (place, inner) in enumerate(zip(places, state.inner, strict=True)):
            if not isinstance(self._parts[number].env, Hosted):
                pairs = zip(leaves_of(inner), self._forms[number], strict=True)
                inner = with_leaves(inner, [place.take(x) if mine else x for x, mine in pairs])
            own.append(inner)
        return _Last(state, places, back, tuple(own))

    def _spread(
        self,
        number: int,
        place: _Places,
        shape: torch.Size,
        state: Any,
        known: tuple[Any, Any] | None = None,
    ) -> Any:
        """A part's state in the shape of all trials; ``known`` are its last own and whole state."""
        if isinstance(self._parts[number].env, Hosted):
            return state
        before, wholes = ([], []) if known is None else (leaves_of(tree) for tree in known)
        found = []
        for k, (leaf, mine) in enumerate(zip(leaves_of(state), self._forms[number], strict=True)):
            if known is not None and leaf is before[k]:
                found.append(wholes[k])  # what a step does not change is most of a state
            else:
                found.append(place.spread(leaf, shape) if mine else leaf)
        return with_leaves(state, found)

    def _padded(
        self, one: Part, place: _Places, ts: TimeStep, given: Tensor | None = None
    ) -> tuple[TimeStep, Tensor]:
        """Time steps ``[n, ...]`` of a part in the sizes of all, and the reward as it paid it."""
        ts = TimeStep(*(leaf[: place.used, 0] for leaf in ts))
        obs = torch.nn.functional.pad(ts.obs, (0, self._obs_size - one.obs_size))
        if given is None:
            rest = ts.obs.new_zeros(len(ts.obs), self._action_size - one.action_size)
        else:
            rest = given[:, 0, one.action_size :].to(ts.prev_action)
        action = torch.cat([ts.prev_action, rest], dim=-1)
        return ts._replace(obs=obs, prev_action=action, reward=ts.reward * one.factor), ts.reward

    def _joined(
        self, steps: list[tuple[TimeStep, Tensor]], back: Tensor, shape: torch.Size
    ) -> tuple[TimeStep, Tensor]:
        """The time steps of all parts, ``[P, B, ...]``, and what they paid, float64 ``[P, B]``."""

        def whole(leaves: tuple[Tensor, ...]) -> Tensor:
            return torch.cat(leaves)[back].unflatten(0, shape)

        parts, paid = zip(*steps, strict=True)
        ts = TimeStep(*(whole(leaves) for leaves in zip(*parts, strict=True)))
        return ts, whole(paid).double()


class HostedMixedEnv(MixedEnv):
    """A mixture with parts whose worlds cannot be copied: a :class:`esmeta.types.Hosted` too."""

    @property
    def most_worlds(self) -> int:
        """How many trials can be begun at once, whatever parts they are of."""
        return min(part.env.most_worlds for part in self._parts if isinstance(part.env, Hosted))

    def close(self) -> None:
        """Close the simulators of all parts."""
        for part in self._parts:
            if isinstance(part.env, Hosted):
                part.env.close()
