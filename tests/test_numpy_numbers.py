"""Numbers, sequences and seeds from numpy are those of Python, wherever one is taken."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

import esmeta
from esmeta import errors, names
from esmeta.errors import UserError
from esmeta.kernels import plastic_scan
from esmeta.names import check_options
from esmeta.options import options_class, plain
from esmeta.rng import Rng
from esmeta.run import config
from esmeta.tasks import make_task, task_numbers
from esmeta.types import Continuous, Discrete, Reference, Spec

OPTIONS = [(kind, name) for kind in names.KINDS for name in names.known(kind)]


def from_numpy(value: Any) -> Any:
    """The same value in numpy's types: scalars, arrays without axes, arrays, lists of these."""
    if isinstance(value, dict):
        return {key: from_numpy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        numbers = all(isinstance(item, int | float) for item in value) and value
        return np.array(value) if numbers else [from_numpy(item) for item in value]
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.array(value) if value % 2 else np.int32(value)
    if isinstance(value, float):
        return np.float32(value) if float(np.float32(value)) == value else np.float64(value)
    return np.str_(value) if isinstance(value, str) else value


def types_in(value: Any) -> set[type]:
    """The types of a value and of all that it holds."""
    if isinstance(value, dict):
        return {dict}.union(*map(types_in, value.values()))
    if isinstance(value, list | tuple):
        return {type(value)}.union(*map(types_in, value))
    return {type(value)}


def values_of(instance: Any) -> dict[str, Any]:
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.init}


def assert_same(made: Any, model: Any) -> None:
    assert made == model and repr(made) == repr(model)
    found = set().union(*(types_in(value) for value in values_of(made).values()))
    assert found <= {bool, int, float, str, tuple, dict, type(None)}, found


@pytest.mark.parametrize(("kind", "name"), OPTIONS)
def test_options_from_numpy_are_those_of_python(kind: str, name: str) -> None:
    cls = names.load(kind, name)
    model = cls()
    values = values_of(model)
    given = {key: from_numpy(value) for key, value in values.items()}
    assert_same(cls(**given), model)
    assert_same(cls(*given.values()), model)  # by position
    assert_same(dataclasses.replace(model, **given), model)
    # A file has no None.
    table = {key: "none" if value is None else value for key, value in given.items()}
    assert_same(check_options(cls, table, kind), model)
    if kind == "task":
        assert_same(make_task(name, **given), model)


@pytest.mark.parametrize(
    "model", [Discrete(3), Continuous(2), Spec(4, Discrete(2), 5), Reference(0.0, 1.5, "known")]
)
def test_what_tasks_say_of_themselves(model: Any) -> None:
    made = type(model)(**{key: from_numpy(value) for key, value in values_of(model).items()})
    assert made == model and repr(made) == repr(model)


@pytest.mark.parametrize(
    "preset", ["harlow-openes", "maze-ppo", "displacement-epg", "pendulum-metagenrl"]
)
def test_configurations_keep_their_digest(preset: str) -> None:
    raw = config.load(preset)
    want, got = config.resolve(raw), config.resolve(from_numpy(raw))
    assert config.to_toml(got) == config.to_toml(want)
    assert config.digest(got) == config.digest(want)
    assert json.dumps(config.to_tables(got)) == json.dumps(config.to_tables(want))


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Options of a user's own class, which is not ours to decorate."""

    size: int = 3
    rate: float = 0.5
    layers: tuple[int, ...] = ()
    open: bool = False

    def __post_init__(self) -> None:
        errors.positive_int("size", self.size)
        errors.finite_positive("rate", self.rate)


def test_classes_of_the_users_own() -> None:
    given = {"size": np.int64(4), "rate": np.float32(0.25), "layers": np.array([1, 2])}
    want = Foreign(4, 0.25, (1, 2))
    assert_same(check_options(Foreign, given, "task"), want)
    assert_same(make_task(f"{__name__}:Foreign", **given, open=np.bool_(False)), want)
    assert Foreign(np.int64(4), np.float32(0.25)).size == 4  # type: ignore[arg-type]
    for wrong in (np.bool_(True), np.float64(4.0), np.int64(0), np.array([4])):
        with pytest.raises(UserError, match="size = .*an integer >= 1"):
            Foreign(size=wrong)  # type: ignore[arg-type]
    for wrong in (np.float64("nan"), np.float32("inf"), np.bool_(True), np.float64(0)):
        with pytest.raises(UserError, match=r"^rate = [^n]\S*.*|^rate = nan: must be"):
            Foreign(rate=wrong)  # type: ignore[arg-type]


def test_what_is_refused_of_python_is_refused_of_numpy() -> None:
    wrong = [np.bool_(True), np.float64(8.0), np.array([8]), np.float32("nan")]
    for value in wrong:
        with pytest.raises(ValueError, match=r"size.*(True|8|nan)"):
            make_task("maze", size=value)
        with pytest.raises(UserError, match="policy.neurons = "):
            esmeta.make_policy("mlp", Spec(2, Discrete(2), 5), neurons=value)
    with pytest.raises(UserError, match="optimizer.sigma = nan: must be a finite number"):
        check_options(names.load("optimizer", "openes"), {"sigma": np.float64("nan")}, "optimizer")


