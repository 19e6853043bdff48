"""How many simulators live, that all are closed, and what becomes of those that fail."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny_runs import overrides, run_here, summary

import esmeta
from esmeta import errors
from esmeta.analysis.pictures import run_trial
from esmeta.envs import simulators
from esmeta.envs.gymnasium_api import TaskEnv, TaskVectorEnv
from esmeta.errors import EnvFailure, UserError
from esmeta.evaluator import PopulationEvaluator
from esmeta.objectives.return_ import Objective
from esmeta.rng import Rng
from esmeta.run import config as configs
from esmeta.run import evaluate, learn, train
from esmeta.run.record import read_metrics
from esmeta.tasks import make_task


class Counted(gymnasium.Env):
    """Walks by its actions from a place that its seed has drawn; opened and closed are counted.

    ``Counted.fails(step, place)`` says, for every step of all simulators, whether it raises.
    """

    opened = closed = peak = steps = 0
    options: list[Any] = []  # noqa: RUF012 - of all simulators together
    observation_space = spaces.Box(-100.0, 100.0, (2,))
    fails: Any = None

    def __init__(self, wide: bool = False, given: Any = None) -> None:
        self.action_space = spaces.Box(-1.0, 1.0, (1,)) if wide else spaces.Discrete(2)
        Counted.opened += 1
        Counted.peak = max(Counted.peak, Counted.opened - Counted.closed)
        if given is not None:
            given["list"].append(1)
            Counted.options.append(list(given["list"]))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.place, self.time = float(self.np_random.normal()), 0
        return self._see(), {}

    def _see(self) -> np.ndarray:
        return np.array([self.place, self.time], np.float32)

    def step(self, action: Any) -> Any:
        Counted.steps += 1
        if Counted.fails is not None and Counted.fails(Counted.steps, self):
            raise ConnectionError(f"lost in step {self.time}")
        self.time += 1
        self.place += float(np.sum(action))
        return self._see(), self.place, self.place > 6, False, {}

    def close(self) -> None:
        assert not getattr(self, "gone", False), "closed twice"
        self.gone = True
        Counted.closed += 1


class Marked(gymnasium.Wrapper):
    """A wrapper that changes its argument."""

    def __init__(self, env: gymnasium.Env, seen: list[int]) -> None:
        super().__init__(env)
        seen.append(1)
        Counted.options.append(list(seen))


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(errors, "_told", 0)
    monkeypatch.setattr("esmeta.tasks.gym._MEASURED_STEPS", 300)
    gymnasium.register("Counted-v0", Counted, max_episode_steps=8)
    wrapper = gymnasium.envs.registration.WrapperSpec("M", f"{__name__}:Marked", {"seen": []})
    gymnasium.register("Wrapped-v0", Counted, max_episode_steps=8, additional_wrappers=(wrapper,))
    simulators.close_all()
    Counted.opened = Counted.closed = Counted.peak = Counted.steps = 0
    Counted.options = []
    yield
    Counted.fails = None
    simulators.close_all()
    for name in ("Counted-v0", "Wrapped-v0"):
        del gymnasium.registry[name]


def evaluator(trials: int = 12, **options: Any) -> tuple[PopulationEvaluator, Any]:
    task = make_task("gym", id="Counted-v0", **options)
    policy = esmeta.make_policy("mlp", task.spec, neurons=4)
    return PopulationEvaluator(policy, task, trials=trials), policy.init(seed=0, population=5)


def forget() -> None:
    """Count from here on."""
    gc.collect()
    simulators.close_all()
    Counted.opened = Counted.closed = Counted.peak = 0


# --- the bound -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "chunk"), [(2, None), (3, 2), (9, None), (12, 4), (31, None)])
def test_scores_are_the_same_bits_whatever_the_bound(most: int, chunk: int | None) -> None:
    whole, params = evaluator(trials=11)
    expected = whole(params, seed=3, split="test")
    own = torch.arange(55).reshape(5, 11)
    expected_own = whole(params, seed=3, index=own)
    task = make_task("gym", id="Counted-v0", most_worlds=most)
    few = PopulationEvaluator(whole.policy, task, trials=11, chunk=chunk)
    forget()
    for got, wanted in (
        (few(params, seed=3, split="test"), expected),
        (few(params, seed=3, index=own), expected_own),
        (few(params, seed=3, split="test", mark_failed=True), expected),
    ):
        assert torch.equal(got.returns, wanted.returns) and torch.equal(got.steps, wanted.steps)
        for name, leaf in wanted.metrics.items():
            assert torch.equal(got.metrics[name], leaf)
    assert most // 2 < Counted.peak <= most
    assert len(expected.returns.unique()) == 11, "the trials differ"


def test_what_fills_a_batch_up_is_not_simulated() -> None:
    scores, params = evaluator(trials=1)
    forget()
    scores({name: leaf[:1] for name, leaf in params.items()})
    assert Counted.peak == 1
    run_trial(scores.policy, params, scores.task)
    assert Counted.peak == 1


def test_environments_of_a_kind_share_what_may_be_open() -> None:
    scores, params = evaluator(most_worlds=8)
    task = make_task("gym", id="Counted-v0", most_worlds=8)
    forget()
    other = task.make_env("cpu")
    state, _ = other.reset(task.sample(5, "train", Rng(0)), Rng(0))
    expected = evaluator(most_worlds=256)[0](params).returns
    assert torch.equal(scores(params).returns, expected), "in batches of three"
    assert Counted.peak == 5 + 60, "of the one that may have more"
    with pytest.raises(UserError, match=r"most_worlds is 8: 4 simulators .* and 5 are in use; wr"):
        task.make_env("cpu").reset(task.sample(4, "train", Rng(0)), Rng(0))
    other.step(state, torch.zeros(1, 5, dtype=torch.int64))
    del other
    last = task.make_env("cpu")
    last.reset(task.sample(8, "train", Rng(0)), Rng(0))
    assert Counted.opened - Counted.closed == 8, "what it does not need is closed"


def test_simulators_that_were_lent_come_back_when_another_cannot_be_made(monkeypatch: Any) -> None:
    task = make_task("gym", id="Counted-v0", most_worlds=8)
    task.make_env("cpu").reset(task.sample(3, "train", Rng(0)), Rng(0))
    gc.collect()  # the three are free for others
    plain = Counted.__init__

    def full(self: Any, **options: Any) -> None:
        plain(self, **options)
        if Counted.opened - Counted.closed > 5:
            raise OSError("no more")

    monkeypatch.setattr(Counted, "__init__", full)
    env = task.make_env("cpu")
    with pytest.raises(EnvFailure, match="no more"):
        env.reset(task.sample(6, "train", Rng(0)), Rng(0))
    assert env.most_worlds == 8, "none is in use"


def test_a_forked_process_uses_no_simulator_of_its_parent() -> None:
    scores, params = evaluator()
    scores(params)
    before = Counted.opened
    child = os.fork()
    if child == 0:
        code = 1
        try:
            scores(params)
            code = 0 if Counted.opened == 2 * before - 1 else 2  # one more was looked at
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def gym_config(preset: str, *changes: str) -> Any:
    pairs = ["task.name=gym", "task.id=Counted-v0", *changes]
    return configs.resolve(configs.load(preset), pairs)


def test_trials_of_an_update_need_as_many_simulators() -> None:
    config = gym_config("gym-ppo", "task.most_worlds=15", "task.trials=16")
    with pytest.raises(UserError, match=r"leaves 15 .* the 16 trials .*task.most_worlds = 16"):
        train.build(config)
    train.build(config, ranks=2)


EPG = ["task.kwargs={wide = true}", "task.horizon=16", "task.episode_steps=8", "task.trials=3",
       "objective.period=8", "objective.buffer=32", "objective.hidden=[4]",
       "objective.minibatch=8", "objective.test_steps=8", "objective.twins=1"]  # fmt: skip


def test_agents_live_in_as_many_batches_as_simulators_ask_for() -> None:
    wide: Any = train.build(gym_config("displacement-epg", *EPG)).objective
    theta = esmeta.ravel(wide.init(0))
    expected = wide.heldout(theta, 5)
    few: Any = train.build(gym_config("displacement-epg", *EPG, "task.most_worlds=8")).objective
    forget()
    got = few.heldout(theta, 5)
    assert torch.equal(got.returns, expected.returns) and Counted.peak == 8
    assert all(torch.equal(got.metrics[k], v) for k, v in expected.metrics.items())
    with pytest.raises(UserError, match=r"leaves 7 .* write task.most_worlds = 8"):
        train.build(gym_config("displacement-epg", *EPG, "task.most_worlds=7"))


META = ["task.kwargs={wide = true}", "task.horizon=16", "task.episode_steps=8", "task.trials=5",
        "objective.agents=3", "objective.batch=4", "objective.period=8", "objective.snippet=4",
        "objective.random=8", "objective.update_after=8", "objective.steps=24",
        "objective.hidden=[8]", "objective.delay=8", "objective.capacity=64",
        "objective.policy_lifetime=0"]  # fmt: skip


def test_agents_that_live_on_leave_simulators_to_those_that_are_scored() -> None:
    preset = "pendulum-metagenrl"
    wide: Any = train.build(gym_config(preset, *META)).objective
    alpha = wide.init(0)
    expected = wide.heldout(alpha, 5)
    parts = train.build(gym_config(preset, *META, "task.most_worlds=6"))
    few: Any = parts.objective
    forget()
    agents = few.start(0, 1)
    assert torch.equal(few.heldout(alpha, 5).returns, expected.returns)
    assert Counted.peak == 6, "three that live on, and three at a time"
    few.environments[0].act(agents[0].life, "train")  # they go on
    del parts, few, agents
    forget()
    with pytest.raises(UserError, match=r"leaves 4 .* write task.most_worlds = 5"):
        train.build(gym_config(preset, *META, "task.most_worlds=4"))


def test_random_play_is_measured_within_the_bound() -> None:
    many = make_task("gym", id="Counted-v0").reference
    task = make_task("gym", id="Counted-v0", most_worlds=3)
    forget()
    assert task.reference == many and Counted.peak == 3


def test_trials_of_a_vector_need_as_many_simulators() -> None:
    forget()
    options: dict[str, Any] = {"id": "Counted-v0", "most_worlds": 3}
    envs = TaskVectorEnv("gym", 3, **options)
    envs.reset(seed=0)
    for _ in range(40):  # episodes end at different times
        envs.step(envs.action_space.sample())
    assert Counted.peak == 3
    envs.close()
    assert Counted.opened == Counted.closed
    env = TaskEnv("gym", **options)
    env.reset(seed=0)
    env.close()
    assert Counted.opened == Counted.closed
    with pytest.raises(UserError, match=r"num_envs is 4.* write most_worlds=4"):
        TaskVectorEnv("gym", 4, **options)


def test_mixtures_simulate_only_what_their_parts_have() -> None:
    part = {"name": "gym", "id": "Counted-v0", "kwargs": {"wide": True}, "most_worlds": 4}
    task = make_task("mixed", parts=(part, {**part, "label": "two", "factor": 2.0}), horizon=8)
    policy = esmeta.make_policy("mlp", task.spec, neurons=4)
    params = policy.init(seed=0, population=3)
    forget()
    few = PopulationEvaluator(policy, task, trials=7)(params)
    assert Counted.peak == 4
    for one in (part,):
        one["most_worlds"] = 256
    many = make_task("mixed", parts=(part, {**part, "label": "two", "factor": 2.0}), horizon=8)
    whole = PopulationEvaluator(policy, many, trials=7)(params)
    assert torch.equal(few.returns, whole.returns)
    assert bool(few.metrics["return_gym"].isnan().any())


# --- runs ----------------------------------------------------------------------------------------

SMALL = ("budget.generations=2", "optimizer.popsize=4", "run.evaluate_every=1",
         "run.evaluate_trials=5", "run.tensorboard=false", "task.trials=3",
         "policy.name=mlp", "policy.neurons=4")  # fmt: skip


def run(out: Path, *changes: str) -> int:
    words = overrides("task.id=Counted-v0", "task.most_worlds=4", *SMALL, *changes)
    return run_here("gym-ppo", "--optimizer", "openes", "--out", out, *words)


def test_runs_keep_to_the_bound_and_close_everything(tmp_path: Path, capsys: Any) -> None:
    with_few, with_many = tmp_path / "few", tmp_path / "many"
    assert run(with_few) == 0
    assert Counted.peak == 4 and Counted.opened == Counted.closed > 0
    assert run(with_many, "task.most_worlds=256") == 0
    one, two = (summary(folder) for folder in (with_few, with_many))
    assert one["theta_sha256"] == two["theta_sha256"]
    scores = [
        [row.get("validation_return") for row in read_metrics(d)] for d in (with_few, with_many)
    ]
    assert scores[0] == scores[1] and None not in scores[0]
    forget()
    assert evaluate.main([str(with_few), "--trials", "30"]) == 0
    assert 4 >= Counted.peak > 1 and Counted.opened == Counted.closed
    told = "(30 trials)"
    assert told in capsys.readouterr().out
    forget()
    args = ["ppo", "--task", "gym", "--steps", "16", "--agents", "3", "--test-episodes", "1"]
    words = ["task.id=Counted-v0", "task.kwargs={wide=true}", "task.episode_steps=8",
             "learner.period=8", "learner.minibatch=8", "learner.hidden=[4]"]  # fmt: skip
    assert learn.main([*args, *overrides(*words, "task.most_worlds=6")]) == 0
    assert Counted.peak == 3 and Counted.opened == Counted.closed
    assert learn.main([*args, *overrides(*words, "task.most_worlds=5")]) == 2
    assert "--agents 3: they live in one batch" in capsys.readouterr().err


def test_simulators_are_closed_after_errors_and_signals(tmp_path: Path, capsys: Any) -> None:
    Counted.fails = lambda step, world: step > 100
    with pytest.raises(UserError, match=r"raised ConnectionError.*; traceback: .*-error.txt"):
        run(tmp_path / "one")
    assert Counted.opened == Counted.closed > 0
    (text,) = [file.read_text() for file in (tmp_path / "one").glob("*error.txt")]
    assert "ConnectionError: lost in step" in text and "in step\n" in text
    Counted.fails = None
    assert run(tmp_path / "two") == 0
    for name, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        forget()
        here = name

        def fails(step: int, world: Any, here: int = here) -> bool:
            signal.raise_signal(here)
            return False

        Counted.fails = fails
        with pytest.raises((SystemExit, KeyboardInterrupt)) as caught:
            evaluate.main([str(tmp_path / "two"), "--trials", "9"])
        if code == 143:
            assert isinstance(caught.value, SystemExit) and caught.value.code == 143
        assert Counted.opened == Counted.closed > 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_evaluation_that_fails_names_the_file_in_the_run(tmp_path: Path, capsys: Any) -> None:
    assert run(tmp_path / "run") == 0
    capsys.readouterr()
    Counted.fails = lambda step, world: True
    assert evaluate.main([str(tmp_path / "run"), "--trials", "9"]) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert not [line for line in before if "played it again" in line], "nothing was mended"
    file = tmp_path / "run" / "environment-error.txt"
    assert last.startswith("esmeta: error: id = 'Counted-v0': step() raised ConnectionError")
    assert last.endswith(f"; traceback: {file}") and "ConnectionError" in file.read_text()
    args = ["ppo", "--task", "gym", "--steps", "16", "--agents", "2", "--set", "task.id=Counted-v0"]
    words = overrides("task.kwargs={wide=true}", "learner.period=8", "learner.minibatch=8")
    assert learn.main([*args, *words]) == 2
    assert "step() raised ConnectionError" in capsys.readouterr().err


def test_a_trial_whose_simulator_fails_costs_an_evaluation_no_other(
    tmp_path: Path, capsys: Any
) -> None:
    assert run(tmp_path / "run") == 0
    words, places = [str(tmp_path / "run"), "--trials", "30", "--json"], []
    Counted.fails = lambda step, world: world.time == 3 and places.append(world.place)
    assert evaluate.main(words) == 0
    Counted.fails = lambda step, world: world.time == 3 and world.place == max(places)
    capsys.readouterr()
    assert evaluate.main(words) == 0
    assert json.loads(capsys.readouterr().out)["return"]["trials"] == 29


# --- simulators that fail ------------------------------------------------------------------------


def once(at: int) -> Any:
    """Fails in step number ``at`` of all, and never again."""
    return lambda step, world: step == at


def test_an_episode_is_played_again_by_another_simulator(capsys: Any) -> None:
    scores, params = evaluator(episodes=2)
    expected = scores(params, seed=1)
    everything = Counted.steps
    for at in (1, 200, everything - 1):
        Counted.steps, Counted.fails = 0, once(at)
        got = scores(params, seed=1)
        assert torch.equal(got.returns, expected.returns)
        assert torch.equal(got.metrics["return_2"], expected.metrics["return_2"])
        assert Counted.steps >= everything
    told = capsys.readouterr().err
    assert told.count("lost in step") == 3 and "a new simulator played it again" in told


class Unsteady(Counted):
    """Does not depend on its seed alone."""

    count = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        Unsteady.count += 1
        return super().reset(seed=Unsteady.count)


def test_what_is_not_the_same_again_is_not_gone_on_with() -> None:
    gymnasium.register("Unsteady-v0", Unsteady, max_episode_steps=8)
    try:
        task = make_task("gym", id="Unsteady-v0")
        env = task.make_env("cpu")
        state, _ = env.reset(task.sample(2, "train", Rng(0)), Rng(0))
        action = torch.zeros(1, 2, dtype=torch.int64)
        state, _ = env.step(state, action)
        Counted.steps, Counted.fails = 0, once(1)
        with pytest.raises(EnvFailure, match="was not the same when it was played again"):
            env.step(state, action)
        with pytest.raises(RuntimeError, match="were left"):
            env.step(state, action)
    finally:
        del gymnasium.registry["Unsteady-v0"]


def test_a_trial_that_fails_for_good_has_no_score(capsys: Any) -> None:
    scores, params = evaluator(trials=40, most_worlds=16)
    one = {name: leaf[:1] for name, leaf in params.items()}
    expected = scores(one, seed=1, split="test")
    first = scores.env
    bad: list[float] = []

    def fails(step: int, world: Any) -> bool:
        # The trial whose place is highest before the fourth step.
        return world.time == 3 and world.place == bad[0]

    places = sorted(_places(scores, one))
    bad.append(places[-1])
    Counted.fails = fails
    with pytest.raises(EnvFailure) as caught:
        scores(one, seed=1, split="test")
    assert isinstance(caught.value.__cause__, ConnectionError)
    got = scores(one, seed=1, split="test", mark_failed=True)
    nan = got.returns.isnan()
    assert int(nan.sum()) == 1 and torch.equal(got.returns[~nan], expected.returns[~nan])
    assert int(got.steps[nan]) == 0 and bool(got.metrics["length"][nan].isnan().all())
    assert first is scores.env and "this trial has no score (nan)" in capsys.readouterr().err
    bad[0] = places[0]
    Counted.fails = lambda step, world: world.time == 3 and world.place > places[-7]
    with pytest.raises(EnvFailure):  # six of forty are no accident
        scores(one, seed=1, split="test", mark_failed=True)


def _places(scores: PopulationEvaluator, params: Any) -> list[float]:
    """Where the trials are before their fourth step."""
    found: list[float] = []
    Counted.fails = lambda step, world: world.time == 3 and found.append(world.place)
    scores(params, seed=1, split="test")
    Counted.fails = None
    return found


def test_members_whose_simulators_fail_cost_no_generation(tmp_path: Path, capsys: Any) -> None:
    """More than a tenth of the members are the user's to repair."""
    changes = ["optimizer.popsize=20", "budget.generations=1", "run.evaluate_every=0"]
    # In the batch, when it is played again, and so twice for the first member alone.
    Counted.fails = lambda step, world: 100 <= step < 104
    assert run(tmp_path / "run", *changes, "task.most_worlds=6") == 0
    assert "evaluation of members [0] raised" in capsys.readouterr().err
    Counted.steps, Counted.fails = 0, lambda step, world: 100 <= step < 110
    with pytest.raises(UserError, match=r"the environments of 4 of 20 members failed"):
        run(tmp_path / "other", *changes)


