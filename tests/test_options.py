"""Every option of policies, searches, gradients, objectives and learners changes what it says.

A row gives an option two values, in given circumstances, and says in what the results differ; what
that can be is said by the function that makes them. An option that is not handed on has the same
results for both, as would one that only the default is compared with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from searches import Windows, solo
from test_epg import objective as epg_objective
from test_metagenrl_runs import parts as metagenrl_parts
from torch import Tensor

from esmeta import names
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import learn, train
from esmeta.tasks import make_task
from esmeta.types import Fitness, Params, State, TimeStep

Given = dict[str, Any]
Results = dict[str, Any]


class Row(NamedTuple):
    """``one`` and ``two`` of an option, where others are ``given``; they differ in ``shows``."""

    one: Any
    two: Any
    shows: str
    keeps: str = ""
    given: Given = {}


def bits(*leaves: Tensor) -> list[bytes]:
    return [leaf.detach().cpu().contiguous().numpy().tobytes() for leaf in leaves]


def compare(results: Callable[[Given], Results], option: str, row: Row, default: Any) -> None:
    """The rule of every row."""
    assert row.one not in (row.two, default), "the default would do"
    one, two = (results(row.given | {option: value}) for value in (row.one, row.two))
    for what in row.shows.split():
        assert one[what] != two[what], f"{what} is the same"
    for what in row.keeps.split():
        assert one[what] == two[what], f"{what} differs"


def defaults(section: str, name: str) -> Given:
    fields = dataclasses.fields(names.load(section, name))
    return {field.name: field.default for field in fields if field.init}


def cases(section: str, rows: dict[str, dict[str, Row]]) -> Any:
    found = [(name, option, row) for name in rows for option, row in rows[name].items()]
    for name in rows:
        assert set(rows[name]) <= set(defaults(section, name)), name
    return pytest.mark.parametrize(
        ("name", "option", "row"), found, ids=[f"{name}-{option}" for name, option, _ in found]
    )


# --- policies -----------------------------------------------------------------------------------


def policy(name: str, given: Given) -> Results:
    """``shapes`` and ``init`` of the leaves, ``state`` at the start, ``out`` after four steps."""
    options = {"neurons": 4, "hidden": (3,), "head_hidden": 3} | given
    spec = make_task("pendulum", horizon=8).spec
    made = names.load("policy", name)(**options).make(spec, value=True)
    params = made.init(3)
    state = made.initial_state(params, 3)
    first = bits(*state.values())
    noise = torch.Generator().manual_seed(0)
    bound, outs = made.bind(params), []
    for t in range(4):
        obs, action = (torch.randn(1, 3, k, generator=noise) for k in (spec.obs_size, 1))
        flag = torch.full((1, 3), t == 2)
        ts = TimeStep(obs, action, torch.full((1, 3), 0.5), flag, flag, flag, flag)
        out, state = made.step_bound(bound, state, ts, t)
        assert out.mean is not None and out.std is not None and out.value is not None
        outs += bits(out.mean, out.std.expand_as(out.mean), out.value)
    return {"shapes": made.shapes, "init": bits(*params.values()), "state": first, "out": outs}


EVERY_POLICY = {
    "neurons": Row(3, 5, "shapes"),
    "hidden": Row((4,), (3, 3), "shapes"),
    "head_hidden": Row(5, 6, "shapes"),
    "extra": Row("time", "bias", "out", "shapes init"),
    "reward_input_scale": Row(0.5, 3.0, "out", "init"),
    "episode_input": Row(True, False, "shapes"),
    "std": Row("learned", "state", "shapes"),
    "std_value": Row(0.2, 0.4, "out", "init"),
    "squash_embedding": Row(True, False, "out", "shapes"),
}
POLICIES = {name: dict(EVERY_POLICY) for name in ("metods", "rl2", "lstm", "mlp")}
# Cells with input weights of their own have no linear layer between, and refuse it.
for cell in ("lstm", "rl2"):
    del POLICIES[cell]["squash_embedding"]
POLICIES["metods"] |= {
    "depth": Row(1, 3, "shapes"),
    "variant": Row("linear", "mlp", "shapes"),
    "init": Row("paper", "identity", "init", "shapes"),
    "w0": Row("sampled", "fixed", "state"),
    "alpha_std": Row(0.1, 0.5, "init", "shapes"),
    "w0_std": Row(0.1, 0.5, "state", "shapes"),
    "skip": Row(0.2, 0.8, "init", "shapes"),
}


@cases("policy", POLICIES)
def test_policies(name: str, option: str, row: Row) -> None:
    compare(functools.partial(policy, name), option, row, defaults("policy", name)[option])


# --- searches -----------------------------------------------------------------------------------


class Bumpy(Windows):
    """Four trials that disagree; two windows of a life; members far to one side may fail."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails
        self.steps: list[Any] = []

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        assert isinstance(params, Tensor)
        self.members.append(params.clone())
        self.steps.append(step if isinstance(step, int) else step.tolist())
        x = params.double().unsqueeze(1)
        goals = torch.linspace(-0.5, 1.5, 4, dtype=torch.float64)[:, None]
        scale = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
        returns = -scale * (x - goals).square().sum(-1) + torch.sin(9 * x).sum(-1)
        if self.fails:
            returns[params[:, 0] > params[:, 0].median()] = math.nan
        return Fitness(returns, torch.full(returns.shape, 5))

    def advance(self, lives: State, params: Params | Tensor, steps: int) -> tuple[State, Fitness]:
        self.steps.append(f"window of {steps}")
        return super().advance(lives, params, steps)


