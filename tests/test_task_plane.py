"""Point robot and 2-D navigation: rewards, ends and episodes by hand, scores by simulation."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Tasks, TimeStep


def play(
    name: str, goal: list[float], actions: list[list[float]], **options: object
) -> tuple[list[TimeStep], dict[str, Tensor]]:
    """One trial with a goal of our own."""
    env = make_task(name, **options).make_env("cpu")
    tasks = Tasks(torch.tensor([[7]]), {"goal": torch.tensor([[goal]])})
    state, ts = env.reset(tasks, Rng(3))
    steps = [ts]
    for action in actions:
        state, ts = env.step(state, torch.tensor([[action]]))
        steps.append(ts)
    return steps, env.metrics(state)


def numbers(steps: list[TimeStep], field: str) -> list[float]:
    return [float(getattr(ts, field)) for ts in steps[1:]]


# Towards (0, 1) by 0.1 per step and axis, with an action that is clipped: y = 0.1, 0.15, 0.15.
MOVES = [[0.0, 3.0], [0.0, 0.5], [0.3, 0.0]]
AT_END = math.hypot(0.03, 0.85)


@pytest.mark.parametrize(
    ("options", "goal", "expected"),
    [
        ({}, [0.0, 1.0], [-0.9, -0.85, -AT_END]),
        ({"reward": "sparse", "tolerance": 0.86}, [0.0, 1.0], [0.0, 0.15, 1 - AT_END]),
        ({"reward": "gated", "tolerance": 0.85001}, [0.0, 1.0], [-1.0, -0.85, -AT_END]),
        ({"reward": "gated", "tolerance": 0.5, "radius": 2.0}, [1.6, 1.2], [-2.0, -2.0, -2.0]),
        ({"step_size": 1.0}, [0.0, 1.0], [0.0, -0.5, -math.hypot(0.3, 0.5)]),
    ],
)
def test_rewards_of_the_point(
    options: dict[str, object], goal: list[float], expected: list[float]
) -> None:
    if options.get("tolerance") == 0.85001:
        expected = [-1.0, -0.85, -1.0]  # the last place is a little too far away
    steps, _ = play("point", goal, MOVES, **options)
    assert numbers(steps, "reward") == pytest.approx(expected, abs=1e-6)
    scale = float(options.get("step_size", 0.1))  # type: ignore[arg-type]
    places = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 1.5], [0.3, 1.5]]) * scale
    assert torch.allclose(torch.stack([ts.obs[0, 0] for ts in steps]), places)
    assert torch.equal(steps[1].prev_action[0, 0], torch.tensor([0.0, 3.0])), "as it was given"


@pytest.mark.parametrize(("reward", "power"), [("distance", 1), ("squared", 2)])
def test_navigation_by_hand(reward: str, power: int) -> None:
    """Goal (0.3, 0.105): there (to 0.005) after the third move, when the episode terminates."""
    moves = [[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]
    steps, metrics = play("navigation", [0.3, 0.105], moves, reward=reward)
    far = [math.hypot(0.2, 0.005), math.hypot(0.1, 0.005), 0.005]
    expected = [*(-(d**power) for d in far), 0.0]
    assert numbers(steps, "reward") == pytest.approx(expected, abs=1e-6)
    assert numbers(steps, "terminated") == [0, 0, 1, 0]
    assert numbers(steps, "truncated") == [0, 0, 0, 0]
    assert numbers(steps, "new_trial") == [0, 0, 1, 1]
    assert float(metrics["distance"]) == pytest.approx(0.005, abs=1e-6), "frozen at the end"
    assert float(metrics["success"]) == 1.0


def test_navigation_terminates_by_coordinate_not_by_distance() -> None:
    inside, outside = [0.0995, 0.0995], [0.0, 0.0895]
    for goal, ends in ((inside, True), (outside, False)):
        steps, metrics = play("navigation", goal, [[goal[0] > 0, 1.0]])
        gap = [abs(goal[0] - 0.1 * (goal[0] > 0)), abs(goal[1] - 0.1)]
        assert (max(gap) < 0.01) == ends
        assert bool(steps[1].terminated) == ends
    steps, _ = play("navigation", inside, [[1.0, 1.0]], terminate=False)
    assert not steps[1].terminated


def test_episodes_of_a_trial() -> None:
    """Three episodes of two steps: the goal stays, the start is drawn anew, memory may go on."""
    options = {"horizon": 6, "episodes": 3, "start": "square", "goals": "square"}
    still = [[0.0, 0.0]] * 7
    steps, metrics = play("point", [0.2, -0.1], still, **options)
    assert numbers(steps, "truncated") == [0, 1, 0, 1, 0, 1, 0]
    assert numbers(steps, "new_episode") == [0, 1, 0, 1, 0, 1, 1]
    assert numbers(steps, "new_trial") == [0, 0, 0, 0, 0, 1, 1]
    places = [ts.obs[0, 0] for ts in steps]
    # The observation that ends an episode inside a trial is the next start.
    for a, b in ((0, 1), (2, 3), (4, 5)):
        assert torch.equal(places[a], places[b])
    assert torch.equal(places[6], places[5]), "the trial's last observation is its own"
    starts = torch.stack([places[0], places[2], places[4]])
    assert len(starts.unique(dim=0)) == 3 and bool((starts.abs() <= 1).all())
    distance = torch.linalg.vector_norm(starts - torch.tensor([0.2, -0.1]), dim=-1)
    expected = [-float(d) for d in distance.repeat_interleave(2)]
    assert numbers(steps, "reward") == pytest.approx([*expected, 0.0], abs=1e-6)
    for k in range(3):
        assert float(metrics[f"return_{k + 1}"]) == pytest.approx(-2 * float(distance[k]))
    _, early = play("point", [0.2, -0.1], still[:3], **options)
    assert float(early["return_2"]) == pytest.approx(-float(distance[1]))
    assert math.isnan(float(early["return_3"]))


def test_an_episode_that_terminates_makes_room_for_the_next() -> None:
    moves = [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    steps, _ = play("navigation", [0.1, 0.0], moves, horizon=6, episodes=3)
    assert numbers(steps, "terminated") == [1, 1, 0, 0]
    assert numbers(steps, "truncated") == [0, 0, 0, 1]
    assert numbers(steps, "new_trial") == [0, 0, 0, 1]
    assert torch.equal(steps[1].obs[0, 0], torch.zeros(2))


def straight(name: str, **options: object) -> tuple[float, float]:
    """Mean and standard error of an agent that knows the goal, through the environment itself."""
    task, batch = make_task(name, **options), 2000
    env = task.make_env("cpu")
    tasks = task.sample(batch, "train", Rng(4))
    state, ts = env.reset(tasks, Rng(5))
    total = torch.zeros(1, batch, dtype=torch.float64)
    for _ in range(task.spec.horizon):
        step = options.get("step_size", 0.1)
        state, ts = env.step(state, (tasks.data["goal"] - ts.obs) / step)
        total += ts.reward
    assert bool(ts.new_trial.all())
    return float(total.mean()), float(total.std()) / batch**0.5


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("point", {}),
        ("point", {"goals": "circle", "reward": "sparse", "horizon": 40}),
        ("point", {"goals": "square", "start": "square", "horizon": 40, "episodes": 2}),
        ("point", {"radius": 2.0, "horizon": 60, "reward": "gated", "tolerance": 0.5}),
        ("navigation", {}),
        ("navigation", {"reward": "squared", "horizon": 60, "episodes": 3}),
    ],
)
def test_best_is_the_straight_way(name: str, options: dict[str, object]) -> None:
    mean, error = straight(name, **options)
    assert mean == pytest.approx(make_task(name, **options).reference.best, abs=4 * error + 1e-5)


def test_best_and_random_without_drawing() -> None:
    """A goal at (1, 0) along an axis: -0.9 -0.8 .. -0.1; one step at random by quadrature."""
    points = torch.arange(2000.0, dtype=torch.float64).add(0.5).div(1000).sub(1)
    x, y = torch.meshgrid(0.1 * points, 0.1 * points, indexing="ij")
    task = make_task("point", horizon=1)
    angle = torch.arange(400, dtype=torch.float64).add(0.5).mul(math.pi / 400)
    exact = [
        -torch.hypot(x[::20, ::20] - math.cos(a), y[::20, ::20] - math.sin(a)).mean() for a in angle
    ]
    assert task.reference.random == pytest.approx(float(torch.stack(exact).mean()), abs=2e-3)
    best = torch.stack([(angle.cos().abs() - 0.1).relu(), (angle.sin().abs() - 0.1).relu()])
    assert task.reference.best == pytest.approx(-float(best.norm(dim=0).mean()), abs=2e-3)


def test_navigation_starts_as_far_away_as_goals_of_a_square_are() -> None:
    # The mean distance of a square of side 1 from its middle: (sqrt(2) + asinh(1)) / 6.
    goal = make_task("navigation").sample(20_000, "train", Rng(0)).data["goal"]
    assert float(goal.norm(dim=-1).mean()) == pytest.approx(0.3826, abs=4e-3)
    assert float(goal.abs().max()) <= 0.5


def test_goals_lie_where_they_should() -> None:
    def goals(**options: object) -> Tensor:
        return make_task("point", **options).sample(4000, "test", Rng(1)).data["goal"][0]

    for kind, lowest in (("half_circle", 0.0), ("circle", -2.0)):
        found = goals(goals=kind, radius=2.0)
        assert torch.allclose(found.norm(dim=-1), torch.tensor(2.0))
        assert float(found[:, 1].min()) == pytest.approx(lowest, abs=2e-2)
        angle = torch.atan2(found[:, 1], found[:, 0])
        assert float(angle.std()) == pytest.approx((math.pi - angle.min().item()) / 12**0.5, 0.05)
    square = goals(goals="square")
    assert float(square.min()) == pytest.approx(-1, abs=2e-2)
    assert float(square.std()) == pytest.approx(3**-0.5, rel=0.05)


def test_few_training_goals() -> None:
    task = make_task("point", train_goals=5)
    train = task.sample(12, "train", Rng(0)).data["goal"][0]
    assert torch.equal(train[:5], train[5:10]) and torch.equal(train[:2], train[10:])
    test = task.sample(12, "test", Rng(0)).data["goal"][0]
    assert len(train.unique(dim=0)) == 5 and len(test.unique(dim=0)) == 12
    assert (
        dataclasses.replace(task, train_goals=0)
        .sample(5, "train", Rng(0))
        .data["goal"][0]
        .equal(train[:5])
    )


def test_random_starts_differ_by_trial_and_are_shared_by_members() -> None:
    task = make_task("point", start="square", goals="square")
    env = task.make_env("cpu")
    tasks = task.sample(4, "train", Rng(0))
    _, first = env.reset(tasks, Rng(1), population=3)
    assert torch.equal(first.obs[0], first.obs[2]) and len(first.obs[0].unique(dim=0)) == 4
    _, other = env.reset(tasks, Rng(2), population=3)
    assert not torch.equal(first.obs, other.obs)
