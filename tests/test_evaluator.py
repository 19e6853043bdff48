"""Fitness of a population: the same bits for any split of members, trials and calls."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esmeta import PopulationEvaluator, make_policy, make_task, ravel, task_names, unravel
from esmeta import rollout as loop
from esmeta.errors import EnvFailure
from esmeta.rng import Rng
from esmeta.types import Fitness, Params

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "metods-base": ("metods", {"variant": "base", "w0": "sampled", "alpha_std": 0.3}),
    "metods-linear": ("metods", {"variant": "linear", "alpha_std": 0.3}),
    "rl2": ("rl2", {}),
    "lstm": ("lstm", {}),
    "mlp": ("mlp", {}),
}
# Short, and long enough that one wrong bit in an action changes a return.
TASKS: dict[str, dict[str, Any]] = {
    "bandit": {},
    "displacement": {"horizon": 20, "episode_steps": 7},
    "gym": {"horizon": 20},
    "harlow": {"horizon": 40},
    "maze": {"size": 5, "horizon": 40},
    "navigation": {"horizon": 20},
    "pendulum": {"horizon": 20, "episode_steps": 9},
    "point": {"horizon": 20, "episodes": 2},
}
# All others simulate bodies, slowly; they meet one policy each.
BODIES = {name: {"horizon": 6} for name in task_names() if name not in TASKS}
CASES = [(task, policy) for task in TASKS for policy in POLICIES]
CASES += [(task, "metods-base") for task in BODIES]
POPULATION, TRIALS = 7, 11


def make(
    task_name: str, policy_name: str, neurons: int = 9, **options: Any
) -> tuple[PopulationEvaluator, Params]:
    task = make_task(task_name, **(TASKS | BODIES).get(task_name, {}))
    name, policy_options = POLICIES[policy_name]
    policy = make_policy(name, task.spec, neurons=neurons, **policy_options)
    draw = torch.Generator().manual_seed(0)
    params = {
        name: leaf + 0.3 * torch.randn(leaf.shape, generator=draw)
        for name, leaf in policy.init(0, POPULATION).items()
    }
    return PopulationEvaluator(policy, task, trials=TRIALS, **options), params


def assert_same(one: Fitness, two: Fitness) -> None:
    assert torch.equal(one.returns, two.returns)
    assert torch.equal(one.steps, two.steps)
    assert one.metrics.keys() == two.metrics.keys()
    for name, values in one.metrics.items():
        assert torch.equal(values.nan_to_num(-7), two.metrics[name].nan_to_num(-7)), name


def rows(fitness: Fitness, members: Any = slice(None), trials: Any = slice(None)) -> Fitness:
    def cut(leaf: Tensor) -> Tensor:
        return leaf[members][:, trials]

    metrics = {name: cut(leaf) for name, leaf in fitness.metrics.items()}
    return Fitness(cut(fitness.returns), cut(fitness.steps), metrics)


def some(params: Params, members: Any) -> Params:
    return {name: leaf[members] for name, leaf in params.items()}


@pytest.mark.parametrize(("task_name", "policy_name"), CASES)
def test_same_bits_for_any_split(task_name: str, policy_name: str) -> None:
    evaluator, params = make(task_name, policy_name)
    whole = evaluator(params, seed=3)
    assert whole.returns.shape == whole.steps.shape == (POPULATION, TRIALS)
    assert whole.returns.dtype == torch.float64 and whole.steps.dtype == torch.int64
    assert len(whole.returns.unique()) > 2, "returns must differ for this to say anything"
    for chunk in (2, 3, 5, 16):
        evaluator.chunk = chunk
        assert_same(evaluator(params, seed=3), whole)
    evaluator.chunk = None
    for members in (slice(0, 1), slice(6, 7), slice(2, 5), slice(1, 7), [4, 0, 2]):
        assert_same(evaluator(some(params, members), seed=3), rows(whole, members))
    for low, high in ((0, 1), (1, 4), (4, 11)):
        part = evaluator(params, seed=3, index=torch.arange(low, high))
        assert_same(part, rows(whole, trials=slice(low, high)))
    order = [5, 10, 0, 3]
    part = evaluator(some(params, [3]), seed=3, index=torch.tensor(order))
    assert_same(part, rows(whole, [3], order))
    flat = ravel(params)
    assert flat.shape == (POPULATION, evaluator.size)
    assert_same(evaluator(flat, seed=3), whole)
    assert_same(evaluator(unravel(flat, evaluator.policy), seed=3), whole)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_memory_has_the_same_bits_for_any_split(policy_name: str) -> None:
    """Finer than returns: every bit of what the heads say after a whole trial."""
    for neurons in (9, 16, 20):
        evaluator, params = make("harlow", policy_name, neurons)
        seen: dict[int, list[Tensor]] = {}

        def watch(state: Any, ts: Any) -> Any:
            for name in state:
                seen.setdefault(len(seen[-1]), []).append(state[name].clone())  # noqa: B023
            seen[-1].append(ts.obs)  # noqa: B023
            return state, ts

        def memory(members: Any, trials: Tensor, chunk: int | None) -> list[Tensor]:
            seen.clear()  # noqa: B023
            seen[-1] = []  # noqa: B023
            evaluator.chunk = chunk  # noqa: B023
            evaluator(some(params, members), seed=1, index=trials, intervene=watch)  # noqa: B023
            return seen.get(30, [])  # noqa: B023

        whole = memory(slice(None), torch.arange(TRIALS), 16)
        if policy_name == "mlp":
            assert whole == []
            continue
        for members, trials in (([3], [4]), ([5, 3], range(4, 11)), ([3, 3, 1, 0, 6], [4, 0, 9])):
            part = memory(members, torch.tensor(list(trials)), None)
            for a, b in zip(part, whole, strict=True):
                for i, member in enumerate(members):
                    got = a[i, : len(trials)] if i < len(a) else None
                    assert got is not None and torch.equal(got, b[member, list(trials)])


def test_global_generators_are_neither_read_nor_moved() -> None:
    for task_name in TASKS:
        evaluator, params = make(task_name, "metods-base")
        results = []
        for poison in (1, 2):
            torch.manual_seed(poison)
            np.random.seed(poison)
            random.seed(poison)
            before = torch.get_rng_state(), np.random.get_state(), random.getstate()
            results.append(evaluator(params, seed=0))
            assert torch.equal(before[0], torch.get_rng_state())
            after = np.random.get_state()
            assert (before[1][1] == after[1]).all() and before[1][2:] == after[2:]
            assert before[2] == random.getstate()
        assert_same(*results)


def test_fitness_is_what_one_trial_after_the_other_gives() -> None:
    """Against a plain loop: one member, one trial, one step at a time."""
    evaluator, params = make("harlow", "rl2")
    got = evaluator(params, seed=5)
    policy, task = evaluator.policy, evaluator.task
    for member, trial in ((0, 0), (3, 7), (6, 10)):
        tasks = task.sample(torch.tensor([trial]), "train", Rng(5).fold("tasks"))
        one = some(params, [member])
        env = task.make_env("cpu")
        rng = Rng(5).fold("trials", "train")
        begin = loop.start(policy, one, env, tasks, rng)
        _, state, env_state, ts, noise = begin[:5]
        total, count = 0.0, 0
        for t in range(task.spec.horizon):
            out, state = policy.step(one, state, ts._replace(new_trial=ts.new_trial & (t == 0)), t)
            assert out.logits is not None
            p = torch.softmax(out.logits[0, 0].double(), 0).cumsum(0)
            action = int((p[:-1] <= float(noise[t, 0, 0, 0])).sum())
            env_state, ts = env.step(env_state, torch.tensor([[action]]))
            total += float(ts.reward)
            count += 1
            if bool(ts.new_trial):
                break
        assert float(got.returns[member, trial]) == pytest.approx(total, abs=1e-12)
        assert int(got.steps[member, trial]) == count
    assert torch.equal(got.mean(), got.returns.mean(1))
    assert torch.equal(got.metrics["length"], got.steps.double())


def test_no_gradient_is_kept() -> None:
    evaluator, params = make("bandit", "metods-base")
    leaves = {k: v.requires_grad_() for k, v in params.items()}
    assert not evaluator(leaves).returns.requires_grad


def test_bad_requests_say_value_and_cure() -> None:
    task, policy = make_task("bandit"), make_policy("mlp", make_task("bandit").spec)
    with pytest.raises(ValueError, match="trials = 0.*>= 1.*16"):
        PopulationEvaluator(policy, task, trials=0)
    with pytest.raises(ValueError, match="chunk = 1.*at least 2"):
        PopulationEvaluator(policy, task, chunk=1)
    with pytest.raises(ValueError, match="the policy was made for.*make_policy"):
        PopulationEvaluator(policy, make_task("harlow"))
    evaluator = PopulationEvaluator(policy, task, trials=2)
    with pytest.raises(ValueError, match=rf"\(3, 5\).*D = {policy.size}"):
        evaluator(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="'train', 'validation' or 'test'"):
        evaluator(policy.init(), split="valid")
    with pytest.raises(ValueError, match="int64"):
        evaluator(policy.init(), index=torch.tensor([0.5]))
    for index in (torch.tensor([], dtype=torch.int64), torch.tensor([[0], [1]])):
        with pytest.raises(ValueError, match=r"task numbers of shape.*index \[B\]"):
            evaluator(policy.init(), index=index)
    with pytest.raises(ValueError, match="0 members.*at least one"):
        evaluator({k: v[:0] for k, v in policy.init().items()})


def test_importing_asks_mkl_for_bits_that_do_not_depend_on_alignment() -> None:
    code = "import os, esmeta; print(os.environ['MKL_CBWR'])"
    for given, want in ((None, "AUTO"), ("AVX2", "AVX2")):
        env = {k: v for k, v in os.environ.items() if k != "MKL_CBWR"}
        env |= {} if given is None else {"MKL_CBWR": given}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == want, done.stderr


def test_a_trial_that_fails_costs_no_other_of_one_member(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, params = make("bandit", "mlp")
    alone, index = some(params, slice(0, 1)), torch.arange(24)
    whole = evaluator(alone, index=index)
    env = type(evaluator.env)
    plain = env.reset

    def reset(self: Any, tasks: Any, rng: Rng, population: int = 1) -> Any:
        if (tasks.index == 13).any():
            raise EnvFailure("number 13")
        return plain(self, tasks, rng, population)

    monkeypatch.setattr(env, "reset", reset)
    with pytest.raises(EnvFailure):
        evaluator(alone, index=index)
    marked = evaluator(alone, index=index, mark_failed=True)
    assert marked.returns.isnan().nonzero().tolist() == [[0, 13]]
    kept = index != 13
    assert torch.equal(marked.returns[:, kept], whole.returns[:, kept])
