"""NRES and PES: formulas, what they reach, the same bits on any ranks and after a stop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import searches
import torch
from searches import digest, flat_theta, on_ranks, same_saved
from torch import Tensor

from esmeta import make_policy, make_task
from esmeta.errors import UserError
from esmeta.evolution import ascent
from esmeta.evolution.noise import pair_noise
from esmeta.evolution.shaping import differences
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import nres, openes, pes
from esmeta.rng import Rng
from esmeta.types import Fitness, Lifetimes, Metrics, Params, State

torch.set_num_threads(1)


class Inner:
    """An inner lifetime that anybody could write: x is pulled towards 0 by a learned step size.

    Theta ``[D]``, D = 2, holds a step size for each of two coordinates of x, with curvatures h:
    ``x <- x - theta h x``. Every step pays ``-sum x^2``. Life number k starts from x scaled by
    ``1 + 0.1 (k % 3)``; two trials, the second twice as far.
    """

    h = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def __init__(self, life_steps: int = 8) -> None:
        self.life_steps = life_steps
        self.advanced = 0
        self.fail: Any = lambda members, life, t: torch.zeros(len(members), dtype=torch.bool)
        self.explode: Any = self.fail

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        raise AssertionError("nres runs windows")

    def begin(self, params: Params | Tensor, life: int) -> State:
        assert isinstance(params, Tensor)
        far = (1 + 0.1 * (life % 3)) * torch.tensor([1.0, 2.0], dtype=torch.float64)
        x = far[None, :, None].expand(len(params), 2, 2)
        where = torch.tensor([life, 0]).expand(len(params), 2)
        return {"x": x, "life": where[:, 0], "t": where[:, 1]}

    def advance(self, lives: State, params: Params | Tensor, steps: int) -> tuple[State, Fitness]:
        assert isinstance(params, Tensor) and params.dtype == torch.float32
        assert len(set(lives["life"].tolist())) == len(set(lives["t"].tolist())) == 1
        self.advanced += len(params)
        life, t = int(lives["life"][0]), int(lives["t"][0])
        if self.explode(params, life, t).any():
            raise OverflowError("a member exploded")
        x, a = lives["x"], params.double()[:, None, :]
        last = min(t + steps, self.life_steps)
        total = torch.zeros(x.shape[:2], dtype=torch.float64)
        for _ in range(t, last):
            x = x - a * self.h * x
            total = total - (x**2).sum(-1)
        total[self.fail(params, life, t)] = math.nan
        taken = torch.full(total.shape, last - t)
        return {"x": x, "life": lives["life"], "t": lives["t"] + steps}, Fitness(total, taken)

    def save(self, lives: State) -> State:
        return lives

    def restore(self, saved: State) -> State:
        return dict(saved)


START = {"a": torch.tensor([[0.3, 0.1]])}


def run(
    optimizer: Any,
    objective: Any,
    generations: int,
    comm: Any = None,
    state: Any = None,
    theta: Params = START,
) -> tuple[Any, list[Metrics]]:
    return searches.run(optimizer, objective, theta, generations, comm, state=state)


FOLLOW = ascent.follow


def spied(monkeypatch: pytest.MonkeyPatch, move: bool = False) -> list[np.ndarray]:
    """Where gradients of all searches are written down; theta is held still unless ``move``."""
    seen: list[np.ndarray] = []

    def follow(kind: Any, moments: Any, gradient: np.ndarray, **options: Any) -> Any:
        seen.append(gradient)
        step, moments = FOLLOW(kind, moments, gradient, **options)
        return step * move, moments

    monkeypatch.setattr(ascent, "follow", follow)
    return seen


def window_scores(
    objective: Inner, theta: np.ndarray, step: np.ndarray, life: int, steps: int
) -> np.ndarray:
    """Mean returns ``[members, windows]`` of members ``theta + step`` over a whole life."""
    rows = []
    for one in step:
        lives = objective.begin(torch.zeros(1, 2), life)
        scores = []
        for window in range(-(-objective.life_steps // steps)):
            delta = one if one.ndim == 1 else one[window]
            member = torch.from_numpy((theta + delta).astype(np.float32))[None]
            lives, fitness = objective.advance(lives, member, steps)
            scores.append(float(fitness.mean()))
        rows.append(scores)
    return np.array(rows)


# --- the formulas ---------------------------------------------------------------------------

PAIRS, SIGMA = 10, 0.05


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_a_group_sums_to_the_gradient_of_its_whole_life(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At constant theta: over the windows of a life, NRES adds up to OpenAI-ES."""
    windows = -(-8 // steps)
    seen, objective = spied(monkeypatch), Inner()
    optimizer = nres.Optimizer(popsize=2 * PAIRS, sigma=SIGMA, window=steps, shaping="raw")
    run(optimizer, objective, 3 * windows)
    theta = START["a"][0].numpy()
    phases = np.arange(PAIRS) * windows // PAIRS
    for generation in range(3 * windows):
        want = np.zeros(2)
        taking = phases <= generation
        for pair in np.flatnonzero(taking):
            birth = generation - (generation - phases[pair]) % windows
            eps = pair_noise(Rng(0), birth, [pair], 2)[0]
            scores = window_scores(objective, theta, SIGMA * np.stack([eps, -eps]), birth, steps)
            change = scores[0] - scores[1]
            want += change[generation - birth] * eps
        want /= 2 * taking.sum() * SIGMA
        np.testing.assert_allclose(seen[generation], want, rtol=2e-6, atol=1e-8)
    if windows == 1:
        return
    # Lives born at generation `windows` (phase 0): their windows alone, added up.
    pairs = np.flatnonzero(phases == 0)
    eps = pair_noise(Rng(0), windows, pairs, 2)
    members = SIGMA * np.concatenate([eps, -eps])
    parts = window_scores(objective, theta, members, windows, steps)
    whole = window_scores(objective, theta, members, windows, 8)
    np.testing.assert_allclose(parts.sum(1), whole[:, 0], rtol=1e-12)


def test_one_window_is_openes_bit_for_bit() -> None:
    task = make_task("bandit", horizon=6)
    policy = make_policy("metods", task.spec, neurons=4, hidden=(4,), head_hidden=4)
    objective = ReturnObjective(policy, task, trials=3, seed=0, device="cpu")
    theta = policy.init(0)
    options: dict[str, Any] = {
        "popsize": 22, "shaping": "raw", "sigma_decay": 0.9, "weight_decay": 0.01,
        "noise": "lowrank:1", "learning_rate_decay": 0.9,
    }  # fmt: skip
    whole, log = run(openes.Optimizer(**options), objective, 5, theta=theta)
    for kind in (nres, pes):
        if kind is pes:  # its sums are of whole directions
            options["noise"] = "full"
            whole, log = run(openes.Optimizer(**options), objective, 5, theta=theta)
        lived, log_2 = run(kind.Optimizer(**options, window=6), objective, 5, theta=theta)
        assert lived.theta.tobytes() == whole.theta.tobytes()
        assert not np.array_equal(whole.theta, openes.Optimizer().init(theta, Rng(0)).theta)
        for a, b in zip(log, log_2, strict=True):
            for name in ("fitness_mean", "env_steps", "update_norm", "sigma"):
                assert a[name] == b[name]
            assert b["life_fitness_mean"] == pytest.approx(b["fitness_mean"], rel=1e-12)


def test_pes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair, two windows, linear in theta: everything on paper."""

    class Paper(Inner):
        # Step t pays c_t a_1 and the state adds up a_2, which is paid at the next step.
        def advance(self, lives: State, params: Any, steps: int) -> tuple[State, Fitness]:
            t, x = int(lives["t"][0]), lives["x"]
            a = params.double()
            pay = (3.0 if t == 0 else 5.0) * a[:, :1] + x[:, :1, 0] * (t > 0)
            x = x + a[:, None, 1:]
            return {**lives, "x": x, "t": lives["t"] + 1}, Fitness(pay, torch.ones_like(pay).long())

    seen = spied(monkeypatch)
    optimizer = pes.Optimizer(popsize=2, sigma=0.5, window=1, shaping="raw")
    run(optimizer, Paper(life_steps=2), 4)
    e = [pair_noise(Rng(0), generation, [0], 2)[0].astype(float) for generation in range(4)]
    for birth in (0, 2):
        first, second = e[birth], e[birth + 1]
        # R+ - R- in the first window: 2 sigma 3 e_1; in the second 2 sigma (5 e'_1 + e_2).
        want = [3 * first[0] * first, (5 * second[0] + first[1]) * (first + second)]
        for k in range(2):
            np.testing.assert_allclose(seen[birth + k], want[k], rtol=1e-5)


def test_nres_by_hand_while_theta_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of a life stays when theta moves under it, and so does its sigma."""
    seen = spied(monkeypatch, move=True)
    optimizer = nres.Optimizer(popsize=2, sigma=0.2, sigma_decay=0.5, window=4, shaping="raw",
                               learning_rate=0.1)  # fmt: skip
    objective = Inner()
    thetas, state = [], optimizer.init(START, Rng(0))
    for _ in range(4):
        thetas.append(state.theta.astype(float))
        (state, log) = run(optimizer, objective, 1, state=state)
    assert log[0]["sigma"] == 0.2 / 8
    for birth in (0, 2):
        eps = pair_noise(Rng(0), birth, [0], 2)[0]
        sigma = 0.2 * 0.5**birth
        path = np.stack(thetas[birth : birth + 2])
        members = np.stack([path + sigma * eps, path - sigma * eps])
        scores = window_scores(objective, np.zeros(2), members, birth, 4)
        for k in range(2):
            want = (scores[0, k] - scores[1, k]) * eps / (2 * sigma)
            np.testing.assert_allclose(seen[birth + k], want, rtol=1e-4)


def test_differences_are_scaled_as_one() -> None:
    fitness = torch.tensor([3.0, 1.0, 0.0, 4.0, math.nan, 7.0, 5.0, 5.0], dtype=torch.float64)
    raw = differences(fitness, "raw")
    assert raw.tolist() == [1.0, -1.0, -2.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    scale = math.sqrt((4 + 16 + 0) / 3)
    scaled = differences(fitness, "zscore")
    torch.testing.assert_close(scaled, raw / scale, rtol=1e-15, atol=0)
    huge = differences(fitness * 1e300, "zscore")
    torch.testing.assert_close(huge, scaled, rtol=1e-14, atol=0)
    for flat in (torch.full((4,), math.nan), torch.ones(4)):
        assert not differences(flat.double(), "zscore").any()


class Linear(Inner):
    """Window w pays ``sum_{u <= w} G[w, u] . theta_u``, theta_u being that of window u."""

    def __init__(self, size: int = 20, windows: int = 4) -> None:
        super().__init__(windows)
        draw = torch.Generator().manual_seed(0)
        self.G = torch.randn(windows, windows, size, generator=draw, dtype=torch.float64)
        self.G *= torch.ones(windows, windows).tril()[..., None]

    def begin(self, params: Any, life: int) -> State:
        lives = super().begin(params, life)
        return {**lives, "x": torch.zeros(len(params), self.life_steps, dtype=torch.float64)}

    def advance(self, lives: State, params: Any, steps: int) -> tuple[State, Fitness]:
        t = int(lives["t"][0])
        x = lives["x"] + params.double() @ self.G[:, t].T
        pay = x[:, t : t + 1]
        return {**lives, "x": x, "t": lives["t"] + 1}, Fitness(pay, torch.ones_like(pay).long())


@pytest.mark.parametrize("kind", [nres, pes])
def test_mean_and_variance_are_those_of_the_theory(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For returns linear in theta both are known: see the sums below."""
    objective, pairs, size = Linear(), 64, 20
    seen = spied(monkeypatch)
    optimizer = kind.Optimizer(popsize=2 * pairs, sigma=0.1, window=1, shaping="raw")
    run(optimizer, objective, 1600, theta={"a": torch.zeros(1, size)})
    gradients = torch.from_numpy(np.stack(seen[3:]))
    by_window = objective.G.sum(1)
    whole = by_window.sum(0)
    mean = gradients.mean(0)
    assert torch.cosine_similarity(mean, whole, dim=0) >= 0.99
    assert mean.norm() == pytest.approx(float(whole.norm()) / 4, rel=0.05)
    # Isserlis: for xi, y jointly normal, E |xi|^2 y^2 = E|xi|^2 E y^2 + 2 |E xi y|^2.
    squares = (by_window**2).sum(1)
    if kind is nres:
        expected = (size + 1) * squares
    else:
        expected = (torch.arange(4) + 1) * size * (objective.G**2).sum((1, 2)) + squares
    # Pairs are staggered: 64 / 4 of them are in each window; means of windows are constant.
    variance = gradients.var(0).sum()
    assert variance == pytest.approx(float(expected.mean()) / pairs, rel=0.08)


# --- what it costs, what it reaches ---------------------------------------------------------


def test_every_generation_begins_and_ends_lives() -> None:
    objective = Inner()
    begun: list[tuple[int, int]] = []
    plain = objective.begin
    objective.begin = lambda p, life: begun.append((life, len(p))) or plain(p, life)  # type: ignore
    _, log = run(nres.Optimizer(popsize=24, window=2), objective, 9)
    assert begun == [(life, 6) for life in range(9)], "one in T/K = 4 pairs, in every generation"
    assert [m["popsize"] for m in log] == [6, 12, 18] + [24] * 6
    # Two steps and two trials for all who take part.
    assert [m["env_steps"] for m in log] == [24, 48, 72] + [96] * 6
    assert ["life_fitness_mean" in m for m in log] == [False] * 3 + [True] * 6
    _, log = run(nres.Optimizer(popsize=24, window=3), Inner(), 4)
    assert log[-1]["env_steps"] == 2 * (8 * 3 + 8 * 3 + 8 * 2), "the last window is shorter"


SLOWING = {"learning_rate": 0.1, "learning_rate_decay": 0.98, "learning_rate_min": 0.001}


@pytest.mark.parametrize("kind", [nres, pes])
def test_it_learns_the_step_sizes_of_an_inner_learner(kind: Any) -> None:
    optimizer = kind.Optimizer(popsize=32, sigma=0.02, window=2, **SLOWING)
    state, log = run(optimizer, Inner(), 300)
    # The best step size is 1 / h: x is 0 from the first step on.
    theta = flat_theta(optimizer, state)
    assert (theta - torch.tensor([2.0, 0.5])).abs().max() < 0.02, theta
    assert log[-1]["life_fitness_mean"] > -0.1 > -2 > log[3]["life_fitness_mean"]


# --- ranks, resume, failures ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [nres, pes])
@pytest.mark.parametrize("stop", [1, 2, 6])
def test_stopped_runs_go_on_with_other_ranks(kind: Any, stop: int) -> None:
    optimizer = kind.Optimizer(popsize=50, window=2, sigma_decay=0.9, weight_decay=0.01)
    whole, log = run(optimizer, Inner(), 10)
    half, _ = run(optimizer, Inner(), stop)
    saved = optimizer.state_dict(half)
    # theta, Adam, three thetas before: nothing of the 50 members.
    assert sum(v.nbytes for v in saved.values() if isinstance(v, Tensor)) <= (20 + 12) * 2 + 64

    def work(comm: Any) -> tuple[Any, Any]:
        state = optimizer.load_state_dict(saved, START)
        return run(optimizer, Inner(), 10 - stop, comm, state)

    for size in (1, 3):
        for state, more in on_ranks(size, work):
            assert same_saved(optimizer.state_dict(state), optimizer.state_dict(whole))
            for a, b in zip(more, log[stop:], strict=True):
                assert {k: v for k, v in a.items() if not k.endswith("_s")} == {
                    k: v for k, v in b.items() if not k.endswith("_s")
                }
    with pytest.raises(UserError, match="2 parameters.*has 3"):
        optimizer.load_state_dict(saved, {"a": torch.zeros(1, 3)})


@pytest.mark.parametrize("bad", ["nan", "raise"])
def test_failed_members_say_nothing(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A pair whose member fails has weight 0, and a raising one until its life ends."""
    optimizer = nres.Optimizer(popsize=50, window=2, sigma=0.2)
    clean, _ = run(optimizer, Inner(), 9)

    def ill(members: Tensor, life: int, t: int) -> Tensor:
        return (members[:, 0] > 0.7) & (t == 2)

    def work(comm: Any) -> tuple[str, list[float]]:
        objective = Inner()
        setattr(objective, "fail" if bad == "nan" else "explode", ill)
        state, log = run(optimizer, objective, 9, comm)
        return digest(optimizer, state), [m["nan_members"] for m in log]

    results = [result for size in (1, 3) for result in on_ranks(size, work)]
    assert len({h for h, _ in results}) == 1 and results[0][0] != digest(optimizer, clean)
    lost = results[0][1]
    assert max(lost) > 0 and lost[0] == 0.0 and all(other == lost for _, other in results)
    if bad == "raise":
        assert "members [" in capsys.readouterr().err


@pytest.mark.parametrize("constant", [0.3, math.nan])
def test_flat_generations_change_nothing(constant: float) -> None:
    class Flat(Inner):
        def advance(self, lives: State, params: Any, steps: int) -> tuple[State, Fitness]:
            lives, fitness = super().advance(lives, params, steps)
            return lives, Fitness(torch.full_like(fitness.returns, constant), fitness.steps)

    optimizer = nres.Optimizer(popsize=20, window=2, weight_decay=0.1)
    moved, _ = run(optimizer, Inner(), 5)
    state, log = run(optimizer, Flat(), 50, state=moved)
    before, after = optimizer.state_dict(moved), optimizer.state_dict(state)
    for saved in (before, after):
        del saved["generation"], saved["thetas"]
    assert same_saved(before, after)
    assert all(m["flat"] == 1.0 and m["update_norm"] == 0.0 for m in log)


def test_an_earlier_state_can_be_gone_on_with_again() -> None:
    """A step leaves the state that it was given as it was."""
    optimizer = nres.Optimizer(popsize=24, window=2)
    half, _ = run(optimizer, Inner(), 5)
    ends = [digest(optimizer, run(optimizer, Inner(), 5, state=half)[0]) for _ in range(2)]
    assert ends[0] == ends[1] == digest(optimizer, run(optimizer, Inner(), 10)[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "window = 0.*>= 1"),
        ({"shaping": "centered"}, "shaping = 'centered'.*zscore, raw"),
        ({"failed": "worst"}, "failed = 'worst'.*drop_pair, raise"),
        ({"aggregate": "worst"}, "aggregate = 'worst'.*mean"),
        ({"tasks": "per_pair"}, "tasks = 'per_pair'.*shared"),
        ({"interactions": 10}, "interactions = 10.*write interactions = 0"),
        ({"popsize": 7}, "popsize = 7.*even"),
    ],
)
def test_bad_options_say_value_and_cure(options: dict[str, Any], words: str) -> None:
    for kind in (nres, pes):
        with pytest.raises(UserError, match=words):
            kind.Optimizer(**options)


def test_bad_objectives_say_value_and_cure() -> None:
    with pytest.raises(UserError, match="window = 9: a life has 8 steps; write at most 8"):
        run(nres.Optimizer(popsize=4, window=9), Inner(), 1)

    with pytest.raises(UserError, match="Objective cannot be run in windows.*'openes'"):
        run(nres.Optimizer(popsize=4), searches.Objective(searches.sphere), 1)
    assert isinstance(Inner(), Lifetimes)
