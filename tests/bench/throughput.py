"""Environment steps per second of population evaluation: esmeta, naive loops and EvoTorch.

    python tests/bench/throughput.py --json throughput.json
    python tests/bench/throughput.py --quick

One process, one thread, CPU. All contenders run the same members on the same tasks with the same
action noise, and their returns are compared with esmeta's before the clock starts. Members are
MetODS as initialised, but with a larger read-out and alpha: so small as they start, actions hardly
depend on memory, and equal returns would say little (with these, full trials and 1e-3 more beta, 6
to 15% of the returns differ).

Each repeat times every contender once, in an order that rotates, so that a noisy machine hits all
alike; figures are medians over repeats. Rates and ratios are by CPU time, which for one thread is
the wall time of an idle machine; wall times stand beside them. Steps are ``fitness.steps``: those
until a trial's end, so what is computed for finished trials counts for nobody. Every contender
stops when all trials of its batch have ended.

* ``esmeta``: PopulationEvaluator.
* ``naive``: the same evaluator with the memory's step replaced by ``plastic_reference``
  (Algorithm 1 as printed), all members in one batch; ``naive, chunks`` has esmeta's batches
  (left out, like the other ``chunks``, where esmeta takes all members at once).
* ``compiled``: the naive policy step (inputs, embedding, memory, heads) under ``torch.compile``;
  the first call compiles and is not timed with the others.
* ``Problem``: an ``evotorch.Problem`` whose ``_evaluate`` runs one member alone with its B trials
  as one batch, with the naive step or with esmeta's. It scores fewer members: rates are per step,
  and its cost per member does not depend on how many there are.
* ``VecGymNE``: EvoTorch's vectorised problem. It runs a recurrent ``nn.Module`` under ``vmap``, one
  row per member, and carries the second output from step to step, so fast weights can be its hidden
  state. It offers one environment per member; here that is a gymnasium ``VectorEnv`` whose
  observation holds all B trials at once, which is kinder to it than B episodes in a row, and the
  action noise, because it draws none itself. ``chunks`` is its own ``max_num_envs``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
# Compilation is timed, so nothing may come out of an earlier run's cache.
_CACHE = tempfile.TemporaryDirectory(prefix="esmeta-throughput-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _CACHE.name
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

from esmeta.run.cli import prepare_process  # noqa: E402

# As every training run does; all contenders profit.
prepare_process()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import esmeta  # noqa: E402
from esmeta import kernels  # noqa: E402
from esmeta import rollout as loop  # noqa: E402
from esmeta.agent import heads  # noqa: E402
from esmeta.policy import Bound, Policy  # noqa: E402
from esmeta.rng import Rng  # noqa: E402
from esmeta.types import Fitness, Params, PolicyOut, State, Task, TimeStep  # noqa: E402

SEED = 0
READ_OUT = 100.0
# A rounding error can turn one action, and with it all that follows in that trial.
LEAST_SAME = 0.99


@dataclass(frozen=True)
class Workload:
    """``members`` P and ``trials`` B of one evaluation; ``alone`` members for ``Problem``."""

    task: str
    task_options: dict[str, Any]
    neurons: int
    depth: int
    alpha_std: float
    members: int
    trials: int
    alone: int


FULL = (
    Workload("harlow", {"horizon": 100}, 20, 2, 0.2, members=256, trials=16, alone=32),
    Workload("maze", {"size": 8, "horizon": 100}, 200, 4, 0.01, members=8, trials=16, alone=4),
)
QUICK = (
    Workload("harlow", {"horizon": 20}, 20, 2, 0.2, members=64, trials=16, alone=8),
    Workload("maze", {"size": 8, "horizon": 5}, 200, 4, 0.01, members=4, trials=16, alone=2),
)


@dataclass
class Contender:
    """``score`` evaluates the first ``members`` members and returns ``[members, B]`` scores."""

    name: str
    members: int
    score: Callable[[], Fitness]
    first_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    env_steps: int = 0
    same: float = 0.0
    error: float = 0.0

    def row(self, reference: float) -> dict[str, Any]:
        """Results for the table and the JSON file; ``reference`` is esmeta's rate."""
        rate = self.env_steps / statistics.median(self.seconds)
        return {
            "contender": self.name,
            "members": self.members,
            "env_steps": self.env_steps,
            "cpu_seconds": self.seconds,
            "wall_seconds": self.wall,
            "env_steps_per_cpu_s": rate,
            "esmeta_is_faster_by": reference / rate,
            "first_call_cpu_s": self.first_s,
            "identical_trials": self.same,
            "largest_return_difference": self.error,
        }


