"""Maze with an invisible target: find it once by search, then return to it from anywhere.

Source: the maze of the MetODS paper. The board generator is not given there; ``pillars`` is the
well-known random walk of walls over pillars and matches the published statistics, ``carve`` is
cell-wise Prim carving. Both leave all free cells connected: pillar walls form trees (every pillar
is reached once), carving grows one tree of cells, and the walls that are added at the end touch
no other wall. Boards are made in numpy for many tasks at once.
"""

from __future__ import annotations

import functools
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import check_int, check_split, task_numbers
from esmeta.types import Discrete, Reference, Spec, Tasks, TimeStep

from . import _maze_boards as maker

GENERATORS = ("pillars", "carve")
_REWARD = 10.0
# Returns in 100 steps of uniform moves and of shortest paths, expectations over 4096 boards with
# starts and teleports over all free cells.
_MEASURED = {
    ("pillars", 4): (41.59, 438.6),
    ("pillars", 6): (10.35, 201.4),
    ("pillars", 8): (4.868, 126),
    ("pillars", 10): (2.853, 89.74),
    ("pillars", 12): (1.901, 69.22),
    ("carve", 4): (20.96, 328.6),
    ("carve", 5): (11.35, 241.4),
    ("carve", 6): (7.096, 188.2),
    ("carve", 7): (4.9, 153.7),
    ("carve", 8): (3.602, 129.2),
    ("carve", 9): (2.791, 112),
    ("carve", 10): (2.204, 98.05),
    ("carve", 11): (1.805, 86.91),
    ("carve", 12): (1.508, 78.42),
}
# Blocks for the references, and how much of each, as the splits share out the boards.
_SAMPLE = (("train", 0, 8), ("train", 1, 8), ("train", 2, 8), ("validation", 0, 4), ("test", 0, 4))


class _Tables(NamedTuple):
    """Every board as an automaton; a code is ``row * side**2 + cell`` over the ``R`` tasks.

    ``next_code`` flat ``[4 * R * side**2]``, action first; ``views`` ``[R * side**2, 9]``;
    ``teleports`` flat ``[R * (horizon + 1)]``, the cell after each hit of the target.
    """

    next_code: Tensor
    views: Tensor
    teleports: Tensor


class State(NamedTuple):
    """State of P x B trials, int64 ``[P, B]`` but for ``time`` ``[]``.

    ``code`` is the agent's cell, ``target`` the target's (-1 once the trial is over), ``hits`` the
    number of hits plus ``first_hit`` ``[Q, B]``, where the trial's teleports begin, and ``first``
    the step of the first hit (the horizon if none).
    """

    code: Tensor
    target: Tensor
    hits: Tensor
    first: Tensor
    time: Tensor
    first_hit: Tensor
    goal: Tensor
    tables: _Tables


