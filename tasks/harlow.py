"""Harlow task on a line: fixate, choose one of two objects, learn from one choice which is good.

Source: the 1-D task of the MetODS paper; what it leaves open (start, view, phases) is completed as
``tasks/README.md`` says. The agent walks on a line of cells. It must first visit the fixation cell
in the middle (reward 0.2), then step on one of two objects, left and right of it: one is worth
+1 and the other -1 for the whole trial, and the sides are drawn anew at every presentation. The
trial ends with the last choice.
"""

from __future__ import annotations

import functools
import math
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid, check_int, check_split, task_numbers
from esmeta.types import Discrete, Reference, Spec, Tasks, TimeStep

_VIEW_LEFT, _VIEW = 4, 8  # the agent at p sees the cells p-4 .. p+3
_DISTANCE = 3  # from the fixation cell to either object
_FIXATION_REWARD = 0.2
_LENGTH_UNIT = 40  # bit of the tally from which the steps are counted
_FIELD_BITS = 20
_FIELD = (1 << _FIELD_BITS) - 1


class _Tables(NamedTuple):
    """What differs between tasks, one row for each of ``R = Q B`` tasks.

    ``row`` int64 ``[Q, B]`` numbers them. By row and event (see :func:`_automaton`), flat
    ``[R * events]``: ``reward`` float32, and ``tally`` int64, what is added to the tally. ``views``
    float32 ``[R * width - 7, 8]`` are all windows of rows of ``width``: the contents of the line in
    every phase with the unseen margins, then an empty view. ``lines`` ``[R, presentations, 2, cells
    + 7]`` are the contents alone.
    """

    row: Tensor
    reward: Tensor
    tally: Tensor
    views: Tensor
    lines: Tensor


class State(NamedTuple):
    """State of P x B trials: ``code`` and ``tally`` int64 ``[P, B]``, ``time`` int64 ``[]``.

    A code is ``(2 * presentation + phase) * cells + position``, and the last code means finished.
    ``tally`` packs two bits per finished presentation (1 wrong, 2 right) and, above them, the
    number of steps.
    """

    code: Tensor
    tally: Tensor
    time: Tensor
    tables: _Tables