class NaiveMemory:
    """A plastic memory whose step builds every intermediate matrix; all else is ``memory``'s."""

    def __init__(self, memory: Any) -> None:
        self.size = memory.size
        self.init = memory.init
        self.initial_state = memory.initial_state

    def prepare(self, params: Params) -> Params:
        return params

    def step(
        self, params: Params, state: State, x: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, State]:
        rule = (params["alpha"], params["kappa"], params["beta"])
        y, fast = kernels.plastic_reference(state["W"], x, *rule)
        return y, {"W": fast}


def in_torch(bound: Bound) -> Bound:
    """The same with all layers in torch operations."""
    found = {k: getattr(bound, k) for k in ("embed", "head", "value")}
    layers = {k: v._replace(compiled=None) for k, v in found.items() if v is not None}
    return bound._replace(**layers)


def naive_policy(policy: Policy, compiled: bool = False) -> Policy:
    """``policy`` with Algorithm 1 as printed."""
    naive = copy.copy(policy)
    naive.memory = NaiveMemory(policy.memory)
    bind = naive.bind
    naive.bind = lambda params: in_torch(bind(params))
    if compiled:
        plain = naive.step_bound

        def step(bound: Bound, state: State, ts: TimeStep) -> tuple[PolicyOut, State]:
            return plain(bound, state, ts)

        fast = torch.compile(step, dynamic=False)
        # The step number is no input of these policies, and a changing int would recompile.
        naive.step_bound = lambda bound, state, ts, t=0, **_: fast(bound, state, ts)
    return naive


class PlasticNet(torch.nn.Module):
    """One member as VecGymNE wants it: ``(observation, W or None)`` to ``(actions [B], W)``."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], trials: int) -> None:
        super().__init__()
        self.trials = trials
        for leaf, shape in shapes.items():
            self.register_parameter(leaf.replace(".", "_"), torch.nn.Parameter(torch.zeros(shape)))

    def _mlp(self, name: str, x: Tensor, layers: int) -> Tensor:
        for i in range(layers):
            x = x @ getattr(self, f"{name}_{i}_weight") + getattr(self, f"{name}_{i}_bias")
            x = torch.tanh(x) if i < layers - 1 else x
        return x

    def forward(self, observation: Tensor, W: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = observation.view(self.trials, -1)
        x = self._mlp("embed", rows[:, :-1], 2)
        if W is None:
            W = self.memory_W0.expand(self.trials, -1, -1)
        rule = (self.memory_alpha, self.memory_kappa, self.memory_beta)
        y, W = kernels.plastic_reference(W[None], x[None], *rule)
        out = PolicyOut(self._mlp("head", y[0], 2), None, None, None)
        return heads.sample(out, rows[:, -1:]).to(x.dtype), W[0]


class Bench:
    """One workload: its members, its tasks, and everybody who scores them."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.task: Task = esmeta.make_task(work.task, **work.task_options)
        self.policy: Policy = esmeta.make_policy(
            "metods",
            self.task.spec,
            neurons=work.neurons,
            depth=work.depth,
            init="identity",
            alpha_std=work.alpha_std,
        )
        self.naive = naive_policy(self.policy)
        params = self.policy.init(seed=SEED, population=work.members)
        params["head.1.weight"] *= READ_OUT
        self.vectors = esmeta.ravel(params)
        self.index = torch.arange(work.trials)
        # As PopulationEvaluator draws them.
        self.rng = Rng(SEED).fold("trials", "train")
        self.tasks = self.task.sample(self.index, "train", Rng(SEED).fold("tasks"))
        self.env = self.task.make_env("cpu")

    def batched(self, policy: Policy, chunk: int | None) -> Callable[[], Fitness]:
        """All members by PopulationEvaluator."""
        evaluator = esmeta.PopulationEvaluator(policy, self.task, self.work.trials, chunk=chunk)
        return lambda: evaluator(self.vectors, seed=SEED)

    def chunk(self) -> int:
        """Members per batch that esmeta chooses."""
        evaluator = esmeta.PopulationEvaluator(self.policy, self.task, self.work.trials)
        return min(evaluator._members_per_batch(self.work.trials), self.work.members)

    def rollout(self, policy: Policy, vectors: Tensor) -> Fitness:
        """Members ``[P, D]`` in one batch, without the evaluator."""
        params = esmeta.unravel(vectors, policy)
        begin = loop.start(policy, params, self.env, self.tasks, self.rng)
        keep = loop.Returns(*begin.ts.reward.shape, device="cpu")
        loop.rollout(policy, self.env, begin, keep)
        return Fitness(keep.returns, keep.steps)

    def contenders(self, compiled: bool) -> list[Contender]:
        """Everybody; esmeta comes first."""
        members, alone = self.work.members, self.work.alone
        chunk = self.chunk()
        found = [
            Contender("esmeta", members, self.batched(self.policy, None)),
            Contender("naive", members, self.batched(self.naive, members)),
        ]
        if chunk < members:
            found.append(Contender("naive, chunks", members, self.batched(self.naive, chunk)))
        if not compiled:
            print("compiled: skipped, as asked")
        elif any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            torch._dynamo.reset()
            fast = [naive_policy(self.policy, compiled=True) for _ in range(2)]
            found.append(Contender("compiled", members, self.batched(fast[0], members)))
            if chunk < members:
                found.append(Contender("compiled, chunks", members, self.batched(fast[1], chunk)))
        else:
            print("compiled: skipped, torch.compile needs a C++ compiler and there is none")
        try:
            import evotorch
        except ImportError as error:
            print(f"EvoTorch: skipped, {error}")
            return found
        evotorch.tools.set_default_logger_config(logger_level=30, override=True)
        found += [
            Contender("Problem, naive", alone, member_problem(self, self.naive)),
            Contender("Problem, esmeta's step", alone, member_problem(self, self.policy)),
            Contender("VecGymNE", members, vectorised_problem(self, members)),
        ]
        if chunk < members:
            score = vectorised_problem(self, chunk)
            found.append(Contender("VecGymNE, chunks", members, score))
        return found


