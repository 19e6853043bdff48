"""Copies, pickles, threads and forked processes give the same scores, or refuse."""

from __future__ import annotations

import copy
import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cloudpickle
import pytest
import torch
from conftest import environment
from test_task_conformance import CHEAP, actions_for
from torch import Tensor

import esmeta
from esmeta.agent import heads
from esmeta.capture import Captured
from esmeta.envs.remote import Node, RemoteTask
from esmeta.errors import UserError
from esmeta.objectives import epg, metagenrl, return_
from esmeta.rng import Rng
from esmeta.sharing import Turn
from esmeta.types import Fitness

torch.set_num_threads(1)

PENDULUM = {"name": "gym", "id": "Pendulum-v1"}
MIXED = ("mixed", {"parts": (PENDULUM, {"name": "hopper"}), "horizon": 12})
GYM = ("gym", {"id": "Pendulum-v1", "horizon": 12})
ROWS = ("hopper", {"engine": "rows", "horizon": 12})


def frozen(thing: Any) -> Any:
    """As Ray has it: by cloudpickle, with arrays in memory that nobody may write to."""
    parts: list[pickle.PickleBuffer] = []
    data = cloudpickle.dumps(thing, protocol=5, buffer_callback=parts.append)
    return pickle.loads(data, buffers=[bytes(part.raw()) for part in parts])


WAYS: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "cloudpickle": lambda thing: pickle.loads(cloudpickle.dumps(thing)),
    "ray": frozen,
}
PARTED = [name for name in WAYS if name != "copy"]


def evaluator_of(
    name: str, options: dict[str, Any], trials: int = 3, policy: str = "mlp", **more: Any
) -> tuple[esmeta.PopulationEvaluator, dict[str, Tensor]]:
    task = esmeta.make_task(name, **options)
    made = esmeta.make_policy(policy, task.spec, neurons=4, **more)
    return esmeta.PopulationEvaluator(made, task, trials=trials), made.init(0, 2)


def alike(one: Fitness, other: Fitness) -> bool:
    pairs = [(one.metrics[name], other.metrics[name]) for name in one.metrics]
    pairs += [(one.returns, other.returns), (one.steps, other.steps)]
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


# --- copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*esmeta.task_names(), "rows", "with simulators"])
def test_copies_of_evaluators_score_the_same(name: str) -> None:
    short = CHEAP.get(name, {} if name in ("harlow", "displacement") else {"horizon": 8})
    name, options = {"rows": ROWS, "with simulators": MIXED}.get(name, (name, short))
    (used, params), (fresh, _) = evaluator_of(name, options), evaluator_of(name, options)
    expected = used(params, seed=5)
    for way, copied in WAYS.items():
        for one in (used, fresh):
            assert alike(copied(one)(params, seed=5), expected), way
    assert alike(used(params, seed=5), expected), "the copied one is as it was"
    for way, copied in WAYS.items():
        assert copied(used.task) == used.task and copied(used.policy).shapes == used.policy.shapes
        assert copied(used.env) is not used.env, way


@pytest.mark.parametrize(
    "name", ["maze", "bandit", "point", "ant_ring", "rows", "mixed", "wheeled"]
)
def test_trials_in_tensors_go_on_in_a_copy(name: str) -> None:
    name, options = ROWS if name == "rows" else (name, CHEAP.get(name, {"horizon": 8}))
    task = esmeta.make_task(name, **options)
    env, actions = task.make_env("cpu"), actions_for(task, 6, 2, 3)
    state, _ = env.reset(task.sample(3, "train", Rng(0)), Rng(1), 2)
    for action in actions[:3]:
        state, _ = env.step(state, action)
    pairs = {way: WAYS[way]((env, state)) for way in PARTED}
    for way, (other, there) in pairs.items():
        here = state
        for action in actions[3:]:
            here, expected = env.step(here, action)
            there, got = other.step(there, action)
            assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), way