@options_class
class Task:
    """One-dimensional Harlow task. Observation ``[8]``: what lies on the cells p-4 .. p+3.

    The fixation cell shows -1 while fixation is asked for; objects show value/10 while a choice is
    asked for; all else is 0. Actions: 0 left, 1 right; moves stop at the ends of the line.

    Args:
        horizon: longest trial, in steps.
        presentations: choices per trial.
        cells: length of the line, odd; the fixation cell is in the middle.
        mirrored: tasks 2k and 2k + 1 are twins: all is alike, noise included, but which object is
            good. Over both the luck of a choice made without memory cancels, which takes most of
            the noise out of a comparison of members. The distribution of tasks is the same.
        forfeit: taken from the last reward for every choice that was not made when the horizon
            cuts the trial. Without it evolution finds agents that stop after a first loss, for
            which an unmade choice is better than a wrong one.
    """

    horizon: int = 250
    presentations: int = 5
    cells: int = 17
    mirrored: bool = aid(False)
    forfeit: float = aid(0.0)
    figures: ClassVar[str] = "esmeta.analysis.trials:draw_harlow"

    def __post_init__(self) -> None:
        check_int("horizon", self.horizon, 1, 1_000_000)
        check_int("presentations", self.presentations, 1, _LENGTH_UNIT // 2)
        check_int("cells", self.cells, 2 * _DISTANCE + 1, 101)
        if not (math.isfinite(self.forfeit) and self.forfeit >= 0):
            raise ValueError(
                f"forfeit is {self.forfeit}; it must be finite and >= 0: write forfeit=1.0"
            )
        if self.cells % 2 == 0:
            raise ValueError(
                f"cells is {self.cells}; it must be odd, so that there is a middle: "
                f"write cells={self.cells + 1}"
            )

    @property
    def spec(self) -> Spec:
        """Eight cells in view, two actions, one episode per trial."""
        return Spec(_VIEW, Discrete(2), self.horizon, episodes_per_trial=self.presentations)

    @property
    def reference(self) -> Reference:
        """Random: exact, by the Markov chain of the positions. Best: one-shot learning."""
        best = _FIXATION_REWARD * self.presentations + self.presentations - 1
        random = _random_return(self.cells, self.presentations, self.horizon, self.forfeit)
        note = (
            "random: uniform actions, exact; best: every fixation, a coin flip at the first choice "
            "and no error afterwards, if the horizon leaves time for it (a memoryless agent that "
            f"finishes reaches {_FIXATION_REWARD * self.presentations:.1f})"
        )
        return Reference(random=random, best=best, note=note)

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number; splits are different streams of real-valued objects.

        Data: ``values`` float32 ``[1, B, 2]`` in 0..10 and ``good`` int64 ``[1, B]``, which of the
        two is worth +1.
        """
        check_split(split)
        index = task_numbers(batch)
        twin = index % 2 if self.mirrored else torch.zeros_like(index)
        # Twins share the address of all that is drawn later, as dynamics and action noise.
        address = index // 2 if self.mirrored else index
        draws = rng.fold("harlow", split).uniform(address, 3)
        values = (10.0 * draws[..., :2]).to(torch.float32)
        good = (draws[..., 2] < 0.5).to(torch.int64) ^ twin
        return Tasks(address, {"values": values, "good": good})

    def make_env(self, device: torch.device | str) -> HarlowEnv:
        """The environment on ``device``; tasks given to it must lie there too."""
        return HarlowEnv(self, device)


class HarlowEnv:
    """P x B Harlow trials in lockstep; a step is a handful of look-ups in small tables."""

    def __init__(self, task: Task, device: torch.device | str) -> None:
        self._task = task
        moves, events = _automaton(task.cells, task.presentations)
        codes = moves.shape[1]
        self._codes = codes
        self._events = 3 + 2 * task.presentations
        self._width = 2 * task.presentations * (task.cells + _VIEW - 1) + _VIEW
        code = torch.arange(codes, device=device)
        phase, position = code // task.cells, code % task.cells
        self._place = phase * (task.cells + _VIEW - 1) + position
        unmade = task.presentations - code // (2 * task.cells)
        self._forfeit = task.forfeit * unmade.to(torch.float32)
        after = torch.tensor(moves, dtype=torch.int64, device=device)
        # One look-up by (action, code) for three numbers that go together.
        packed = torch.stack(
            [after, torch.tensor(events, dtype=torch.int64, device=device), self._place[after]]
        )
        shifts = _FIELD_BITS * torch.arange(3, device=device)
        self._moves = (packed << shifts[:, None, None]).sum(0).flatten()
        self._eye = torch.eye(2, dtype=torch.float32, device=device)

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Start on a uniformly random cell; the sides of all presentations are drawn here."""
        task = self._task
        draws = rng.fold("dynamics").uniform(tasks.index, 1 + task.presentations)
        tables = self._tables(tasks, draws[..., 1:] < 0.5)
        code = (draws[..., 0] * task.cells).to(torch.int64)
        code = code.expand(population, tasks.index.shape[1]).contiguous()
        zeros = torch.zeros_like(code)
        state = State(code, zeros, torch.zeros((), dtype=torch.int64, device=code.device), tables)
        no = torch.zeros_like(code, dtype=torch.bool)
        yes = torch.ones_like(no)
        reward = zeros.to(torch.float32)
        obs = torch.embedding(tables.views, tables.row * self._width + self._place[code])
        prev_action = reward.unsqueeze(-1).expand(-1, -1, 2)
        return state, TimeStep(obs, prev_action, reward, no, no, yes, yes)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """One step of every trial: reward 0.2 at fixation, +1 or -1 at a choice."""
        tables, last = state.tables, self._codes - 1
        move = torch.take(self._moves, torch.add(state.code, action, alpha=self._codes))
        code, event = move & _FIELD, (move >> _FIELD_BITS) & _FIELD
        place = torch.add(move >> 2 * _FIELD_BITS, tables.row, alpha=self._width)
        outcome = torch.add(event, tables.row, alpha=self._events)
        finished = code == last
        time = state.time + 1
        timeout = time >= self._task.horizon
        over = finished | timeout
        reward = torch.take(tables.reward, outcome)
        if self._task.forfeit:
            reward = reward - timeout * torch.take(self._forfeit, code)
        step = TimeStep(
            obs=torch.embedding(tables.views, place),
            prev_action=torch.embedding(self._eye, action),
            reward=reward,
            terminated=event > 2 * self._task.presentations,
            truncated=timeout > finished,  # on booleans: timeout and not finished
            # A presentation begins when fixation is rewarded and the objects appear.
            new_episode=over | (reward == _FIXATION_REWARD),
            new_trial=over,
        )
        tally = state.tally + torch.take(tables.tally, outcome)
        return State(torch.where(timeout, last, code), tally, time, tables), step

    def metrics(self, state: State) -> dict[str, Tensor]:
        """``accuracy_k`` (1, 0, or NaN if not reached), ``presentations`` done, ``length`` (steps).

        All are float32 ``[P, B]``.
        """
        count = self._task.presentations
        bits = torch.arange(0, 2 * count, 2, device=state.tally.device)
        outcome = ((state.tally.unsqueeze(-1) >> bits) & 3).to(torch.float32)
        nan = torch.full_like(outcome, torch.nan)
        accuracy = torch.where(outcome > 0, outcome - 1, nan)
        result = {f"accuracy_{k + 1}": accuracy[..., k] for k in range(count)}
        result["presentations"] = (outcome > 0).sum(-1).to(torch.float32)
        result["length"] = (state.tally >> _LENGTH_UNIT).to(torch.float32)
        return result

    def _tables(self, tasks: Tasks, first_left: Tensor) -> _Tables:
        """Of all tasks; ``first_left`` bool ``[Q, B, presentations]``."""
        good_left = (first_left == (tasks.data["good"] == 0).unsqueeze(-1)).flatten(0, 1)
        rows, count = good_left.shape
        correct = torch.stack([good_left, ~good_left], dim=-1).flatten(1)
        reward = torch.zeros(rows, self._events, dtype=torch.float32, device=correct.device)
        reward[:, 2] = _FIXATION_REWARD
        reward[:, 3:] = torch.where(correct, 1.0, -1.0)
        shift = torch.arange(0, 2 * count, 2, device=correct.device).repeat_interleave(2)
        tally = torch.zeros(rows, self._events, dtype=torch.int64, device=correct.device)
        tally[:, 3:] = (1 + correct.to(torch.int64)) << shift
        tally[:, 1:] += 1 << _LENGTH_UNIT
        contents, lines = self._lines(tasks, first_left)
        return _Tables(
            torch.arange(rows, device=correct.device).view(tasks.index.shape),
            reward.flatten(),
            tally.flatten(),
            contents.flatten().unfold(0, _VIEW, 1),
            lines,
        )

    def _lines(self, tasks: Tasks, first_left: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of contents, and their part that is no empty view: see :class:`_Tables`."""
        cells, count = self._task.cells, self._task.presentations
        values = (tasks.data["values"] / 10.0).flatten(0, 1)
        side = first_left.flatten(0, 1)
        first, second = values[:, :1], values[:, 1:]
        middle = _VIEW_LEFT + cells // 2
        contents = values.new_zeros(values.shape[0], self._width)
        line = contents[:, :-_VIEW].unflatten(1, (count, 2, cells + _VIEW - 1))
        line[:, :, 0, middle] = -1.0
        line[:, :, 1, middle - _DISTANCE] = torch.where(side, first, second)
        line[:, :, 1, middle + _DISTANCE] = torch.where(side, second, first)
        return contents, line


@functools.cache
def _automaton(cells: int, presentations: int) -> tuple[np.ndarray, np.ndarray]:
    """Next code and event of (action, code), int64 ``[2, codes]`` each.

    Events: 0 finished before, 1 nothing, 2 fixation, ``3 + 2 * presentation + side`` a choice (side
    0 left, 1 right).
    """
    codes = 2 * presentations * cells + 1
    moves = np.full((2, codes), codes - 1, dtype=np.int64)
    events = np.zeros((2, codes), dtype=np.int64)
    middle = cells // 2
    for code in range(codes - 1):
        block, position = divmod(code, cells)
        presentation, choosing = divmod(block, 2)
        for action, shift in enumerate((-1, 1)):
            there = min(max(position + shift, 0), cells - 1)
            if not choosing and there == middle:
                block_after, event = block + 1, 2
            elif choosing and abs(there - middle) == _DISTANCE:
                block_after, event = block + 1, 3 + 2 * presentation + int(there > middle)
            else:
                block_after, event = block, 1
            ended = block_after == 2 * presentations
            moves[action, code] = codes - 1 if ended else block_after * cells + there
            events[action, code] = event
    return moves, events


@functools.cache
def _random_return(cells: int, presentations: int, horizon: int, forfeit: float) -> float:
    """Mean return of uniform actions: 0.2 per fixation, since choices are worth 0 on average.

    What is forfeited at the horizon is taken off.
    """
    moves, events = _automaton(cells, presentations)
    mass = np.zeros(moves.shape[1])
    mass[:cells] = 1.0 / cells
    total = 0.0
    for _ in range(horizon):
        total += _FIXATION_REWARD * 0.5 * float((mass * (events == 2)).sum())
        after = np.zeros_like(mass)
        for action in range(2):
            np.add.at(after, moves[action], 0.5 * mass)
        mass = after
        if mass[-1] > 1.0 - 1e-12:
            break
    unmade = presentations - np.arange(len(mass)) // (2 * cells)
    return total - forfeit * float((mass * unmade).sum())


def render(state: State, p: int, b: int, scale: int = 16) -> np.ndarray:
    """Picture of trial ``[p, b]``: uint8 ``[3 * scale, cells * scale, 3]``, one square per cell.

    Fixation is blue while asked for, objects are orange, the brighter the larger their value, and
    the agent is a green square above its cell.
    """
    lines, code = state.tables.lines, int(state.code[p, b])
    row = int(state.tables.row.expand_as(state.code)[p, b])
    _, presentations, _, width = lines.shape
    cells = width - (_VIEW - 1)
    picture = np.full((3, cells, 3), 255, dtype=np.uint8)
    picture[1] = 225
    if code < 2 * presentations * cells:
        block, position = divmod(code, cells)
        line = lines[row, block // 2, block % 2, _VIEW_LEFT : _VIEW_LEFT + cells]
        for cell, shown in enumerate(line.tolist()):
            if shown < 0:
                picture[1, cell] = (40, 90, 200)
            elif shown > 0:
                picture[1, cell] = (255, int(200 - 130 * shown), int(120 - 120 * shown))
        picture[0, position] = (30, 150, 60)
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)
