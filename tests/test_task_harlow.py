"""Harlow task: a hand-traced trial and a scripted one-shot learner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.tasks.harlow import HarlowEnv, State, Task, render
from esmeta.types import Tasks, TimeStep

LEFT, RIGHT = 0, 1


def setup(batch: int = 64, **options: Any) -> tuple[HarlowEnv, Tasks, State, TimeStep]:
    task = Task(**options)
    tasks = task.sample(batch, "train", Rng(0))
    env = task.make_env("cpu")
    return env, tasks, *env.reset(tasks, Rng(1))


def test_hand_traced_trial() -> None:
    env, tasks, state, ts = setup()
    # A trial that starts on cell 6, two cells left of fixation: it sees the cells 2 .. 9.
    row = int((state.code[0] == 6).nonzero()[0])
    assert ts.obs[0, row].tolist() == [0, 0, 0, 0, 0, 0, -1, 0]
    values = tasks.data["values"][0, row] / 10
    good = float(values[tasks.data["good"][0, row]])

    def move(action: int) -> tuple[float, list[float]]:
        nonlocal state, ts
        state, ts = env.step(state, torch.full((1, 64), action))
        return round(float(ts.reward[0, row]), 6), ts.obs[0, row].tolist()

    assert move(RIGHT) == (0.0, [0, 0, 0, 0, 0, -1, 0, 0])
    reward, seen = move(RIGHT)
    assert reward == 0.2
    assert [seen[j] for j in (0, 2, 3, 4, 5, 6)] == [0] * 6  # fixation is not shown now
    assert sorted([seen[1], seen[7]]) == sorted(values.tolist())
    worth = 1.0 if seen[1] == good else -1.0
    assert move(LEFT)[0] == 0.0
    assert move(LEFT)[0] == 0.0
    assert move(LEFT) == (worth, [0, 0, 0, 0, 0, 0, 0, -1])  # on cell 5, fixation asked for again
    assert move(LEFT)[0] == 0.0  # one cell too far: cells 0 .. 7 are in view, all empty
    assert ts.obs[0, row].tolist() == [0] * 8
    for expected in (0.0, 0.0, 0.0, 0.2):
        assert move(RIGHT)[0] == expected
    worth = 1.0 if ts.obs[0, row, 7] == good else -1.0
    rewards = [move(RIGHT)[0] for _ in range(3)]
    assert rewards == [0.0, 0.0, worth]
    scores = {name: float(score[0, row]) for name, score in env.metrics(state).items()}
    assert scores["presentations"] == 2 and scores["length"] == 13
    assert scores["accuracy_2"] == (worth + 1) / 2
    assert scores["accuracy_3"] != scores["accuracy_3"]  # NaN: not reached


def test_unmade_choices_are_forfeited_at_the_horizon() -> None:
    totals, draw = [], torch.Generator().manual_seed(0)
    actions = torch.randint(2, (60, 1, 64), generator=draw)
    for forfeit in (0.0, 0.5):
        env, _, state, _ = setup(horizon=60, forfeit=forfeit)
        rewards = []
        for action in actions:
            state, ts = env.step(state, action)
            rewards.append(ts.reward)
        assert torch.equal(ts.truncated, env.metrics(state)["presentations"] < 5)
        totals.append(torch.stack(rewards))
    made = env.metrics(state)["presentations"]
    assert 0 < made.mean() < 5
    assert torch.equal(totals[0][:-1], totals[1][:-1])
    assert torch.equal(totals[0][-1] - totals[1][-1], 0.5 * (5 - made))


def test_moves_stop_at_the_ends() -> None:
    env, _, state, _ = setup(200)
    for action, end in ((LEFT, 0), (RIGHT, 16)):
        rows = (state.code[0] == end).nonzero().flatten()
        after, _ = env.step(state, torch.full((1, 200), action))
        assert len(rows) and torch.equal(after.code[0, rows], state.code[0, rows])


def test_starts_and_sides_are_uniform() -> None:
    _, tasks, state, _ = setup(17000)
    starts = torch.bincount(state.code[0], minlength=17)
    assert (starts - 1000).abs().max() < 4 * 1000**0.5
    first_left = state.tables.lines[:, :, 1, 4 + 5] == tasks.data["values"][0, :, :1] / 10
    assert ((first_left.float().mean(0) - 0.5).abs() < 0.015).all()
    values = tasks.data["values"]
    assert abs(float(values.mean()) - 5.0) < 0.06 and values.min() >= 0 and values.max() <= 10


class OneShotLearner:
    """Looks, walks to fixation, remembers the better value after one choice. Reads only TimeStep.

    Where it sees nothing at the start, it walks right five times and then left.
    """

    def __init__(self, batch: int, *, learns: bool) -> None:
        self.learns = learns
        self.time = 0
        self.way = torch.full((batch,), RIGHT)
        self.choosing = torch.zeros(batch, dtype=torch.bool)
        self.pair = torch.zeros(batch, 2)
        self.good = torch.full((batch,), torch.nan)

    def act(self, ts: TimeStep) -> Tensor:
        obs, reward = ts.obs[0], ts.reward[0]
        chosen = reward.abs() > 0.9
        picked = torch.where(self.way == LEFT, self.pair[:, 0], self.pair[:, 1])
        better = torch.where(reward > 0, picked, self.pair.sum(1) - picked)
        if self.learns:
            self.good = torch.where(chosen, better, self.good)
        self.choosing = self.choosing & ~chosen
        arrived = (reward > 0.1) & ~chosen
        self.choosing = self.choosing | arrived
        self.pair = torch.where(arrived[:, None], obs[:, [1, 7]], self.pair)
        distance = (self.pair - self.good[:, None]).abs()
        choice = (distance[:, 1] <= distance[:, 0]).long()  # NaN compares false: left
        sees = (obs == -1).any(1)
        to_fixation = ((obs == -1).long().argmax(1) > 4).long()
        blind = torch.full_like(self.way, RIGHT if self.time < 5 else LEFT)
        way = torch.where(sees, to_fixation, blind)
        self.way = torch.where(self.choosing, torch.where(arrived, choice, self.way), way)
        self.time += 1
        return self.way.unsqueeze(0)


def run_learner(batch: int, *, learns: bool) -> tuple[Tensor, dict[str, Tensor]]:
    env, _, state, ts = setup(batch)
    learner = OneShotLearner(batch, learns=learns)
    total = torch.zeros(batch, dtype=torch.float64)
    while not ts.new_trial.all() or learner.time == 0:
        state, ts = env.step(state, learner.act(ts))
        total += ts.reward[0]
    return total, env.metrics(state)


def test_one_shot_learner_reaches_the_best_score() -> None:
    total, scores = run_learner(8000, learns=True)
    assert abs(float(total.mean()) - make_task("harlow").reference.best) < 0.05
    assert abs(float(scores["accuracy_1"].mean()) - 0.5) < 0.02
    for k in range(2, 6):
        assert (scores[f"accuracy_{k}"] == 1).all()
    assert (scores["presentations"] == 5).all()
    # 27 steps between fixations and choices, and by hand from a uniform start with that search
    # 100/17 steps to the first fixation. (A trained agent was seen to need 34.)
    assert abs(float(scores["length"].mean()) - (27 + 100 / 17)) < 0.15


def test_choice_without_memory_is_worth_one() -> None:
    total, scores = run_learner(8000, learns=False)
    assert abs(float(total.mean()) - 1.0) < 3 * 5**0.5 / 8000**0.5
    assert abs(float(scores["accuracy_4"].mean()) - 0.5) < 0.02


def test_render() -> None:
    env, _, state, _ = setup()
    row = int((state.code[0] == 6).nonzero()[0])
    picture = render(state, 0, row, scale=1)
    assert picture.shape == (3, 17, 3) and picture.dtype.name == "uint8"
    assert picture[1, 8].tolist() == [40, 90, 200] and picture[0, 6].tolist() == [30, 150, 60]
    for _ in range(2):
        state, _ = env.step(state, torch.full((1, 64), RIGHT))
    coloured = (render(state, 0, row, scale=1)[1] != 225).any(-1).nonzero()[0]
    assert coloured.tolist() == [5, 11]


def test_mirrored_twins_differ_only_in_which_object_is_good() -> None:
    task = make_task("harlow", horizon=100, mirrored=True)
    tasks = task.sample(16, "train", Rng(3))
    values, good = tasks.data["values"][0], tasks.data["good"][0]
    assert torch.equal(values[0::2], values[1::2])
    assert torch.equal(good[0::2], 1 - good[1::2])
    assert len(values.unique()) == 16 and 0 < int(good[0::2].sum()) < 8
    # The second half alone is the same tasks: an address does not depend on the batch.
    again = task.sample(torch.arange(8, 16), "train", Rng(3))
    assert torch.equal(again.data["good"][0], good[8:])


def test_mirrored_twins_cancel_the_luck_of_a_memoryless_agent() -> None:
    task = make_task("harlow", horizon=100, mirrored=True)
    env = task.make_env("cpu")
    state, ts = env.reset(task.sample(32, "train", Rng(1)), Rng(1))
    noise = Rng(9).uniform(torch.arange(16)[None], 100).repeat_interleave(2, dim=1)
    total = torch.zeros(1, 32)
    for t in range(100):
        # Walks by what it sees and by noise that twins share, never by reward.
        lean = torch.where(ts.obs.sum(-1) > 0.5, 0.8, 0.4)
        state, ts = env.step(state, (noise[..., t] < lean).to(torch.int64))
        total += ts.reward
    scores = env.metrics(state)
    first = scores["accuracy_1"][0]
    reached = ~first.isnan()
    assert int(reached.sum()) >= 20 and torch.equal(reached[0::2], reached[1::2])
    assert torch.equal(first[0::2][reached[0::2]], 1 - first[1::2][reached[1::2]])
    fixations = 0.2 * scores["presentations"][0]
    assert torch.equal(fixations[0::2], fixations[1::2])
    luck = total[0] - fixations
    assert float(luck.abs().max()) > 0.9
    assert float((luck[0::2] + luck[1::2]).abs().max()) < 0.45  # a fixation without a choice
