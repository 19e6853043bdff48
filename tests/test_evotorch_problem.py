"""esmeta.evotorch_problem: EvoTorch's own searchers, loggers and hooks on an esmeta evaluator."""

import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, RunFunction, environment
from searches import RankComm, on_ranks, solo, sphere
from torch import Tensor

import esmeta
from esmeta.types import Fitness

os.environ["EVOTORCH_VERBOSE_LEVEL"] = "0"
torch.set_num_threads(1)


class FakePolicy:
    """Members start near 5, far from the sphere's optimum."""

    def init(self, seed: int = 0, population: int = 1) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return {"w": torch.randn(population, 6, generator=draw) * 0.01 + 5.0}


class FakeEvaluator:
    """The sphere with an offset per task; a trial takes 2 steps; notes the tasks asked for."""

    size, trials = 6, 4

    def __init__(self, nan_above: float = math.inf, value: Callable[[Tensor], Tensor] = sphere):
        self.policy = FakePolicy()
        self.asked: list[list[int]] = []
        self.rows = 0
        self.nan_above = nan_above
        self.value = value

    def __call__(
        self, params: Tensor, seed: int = 0, split: str = "train", index: Tensor | None = None
    ) -> Fitness:
        assert type(params) is Tensor and params.dtype == torch.float32 and index is not None
        self.asked.append(index.tolist())
        self.rows += len(params)
        value = self.value(params.double())
        value = torch.where(value > self.nan_above, math.nan, value).unsqueeze(1)
        returns = value + 0.1 * index.double()
        return Fitness(returns, torch.full(returns.shape, 2))


def flat(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.float64)


def make_problem(evaluator: Any = None, comm: RankComm | None = None, seed: int = 3) -> Any:
    return esmeta.evotorch_problem(evaluator or FakeEvaluator(), comm, seed=seed)  # type: ignore[arg-type]


def pgpe(problem: Any, **options: Any) -> Any:
    from evotorch.algorithms import PGPE

    defaults = {"popsize": 10, "stdev_init": 0.3}
    rates = {"center_learning_rate": 0.3, "stdev_learning_rate": 0.1}
    return PGPE(problem, **{**defaults, **rates, **options})