def test_plain_leaves_other_values_alone() -> None:
    class Pair(tuple):
        pass

    for value in (Pair((1, 2)), torch.ones(2), "text", None, {1}, range(3)):
        assert plain(value) is value
    assert plain(np.arange(4).reshape(2, 2)) == [[0, 1], [2, 3]]
    assert plain(np.array([None, np.int64(3)], dtype=object)) == [None, 3]
    assert plain(np.float32(0.1)) == float(np.float32(0.1)) != 0.1

    @options_class
    class Table:
        rows: tuple[tuple[int, ...], ...] = ()

    assert Table(np.ones((1, 2), dtype=np.uint8)) == Table(((1, 1),)) == Table([[1, 1]])  # type: ignore


# --- seeds, counts and task numbers ------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.array])
def test_streams_of_a_seed_from_numpy(kind: Any) -> None:
    rows = torch.arange(4)
    for seed in (0, 3, 200):
        stream, want = Rng(kind(seed)), Rng(seed)
        assert stream == want and type(stream.key) is int
        assert torch.equal(stream.bits(rows, 3), want.bits(rows, 3))
        assert stream.fold("x", kind(5)) == want.fold("x", 5)
    for seed in (np.float64(3.0), 3.0, np.array([3])):
        with pytest.raises(TypeError):
            Rng(seed)  # type: ignore[arg-type]


def test_evaluators_and_policies() -> None:
    task = make_task("bandit", horizon=np.int64(4))
    policy = esmeta.make_policy("mlp", task.spec, neurons=np.int64(4), hidden=np.array([4]))
    params = policy.init(seed=np.int64(1), population=np.array(3))  # type: ignore[arg-type]
    again = policy.init(seed=1, population=3)
    assert all(torch.equal(params[name], again[name]) for name in again)
    want = esmeta.PopulationEvaluator(policy, task, trials=5, chunk=2)(params, seed=7)
    evaluator = esmeta.PopulationEvaluator(policy, task, np.int32(5), chunk=np.int64(2))  # type: ignore[arg-type]
    assert type(evaluator.trials) is int and type(evaluator.chunk) is int
    for index in (
        None,
        np.arange(5),
        np.arange(5, dtype=np.uint8),
        [0, 1, 2, 3, np.int64(4)],
        range(5),
    ):
        got = evaluator(params, seed=np.int64(7), index=index)  # type: ignore[arg-type]
        assert torch.equal(got.returns, want.returns)
    for wrong in (4.0, np.float32(4), True, np.bool_(True), 0):
        with pytest.raises(ValueError, match="trials = "):
            esmeta.PopulationEvaluator(policy, task, trials=wrong)  # type: ignore[arg-type]
    for wrong in ([0.5, 1.0], np.ones(2), np.array([True]), []):
        with pytest.raises(UserError, match="index is .*whole numbers"):
            evaluator(params, index=wrong)  # type: ignore[arg-type]


def test_numbers_of_tasks() -> None:
    for batch in (3, np.int64(3), np.arange(3), [0, 1, 2], (0, np.int8(1), 2), torch.arange(3)):
        assert torch.equal(task_numbers(batch), torch.tensor([[0, 1, 2]]))  # type: ignore[arg-type]
    for batch in (np.float64(3), True, np.bool_(True), [1.5], "3"):
        with pytest.raises(ValueError, match="batch|index"):
            task_numbers(batch)  # type: ignore[arg-type]


def test_kernels() -> None:
    W, x, one = torch.ones(1, 2, 3, 3) / 9, torch.ones(5, 1, 2, 3), torch.ones(1, 3, 3)
    rule = one, torch.ones(1, 1, 2) / 2, torch.ones(1, 1, 2) / 2
    want = plastic_scan(W, x, *rule, store_every=2)
    got = plastic_scan(W, x, *rule, store_every=np.int64(2))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_gymnasium_takes_seeds_and_trials_from_numpy() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    import esmeta.envs.gymnasium_api  # noqa: F401

    env = gymnasium.make("esmeta/Bandit-v0", horizon=np.int64(5)).unwrapped
    want, _ = env.reset(seed=3, options={"trial": 2})
    got, _ = env.reset(seed=np.int64(3), options={"trial": np.int32(2)})
    assert np.array_equal(got, want)
    envs = gymnasium.make_vec("esmeta/Bandit-v0", num_envs=np.int64(2), horizon=5)
    want, _ = envs.reset(seed=4)
    got, _ = envs.reset(seed=np.array(4))
    assert np.array_equal(got, want)
    for wrong in (np.float64(3.0), np.array([3])):
        with pytest.raises((ValueError, gymnasium.error.Error)):
            envs.reset(seed=wrong)


def test_evotorch_takes_seeds_from_numpy() -> None:
    pytest.importorskip("evotorch")
    task = make_task("bandit", horizon=4)
    policy = esmeta.make_policy("mlp", task.spec, neurons=4)
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=2)
    seeds: list[Any] = [5, np.int64(5)]
    one, two = (esmeta.evotorch_problem(evaluator, seed=seed) for seed in seeds)
    assert torch.equal(one.generate_batch(2).values, two.generate_batch(2).values)  # type: ignore[arg-type]
    for wrong in (np.int64(-1), np.float64(1.0), np.bool_(True)):
        with pytest.raises(UserError, match="seed = "):
            esmeta.evotorch_problem(evaluator, seed=wrong)  # type: ignore[arg-type]