MATRIX = {"a": torch.linspace(-1, 1, 20).reshape(1, 4, 5), "b": 3 * torch.linspace(-1, 1, 4)[None]}


def search(name: str, given: Given) -> Results:
    """Four generations: ``members`` of the first and of ``all``; ``steps`` that were asked for;
    ``theta``; ``metrics``; or the ``error`` that ended them."""
    given = dict(given)
    objective = Bumpy(given.pop("fails", False))
    options = {"popsize": 8, "sigma": 0.3} | given
    optimizer = names.load("optimizer", name)(**options)
    state, log = optimizer.init(MATRIX, Rng(2)), []
    error = ""
    try:
        for _ in range(4):
            state, metrics = optimizer.step(state, objective, solo(), Rng(2))
            log.append({k: v for k, v in metrics.items() if not k.endswith("_s")})
    except FloatingPointError as raised:
        error = type(raised).__name__
    return {
        "members": bits(objective.members[0]),
        "all": bits(*objective.members),
        "steps": objective.steps,
        "theta": bits(*optimizer.theta(state).values()),
        "sigma": [m["sigma"] for m in log],
        "popsize": [m["popsize"] for m in log],
        "error": error,
    }


EVERY_SEARCH = {
    "popsize": Row(6, 10, "popsize theta"),
    "sigma": Row(0.2, 0.5, "members sigma theta"),
    "failed": Row("raise", "worst", "error", "members", {"fails": True}),
}
FITNESS = {
    "aggregate": Row("worst", "cvar:0.5", "theta", "members"),
    "tasks": Row("per_pair", "shared", "steps", "popsize"),
}
DECAY = {"weight_decay": Row(0.1, 0.5, "theta", "members")}
BLOCKS = {"sigma_blocks": Row("scaled", {"b": 5.0}, "members theta", "popsize")}
GROWTH = {
    "interactions": Row(200, 500, "popsize", "members"),
    "popsize_max": Row(16, 32, "popsize", "members", {"interactions": 4000}),
}
PAIRS = {"failed": Row("drop_pair", "worst", "theta", "members", {"fails": True})}
SHAPED = {"shaping": Row("raw", "zscore", "theta", "members")}
RATE = {"learning_rate": Row(0.1, 0.3, "theta", "members")}
SPREAD = {"learning_rate": Row(0.05, 0.3, "sigma", "members")}
ASCENT = {"optimizer": Row("sgd", "clipup", "theta", "members")}
OPENES = {
    **RATE, **ASCENT, **DECAY, **BLOCKS,
    "beta1": Row(0.5, 0.8, "theta", "members"),
    "beta2": Row(0.5, 0.8, "theta", "members"),
    "eps": Row(0.1, 1.0, "theta", "members"),
    "sigma_decay": Row(0.5, 0.8, "sigma all", "members"),
    "sigma_min": Row(0.1, 0.2, "sigma all", "members", {"sigma_decay": 0.2}),
    "learning_rate_decay": Row(0.3, 0.8, "theta", "members"),
    "learning_rate_min": Row(0.005, 0.01, "theta", "members", {"learning_rate_decay": 0.1}),
    "learning_rate_generations": Row(2, 5, "theta", "members"),
    "noise": Row("lowrank:1", "lowrank:2", "members theta"),
}  # fmt: skip
PGPE = {
    **RATE, **ASCENT, **DECAY, **SHAPED,
    "stdev_learning_rate": Row(0.02, 0.05, "sigma", "members"),
    "stdev_max_change": Row(0.001, 0.005, "sigma", "members"),
}  # fmt: skip
WINDOWS = {
    "failed": Row("raise", "drop_pair", "error", "members", {"fails": True}),
    "shaping": Row("raw", "zscore", "theta", "members", {"optimizer": "sgd"}),
    "window": Row(2, 4, "steps"),
}
SEARCHES = {
    "openes": EVERY_SEARCH | FITNESS | GROWTH | PAIRS | OPENES | SHAPED,
    "pgpe": EVERY_SEARCH | FITNESS | GROWTH | PAIRS | BLOCKS | PGPE,
    "snes": EVERY_SEARCH | FITNESS | GROWTH | BLOCKS | SPREAD | SHAPED,
    "sepcma": EVERY_SEARCH | FITNESS | BLOCKS,
    "nres": EVERY_SEARCH | OPENES | WINDOWS,
    "pes": EVERY_SEARCH | OPENES | WINDOWS,
    "evotorch_pgpe": EVERY_SEARCH | FITNESS | PGPE,
    "evotorch_snes": EVERY_SEARCH | FITNESS | DECAY | SPREAD | SHAPED,
    "xnes": EVERY_SEARCH | FITNESS | DECAY | SPREAD | SHAPED,
    "cem": EVERY_SEARCH | FITNESS | DECAY | {
        "parenthood_ratio": Row(0.25, 0.75, "theta", "members"),
        "stdev_min": Row(0.25, 0.29, "sigma", "members"),
        "stdev_max_change": Row(0.01, 0.05, "sigma", "members"),
    },
    "cmaes": EVERY_SEARCH | FITNESS | DECAY | {
        "separable": Row(True, False, "theta", "members"),
    },
}  # fmt: skip
# One value is all that these take.
FIXED = {
    ("sepcma", "interactions"), ("sepcma", "popsize_max"),
    *((name, option) for name in ("nres", "pes")
      for option in ("aggregate", "tasks", "interactions", "popsize_max")),
}  # fmt: skip