@pytest.mark.parametrize("case", [GYM, MIXED], ids=["gym", "mixed"])
def test_trials_in_simulators_refuse_copies(case: tuple[str, dict[str, Any]]) -> None:
    task = esmeta.make_task(case[0], **case[1])
    env, action = task.make_env("cpu"), actions_for(task, 1, 1, 2)[0]
    tasks = task.sample(2, "train", Rng(0))
    state, _ = env.reset(tasks, Rng(1))
    for way in PARTED:
        with pytest.raises(UserError, match="step 0 cannot be copied.*copy the evaluator"):
            WAYS[way](state)
    other = copy.deepcopy(env)
    begun, _ = other.reset(tasks, Rng(2))  # as many trials and steps as the first has
    with pytest.raises(RuntimeError, match="trials 1 at step 0 were left"):
        other.step(state, action)
    env.step(state, action)
    other.step(begun, action)


def test_a_copy_closes_its_own_simulators() -> None:
    env: Any = esmeta.make_task(*GYM[:1], **GYM[1]).make_env("cpu")
    task, action = esmeta.make_task(GYM[0], **GYM[1]), torch.zeros(1, 2, 1)
    state, _ = env.reset(task.sample(2, "train", Rng(0)), Rng(1))
    other: Any = copy.copy(env)
    other.reset(task.sample(2, "train", Rng(0)), Rng(1))
    mine, its = list(env._worlds), list(other._worlds)
    assert len(its) == 2 and not {id(world) for world in mine} & {id(world) for world in its}
    other.close()
    env.step(state, action)  # goes on


@pytest.mark.parametrize("way", PARTED)
def test_copies_of_bound_parameters_hold_their_own_memory(way: str) -> None:
    task = esmeta.make_task("maze", horizon=5)
    policy = esmeta.make_policy("metods", task.spec, neurons=16, depth=2)
    params = policy.init(3, 2)
    state = policy.initial_state(params, 4)
    _, ts = task.make_env("cpu").reset(task.sample(4, "train", Rng(0)), Rng(1), 2)
    expected = policy.step_bound(policy.bind(params), state, ts)[0].logits
    bound = policy.bind(params)
    copied = WAYS[way](bound)
    assert bound.embed.compiled is not None
    for held in (*bound.embed.compiled.padded, *bound.memory.rule.kappa):
        held.fill_(7.0)  # whoever looks there by an old address sees it
    got = policy.step_bound(copied, state, ts)[0].logits
    assert expected is not None and got is not None and torch.equal(got, expected)


