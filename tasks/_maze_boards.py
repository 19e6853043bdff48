"""Boards of the maze task, made in numpy for many tasks at once, and what they are worth.

Every board is a function of the address (key, number, attempt) alone. A board is a flat bool
array of ``side * side`` cells with a closed border.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from esmeta.rng import Rng

_DENSITY = 0.75
_TEST_SHARE = 4  # one board in this many is held out, for the test or for validation
_FEW_BOARDS = 8  # below this size there are only two dozen boards or five
_SPLIT = 17  # of 24 hashes tried, the one whose two sides differ least in their mean scores
_HALF = 24  # of 51 bits of it tried, the one that halves what is held out most evenly in them
_CACHED_BLOCKS = 128
_ZERO = torch.zeros((), dtype=torch.int64, device="cpu")
BLOCK = 512  # boards made together: amortises numpy's cost per call
Boards = tuple[np.ndarray, np.ndarray]


def side_of(size: int, generator: str) -> int:
    """Cells along one side of the board, border included."""
    return 2 * (size // 2) + 1 if generator == "pillars" else size + 2


@functools.lru_cache(maxsize=_CACHED_BLOCKS)
def boards(size: int, generator: str, split: str, key: int, block: int) -> Boards:
    """Walls bool ``[BLOCK, cells]`` and target cells int64 ``[BLOCK]`` of one block of tasks."""
    numbers = torch.arange(block * BLOCK, (block + 1) * BLOCK, device="cpu")
    rng = Rng(key).fold("maze", size, generator, split)
    side = side_of(size, generator)
    weights = Rng(0).fold("maze split", _SPLIT).bits(_ZERO, 2 * side * side).numpy()
    walls = np.empty((BLOCK, side * side), dtype=bool)
    target = np.empty(BLOCK, dtype=np.int64)
    wanted = np.arange(BLOCK)
    attempt = 0
    while wanted.size:
        draws = rng.fold(attempt)
        index = numbers[torch.from_numpy(wanted)]
        made = (_pillars if generator == "pillars" else _carve)(size, draws, index)
        _fill(made.reshape(-1, side, side))
        goal = _pick(~made, draws.fold("target").uniform(index, 1).numpy()[:, 0])
        word = (made * weights[: side * side]).sum(1)
        if size < _FEW_BOARDS:
            word += weights[side * side + goal]
        good = _split_of(word.view(np.uint64)) == split
        walls[wanted[good]], target[wanted[good]] = made[good], goal[good]
        wanted = wanted[~good]
        attempt += 1
    return walls, target


def _split_of(word: np.ndarray) -> np.ndarray:
    """Names of splits ``[n]`` for hashes uint64 ``[n]``."""
    held_out = (word >> np.uint64(40)) % np.uint64(_TEST_SHARE) == 0
    first = (word >> np.uint64(_HALF)) % np.uint64(2) == 0
    return np.where(held_out, np.where(first, "test", "validation"), "train")


def _pick(free: np.ndarray, u: np.ndarray) -> np.ndarray:
    """One true cell per row of bool ``[n, cells]``, by uniform draws ``[n]``."""
    rank = (u * free.sum(1)).astype(np.int64)
    return (free.cumsum(1) > rank[:, None]).argmax(1)


def _pillars(size: int, rng: Rng, index: torch.Tensor) -> np.ndarray:
    """Walls that walk over the pillars (cells with even coordinates).

    ``density * (side // 2)**2`` times, a pillar is drawn, border included, and made a wall; from
    there the wall walks to a random neighbour pillar that is still free, until there is none. The
    original draws among all neighbours and stops after some hundred tries, which come to the same
    but for a chance below 1e-6. Draws are addressed by walk and by the number of pillars filled.
    """
    side = side_of(size, "pillars")
    half = side // 2
    walks = int(_DENSITY * half * half)
    width = half + 3  # pillars per row, with a ring that counts as filled
    count = index.shape[0]
    u = rng.uniform(index, walks + (half - 1) ** 2).numpy()
    drawn = (u[:, :walks] * (half + 1) ** 2).astype(np.int64)
    starts = (drawn // (half + 1) + 1) * width + drawn % (half + 1) + 1
    full = np.ones((count, width, width), dtype=bool)
    full[:, 2 : width - 2, 2 : width - 2] = False
    full = full.reshape(count, -1)
    walls = np.ones((count, side, side), dtype=bool)
    walls[:, 1:-1, 1:-1] = False
    walls = walls.reshape(count, -1)
    pillar = np.arange(width * width)
    cell = 2 * (pillar // width - 1) * side + 2 * (pillar % width - 1)  # wrong in the ring, unused
    step = np.array([-width, width, -1, 1])
    link = np.array([-side, side, -1, 1])
    filled = np.zeros(count, dtype=np.int64)
    for walk in range(walks):
        row, at = np.arange(count), starts[:, walk]
        full[row, at] = True
        walls[row, cell[at]] = True
        while row.size:
            free = ~full[row[:, None], at[:, None] + step]
            going = free.any(1)
            row, at, free = row[going], at[going], free[going]
            way = _pick(free, u[row, walks + filled[row]])
            walls[row, cell[at] + link[way]] = True
            at = at + step[way]
            full[row, at] = True
            walls[row, cell[at]] = True
            filled[row] += 1
    return walls


def _carve(size: int, rng: Rng, index: torch.Tensor) -> np.ndarray:
    """Cell-wise Prim carving: open a random cell that touches exactly one open cell, repeatedly."""
    side = side_of(size, "carve")
    count = index.shape[0]
    u = rng.uniform(index, size * size).numpy()
    inside = np.zeros((side, side), dtype=bool)
    inside[1:-1, 1:-1] = True
    cells = np.flatnonzero(inside)
    step = np.array([-side, side, -1, 1])
    walls = np.ones((count, side * side), dtype=bool)
    touching = np.zeros((count, side * side), dtype=np.int8)
    row = np.arange(count)
    at = cells[(u[:, 0] * cells.size).astype(np.int64)]
    for turn in range(1, size * size):
        walls[row, at] = False
        touching[row[:, None], at[:, None] + step] += 1
        candidates = walls[row] & (touching[row] == 1) & inside.reshape(-1)
        going = candidates.any(1)
        row, candidates = row[going], candidates[going]
        if not row.size:
            break
        at = _pick(candidates, u[row, turn])
    return walls


def _fill(walls: np.ndarray) -> None:
    """Add a wall to every cell without any around it, in reading order, in place.

    In order, a new wall spares its neighbours; ``walls`` is bool ``[n, side, side]``.
    """
    side = walls.shape[1]
    for y in range(1, side - 1):
        for x in range(1, side - 1):
            walls[:, y, x] |= ~walls[:, y - 1 : y + 2, x - 1 : x + 2].any(axis=(1, 2))


def distances(walls: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Steps from every cell to the target, int64 ``[n, cells]``; -1 where there is no way."""
    count, cells = walls.shape
    side = round(cells**0.5)
    found = np.full((count, side, side), -1, dtype=np.int64)
    reached = np.zeros((count, side, side), dtype=bool)
    reached.reshape(count, -1)[np.arange(count), target] = True
    free = ~walls.reshape(count, side, side)
    front, length = reached.copy(), 0
    while front.any():
        found[front] = length
        grown = np.zeros_like(front)
        grown[:, 1:] |= front[:, :-1]
        grown[:, :-1] |= front[:, 1:]
        grown[:, :, 1:] |= front[:, :, :-1]
        grown[:, :, :-1] |= front[:, :, 1:]
        front = grown & free & ~reached
        reached |= front
        length += 1
    return found.reshape(count, cells)


def oracle_hits(
    walls: np.ndarray, target: np.ndarray, horizon: int, *, avoid_target: bool = True
) -> np.ndarray:
    """Expected hits of shortest paths in ``horizon`` steps, float64 ``[n]``; exact renewal sum."""
    steps = distances(walls, target)
    if not avoid_target:
        # From the target itself: bump into a wall, or leave and come back.
        row, side = np.arange(walls.shape[0]), round(walls.shape[1] ** 0.5)
        around = target[:, None] + np.array([-side, side, -1, 1])
        steps[row, target] = np.where(walls[row[:, None], around].any(1), 1, 2)
    longest = int(steps.max())
    share = np.stack([(steps == d).sum(1) for d in range(1, longest + 1)], axis=1)
    share = share / share.sum(1, keepdims=True)
    hits = np.zeros((walls.shape[0], horizon + 1))
    for left in range(1, horizon + 1):
        reach = min(longest, left)
        after = 1.0 + hits[:, left - reach : left][:, ::-1]  # after paths of 1, 2, ... steps
        hits[:, left] = (share[:, :reach] * after).sum(1)
    return hits[:, horizon]


def random_hits(
    walls: np.ndarray, target: np.ndarray, horizon: int, *, avoid_target: bool = True
) -> tuple[float, float]:
    """Mean hits and share of trials with a hit under uniform moves; exact for the given boards."""
    count, cells = walls.shape
    side = round(cells**0.5)
    row = np.arange(count)
    others = ~walls
    others[row, target] = not avoid_target
    spread = others / others.sum(1, keepdims=True)
    free = (~walls).reshape(count, side, side)
    exits = np.zeros((count, side, side))
    shifts = [(1, 1), (1, -1), (2, 1), (2, -1)]
    for axis, shift in shifts:
        exits += np.roll(free, shift, axis)
    stay = (1.0 - exits / 4.0).reshape(count, cells)
    both = np.concatenate([spread, spread])  # with teleports, and without: who never hit
    hits = missed = 0.0
    for _ in range(horizon):
        grid = both.reshape(2, count, side, side)
        moved = [np.roll(grid, shift, axis + 1) / 4.0 for axis, shift in shifts]
        flow = (
            np.sum(moved, axis=0).reshape(2, count, cells) * ~walls
            + grid.reshape(2, count, cells) * stay
        )
        arrived = flow[:, row, target]
        flow[:, row, target] = 0.0
        flow[0] += arrived[0][:, None] * spread
        hits += float(arrived[0].mean())
        missed += float(arrived[1].mean())
        both = flow.reshape(2 * count, cells)
    return hits, missed
