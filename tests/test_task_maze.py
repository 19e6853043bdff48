"""Maze: board statistics against the published table, separation of the splits, and dynamics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from esmeta.rng import Rng
from esmeta.tasks import SPLITS, make_task
from esmeta.tasks import _maze_boards as maker
from esmeta.tasks.maze import Task, render
from esmeta.types import Tasks

# size: free cells, mean distance, oracle reward, random reward, random success (1000 boards each)
TABLE = {
    4: (7.3, 2.2, 412, 41.8, 0.94),
    6: (17.3, 5.1, 197, 9.8, 0.56),
    8: (31.6, 8.3, 123, 5.1, 0.37),
    10: (50.0, 11.4, 90, 3.0, 0.24),
    12: (72.4, 14.6, 70, 2.0, 0.17),
}
# Standard deviations of a trial's random reward and of the oracle's, from the same table.
SPREAD = {4: (71, 27.3), 6: (47, 11.5), 8: (35, 7.8), 10: (27, 5.8), 12: (23, 4.6)}


def flat_boards(task: Task, split: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    data = task.sample(count, split, Rng(seed)).data
    return data["walls"][0].flatten(1).numpy(), data["target"][0].numpy()


def check_distances(walls: np.ndarray, target: int) -> dict[int, int]:
    """Breadth-first search of one board, an independent check of the vectorised one."""
    side = round(len(walls) ** 0.5)
    found, queue = {target: 0}, [target]
    for cell in queue:
        for step in (-side, side, -1, 1):
            if not walls[cell + step] and cell + step not in found:
                found[cell + step] = found[cell] + 1
                queue.append(cell + step)
    return found


@pytest.mark.parametrize("size", TABLE)
def test_statistics_match_the_table(size: int) -> None:
    cells, distance, oracle, random_reward, success = TABLE[size]
    oracle_sd, random_sd = SPREAD[size]
    task = Task(size=size)
    counts = {"train": 1500, "validation": 250, "test": 250}
    parts = [flat_boards(task, split, n) for split, n in counts.items()]
    walls, target = (np.concatenate(part) for part in zip(*parts, strict=True))
    steps = maker.distances(walls, target)
    for board in range(0, 1000, 50):
        alone = check_distances(walls[board], int(target[board]))
        assert alone == {c: steps[board, c] for c in np.flatnonzero(steps[board] >= 0)}
    free = ~walls
    assert (steps[free] >= 0).all(), "a free cell is cut off"
    assert free.sum(1).mean() == pytest.approx(cells, rel=0.01)
    mean = (np.where(free, steps, 0).sum(1) / free.sum(1)).mean()
    assert mean == pytest.approx(distance, rel=0.03)
    best = 10 * maker.oracle_hits(walls, target, 100).mean()
    # 2% below the table throughout, whose oracle may start on the target itself.
    assert best == pytest.approx(oracle, rel=0.03, abs=2 * oracle_sd / 1000**0.5)
    # The table's random walker was measured with teleports over all free cells.
    hits, ever = maker.random_hits(walls, target, 100, avoid_target=False)
    assert 10 * hits == pytest.approx(random_reward, rel=0.02, abs=3 * random_sd / 1000**0.5)
    assert ever == pytest.approx(success, abs=0.04)


@pytest.mark.parametrize("size", [6, 8, 12])
def test_reference_constants_are_what_is_computed(size: int) -> None:
    shares = {"train": 0.75, "validation": 0.125, "test": 0.125}
    parts = [maker.boards(size, "pillars", split, 3, 0) for split in shares]
    weights = np.repeat(list(shares.values()), maker.BLOCK) / maker.BLOCK
    walls, target = (np.concatenate(part) for part in zip(*parts, strict=True))
    hits = maker.oracle_hits(walls, target, 100, avoid_target=False)
    best = 10 * (hits * weights).sum()
    reference = Task(size=size).reference
    assert best == pytest.approx(reference.best, rel=0.03)
    sides = [10 * maker.random_hits(*part, 100, avoid_target=False)[0] for part in parts]
    mean = sum(share * side for share, side in zip(shares.values(), sides, strict=True))
    assert mean == pytest.approx(reference.random, rel=0.05)
    held = np.split(hits, 3)[1:]
    assert 10 * held[0].mean() == pytest.approx(10 * held[1].mean(), rel=0.05), "none is easier"


def test_oracle_expectation_by_simulation() -> None:
    task = Task(size=6, avoid_target=True)
    tasks = task.sample(400, "train", Rng(0))
    env = task.make_env("cpu")
    walls, target = tasks.data["walls"][0].flatten(1).numpy(), tasks.data["target"][0].numpy()
    side = tasks.data["walls"].shape[-1]
    steps = maker.distances(walls, target)
    steps[steps < 0] = 999
    state, ts = env.reset(tasks, Rng(1))
    total = np.zeros(400)
    row = np.arange(400)
    for _ in range(100):
        cell = state.code[0].numpy() % (side * side)
        near = steps[row[:, None], cell[:, None] + np.array([-side, side, -1, 1])]
        state, ts = env.step(state, torch.from_numpy(near.argmin(1))[None])
        total += ts.reward[0].numpy()
    expected = 10 * maker.oracle_hits(walls, target, 100)
    error = (total - expected).std() / 400**0.5
    assert abs((total - expected).mean()) < 3 * error


@pytest.mark.parametrize("generator", ["pillars", "carve"])
@pytest.mark.parametrize("size", [4, 5, 8])
def test_boards_are_connected_and_views_never_empty(size: int, generator: str) -> None:
    task = Task(size=size, generator=generator)
    tasks = task.sample(300, "train", Rng(2))
    walls, target = flat_boards(task, "train", 300, seed=2)
    steps = maker.distances(walls, target)
    assert (steps[~walls] >= 0).all()
    assert not walls[np.arange(300), target].any()
    state, _ = task.make_env("cpu").reset(tasks, Rng(3))
    views = state.tables.views.view(300, -1, 9)
    assert views[torch.from_numpy(~walls)].sum(-1).min() >= 1
    assert (views[..., 4].bool().numpy() == walls).all()


def test_splits_share_no_board() -> None:
    task = make_task("maze", size=8)
    seen = {
        split: {
            board.tobytes() for seed in (0, 9) for board in flat_boards(task, split, 1024, seed)[0]
        }
        for split in SPLITS
    }
    assert len(seen["train"]) > 500 and min(len(seen[split]) for split in SPLITS) > 140
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


@pytest.mark.parametrize("size", [4, 5, 6, 7])
def test_small_sizes_share_no_task(size: int) -> None:
    seen = {}
    for split in SPLITS:
        pairs = zip(*flat_boards(Task(size=size), split, 512), strict=True)
        seen[split] = {(board.tobytes(), int(goal)) for board, goal in pairs}
    assert len(seen["train"]) > 15 and min(len(seen[split]) for split in SPLITS) > 4
    for one, other in itertools.combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_boards_are_addressed_by_number() -> None:
    task = Task()
    whole = task.sample(600, "train", Rng(0)).data
    numbers = torch.tensor([513, 3, 599, 3])
    some = task.sample(numbers, "train", Rng(0)).data
    alone = task.sample(torch.tensor([513]), "train", Rng(0)).data
    for name in whole:
        assert torch.equal(some[name], whole[name][:, numbers])
        assert torch.equal(alone[name], whole[name][:, 513:514])
    index, rng = torch.arange(40), Rng(5)
    made = maker._pillars(8, rng, index)
    assert (maker._pillars(8, rng, index[7:9]) == made[7:9]).all()
    made = maker._carve(8, rng, index)
    assert (maker._carve(8, rng, index[7:9]) == made[7:9]).all()


def test_fill_rule_in_reading_order() -> None:
    room = np.ones((1, 7, 7), dtype=bool)
    room[:, 1:-1, 1:-1] = False
    maker._fill(room)
    # The inner 3 x 3 of a 5 x 5 room lacks walls around; its first cell in reading order gets
    # one, which serves all neighbours of that cell; the corners beyond need their own.
    assert [tuple(cell) for cell in np.argwhere(room[0, 1:-1, 1:-1])] == [
        (1, 1), (1, 3), (3, 1), (3, 3)
    ]  # fmt: skip


def corridor(avoid_target: bool = True) -> tuple[Task, Tasks]:
    """Two cells in a row, the target on the left one; many trials."""
    walls = torch.ones(1, 64, 5, 5, dtype=torch.bool)
    walls[:, :, 2, 1:3] = False
    data = {"walls": walls, "target": torch.full((1, 64), 2 * 5 + 1)}
    return Task(size=4, horizon=6, avoid_target=avoid_target), Tasks(torch.arange(64)[None], data)


def test_hand_traced_corridor() -> None:
    task, tasks = corridor()
    env = task.make_env("cpu")
    state, ts = env.reset(tasks, Rng(0))
    assert (ts.obs == torch.tensor([1.0, 1, 1, 0, 0, 1, 1, 1, 1])).all()
    up, down, left, right = (torch.full((1, 64), a) for a in range(4))
    rewards = []
    for action in (up, right, left, down, left):
        state, ts = env.step(state, action)
        rewards.append(ts.reward[0, 0].item())
        assert (ts.obs[..., 3] == 0).all()  # back on the right cell: the only one to teleport to
    assert rewards == [0, 0, 10, 0, 10]
    state, ts = env.step(state, left)
    assert ts.truncated.all() and ts.new_trial.all() and (ts.reward == 10).all()
    scores = {name: score[0, 0].item() for name, score in env.metrics(state).items()}
    assert scores == {"success": 1.0, "first_reward": 3.0, "hits": 3.0}


def test_teleport_over_all_cells_pays_for_bumps_on_the_target() -> None:
    task, tasks = corridor(avoid_target=False)
    env = task.make_env("cpu")
    state, _ = env.reset(tasks, Rng(0))
    on_target = state.code == state.goal
    assert 15 < int(on_target.sum()) < 49
    _, ts = env.step(state, torch.zeros(1, 64, dtype=torch.int64))
    assert torch.equal(ts.reward > 0, on_target)


def test_never_hit_reports_the_horizon() -> None:
    task, tasks = corridor()
    env = task.make_env("cpu")
    state, _ = env.reset(tasks, Rng(0))
    for _ in range(9):
        state, _ = env.step(state, torch.zeros(1, 64, dtype=torch.int64))
    scores = {name: score[0, 0].item() for name, score in env.metrics(state).items()}
    assert scores == {"success": 0.0, "first_reward": 6.0, "hits": 0.0}


@pytest.mark.parametrize("avoid_target", [False, True])
def test_starts_and_teleports_are_uniform_over_free_cells(avoid_target: bool) -> None:
    task = Task(size=4, horizon=400, avoid_target=avoid_target)
    one = task.sample(1, "train", Rng(0))
    data = {name: leaf.repeat(1, 200, *[1] * (leaf.dim() - 2)) for name, leaf in one.data.items()}
    tasks = Tasks(torch.arange(200)[None], data)
    state, _ = task.make_env("cpu").reset(tasks, Rng(1))
    cells = data["walls"].shape[-1] ** 2
    places = torch.bincount(state.tables.teleports % cells, minlength=cells)
    starts = torch.bincount(state.code[0] % cells, minlength=cells)
    allowed = ~one.data["walls"].flatten()
    if avoid_target:
        allowed[one.data["target"].flatten()] = False
    assert torch.equal(places > 0, allowed) and torch.equal(starts > 0, allowed)
    expected = 200 * 401 / int(allowed.sum())
    assert (places[allowed] - expected).abs().max() < 4 * expected**0.5


def test_render() -> None:
    task, tasks = corridor()
    state, _ = task.make_env("cpu").reset(tasks, Rng(0))
    picture = render(state, 0, 5, scale=4)
    assert picture.shape == (20, 20, 3) and picture.dtype == np.uint8
    assert picture[0, 0].tolist() == [60, 60, 60] and picture[9, 5].tolist() == [220, 60, 50]
    assert picture[10, 10].tolist() == [30, 150, 60] and picture[8, 8].tolist() == [240, 240, 240]