@cases("optimizer", SEARCHES)
def test_searches(name: str, option: str, row: Row) -> None:
    compare(functools.partial(search, name), option, row, defaults("optimizer", name)[option])


# --- gradients ----------------------------------------------------------------------------------

GRADIENT_RUN = """
[task]
name = "pendulum"
trials = 4
horizon = 6
episode_steps = 6
[policy]
name = "metods"
neurons = 3
hidden = [3]
head_hidden = 3
std = "learned"
[budget]
updates = 3
[run]
tensorboard = false
"""


def words(section: str, given: Given) -> list[str]:
    """Options as a command line gives them."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k} = {text(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(text, value)) + "]"
        return f'"{value}"' if isinstance(value, str) else str(value).lower()

    return [f"{section}.{key}={text(value)}" for key, value in given.items()]


def gradient(name: str, given: Given) -> Results:
    """``theta`` after three updates, ``first`` after one, and the ``losses`` of all."""
    import tomllib

    options = words("optimizer", {"adam_eps": 0.1, "learning_rate": 0.05} | given)
    raw = tomllib.loads(GRADIENT_RUN)
    made = train.build(configs.resolve(raw, [f"optimizer.name={name}", *options]))
    state, thetas, losses = made.state, [], []
    for _ in range(3):
        state, metrics = made.optimizer.step(state, made.objective, solo(), made.rng)
        thetas.append(bits(*made.optimizer.theta(state).values()))
        losses.append(metrics)
    return {
        "theta": thetas[-1],
        "first": thetas[0],
        "value": [m["value_loss"] for m in losses],
        "kl": [m.get("kl") for m in losses],
    }


LINEAR = {"schedule": "linear", "schedule_updates": 4}
GRADIENTS: dict[str, dict[str, Row]] = {
    name: {
        "learning_rate": Row(0.01, 0.1, "first"),
        "gamma": Row(0.5, 0.9, "first value"),
        "gae_lambda": Row(0.5, 0.9, "first"),
        "value_coef": Row(0.1, 1.0, "first"),
        "entropy_coef": Row(0.1, 0.5, "first"),
        "max_grad_norm": Row(0.01, 0.1, "first"),
        "normalize_advantage": Row(name == "a2c", name != "a2c", "first"),
        "reward_scale": Row(2.0, 5.0, "first value"),
        "bootstrap": Row(True, False, "first value"),
        "adam_eps": Row(0.01, 1.0, "first"),
        "schedule": Row("linear", "cosine", "theta", "first", {"schedule_updates": 4}),
        "schedule_updates": Row(2, 8, "theta", "first", {"schedule": "linear"}),
        "learning_rate_final": Row(0.01, 0.02, "theta", "first", LINEAR),
        "entropy_final": Row(0.2, 0.5, "theta", "first", LINEAR),
    }
    for name in ("a2c", "ppo")
}
MANY = {"learning_rate": 0.2, "epochs": 3, "adam_eps": 1e-3}
GRADIENTS["ppo"] |= {
    "clip": Row(0.01, 5.0, "first", "", MANY),
    "epochs": Row(1, 2, "first"),
    "minibatches": Row(1, 2, "first"),
    "target_kl": Row(1e-9, 1e9, "first", "", MANY),
}


@cases("optimizer", GRADIENTS)
def test_gradients(name: str, option: str, row: Row) -> None:
    compare(functools.partial(gradient, name), option, row, defaults("optimizer", name)[option])


class Pulled:
    """Three agents of one parameter vector that each want it elsewhere."""

    def check_ranks(self, ranks: int) -> None: ...

    def start(self, rank: int, size: int) -> int:
        return 3

    def rows(self, agents: int) -> int:
        return agents

    def loss(self, params: Params, agents: int) -> tuple[int, Tensor, dict[str, Tensor]]:
        goals = torch.tensor([[3.0, 1.0], [-1.0, 0.5], [9.0, -2.0]])
        loss = (params["a"] - goals).square().sum(1)
        return agents, loss, {"env_steps": torch.ones(3), "return": -loss.detach()}

    def save(self, agents: int) -> State:
        return {}

    def restore(self, saved: State, rank: int, size: int) -> int:
        return 3


def meta_gradient(given: Given) -> Results:
    """``theta`` after three updates, ``first`` after one."""
    optimizer = names.load("optimizer", "adam")(**{"adam_eps": 0.5} | given)
    state, thetas = optimizer.init({"a": torch.zeros(1, 2)}, Rng(0)), []
    for _ in range(3):
        state, _ = optimizer.step(state, Pulled(), solo(), Rng(0))
        thetas.append(bits(*optimizer.theta(state).values()))
    return {"first": thetas[0], "theta": thetas[-1]}


ADAM = {
    "learning_rate": Row(0.1, 0.2, "first"),
    "learning_rate_final": Row(0.5, 0.1, "theta", "first", {"schedule_updates": 4}),
    "schedule_updates": Row(2, 8, "theta", "first", {"learning_rate_final": 0.5}),
    "max_grad_norm": Row(0.5, 2.0, "first"),
    "adam_eps": Row(0.1, 1.0, "first"),
}


@cases("optimizer", {"adam": ADAM})
def test_adam(name: str, option: str, row: Row) -> None:
    compare(meta_gradient, option, row, defaults("optimizer", name)[option])


# --- objectives ---------------------------------------------------------------------------------

EPG_GIVEN = {
    "period": 8, "buffer": 24, "epochs": 1, "minibatch": 4, "hidden": (5,), "learning_rate": 0.01,
    "ppo_generations": 4, "test_episodes": 2, "test_steps": 8, "chunk": 4, "memory": False,
    "life_generations": 0,
}  # fmt: skip


def epg(given: Given) -> Results:
    """Scores of two members in ``train`` generation 2 and in ``test``; ``shapes`` of theta; how
    many agents are in a batch (``batches``)."""
    options = EPG_GIVEN | given
    made = epg_objective("task.horizon=32", "task.episode_steps=8", *words("objective", options))
    from test_epg import members

    theta = members(made, 2)
    heldout = made.heldout(theta, 2)
    return {
        "train": bits(made.fitness(theta, 2).returns),
        "test": bits(heldout.returns, *heldout.metrics.values()),
        "shapes": made.shapes,
        "batches": [len(part.rows) for part in made.begin(theta, 0).parts],
    }


EPG = {
    "period": Row(4, 16, "train test"),
    "buffer": Row(32, 40, "train test"),
    "epochs": Row(2, 3, "train test"),
    "minibatch": Row(2, 8, "train test"),
    "learning_rate": Row(0.02, 0.05, "train test"),
    "hidden": Row((4,), (6,), "train test", "shapes"),
    "reward": Row(False, True, "train test"),
    "memory": Row(True, False, "train test"),
    "saturation": Row(0.5, 5.0, "train test", "shapes", {"learning_rate": 0.5}),
    "evolve_init": Row(True, False, "shapes"),
    "ppo_generations": Row(3, 10, "train", "test"),
    "ppo_first": Row(0.3, 0.8, "train", "test"),
    "ppo_last": Row(0.2, 0.6, "train", "test"),
    "life_first": Row(0.25, 0.5, "train", "test", {"life_generations": 8}),
    "life_generations": Row(3, 40, "train", "test", {"life_first": 0.25}),
    "test_episodes": Row(1, 4, "train test"),
    "test_steps": Row(3, 6, "train test"),
    "twins": Row(2, 1, "train test"),
    "chunk": Row(2, 3, "batches", "train test"),
}


@cases("objective", {"epg": EPG})
def test_epg_objective(name: str, option: str, row: Row) -> None:
    compare(epg, option, row, defaults("objective", name)[option])


def metagenrl(given: Given) -> Results:
    """``theta`` after some updates, the ``first`` loss; ``fresh`` agents' scores by a theta that
    is always the same, and how many of them are in a batch (``batches``)."""
    given = dict(given)
    updates = given.pop("updates", 8)
    made = metagenrl_parts(*words("objective", given), "optimizer.learning_rate=0.01")
    state, log = made.state, []
    objective: Any = made.objective
    rows: list[int] = []
    for _ in range(updates):
        state, metrics = made.optimizer.step(state, objective, solo(), made.rng)
        log.append(metrics["meta_loss"])
    trained = objective.trained
    objective.trained = lambda loss, index, *rest: (
        rows.append(len(index)) or trained(loss, index, *rest)  # type: ignore[func-returns-value]
    )
    fresh = objective.heldout(objective.init(1), 5)
    return {
        "theta": bits(*made.optimizer.theta(state).values()),
        "first": log[0],
        "fresh": bits(fresh.returns, fresh.metrics["life"]),
        "batches": rows[0],
        "agents": objective.rows(state.agents),
    }


METAGENRL = {
    "agents": Row(2, 4, "agents theta", "fresh"),
    "more_tasks": Row(
        [{"name": "double_integrator", "horizon": 32, "episode_steps": 16}],
        [{"name": "double_integrator", "horizon": 32, "episode_steps": 8}], "theta", "fresh"),
    "steps": Row(40, 56, "fresh", "theta"),
    "period": Row(4, 16, "theta fresh"),
    "batch": Row(2, 4, "theta fresh"),
    "snippet": Row(4, 6, "theta fresh"),
    "snippets": Row("steps", "episodes", "theta fresh"),
    "extra": Row(0, 6, "theta", "fresh"),
    "inner_steps": Row(2, 3, "first theta", "fresh"),
    "inner_rate": Row(0.01, 0.1, "first theta", "fresh"),
    "inner_reduction": Row("mean", "sum", "theta", "fresh"),
    "inner_clip": Row(1e-3, 1e-1, "theta", "fresh"),
    "saturation": Row(100.0, 1000.0, "theta fresh"),
    "learning_rate": Row(0.002, 0.01, "theta fresh"),
    "policy_rate": Row(0.002, 0.01, "theta fresh"),
    "clip": Row(0.0, 1e-9, "theta fresh"),
    "anneal": Row(12, 60, "theta", "fresh"),
    "anneal_after": Row(8, 30, "theta", "fresh"),
    "lifetime": Row(24, 99, "theta", "fresh", {"updates": 12}),
    "policy_lifetime": Row(8, 24, "theta", "fresh"),
    "random": Row(4, 20, "theta fresh"),
    "update_after": Row(8, 24, "theta fresh"),
    "capacity": Row(16, 24, "theta fresh"),
    "critic_batch": Row(4, 12, "theta fresh"),
    "delay": Row(1, 4, "theta fresh"),
    "reward_scale": Row(0.1, 3.0, "theta fresh"),
    "gamma": Row(0.5, 0.9, "theta fresh"),
    "polyak": Row(0.5, 0.9, "theta fresh"),
    "hidden": Row((5,), (7,), "theta fresh"),
    "std": Row(0.2, 0.5, "theta fresh"),
    "time": Row("episode", "none", "theta fresh"),
    "values": Row("now", "none", "theta fresh"),
    "bound": Row(0.5, 5.0, "theta fresh"),
    "terminal_bonus": Row(1.0, 5.0, "theta fresh", "", {"timeout_is_terminal": True}),
    "timeout_is_terminal": Row(True, False, "theta fresh"),
    "test_episodes": Row(1, 3, "fresh", "theta"),
    "chunk": Row(2, 3, "batches", "theta fresh"),
}  # fmt: skip


@cases("objective", {"metagenrl": METAGENRL})
def test_metagenrl_objective(name: str, option: str, row: Row) -> None:
    compare(metagenrl, option, row, defaults("objective", name)[option])


# --- learners -----------------------------------------------------------------------------------


def learner(name: str, given: Given) -> Results:
    """Networks of three agents after 48 steps, by name, and the ``rewards`` of these."""
    small = {"period": 8, "hidden": (5,)} | given
    args = ["--set=" + word for word in words("learner", small)]
    args += ["--set=task.episode_steps=16", "--steps", "48", "--agents", "3"]
    lives, loss = learn.build(learn.parser().parse_args([name, "--task", "pendulum", *args]))
    life, rewards = lives.begin(torch.arange(3), "train"), []
    for _ in range(lives.updates):
        life, new = lives.advance(life, loss, "train")
        rewards += bits(new.reward)
    found: Results = {"rewards": rewards, "shapes": []}
    trees = {"": life.state.params, "target.": getattr(life.state, "target", {})}
    for prefix, tree in trees.items():
        for leaf, value in tree.items():
            network = prefix + leaf.partition(".")[0].partition("_")[0]
            found.setdefault(network, []).extend(bits(value))
            found["shapes"].append((leaf, value.shape))
    return found


REPLAY = {"batch": 4, "start": 8, "update_after": 16, "learning_rate": 0.01}
OFF_POLICY = {
    "hidden": Row((4,), (3, 3), "shapes"),
    "period": Row(4, 16, "rewards policy", "", REPLAY),
    "capacity": Row(16, 24, "policy q1", "", REPLAY),
    "batch": Row(6, 8, "policy q1", "", REPLAY),
    "critic_batch": Row(2, 12, "q1", "", REPLAY),
    "snippets": Row("episodes", "steps", "q1", "", REPLAY),
    "start": Row(4, 20, "rewards", "", REPLAY),
    "update_after": Row(8, 24, "policy", "", REPLAY),
    "gamma": Row(0.5, 0.9, "q1", "", REPLAY),
    "polyak": Row(0.5, 0.9, "target.q1", "", REPLAY),
    "exploration": Row(0.2, 0.5, "rewards", "", REPLAY),
    "target_noise": Row(0.1, 0.4, "q1", "", REPLAY),
    "target_clip": Row(0.05, 0.2, "q1", "", REPLAY | {"target_noise": 1.0}),
    "delay": Row(1, 4, "policy", "", REPLAY),
    "twin": Row(False, True, "q2 q1", "", REPLAY),
    "learning_rate": Row(0.003, 0.03, "policy q1", "", REPLAY | {"clip": 0.0}),
    "clip": Row(1e-8, 1e-7, "policy", "", REPLAY),
}
PPO = {
    "period": Row(4, 16, "policy"),
    "epochs": Row(2, 3, "policy value"),
    "minibatch": Row(2, 4, "policy value"),
    "learning_rate": Row(0.003, 0.03, "policy value"),
    "hidden": Row((4,), (3, 3), "shapes"),
    "clip": Row(1e-4, 1e-2, "policy"),
    "gamma": Row(0.5, 0.9, "policy value"),
    "gae_lambda": Row(0.5, 0.9, "policy value"),
    "kl_coef": Row(1.0, 9.0, "policy"),
    "value_coef": Row(0.01, 0.5, "value policy"),
    "value_epochs": Row(1, 3, "value"),
    "value_learning_rate": Row(0.003, 0.03, "value", "", {"value_epochs": 2}),
    "kl_stop": Row(1e-9, 1e9, "policy", "", {"learning_rate": 0.03}),
    "log_std": Row(-1.0, 0.5, "rewards"),
    "value_target": Row("reward_to_go", "gae", "value"),
    "normalize": Row(False, True, "policy value"),
    "reward_scale": Row(0.1, 5.0, "value"),
}
LEARNERS = {
    "td3": OFF_POLICY | {"snippet": Row(2, 6, "policy", "", REPLAY)},
    "offpolicy_reinforce": OFF_POLICY
    | {
        "snippet": Row(2, 6, "policy", "", REPLAY),
        "snippets": Row("steps", "episodes", "policy", "", REPLAY),
        "gae_lambda": Row(0.3, 0.9, "policy", "", REPLAY | {"snippet": 6}),
    },
    "ppo": PPO,
    "reinforce": {
        option: PPO[option]
        for option in (
            "period", "minibatch", "hidden", "gamma", "gae_lambda", "log_std", "value_target",
            "normalize", "reward_scale",
        )
    }
    | {
        "minibatch": Row(2, 4, "value"),
        "learning_rate": Row(0.01, 0.03, "policy"),
        "value_epochs": Row(1, 3, "value", "", {"minibatch": 4}),
        "value_learning_rate": Row(0.003, 0.03, "value", "", {"minibatch": 4}),
    },
}  # fmt: skip
FEW = {"ppo": {"minibatch": 4, "epochs": 2}, "reinforce": {"minibatch": 4}}


@cases("learner", LEARNERS)
def test_learners(name: str, option: str, row: Row) -> None:
    more = FEW.get(name, {}) | ({"snippet": 2} if name == "offpolicy_reinforce" else {})
    row = row._replace(given=more | row.given)
    default = defaults("learner", name)[option]
    compare(functools.partial(learner, name), option, row, default)


# --- none is left out ---------------------------------------------------------------------------


def test_no_option_is_left_out() -> None:
    tables = {
        "policy": POLICIES,
        "optimizer": SEARCHES | GRADIENTS | {"adam": ADAM},
        "objective": {"epg": EPG, "metagenrl": METAGENRL, "return": {}},
        "learner": LEARNERS,
    }
    # Recording is for GPUs; on a CPU it is refused (see test_capture.py).
    known = FIXED | {("return", "capture")} | {(c, "squash_embedding") for c in ("lstm", "rl2")}
    for section, rows in tables.items():
        assert set(rows) == set(names.known(section)), section
        for name in rows:
            missing = {option for option in defaults(section, name) if (name, option) not in known}
            assert missing == set(rows[name]), f"{section} {name}"