def member_problem(bench: Bench, policy: Policy) -> Callable[[], Fitness]:
    """EvoTorch's plain Problem: a Python loop over members."""
    from evotorch import Problem, Solution, SolutionBatch

    scores: list[Fitness] = []

    class Members(Problem):
        def _evaluate(self, solution: Solution) -> None:
            fitness = bench.rollout(policy, solution.values.clone().unsqueeze(0))
            scores.append(fitness)
            solution.set_evals(fitness.mean())

    problem = Members(
        "max",
        solution_length=policy.size,
        initial_bounds=(-1.0, 1.0),
        dtype=torch.float32,
        eval_dtype=torch.float64,
        seed=1,
    )
    batch = SolutionBatch(problem, bench.work.alone, empty=True)
    batch.set_values(bench.vectors[: bench.work.alone])

    @torch.no_grad()
    def score() -> Fitness:
        scores.clear()
        problem.evaluate(batch)
        return join(scores)

    return score


def vectorised_problem(bench: Bench, chunk: int) -> Callable[[], Fitness]:
    """EvoTorch's VecGymNE with fast weights as its hidden state."""
    import numpy as np
    from evotorch import SolutionBatch
    from evotorch.neuroevolution import VecGymNE
    from evotorch.neuroevolution.net.vecrl import BaseVectorEnv
    from gymnasium.spaces import Box

    policy, trials = bench.policy, bench.work.trials
    one = esmeta.unravel(bench.vectors[:1], policy)
    noise = loop.start(policy, one, bench.env, bench.tasks, bench.rng).noise
    like = bench.vectors[:1]
    actions = bench.task.spec.action.size
    scores: list[loop.Returns] = []

    class Trials(BaseVectorEnv):
        """Row p is all trials of member p: their inputs and action noise, flattened."""

        def __init__(self, num_envs: int) -> None:
            width = trials * (policy.input_size + 1)
            super().__init__(
                num_envs,
                Box(-np.inf, np.inf, (width,), np.float32),
                Box(0.0, actions - 1.0, (trials,), np.float32),
            )

        def _observe(self) -> Tensor:
            # Past the horizon, VecGymNE asks once more and then stops.
            now = noise[min(self._t, len(noise) - 1)].expand(self.num_envs, -1, -1)
            parts = policy.inputs.parts(self._ts, self._t, policy.spec.horizon)
            return torch.cat([*(part.to(like.dtype) for part in parts), now], -1).flatten(1)

        def reset(self, **_: Any) -> tuple[Tensor, dict]:
            self._t = 0
            self._state, self._ts = bench.env.reset(bench.tasks, bench.rng, self.num_envs)
            self._active = torch.ones_like(self._ts.new_trial)
            scores.append(loop.Returns(self.num_envs, trials, "cpu"))
            return self._observe(), {}

        def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
            before, action = self._ts, action.to(torch.int64)
            self._state, self._ts = bench.env.step(self._state, action)
            self._t += 1
            scores[-1].record(before, None, action, self._ts, self._active)
            self._active = self._active & ~self._ts.new_trial
            done = ~self._active.any(1)
            return self._observe(), self._ts.reward.mean(1), done, torch.zeros_like(done), {}

    net = PlasticNet(policy.shapes, trials)
    problem = VecGymNE(Trials, net, max_num_envs=chunk)
    assert problem.solution_length == policy.size, (problem.solution_length, policy.size)
    batch = SolutionBatch(problem, bench.work.members, empty=True)
    batch.set_values(bench.vectors)

    @torch.no_grad()
    def score() -> Fitness:
        scores.clear()
        problem.evaluate(batch)
        result = join([Fitness(part.returns, part.steps) for part in scores])
        # The last of several batches may be filled up with copies.
        return Fitness(result.returns[: len(batch)], result.steps[: len(batch)])

    return score