def training(objective: Any, name: str, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    task = esmeta.make_task(name, horizon=64, **options)
    made = objective.make(None, task, trials=2, seed=0, device="cpu")
    params = made.init(0)
    return made, {k: v.expand(2, *v.shape[1:]).clone() for k, v in params.items()}


EPG = epg.Objective(
    period=16, buffer=32, minibatch=16, hidden=(4,), test_steps=8, test_episodes=1, chunk=4
)
METAGENRL = metagenrl.Objective(
    hidden=(4,), steps=32, period=16, update_after=16, random=16, batch=4, snippet=2, agents=2,
    test_episodes=1, capacity=64, delay=2, policy_lifetime=0, chunk=4,
)  # fmt: skip


@pytest.mark.parametrize("objective", [EPG, METAGENRL], ids=["epg", "metagenrl"])
@pytest.mark.parametrize("task", ["hopper", "gym"])
def test_copies_of_objectives_and_agents_that_learn(objective: Any, task: str) -> None:
    options = {"episode_steps": 16} | ({"id": "Pendulum-v1"} if task == "gym" else {})
    made, params = training(objective, task, **options)
    expected = made.fitness(params, 0)
    for way, copied in WAYS.items():
        assert alike(copied(made).fitness(params, 0), expected), way
    if task == "gym":
        return

    def learn(pair: Any) -> Tensor:
        made, agents = pair
        if isinstance(objective, metagenrl.Objective):
            return made.loss(params, agents)[1].detach()
        life, _ = made.lives.advance(agents, made.network.loss(params), "train")
        return made.lives.score(life, "train")[0]

    begun = (
        made.start(0, 1)
        if isinstance(objective, metagenrl.Objective)
        else made.lives.begin(torch.arange(2), "train")
    )
    copies = [WAYS[way]((made, begun)) for way in PARTED]
    expected = learn((made, begun))
    assert all(torch.equal(learn(pair), expected) for pair in copies)


def test_copies_of_the_return_and_its_lives() -> None:
    task = esmeta.make_task("hopper", horizon=12)
    policy = esmeta.make_policy("metods", task.spec, neurons=4, depth=2)
    made = return_.Objective().make(policy, task, trials=2, seed=0, device="cpu")
    params, one = policy.init(0, 2), policy.init(0, 1)
    lives, _ = made.advance(made.begin(params, 0), params, 5)
    expected, recorded = made.fitness(params, 1), made.trajectories(one, 0)[0]
    after = made.advance(lives, params, 4)[1].returns
    for way, copied in WAYS.items():
        assert alike(copied(made).fitness(params, 1), expected), way
        assert torch.equal(copied(made).trajectories(one, 0)[0].reward, recorded.reward), way
        other, there = copied((made, lives))
        assert torch.equal(other.advance(there, params, 4)[1].returns, after), way


def batch_scores(problem: Any, generation: int = 0) -> Tensor:
    batch, size = problem.generate_batch(4), problem.solution_length
    batch.access_values()[:] = torch.linspace(-1, 1, 4 * size).reshape(4, size)
    problem.generation = generation
    problem.evaluate(batch)
    return batch.evals.as_subclass(Tensor).clone()


@pytest.mark.parametrize("case", [GYM, ROWS], ids=["gym", "rows"])
def test_copies_of_evotorch_problems(case: tuple[str, dict[str, Any]]) -> None:
    problem = esmeta.evotorch_problem(evaluator_of(*case)[0], seed=1)
    expected = batch_scores(problem)
    for way, copied in WAYS.items():
        assert torch.equal(batch_scores(copied(problem)), expected), way


def test_a_copy_records_its_own_graphs() -> None:
    captured = object.__new__(Captured)
    with pytest.raises(UserError, match="only what runs on a GPU"):
        captured.__init__(torch.device("cpu"))  # type: ignore[misc]
    made = Captured.__new__(Captured, torch.device("cuda"), keep=3)
    made.__init__(torch.device("cuda"), keep=3)  # type: ignore[misc]
    made._known["seen"] = None  # type: ignore[assignment]
    other = copy.deepcopy(made)
    assert other._keep == 3 and not other._known and made._known


def test_worlds_of_other_ranks_refuse_copies_and_other_processes() -> None:
    node = object.__new__(Node)
    node.turn, node._process = Turn(), -1
    for thing in (node, RemoteTask(esmeta.make_task("maze"), node)):
        for way in PARTED:
            with pytest.raises(UserError, match="worlds of other ranks.*cannot be copied"):
                WAYS[way](thing)
    with pytest.raises(UserError, match="cannot be used in a forked process"):
        node.ask(1, 0, lambda: None)


# --- threads --------------------------------------------------------------------------------


def in_threads(call: Callable[[int], Any], count: int = 8) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


@pytest.mark.parametrize("case", [GYM, MIXED, ROWS, ("maze", {"horizon": 12})], ids=str)
def test_an_evaluator_that_threads_share(case: tuple[str, dict[str, Any]]) -> None:
    evaluator, params = evaluator_of(*case)
    expected = [evaluator(params, seed=seed) for seed in range(8)]
    got = in_threads(lambda seed: evaluator(params, seed=seed))
    assert all(alike(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("case", [GYM, MIXED, ROWS], ids=str)
def test_an_objective_that_threads_share(case: tuple[str, dict[str, Any]]) -> None:
    task = esmeta.make_task(case[0], **case[1])
    policy = esmeta.make_policy("mlp", task.spec, neurons=4)
    made = return_.Objective().make(policy, task, trials=2, seed=0, device="cpu")
    one = policy.init(0, 1)
    expected = [made.trajectories(one, step)[0].reward for step in range(8)]
    got = in_threads(lambda step: made.trajectories(one, step)[0].reward)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_problems_share_an_evaluator_but_threads_no_problem() -> None:
    evaluator, _ = evaluator_of(*GYM)
    expected = [batch_scores(esmeta.evotorch_problem(evaluator, seed=1), step) for step in range(4)]
    problems = [esmeta.evotorch_problem(evaluator, seed=1) for _ in range(4)]
    got = in_threads(lambda step: batch_scores(problems[step], step), 4)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))

    def other_thread(*_: Any) -> None:
        if looked:
            return
        looked.append(True)
        with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="another thread"):
            pool.submit(batch_scores, problems[0]).result()

    looked: list[bool] = []
    problems[0].before_eval_hook.append(other_thread)
    assert torch.equal(batch_scores(problems[0]), expected[0]) and looked == [True]