def algorithm(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(problem: Any) -> Any:
        from evotorch import algorithms

        return getattr(algorithms, name)(problem, popsize=20, **options)

    return make


def genetic(name: str) -> Callable[[Any], Any]:
    def make(problem: Any) -> Any:
        from evotorch import algorithms, operators

        steps = [
            operators.OnePointCrossOver(problem, tournament_size=4),
            operators.GaussianMutation(problem, stdev=0.3),
        ]
        return getattr(algorithms, name)(problem, popsize=20, operators=steps)

    return make


SEARCHERS: dict[str, Callable[[Any], Any]] = {
    "PGPE": pgpe,
    "SNES": algorithm("SNES", stdev_init=0.5),
    "CEM": algorithm("CEM", stdev_init=2.0, parenthood_ratio=0.5, stdev_max_change=0.1),
    "XNES": algorithm("XNES", stdev_init=0.5),
    "CMAES": algorithm("CMAES", stdev_init=0.5),
    "SepCMAES": algorithm("CMAES", stdev_init=0.5, separable=True),
    "GeneticAlgorithm": genetic("GeneticAlgorithm"),
    "SteadyStateGA": genetic("SteadyStateGA"),
    "Cosyne": algorithm("Cosyne", tournament_size=4, mutation_stdev=0.3, elitism_ratio=0.1),
}
every = pytest.mark.parametrize("make", list(SEARCHERS.values()), ids=list(SEARCHERS))


def bits(search: Any) -> tuple[Tensor, Tensor]:
    """Solutions and fitness of the population."""
    batch = search.population
    return batch.values.as_subclass(Tensor).clone(), batch.evals.as_subclass(Tensor).clone()


def equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- searchers ------------------------------------------------------------------------------


@every
def test_searchers_climb(make: Callable[[Any], Any]) -> None:
    search = make(make_problem())
    search.run(60)
    batch = bits(search)[0]
    assert sphere(batch.double()).mean() > 0.1 * sphere(torch.full((1, 6), 5.0).double()).item()


@every
def test_same_bits_on_any_number_of_ranks(make: Callable[[Any], Any]) -> None:
    def work(comm: RankComm) -> tuple[Any, int, int]:
        evaluator = FakeEvaluator()
        search = make(make_problem(evaluator, comm))
        search.run(5)
        return bits(search), evaluator.rows, search.status["total_interaction_count"]

    [(alone, rows, steps)] = on_ranks(1, work)
    assert steps == rows * 4 * 2
    for size in (2, 3):
        results = on_ranks(size, work)
        assert all(equal(batch, alone) and total == steps for batch, _, total in results)
        assert sum(own for _, own, _ in results) == rows
        assert max(own for _, own, _ in results) <= -(-rows // size) + 5 * 2


@every
def test_a_pickled_searcher_goes_on_bit_by_bit(make: Callable[[Any], Any]) -> None:
    search = make(make_problem(comm=solo()))
    search.run(3)
    saved = pickle.dumps(search)
    search.run(3)
    torch.manual_seed(1)  # what a fresh process holds is another thing
    resumed = pickle.loads(saved)
    assert resumed.problem.comm is None
    resumed.problem.comm = solo()
    resumed.run(3)
    assert equal(bits(resumed), bits(search))
    assert resumed.problem.generation == search.problem.generation
    assert resumed.status["total_interaction_count"] == search.status["total_interaction_count"] > 0


def test_ranks_that_drift_apart_raise() -> None:
    def seeds(comm: RankComm) -> None:
        pgpe(make_problem(comm=comm, seed=comm.rank)).run(1)

    def late(comm: RankComm) -> None:
        search = pgpe(make_problem(comm=comm))
        search.run(2)
        if comm.rank == 1:
            search._distribution.parameters["mu"][0] += 1e-6
        search.run(1)

    with pytest.raises(RuntimeError, match="different solutions for evaluation 0.*same seed|seed"):
        on_ranks(2, seeds)
    with pytest.raises(RuntimeError, match="different solutions for evaluation 2"):
        on_ranks(2, late)


def test_global_generators_are_not_read() -> None:
    def batch(make: Callable[[Any], Any], poison: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(poison)
        search = make(make_problem())
        search.run(3)
        return bits(search)

    for name, make in SEARCHERS.items():
        assert equal(batch(make, 1), batch(make, 2)), name


def test_each_batch_gets_fresh_tasks() -> None:
    evaluator = FakeEvaluator()
    search = pgpe(make_problem(evaluator))
    search.run(3)
    assert evaluator.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    search = pgpe(make_problem(), stdev_init=0.01)
    search.run(1)  # starts at the policy's own init
    assert (search.status["center"].as_subclass(Tensor) - 5).abs().max() < 0.1


def test_interactions_are_counted_over_all_ranks() -> None:
    # 10 members x 4 trials x 2 steps are 80 steps a batch: 3 batches are the first above 200.
    def work(comm: RankComm) -> tuple[Any, list[int]]:
        sizes: list[int] = []
        search = pgpe(make_problem(comm=comm), num_interactions=200)
        search.after_step_hook.append(lambda: sizes.append(len(search.population)))
        search.run(3)
        assert search.status["total_episode_count"] == 3 * 30 * 4
        return bits(search), sizes

    [(alone, sizes)] = on_ranks(1, work)
    assert sizes == [30, 30, 30]
    assert all(equal(batch, alone) and s == sizes for batch, s in on_ranks(3, work))


def test_restarts() -> None:
    from evotorch.algorithms import SNES
    from evotorch.algorithms.restarter import IPOP, Restart

    arguments = {"popsize": 10, "stdev_init": 0.1}
    plain = Restart(make_problem(), SNES, arguments)
    direct = SNES(make_problem(), **arguments)
    plain.run(4)
    direct.run(4)
    assert plain.status["num_restarts"] == 1
    assert equal(bits(plain.search_algorithm), bits(direct))

    # A flat batch ends a search; the next one has twice the members and starts anew.
    sizes: list[int] = []
    again = IPOP(make_problem(FakeEvaluator(value=flat)), SNES, arguments)
    again.after_step_hook.append(lambda: sizes.append(again.problem.scores.fitness.numel()))
    again.run(3)
    assert sizes == [10, 20, 40] and again.status["num_restarts"] == 4


# --- loggers and hooks ----------------------------------------------------------------------


def test_loggers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from evotorch.logging import PandasLogger, PicklingLogger, StdOutLogger

    search = pgpe(make_problem())
    StdOutLogger(search, interval=2)
    table = PandasLogger(search)
    PicklingLogger(search, interval=4, directory=tmp_path, prefix="run", verbose=False)
    search.run(4)
    printed = capsys.readouterr().out
    assert re.findall(r"^ *iter : (\d+)$", printed, re.MULTILINE) == ["2", "4"]
    assert re.search(r"^ *total_interaction_count : 320$", printed, re.MULTILINE)
    frame = table.to_dataframe()
    assert frame.index.tolist() == [1, 2, 3, 4]
    assert frame["total_interaction_count"].tolist() == [80, 160, 240, 320]
    assert frame["best_eval"].tolist() == frame["pop_best_eval"].cummax().tolist()
    [saved] = [pickle.loads(path.read_bytes()) for path in tmp_path.iterdir()]
    center = search.status["center"].as_subclass(Tensor)
    assert torch.equal(saved["center"], center) and saved["best"].shape == (6,)
    assert saved["mean_eval"] == frame["mean_eval"].iloc[-1]


# --- failures -------------------------------------------------------------------------------


def test_failures_are_reported_below_the_worst() -> None:
    from evotorch import SolutionBatch

    problem = make_problem(FakeEvaluator(nan_above=-1.0))
    batch = SolutionBatch(problem, popsize=3, empty=True)
    rows = torch.stack([torch.linspace(-1, 1, 6), torch.zeros(6), torch.ones(6)])
    batch.set_values(rows)
    problem.evaluate(batch)
    evals = batch.evals[:, 0].as_subclass(Tensor)
    plain = sphere(rows.double()) + 0.15
    assert torch.allclose(evals[1:], plain[1:])
    assert evals[0] == evals[1:].min() - (evals[1:].max() - evals[1:].min())


def test_a_failure_is_worse_than_all_before_it() -> None:
    # Searchers with elites compare a child with parents of earlier batches.
    from evotorch import SolutionBatch

    problem = make_problem(FakeEvaluator(nan_above=-1.0))
    optimum = torch.linspace(-1, 1, 6)  # fails
    batch = SolutionBatch(problem, popsize=2, empty=True)

    def evaluate(one: Tensor, other: Tensor) -> list[float]:
        batch.set_values(torch.stack([one, other]))
        problem.evaluate(batch)
        return batch.evals[:, 0].tolist()

    lowest, _ = evaluate(torch.full((6,), 9.0), torch.full((6,), 3.0))
    failure, fine = evaluate(optimum, torch.ones(6))
    assert failure < lowest < fine
    assert max(evaluate(optimum, optimum)) < lowest


def test_a_bad_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed = -1"):
        make_problem(seed=-1)


# --- the real evaluator ---------------------------------------------------------------------


def test_a_real_evaluator_pickles_and_scores_training_tasks() -> None:
    from evotorch import SolutionBatch

    task = esmeta.make_task("bandit", horizon=5)
    policy = esmeta.make_policy("metods", task.spec, neurons=4, hidden=(4,), w0="sampled")
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=3)
    problem: Any = pickle.loads(pickle.dumps(esmeta.evotorch_problem(evaluator, seed=5)))
    batch = SolutionBatch(problem, popsize=4)
    problem.evaluate(batch)
    problem.evaluate(batch)
    members = batch.values.as_subclass(Tensor)
    want = evaluator(members, seed=5, split="train", index=torch.arange(3, 6)).returns.mean(dim=1)
    assert torch.equal(batch.evals[:, 0].as_subclass(Tensor), want)
    assert problem.status["total_interaction_count"] == 2 * 4 * 3 * 5


EXAMPLE = ROOT / "docs/examples/evotorch_searcher.py"


@pytest.mark.mpi
def test_the_example_learns_the_same_alone_and_on_two_ranks(
    tmp_path: Path, mpirun: RunFunction
) -> None:
    alone = subprocess.run(
        [sys.executable, str(EXAMPLE), "10"],
        cwd=tmp_path,
        env=environment(None),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert alone.returncode == 0, alone.stderr
    pair = mpirun(2, EXAMPLE, 10)
    assert pair.returncode == 0, pair.stderr
    lines = alone.stdout.splitlines()
    assert re.findall(r"iter : (\d+)", alone.stdout) == ["5", "10"]
    assert "stdev_mean" in alone.stdout and re.fullmatch(r"theta [0-9a-f]{64}", lines[-1])
    assert pair.stdout.splitlines()[-2:] == lines[-2:]
    assert len(re.findall(r"^ *iter", pair.stdout, re.MULTILINE)) == 2  # rank 0 only