def join(parts: list[Fitness]) -> Fitness:
    """Members scored one after the other."""
    returns = torch.cat([part.returns for part in parts])
    return Fitness(returns, torch.cat([part.steps for part in parts]))


def cpu_with_children() -> float:
    """CPU seconds of this process and the compilers that it called."""
    return sum(os.times()[:4])


def measure(work: Workload, repeats: int, compiled: bool) -> list[dict[str, Any]]:
    """Check all contenders against esmeta, then time them in turns."""
    print(f"\n{work}", flush=True)
    contenders = Bench(work).contenders(compiled)
    expected: Fitness | None = None
    for contender in contenders:
        began = cpu_with_children()
        fitness = contender.score()
        contender.first_s = cpu_with_children() - began
        contender.env_steps = int(fitness.steps.sum())
        expected = expected or fitness
        difference = (fitness.returns - expected.returns[: contender.members]).abs()
        contender.same = float((difference == 0).double().mean())
        contender.error = float(difference.max())
        print(
            f"check {contender.name:<24} {contender.same:8.2%} of {difference.numel()} returns as "
            f"esmeta's, largest difference {contender.error:.2g}; "
            f"first call {contender.first_s:.2f} CPU s",
            flush=True,
        )
        if contender.same < LEAST_SAME:
            raise SystemExit(f"{contender.name} does not do the same work; nothing is timed")
    for turn in range(repeats):
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            wall, cpu = time.perf_counter(), time.process_time()
            contender.score()
            contender.seconds.append(time.process_time() - cpu)
            contender.wall.append(time.perf_counter() - wall)
    reference = contenders[0].env_steps / statistics.median(contenders[0].seconds)
    rows = [contender.row(reference) for contender in contenders]
    print(f"\n{'median, least and most':<24} {'P':>5} {'env steps':>10} {'CPU s':>7} ", end="")
    print(f"{'least':>7} {'most':>7} {'wall s':>7} {'steps/CPU s':>12} {'esmeta is':>10}")
    for row in rows:
        cpu = row["cpu_seconds"]
        print(
            f"{row['contender']:<24} {row['members']:>5} {row['env_steps']:>10,} "
            f"{statistics.median(cpu):>7.3f} {min(cpu):>7.3f} {max(cpu):>7.3f} "
            f"{statistics.median(row['wall_seconds']):>7.3f} "
            f"{row['env_steps_per_cpu_s']:>12,.0f} {row['esmeta_is_faster_by']:>9.2f}x",
            flush=True,
        )
    return rows


def machine() -> dict[str, Any]:
    """What the figures depend on; the load average says how noisy the machine was."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    found = {name: version(name) for name in ("torch", "evotorch", "gymnasium", "numpy")}
    return found | {
        "python": platform.python_version(),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg(),
    }


def main() -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--quick", action="store_true", help="seconds: short trials, few members")
    parser.add_argument("--only", choices=[work.task for work in FULL], help="one workload")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--repeats", type=int, help="times per contender (5; 2 with --quick)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    repeats = args.repeats or (2 if args.quick else 5)
    start = machine()
    print(json.dumps(start))
    works = [w for w in (QUICK if args.quick else FULL) if args.only in (None, w.task)]
    results = [
        {"workload": vars(work), "rows": measure(work, repeats, not args.no_compile)}
        for work in works
    ]
    if args.json:
        report = {"machine": start, "load_at_end": os.getloadavg(), "repeats": repeats}
        args.json.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