@pytest.mark.parametrize("case", [GYM, ROWS], ids=["gym", "rows"])
def test_an_evaluator_that_is_called_within_its_own_call(case: tuple[str, dict[str, Any]]) -> None:
    evaluator, params = evaluator_of(*case)
    expected, asked = evaluator(params), []

    def act(out: Any, noise: Tensor) -> Tensor:
        if not asked:
            asked.append(evaluator(params))
        return heads.sample(out, noise)

    if case is GYM:
        with pytest.raises(RuntimeError, match="were left"):
            evaluator(params, act=act)
    else:
        assert alike(evaluator(params, act=act), expected)
    assert alike(asked[0], expected) and alike(evaluator(params), expected)


# --- processes ------------------------------------------------------------------------------

PROCESSES = """
import multiprocessing, os, signal, sys, threading
import torch
import esmeta
torch.set_num_threads(2)

def made(name, neurons, **options):
    task = esmeta.make_task(name, horizon=8, **options)
    policy = esmeta.make_policy("metods", task.spec, neurons=neurons, depth=2)
    return esmeta.PopulationEvaluator(policy, task, trials=8), policy.init(0, 4)

def same(evaluator, params, expected):
    return torch.equal(evaluator(params).returns, expected)

def of_the_parent(number):
    return same(*used[number])

if __name__ == "__main__":
    pendulum = {"name": "gym", "id": "Pendulum-v1"}
    threads = [{"name": "hopper", "engine": e, "threads": 2} for e in ("rows", "batch")]
    used = [
        made("hopper", 4, engine="rows", threads=2),
        made("mixed", 4, parts=(pendulum, *({**t, "label": t["engine"]} for t in threads))),
        made("maze", 48),  # large enough that the kernels use threads of their own
    ]
    used = [(*pair, pair[0](pair[1]).returns) for pair in used]
    env = used[1][0].env._parts[0].env
    state, action = env._state, torch.zeros(4, 8, 1)
    torch.randn(1000, 1000) @ torch.randn(1000, 1000)  # starts the threads of OpenMP
    held, forked = threading.Event(), threading.Event()
    def in_the_middle_of_trials():
        with used[1][0].whole_trials(), env.turn:
            held.set()
            forked.wait()
    threading.Thread(target=in_the_middle_of_trials).start()
    held.wait()
    pid = os.fork()
    forked.set()
    if pid == 0:
        signal.alarm(240)  # who waits for ever for a lock or a thread of the parent
        try:
            env.metrics(state)
        except RuntimeError:
            sys.exit(0 if all(map(of_the_parent, range(3))) else 5)
        sys.exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(of_the_parent, range(3)).get(240) == [True] * 3
    env.metrics(state)
    assert all(map(of_the_parent, range(3)))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.starmap_async(same, used).get(240) == [True] * 3
    print("all the same")
"""


def test_pools_of_processes_forked_and_spawned(tmp_path: Any) -> None:
    script = tmp_path / "pools.py"
    script.write_text(PROCESSES)
    # Threads of OpenMP that spin while they wait take the cores from those that work.
    env = environment({"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"})
    done = subprocess.run(
        [sys.executable, str(script)], env=env, timeout=280,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.endswith("all the same\n"), done.stdout + done.stderr


@pytest.mark.slow
def test_evaluators_on_ray() -> None:
    ray: Any = importlib.import_module("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        score = ray.remote(lambda evaluator, params: evaluator(params))
        for case in (GYM, MIXED, ROWS, ("ant_ring", {"horizon": 12})):
            evaluator, params = evaluator_of(*case)
            expected = evaluator(params)
            got = ray.get([score.remote(ray.put(evaluator), params) for _ in range(2)])
            assert all(alike(one, expected) for one in got), case
    finally:
        ray.shutdown()
