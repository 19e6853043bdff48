"""OpenAI-ES: its gradient, its bits over ranks, and what must not move it."""

import hashlib
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esmeta.optimizers import openes
from esmeta.optimizers._noise import Noise, pair_noise
from esmeta.optimizers._population import Sample, partial_sums
from esmeta.rng import Rng
from esmeta.types import Fitness, Metrics, Params

torch.set_num_threads(1)


class Objective:
    """Scores vectors by ``value`` on 3 trials that differ by a constant; 5 steps per trial."""

    def __init__(self, value: Callable[[Tensor], Tensor]) -> None:
        self.value = value
        self.rows = 0

    def fitness(self, params: Params | Tensor, step: int) -> Fitness:
        assert isinstance(params, Tensor) and params.dtype == torch.float32
        self.rows += len(params)
        value = self.value(params.double()).unsqueeze(1)
        returns = value + torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
        return Fitness(returns, torch.full(returns.shape, 5))


class Ranks:
    """Ranks as threads of this process, with the semantics of a real communicator."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def comm(self, rank: int) -> "RankComm":
        return RankComm(self, rank)


class RankComm:
    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank, self.size = ranks, rank, ranks.size

    def _all(self, value: Any) -> list[Any]:
        self.ranks.slots[self.rank] = value
        self.ranks.barrier.wait(30)
        values = list(self.ranks.slots)
        self.ranks.barrier.wait(30)
        return values

    def gather_rows(self, local: Tensor, counts: list[int]) -> Tensor:
        assert local.dtype == torch.float64 and local.shape[0] == counts[self.rank]
        return torch.cat([part.clone() for part in self._all(local)])

    def sum_exact(self, value: Tensor) -> Tensor:
        assert value.dtype == torch.int64
        return torch.stack(self._all(value)).sum(dim=0)

    def bcast(self, value: Tensor) -> Tensor:
        values = self._all(value.clone())
        assert all(v.shape == values[0].shape and v.dtype == values[0].dtype for v in values)
        return values[0].clone()

    def same(self, digest: bytes) -> bool:
        return len(set(self._all(digest))) == 1

    def abort(self, code: int, message: str) -> None:
        self.ranks.barrier.abort()


def on_ranks(size: int, work: Callable[[RankComm], Any]) -> list[Any]:
    """The results of ``work`` on every rank; the first exception is raised."""
    ranks, results, errors = Ranks(size), [None] * size, []

    def main(rank: int) -> None:
        try:
            results[rank] = work(ranks.comm(rank))
        except BaseException as error:
            errors.append(error)
            ranks.barrier.abort()

    threads = [threading.Thread(target=main, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise min(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError))
    return results


def solo() -> RankComm:
    return Ranks(1).comm(0)


def start(size: int, value: float = 0.0) -> Params:
    half = size // 2
    return {"a": torch.full((1, half), value), "b": torch.full((1, 1, size - half), value)}


def target(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def sphere(x: Tensor) -> Tensor:
    return -((x - target(x.shape[1])) ** 2).sum(dim=1)


def ellipsoid(x: Tensor) -> Tensor:
    weights = torch.logspace(0, 2, x.shape[1], dtype=torch.float64)
    return -(weights * (x - target(x.shape[1])) ** 2).sum(dim=1)


def run(
    optimizer: Any,
    objective: Objective,
    theta: Params,
    generations: int,
    comm: RankComm | None = None,
    seed: int = 0,
    state: Any = None,
) -> tuple[Any, list[Metrics]]:
    comm = comm or solo()
    state = optimizer.init(theta, Rng(seed)) if state is None else state
    log = []
    for _ in range(generations):
        state, metrics = optimizer.step(state, objective, comm, Rng(seed))
        log.append(metrics)
    return state, log


def flat_theta(optimizer: Any, state: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in optimizer.theta(state).values()])


def digest(optimizer: Any, state: Any) -> str:
    return hashlib.sha256(flat_theta(optimizer, state).numpy().tobytes()).hexdigest()


def same_saved(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(v, two[k]) if isinstance(v, Tensor) else v == two[k] for k, v in one.items()
    )


# --- the gradient ---------------------------------------------------------------------------


def fixed_point_gradient(shaped: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
    blocks = [range(a, min(a + 8, len(noise))) for a in range(0, len(noise), 8)]
    sample = Sample(noise, np.arange(len(noise)), blocks)
    total = partial_sums(sample, Noise({"a": noise.shape[1:]}), [shaped[0::2] - shaped[1::2]])
    return total[0].astype(np.float64) / 2**36 / (2 * len(noise) * sigma)


def test_gradient_matches_the_formula_in_float64() -> None:
    noise = pair_noise(Rng(1), 0, range(53), 31)
    shaped = np.random.Generator(np.random.PCG64(0)).uniform(-0.5, 0.5, 106)
    signed = np.stack([noise, -noise], axis=1).reshape(106, 31).astype(np.float64)
    want = (shaped[:, None] * signed).sum(axis=0) / (106 * 0.05)
    got = fixed_point_gradient(shaped, noise, 0.05)
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_raw_gradient_of_a_linear_function_is_the_closed_form() -> None:
    # u = c . (theta +- sigma eps): the estimate is (1/n) sum_pairs eps eps^T c, exactly.
    slope = np.linspace(-2, 3, 10)
    noise = pair_noise(Rng(0), 0, range(32), 10).astype(np.float64)
    want = noise.T @ (noise @ slope) / 32
    seen = {}

    class Spy(openes.Optimizer):
        def _ascend(self, state: Any, gradient: np.ndarray) -> Any:
            seen["gradient"] = gradient
            return super()._ascend(state, gradient)

    objective = Objective(lambda x: x @ torch.from_numpy(slope))
    run(Spy(popsize=64, sigma=0.5, shaping="raw"), objective, start(10), 1)
    assert np.abs(seen["gradient"] - want).max() <= 1e-6 * np.abs(want).max()


def test_huge_raw_fitness_does_not_overflow() -> None:
    small = openes.Optimizer(popsize=32, shaping="raw")
    grown, _ = run(small, Objective(lambda x: 2.0**70 * sphere(x)), start(10), 1)
    plain, _ = run(small, Objective(sphere), start(10), 1)
    assert torch.allclose(flat_theta(small, grown), flat_theta(small, plain), atol=1e-6)


def reference_run(value: Callable[[Tensor], Tensor], theta: np.ndarray, steps: int) -> np.ndarray:
    """The OpenAI formula with Adam and L2, dense, in float64 (no ties occur here)."""
    popsize, sigma, rate, decay = 64, 0.1, 0.05, 0.005
    mean = square = np.zeros(len(theta))
    for t in range(steps):
        eps = pair_noise(Rng(0), t, range(popsize // 2), len(theta)).astype(np.float64)
        signed = np.stack([eps, -eps], axis=1).reshape(popsize, -1)
        fitness = value(torch.from_numpy(theta + sigma * signed)).numpy()
        shaped = np.argsort(np.argsort(fitness)) / (popsize - 1) - 0.5
        gradient = shaped @ signed / (popsize * sigma) - decay * theta
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        hat, hat2 = mean / (1 - 0.9 ** (t + 1)), square / (1 - 0.999 ** (t + 1))
        theta = theta + rate * hat / (np.sqrt(hat2) + 1e-8)
    return theta


def test_ten_generations_match_a_dense_float64_reference() -> None:
    optimizer = openes.Optimizer(popsize=64, sigma=0.1, learning_rate=0.05, weight_decay=0.005)
    state, _ = run(optimizer, Objective(sphere), start(12, 0.5), 10)
    want = reference_run(sphere, np.full(12, 0.5), 10)
    assert np.abs(flat_theta(optimizer, state).numpy() - want).max() < 2e-6


# --- what it reaches, and what must not move it ---------------------------------------------


@pytest.mark.parametrize("value", [sphere, ellipsoid])
def test_reaches_the_optimum(value: Callable[[Tensor], Tensor]) -> None:
    optimizer = openes.Optimizer(
        popsize=64, sigma=0.05, learning_rate=0.05, learning_rate_decay=0.98, sigma_decay=0.99
    )
    state, _ = run(optimizer, Objective(value), start(20), 300)
    assert value(flat_theta(optimizer, state).double()[None]).item() > -1e-2


@pytest.mark.parametrize("constant", [0.3, math.nan, math.inf])
def test_flat_generations_change_nothing(constant: float) -> None:
    optimizer = openes.Optimizer(popsize=20, weight_decay=0.1)
    moved, _ = run(optimizer, Objective(sphere), start(6, 1.0), 3)
    before = optimizer.state_dict(moved)
    nothing = Objective(lambda x: torch.full((len(x),), constant, dtype=torch.float64))
    state, log = run(optimizer, nothing, {}, 100, state=moved)
    after = optimizer.state_dict(state)
    assert after.pop("generation") == 103 and before.pop("generation") == 3
    assert same_saved(before, after)
    assert all(m["flat"] == 1.0 and m["update_norm"] == 0.0 for m in log)


def failing(bad: float) -> Callable[[Tensor], Tensor]:
    def value(x: Tensor) -> Tensor:
        plain = sphere(x)
        worst = plain.argsort()[: max(1, len(plain) // 10)]
        return plain.index_fill(0, worst, bad)

    return value


def test_nan_is_as_bad_as_minus_1e30() -> None:
    optimizer = openes.Optimizer(popsize=50)
    ends = []
    for bad in (math.nan, -1e30):
        state, log = run(optimizer, Objective(failing(bad)), start(10), 60)
        ends.append(sphere(flat_theta(optimizer, state).double()[None]).item())
    assert ends[0] == pytest.approx(ends[1], rel=0.02)
    assert log[0]["nan_members"] == 0.0


def test_metrics_of_a_generation() -> None:
    objective = Objective(failing(math.nan))
    _, (metrics,) = run(openes.Optimizer(popsize=50), objective, start(10), 1)
    assert metrics["env_steps"] == 50 * 3 * 5 and metrics["nan_members"] == 5.0
    assert metrics["fitness_min"] < metrics["fitness_mean"] < metrics["fitness_max"]
    assert metrics["flat"] == 0.0 and metrics["sigma"] == 0.05
    assert {"update_norm", "evaluate_s", "search_s", "wait_s"} <= metrics.keys()


def test_schedules_decay_to_their_floors() -> None:
    optimizer = openes.Optimizer(popsize=4, sigma=0.4, sigma_decay=0.5, sigma_min=0.09)
    _, log = run(optimizer, Objective(sphere), start(4), 4)
    assert [m["sigma"] for m in log] == [0.4, 0.2, 0.1, 0.09]
    # Adam's first step is the learning rate in every coordinate.
    optimizer = openes.Optimizer(popsize=4, learning_rate=0.1, learning_rate_decay=0.5)
    state, log = run(optimizer, Objective(sphere), start(4), 1)
    assert log[0]["update_norm"] == pytest.approx(0.1 * 2, rel=1e-5)
    frozen = openes.Optimizer(popsize=4, learning_rate=0.1, learning_rate_decay=1e-12)
    _, log = run(frozen, Objective(sphere), start(4), 2)
    assert log[0]["update_norm"] > 0.1 > 1e-6 > log[1]["update_norm"]


def test_sigma_blocks_scale_noise_and_step_per_leaf() -> None:
    seen = {}

    def value(x: Tensor) -> Tensor:
        seen.setdefault("x", x)
        return sphere(x)

    theta = {"a": torch.tensor([[1.0, 3.0]]), "b": torch.zeros(1, 500), "c": torch.zeros(1, 1)}
    optimizer = openes.Optimizer(popsize=2, sigma=0.1, sigma_blocks={"b": 10.0})
    state, _ = run(optimizer, Objective(value), theta, 1)
    spread = (seen["x"][0] - seen["x"][1]) / 2
    noise = torch.from_numpy(pair_noise(Rng(0), 0, [0], 503)).double()[0]
    units = torch.tensor([1.0] * 2 + [10.0] * 500 + [1.0], dtype=torch.float64)
    assert torch.allclose(spread, 0.1 * units * noise, atol=1e-6)
    steps = (flat_theta(optimizer, state) - torch.cat([theta["a"][0], torch.zeros(501)])).abs()
    assert torch.allclose(steps.double(), 0.02 * units, rtol=1e-3)
    scaled = openes.Optimizer(sigma_blocks="scaled").init(theta, Rng(0))
    assert (scaled.unit == 1.0).all()  # std of (1, 3) is 1; constant leaves follow


# --- ranks, resume, global state ------------------------------------------------------------


@pytest.mark.parametrize("popsize", [2, 50, 64])
def test_same_bits_for_any_number_of_ranks(popsize: int) -> None:
    optimizer = openes.Optimizer(popsize=popsize)
    hashes = set()
    for size in (1, 2, 3, 4):
        objectives = [Objective(sphere) for _ in range(size)]

        def work(comm: RankComm, objectives: list[Objective] = objectives) -> tuple[str, float]:
            state, log = run(optimizer, objectives[comm.rank], start(11), 12, comm)
            return digest(optimizer, state), log[-1]["env_steps"]

        results = on_ranks(size, work)
        hashes |= {h for h, _ in results}
        assert {steps for _, steps in results} == {popsize * 15.0}
        assert sum(o.rows for o in objectives) == 12 * popsize
    assert len(hashes) == 1


def test_disagreeing_ranks_raise_and_name_the_generation() -> None:
    optimizer = openes.Optimizer(popsize=32)

    def work(comm: RankComm) -> None:
        run(optimizer, Objective(sphere), start(5, float(comm.rank)), 1, comm)

    with pytest.raises(RuntimeError, match="generation 0"):
        on_ranks(2, work)


def test_resume_is_exact() -> None:
    optimizer = openes.Optimizer(popsize=50, weight_decay=0.01, sigma_decay=0.99)
    whole, _ = run(optimizer, Objective(sphere), start(9), 20)
    half, _ = run(optimizer, Objective(sphere), start(9), 10)
    saved = optimizer.state_dict(half)
    assert sum(v.nbytes for v in saved.values() if isinstance(v, Tensor)) <= 20 * 9 + 64
    loaded = optimizer.load_state_dict(saved, start(9))
    resumed, _ = run(optimizer, Objective(sphere), {}, 10, state=loaded)
    assert same_saved(optimizer.state_dict(resumed), optimizer.state_dict(whole))
    with pytest.raises(ValueError, match="9 parameters.*has 10"):
        optimizer.load_state_dict(saved, start(10))


def test_global_generators_are_neither_read_nor_moved() -> None:
    optimizer, states = openes.Optimizer(popsize=32), []
    for poison in (1, 2):
        torch.manual_seed(poison)
        np.random.seed(poison)
        before = torch.get_rng_state(), np.random.get_state()[1]
        states.append(digest(optimizer, run(optimizer, Objective(sphere), start(5), 5)[0]))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()
    assert states[0] == states[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"popsize": 1}, "popsize = 1.*even"),
        ({"popsize": 7}, "popsize = 7.*even"),
        ({"popsize": 0}, "popsize = 0"),
        ({"popsize": True}, "popsize = True"),
        ({"popsize": 4.0}, "popsize = 4.0"),
        ({"sigma": 0.0}, "sigma = 0.0.*> 0"),
        ({"sigma": math.inf}, "sigma = inf"),
        ({"learning_rate": math.nan}, "learning_rate = nan.*finite"),
        ({"learning_rate": -1.0}, "learning_rate = -1.0"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"beta1": 1.0}, r"beta1 = 1.0.*\[0, 1\)"),
        ({"sigma_decay": 1.5}, r"sigma_decay = 1.5.*\(0, 1\]"),
        ({"shaping": "rank"}, "shaping = 'rank'.*centered"),
        ({"sigma_blocks": "on"}, "sigma_blocks = 'on'"),
        ({"sigma_blocks": {"a": 0.0}}, "sigma_blocks.a = 0.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        openes.Optimizer(**options)


def test_unknown_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match="no leaf is named 'z'.*a, b"):
        openes.Optimizer(sigma_blocks={"z": 1.0}).init(start(4), Rng(0))