@options_class
class Task:
    """Maze with a hidden target. Observation ``[9]``: the 3 x 3 cells around, 1 is a wall.

    Actions: 0 up, 1 down, 2 left, 3 right; a move into a wall does nothing. Stepping on the target
    pays 10 and moves the agent to a random other free cell. The trial is truncated at the horizon.

    Args:
        size: 4 to 12. Pillar boards measure ``2 * (size // 2) + 1`` with their border, so that an
            odd size gives the boards of the even size below; carved ones have ``size`` cells
            inside a border.
        horizon: steps per trial.
        generator: ``"pillars"`` or ``"carve"``.
        avoid_target: whether starts and teleports spare the target. If not, they are uniform over
            all free cells (the paper's words), and an agent that bumps into a wall on the target
            is paid too.
    """

    size: int = 8
    horizon: int = 100
    generator: str = "pillars"
    avoid_target: bool = False
    figures: ClassVar[str] = "esmeta.analysis.trials:draw_maze"

    def __post_init__(self) -> None:
        check_int("size", self.size, 4, 12)
        check_int("horizon", self.horizon, 1, 100_000)
        if self.generator not in GENERATORS:
            raise ValueError(
                f"generator is {self.generator!r}; it must be one of {', '.join(GENERATORS)}: "
                f"write generator='pillars'"
            )
        if not isinstance(self.avoid_target, bool):
            raise ValueError(
                f"avoid_target is {self.avoid_target!r}; it must be true or false: "
                f"write avoid_target=false"
            )

    @property
    def spec(self) -> Spec:
        """Nine cells in view, four moves, one episode per trial."""
        return Spec(obs_size=9, action=Discrete(4), horizon=self.horizon)

    @property
    def reference(self) -> Reference:
        """Uniform moves, and shortest paths by an oracle that knows map and target."""
        return _reference(self.size, self.horizon, self.generator, self.avoid_target)

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Tasks by number, each the same whatever its batch mates.

        No board is in two splits, for any seed: a hash of its walls decides (one in eight is of
        ``test``, one of ``validation``) and a board of the wrong split is drawn again. Sizes below
        8 have too few pillar boards to divide; there board and target together are hashed, so that
        the splits share boards but no task. Data: ``walls`` bool ``[1, B, side, side]``,
        ``target`` int64 ``[1, B]``, a flat cell number.
        """
        check_split(split)
        index = task_numbers(batch)
        numbers = index.flatten().cpu().numpy()
        side = maker.side_of(self.size, self.generator)
        walls = np.empty((len(numbers), side * side), dtype=bool)
        target = np.empty(len(numbers), dtype=np.int64)
        for block in np.unique(numbers // maker.BLOCK).tolist():
            here = numbers // maker.BLOCK == block
            made, goals = maker.boards(self.size, self.generator, split, rng.key, block)
            walls[here] = made[numbers[here] % maker.BLOCK]
            target[here] = goals[numbers[here] % maker.BLOCK]
        data = {
            "walls": torch.as_tensor(
                walls.reshape(1, -1, side, side), dtype=torch.bool, device=index.device
            ),
            "target": torch.as_tensor(target[None], dtype=torch.int64, device=index.device),
        }
        return Tasks(index, data)

    def make_env(self, device: torch.device | str) -> MazeEnv:
        """The environment on ``device``; tasks given to it must lie there too."""
        return MazeEnv(self, device)


class MazeEnv:
    """P x B mazes in lockstep; a step is a handful of table look-ups."""

    def __init__(self, task: Task, device: torch.device | str) -> None:
        self._task = task
        self._eye = torch.eye(4, dtype=torch.float32, device=device)

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[State, TimeStep]:
        """Start on a random free cell; all teleports are drawn here.

        The k-th hit leads to the same cell for all members, whenever it happens.
        """
        walls, target = tasks.data["walls"], tasks.data["target"]
        rows, batch, side, _ = walls.shape
        cells = side * side
        offset = cells * torch.arange(rows * batch, device=walls.device).view(rows, batch)
        free = ~walls.flatten(2)
        if self._task.avoid_target:
            free = free.scatter(2, target.unsqueeze(-1), False)
        # Stable sort: the free cells first, in order, so that a draw picks among them.
        order = torch.argsort(free.to(torch.int8), dim=-1, descending=True, stable=True)
        draws = rng.fold("dynamics").uniform(tasks.index, 2 + self._task.horizon)
        rank = (draws * free.sum(-1, keepdim=True)).to(torch.int64)
        places = torch.gather(order, 2, rank) + offset.unsqueeze(-1)
        width = 1 + self._task.horizon
        next_code = _next_cells(walls) + offset.view(1, -1, 1)
        tables = _Tables(next_code.flatten(), _views(walls), places[..., 1:].flatten())
        code = places[..., 0].expand(population, batch).contiguous()
        first_hit = width * torch.arange(rows * batch, device=walls.device).view(rows, batch)
        goal = target + offset
        state = State(
            code,
            goal,
            first_hit.expand(population, batch).contiguous(),
            torch.full_like(code, self._task.horizon),
            torch.zeros((), dtype=torch.int64, device=code.device),
            first_hit,
            goal,
            tables,
        )
        no = torch.zeros_like(code, dtype=torch.bool)
        yes = torch.ones_like(no)
        reward = torch.zeros_like(code, dtype=torch.float32)
        prev_action = reward.unsqueeze(-1).expand(-1, -1, 4)
        obs = torch.embedding(tables.views, code)
        return state, TimeStep(obs, prev_action, reward, no, no, yes, yes)

    def step(self, state: State, action: Tensor) -> tuple[State, TimeStep]:
        """One move of every agent: reward 10 on the target, then a teleport."""
        tables = state.tables
        move = torch.add(state.code, action, alpha=tables.views.shape[0])
        there = torch.take(tables.next_code, move)
        hit = there == state.target
        code = torch.where(hit, torch.take(tables.teleports, state.hits), there)
        time = state.time + 1
        timeout = time >= self._task.horizon
        over = timeout.expand(hit.shape)
        step = TimeStep(
            obs=torch.embedding(tables.views, code),
            prev_action=torch.embedding(self._eye, action),
            reward=hit.to(torch.float32) * _REWARD,
            terminated=torch.zeros_like(hit),
            truncated=(time == self._task.horizon).expand(hit.shape),
            new_episode=over,
            new_trial=over,
        )
        first = torch.where(hit, torch.minimum(state.first, time), state.first)
        target = state.target.masked_fill(timeout, -1)  # nothing is hit after the end
        hits = state.hits + hit
        return State(code, target, hits, first, time, state.first_hit, state.goal, tables), step

    def metrics(self, state: State) -> dict[str, Tensor]:
        """``success`` (1 if ever hit), ``first_reward`` (step, or the horizon), ``hits``.

        All are float32 ``[P, B]``.
        """
        hits = (state.hits - state.first_hit).to(torch.float32)
        return {
            "success": (hits > 0).to(torch.float32),
            "first_reward": state.first.to(torch.float32),
            "hits": hits,
        }


def _next_cells(walls: Tensor) -> Tensor:
    """Cell after each move, int64 ``[4, R, side**2]``, from bool ``[Q, B, side, side]``."""
    side = walls.shape[-1]
    flat = walls.flatten(2).flatten(0, 1)
    cell = torch.arange(side * side, device=walls.device)
    moved = torch.stack([cell - side, cell + side, cell - 1, cell + 1])
    moved = moved.clamp(0, side * side - 1)  # only wall cells of the border can leave the board
    return torch.where(flat[:, moved].transpose(0, 1), cell, moved.unsqueeze(1))


def _views(walls: Tensor) -> Tensor:
    """3 x 3 surroundings of every cell, float32 ``[R * side**2, 9]``; walls and outside are 1."""
    flat = walls.flatten(0, 1).to(torch.float32)
    padded = torch.nn.functional.pad(flat, (1, 1, 1, 1), value=1.0)
    return padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(0, 2).flatten(1).contiguous()


@functools.cache
def _reference(size: int, horizon: int, generator: str, avoid_target: bool) -> Reference:
    """Exact expectations, averaged over boards."""
    even = size - size % 2 if generator == "pillars" else size
    if horizon == 100 and not avoid_target:
        random, best = _MEASURED[generator, even]
        boards = "4096"
    else:
        parts = []
        for split, block, eighths in _SAMPLE:
            made = maker.boards(size, generator, split, 0, block)
            parts.append([part[: maker.BLOCK * eighths // 8] for part in made])
        walls, target = (np.concatenate(part) for part in zip(*parts, strict=True))
        options = {"avoid_target": avoid_target}
        random = _REWARD * maker.random_hits(walls, target, horizon, **options)[0]
        best = _REWARD * float(maker.oracle_hits(walls, target, horizon, **options).mean())
        boards = "2048"
    note = f"mean over {boards} boards; random: uniform moves; best: shortest paths on a known map"
    return Reference(random, best, note)


def render(state: State, p: int, b: int, scale: int = 16) -> np.ndarray:
    """Picture of trial ``[p, b]``: uint8 ``[side * scale, side * scale, 3]``.

    Walls are dark, the target is red and the agent a green square inside its cell.
    """
    rows, batch = state.goal.shape
    cells = state.tables.views.shape[0] // (rows * batch)
    side = round(cells**0.5)
    row = (p if rows > 1 else 0) * batch + b
    walls = state.tables.views[row * cells : (row + 1) * cells, 4].reshape(side, side).cpu().numpy()
    picture = np.where(walls[..., None] > 0, 60, 240).astype(np.uint8).repeat(3, axis=2)
    picture[divmod(int(state.goal.reshape(-1)[row]) % cells, side)] = (220, 60, 50)
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    y, x = (scale * part for part in divmod(int(state.code[p, b]) % cells, side))
    edge = scale // 4
    picture[y + edge : y + scale - edge, x + edge : x + scale - edge] = (30, 150, 60)
    return picture