def test_trials_of_an_update_are_run_again_once(capsys: Any) -> None:
    task = make_task("gym", id="Counted-v0")
    policy = esmeta.make_policy("mlp", task.spec, neurons=4, value=True)
    objective = Objective().make(policy, task, trials=4, seed=0, device="cpu")
    params = policy.init(seed=0)
    expected, last, _ = objective.trajectories(params, 0)
    Counted.steps, Counted.fails = 0, lambda step, world: 9 <= step < 11  # twice in a row
    got, again, _ = objective.trajectories(params, 0)
    assert torch.equal(got.reward, expected.reward) and torch.equal(again, last)
    assert "the trials of update 0 are run again" in capsys.readouterr().err
    Counted.fails = lambda step, world: True
    with pytest.raises(EnvFailure):
        objective.trajectories(params, 0)


def test_simulators_share_no_argument() -> None:
    kwargs = {"given": {"list": [0]}}
    task = make_task("gym", id="Counted-v0", kwargs=kwargs)
    task.make_env("cpu").reset(task.sample(3, "train", Rng(0)), Rng(0))
    assert Counted.options == [[0, 1]] * 4 and kwargs == {"given": {"list": [0]}}
    Counted.options = []
    task = make_task("gym", id="Wrapped-v0")
    task.make_env("cpu").reset(task.sample(3, "train", Rng(0)), Rng(0))
    assert Counted.options == [[1]] * 4


def test_a_simulator_that_cannot_be_closed_is_told(capsys: Any, monkeypatch: Any) -> None:
    def close(self: Any) -> None:
        raise OSError("already gone")

    scores, params = evaluator()
    scores(params)
    monkeypatch.setattr(Counted, "close", close)
    simulators.close_all()
    assert "close() raised OSError: already gone" in capsys.readouterr().err
