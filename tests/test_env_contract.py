"""What Gymnasium's environments may do wrong, and what is said then; what agents send them."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tiny_runs import overrides, run_here

import esmeta
from esmeta.envs._contract import Contract
from esmeta.errors import EnvError, EnvFailure, UserError, keep_traceback
from esmeta.rng import Rng
from esmeta.run import evaluate
from esmeta.run.cli import simulators_closed
from esmeta.run.record import load_theta
from esmeta.tasks import make_task

OBS = np.zeros(3, np.float32)
GOOD = (OBS, 1.0, False, False, {})
F32 = "must be finite and fit into float32"
REWARDS = "rewards must be finite and at most 1e+12 in size"


class Odd(gymnasium.Env):
    """Gives whatever it is told to; what it is given is kept."""

    given: Any = None
    first: Any = (OBS, {})
    then: Any = GOOD

    def __init__(self, actions: str = "discrete", observations: str = "box") -> None:
        self.action_space = (ACTIONS | REFUSED)[actions]
        self.observation_space = (SEEN | REFUSED)[observations]

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self._told(Odd.first)

    def step(self, action: Any) -> Any:
        Odd.given = action
        return self._told(Odd.then)

    @staticmethod
    def _told(value: Any) -> Any:
        return value() if callable(value) else value


REFUSED: dict[str, Any] = {"none": None, "empty": spaces.Box(-1.0, 1.0, (0,))}
ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(3, start=-1),
    "small": spaces.Discrete(2, dtype=np.int32),
    "double": spaces.Box(-2.0, 2.0, (1, 2), np.float64),
    "half": spaces.Box(-0.1, 0.3, (2,), np.float16),
    "point": spaces.Box(0.0, 1.0, (), np.float32),
}
SEEN: dict[str, spaces.Space] = {
    "box": spaces.Box(-1.0, 1.0, (3,)),
    "bytes": spaces.Box(0, 255, (2, 2), np.uint8),
    "flags": spaces.MultiBinary(3),
    "many": spaces.MultiDiscrete([2, 3], start=[5, -1]),
    "one": spaces.Discrete(3, start=4),
    "dict": spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(-1.0, 1.0, (1,))}),
    "flags4": spaces.MultiBinary(4),
    "tuple": spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(2))),
}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    gymnasium.register("Odd-v0", Odd, max_episode_steps=4)
    yield
    Odd.first, Odd.then = (OBS, {}), GOOD
    del gymnasium.registry["Odd-v0"]


def play(steps: int = 1, **kwargs: Any) -> Any:
    """The time step after ``steps`` steps of two trials."""
    task = make_task("gym", id="Odd-v0", kwargs=kwargs)
    env = task.make_env("cpu")
    state, ts = env.reset(task.sample(2, "train", Rng(0)), Rng(0))
    for _ in range(steps):
        size = () if isinstance(task.spec.action, esmeta.types.Discrete) else (2,)
        state, ts = env.step(state, torch.ones(1, 2, *size[: task.spec.action.size]).long())
    return ts


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (None, ["step() returned None", "return observation, reward, terminated, truncated, info"]),
        (
            (OBS, 1.0, False, {}),
            ["returned a tuple of 4", "done", "terminated or truncated"],
        ),
        ((OBS, 1.0, False, False, {}, 1), ["a tuple of 6"]),
        ([*GOOD], ["step() returned a list"]),
        ((OBS, 1.0, False, False, None), ["a tuple of 5", "info (a dict)"]),
        ((np.zeros(4), *GOOD[1:]), ["shape (4,)", "a Box of shape (3,) and float32"]),
        ((np.zeros((1, 3)), *GOOD[1:]), ["shape (1, 3)", "a Box of shape (3,)"]),
        ((None, *GOOD[1:]), ["returned None as the observation"]),
        (({"x": OBS}, *GOOD[1:]), ["returned a dict as the observation"]),
        (((OBS, {}), *GOOD[1:]), ["a tuple of 2 as the observation"]),
        ((np.array([1, None, 2]), *GOOD[1:]), ["an array of object of shape (3,)"]),
        ((OBS > 0, *GOOD[1:]), ["an array of bool"]),
        ((OBS + 1j, *GOOD[1:]), ["an array of complex64"]),
        (("abc", *GOOD[1:]), ["'abc' as the observation"]),
        (([[0.0], [0.0, 1.0], 0.0], *GOOD[1:]), ["a list as the observation"]),
        ((OBS, None, False, False, {}), ["None as the reward", "a number"]),
        ((OBS, "1.0", False, False, {}), ["'1.0' as the reward"]),
        ((OBS, np.ones(2), False, False, {}), ["shape (2,) as the reward"]),
        ((OBS, 1j, False, False, {}), ["1j as the reward"]),
        ((OBS, np.ones(1), False, False, {}), ["shape (1,) as the reward", "float(reward.item())"]),
        ((OBS, torch.ones(1), False, False, {}), ["as the reward", "float(reward.item())"]),
        ((OBS, 1.0, np.array([True]), False, {}), ["shape (1,) as terminated"]),
        ((OBS, 1.0, None, False, {}), ["None as terminated", "True or False"]),
        ((OBS, 1.0, False, {}, {}), ["a dict as truncated"]),
        ((OBS, 1.0, np.zeros(2, bool), False, {}), ["shape (2,) as terminated"]),
        ((OBS, 1.0, 0.0, False, {}), ["0.0 as terminated"]),
        ((OBS, 1.0, False, 2, {}), ["2 as truncated"]),
    ],
)
def test_a_step_that_breaks_the_contract_is_told_at_once(then: Any, words: list[str]) -> None:
    Odd.then = then
    with pytest.raises(EnvError) as caught:
        play()
    assert not isinstance(caught.value, EnvFailure), "running it again would not help"
    text = str(caught.value)
    assert text.startswith("id = 'Odd-v0': step() ") and "\n" not in text
    for word in words:
        assert word in text, text


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (OBS, ["reset() returned an array of float32 of shape (3,)", "return observation, info"]),
        (None, ["reset() returned None"]),
        ((OBS, OBS), ["reset() returned a tuple of 2", "info (a dict)"]),
        ((np.zeros(2), {}), ["reset() returned an array of float64 of shape (2,)"]),
        ((OBS.astype(object), {}), ["an array of object"]),
    ],
)
def test_a_reset_that_breaks_the_contract_is_told_at_once(first: Any, words: list[str]) -> None:
    Odd.first = first
    with pytest.raises(EnvError) as caught:
        play(0)
    assert not isinstance(caught.value, EnvFailure)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        ((OBS, {}), (OBS, np.nan, False, False, {}), ["the reward nan", REWARDS]),
        ((OBS, {}), (OBS, np.inf, False, False, {}), ["the reward inf", REWARDS]),
        ((OBS, {}), (OBS, np.float64(1e300), False, False, {}), ["the reward 1e+300", REWARDS]),
        ((OBS, {}), (OBS, -1e38, False, False, {}), ["the reward -1e+38", "TransformReward"]),
        ((OBS, {}), (OBS, 1.1e12, False, False, {}), ["the reward 1.1e+12", REWARDS]),
        ((OBS, {}), (OBS * np.nan, *GOOD[1:]), ["an observation with nan", F32]),
        ((OBS, {}), (np.full(3, 1e300), *GOOD[1:]), ["an observation with 1e+300", F32]),
        ((OBS - np.inf, {}), GOOD, ["reset() returned an observation with -inf", "step 0 of"]),
    ],
)
def test_numbers_that_are_not_finite_name_the_episode(first: Any, then: Any, words: Any) -> None:
    Odd.first, Odd.then = first, then
    with pytest.raises(EnvFailure, match=r"of the episode with seed \d+, also when") as caught:
        play()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("seen", [[0.5, 1, -3], (0.5, 1.0, -3.0), np.array([0.5, 1, -3], ">f8")])
@pytest.mark.parametrize(
    "reward", [2, np.int8(2), np.float16(2.0), np.array(2.0), torch.tensor(2.0)]
)
@pytest.mark.parametrize("flag", [True, np.True_, np.array(True), 1, torch.tensor(True)])
def test_what_can_only_mean_one_thing_is_taken(seen: Any, reward: Any, flag: Any) -> None:
    Odd.then = (seen, reward, flag, np.False_, {})
    ts = play()
    assert ts.reward.tolist() == [[2.0, 2.0]] and ts.terminated.tolist() == [[True, True]]
    assert ts.obs.tolist() == [[[0.5, 1.0, -3.0]] * 2]


@pytest.mark.parametrize(
    ("space", "good", "flat", "bad"),
    [
        ("bytes", [[1, 2], [3, 255]], [1, 2, 3, 255], [[0.5, 1], [2, 3]]),
        ("bytes", np.eye(2), [1, 0, 0, 1], np.eye(2) > 0),
        ("flags", np.array([True, False, True]), [1, 0, 1], [0, 1, 2]),
        ("many", [6, 1], [0, 1, 0, 0, 1], [7, 0]),
        ("many", np.array([5, -1]), [1, 0, 1, 0, 0], [5, 2]),
        ("one", 4, [1, 0, 0], 3),
        ("one", np.array([6]), [0, 0, 1], 7),
        ("one", np.int16(5), [0, 1, 0], 5.0),
        ("dict", {"a": 1, "b": [0.5]}, [0, 1, 0.5], {"a": 1}),
        ("dict", {"b": OBS[:1], "a": 0}, [1, 0, 0], {"a": 2, "b": [0.5]}),
        ("tuple", (1, [0, 1]), [0, 1, 0, 1], (1,)),
        ("tuple", (0, np.ones(2) > 0), [1, 0, 1, 1], (0, [1, 1, 1])),
    ],
)
def test_observations_of_all_spaces(space: str, good: Any, flat: list[float], bad: Any) -> None:
    contract = Contract("Odd-v0", SEEN[space], ACTIONS["discrete"])
    seen = contract.first((good, {}))
    assert seen.tolist() == flat and seen.dtype == np.float32
    with pytest.raises(EnvError, match=r"reset\(\) returned .* as the observation"):
        contract.first((bad, {}))


@pytest.mark.parametrize("name", sorted(ACTIONS))
def test_actions_are_of_the_space(name: str) -> None:
    space = ACTIONS[name]
    contract = Contract("Odd-v0", SEEN["box"], space)
    draws = np.random.default_rng(0)
    for _ in range(50):
        if isinstance(space, spaces.Discrete):
            number = draws.integers(contract.action.size)
            given = contract.act(number)
            assert given == number + space.start
        else:
            given = contract.act(draws.normal(size=contract.action.size).astype(np.float32) * 3)
            assert isinstance(given, np.ndarray) and given.shape == space.shape
        assert given.dtype == space.dtype and space.contains(given)


def test_what_an_environment_goes_on_to_change_is_kept() -> None:
    mine = OBS.copy()

    def step() -> Any:
        mine[:] += 1
        return mine, 1.0, False, False, {}

    Odd.then = step
    task = make_task("gym", id="Odd-v0")
    env = task.make_env("cpu")
    state, _ = env.reset(task.sample(1, "train", Rng(0)), Rng(0))
    _, ts = env.step(state, torch.zeros(1, 1, dtype=torch.int64))
    mine[:] = 9
    assert ts.obs.tolist() == [[[1.0, 1.0, 1.0]]]
    assert env.final_obs(env._state).tolist() == [[[1.0, 1.0, 1.0]]]


class Nameless(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


@pytest.mark.parametrize("error", [SystemExit(0), SystemExit("no licence"), Nameless(), KeyError()])
def test_whatever_an_environment_raises_names_it(error: BaseException) -> None:
    for where in ("first", "then"):
        setattr(Odd, where, raising(error))
        with pytest.raises(EnvFailure, match=rf"'Odd-v0': .* raised {type(error).__name__}"):
            play()


@pytest.mark.parametrize(
    ("actions", "observations", "words"),
    [("none", "box", "action_space is None"), ("discrete", "none", "observation_space is None")]
    + [("empty", "box", "actions Box.* are not supported")],
)
def test_spaces_that_are_missing_or_empty(actions: str, observations: str, words: str) -> None:
    with pytest.raises(UserError, match=f"id = 'Odd-v0': .*{words}"):
        make_task("gym", id="Odd-v0", kwargs={"actions": actions, "observations": observations})


def test_a_signal_while_an_environment_is_called_ends_the_run() -> None:
    """Its ``SystemExit`` is of esmeta's handler, and no fault of the environment."""
    task = make_task("gym", id="Odd-v0")
    env = task.make_env("cpu")
    Odd.first = lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit), simulators_closed():
        env.reset(task.sample(2, "train", Rng(0)), Rng(0))


class Changing(Odd):
    """One that is made later has other spaces."""

    made = 0
    later: tuple[str, str] = ("discrete", "box")

    def __init__(self) -> None:
        super().__init__(*(Changing.later if Changing.made else ("discrete", "box")))
        Changing.made += 1


@pytest.mark.parametrize("later", [("small", "box"), ("discrete", "flags4")])
def test_environments_of_one_name_have_the_same_spaces(later: tuple[str, str]) -> None:
    Changing.made, Changing.later = 0, later
    gymnasium.register("Odd-v0", lambda: Changing(), max_episode_steps=4)
    with pytest.raises(EnvError, match=r"'Odd-v0': .* must have the same spaces"):
        play()


def test_a_name_that_is_registered_anew_is_looked_at_anew() -> None:
    assert make_task("gym", id="Odd-v0").spec.obs_size == 3
    Changing.made, Changing.later = 1, ("small", "dict")
    gymnasium.register("Odd-v0", lambda: Changing(), max_episode_steps=7)
    task = make_task("gym", id="Odd-v0")
    assert (task.spec.obs_size, task.spec.action.size, task.spec.horizon) == (3, 2, 7)


def test_who_erred_is_where_it_was_raised() -> None:
    Odd.then = raising(KeyError("theirs"))
    with pytest.raises(EnvFailure, match=r"step\(\) raised KeyError: 'theirs'") as caught:
        play()
    assert isinstance(caught.value.__cause__, KeyError)
    # A function of esmeta that an environment calls is not the environment.
    Odd.then = lambda: Rng("no seed").fold("x")  # type: ignore[arg-type]
    with pytest.raises(Exception) as caught:
        play()
    assert not isinstance(caught.value, UserError)
    Odd.then = raising(MemoryError())
    with pytest.raises(MemoryError):
        play()


def test_an_environment_that_misses_options_is_told_of_task_key() -> None:
    Odd.first = raising(TypeError("'NoneType' object is not subscriptable"))
    with pytest.raises(EnvFailure, match=r"reset\(\) raised TypeError.* set task\.task_key if it"):
        play()
    keyed = make_task("gym", id="Odd-v0", task_key="task")
    with pytest.raises(EnvFailure, match=r"repair the environment \(in step 0"):
        keyed.make_env("cpu").reset(keyed.sample(2, "train", Rng(0)), Rng(0))


def test_a_policy_that_exploded_is_not_the_environments_fault() -> None:
    task = make_task("gym", id="Odd-v0", kwargs={"actions": "double"})
    env = task.make_env("cpu")
    state, _ = env.reset(task.sample(1, "train", Rng(0)), Rng(0))
    with pytest.raises(FloatingPointError, match="the policy's actions for Odd-v0"):
        env.step(state, torch.full((1, 1, 2), torch.nan))


def test_the_traceback_is_kept_in_a_file(tmp_path: Path) -> None:
    Odd.then = raising(KeyError("theirs"))
    with pytest.raises(EnvFailure) as caught:
        play()
    for folder in (tmp_path, tmp_path / "none"):
        error = EnvFailure(str(caught.value))
        error.__cause__ = caught.value.__cause__
        keep_traceback(error, folder)
        keep_traceback(error, folder)  # once is enough
        assert str(error).count("; traceback: ") == 1 and "\n" not in str(error)
        file = Path(str(error).rpartition("; traceback: ")[2])
        assert (file.parent == folder) == (folder == tmp_path)
        text = file.read_text()
        assert "KeyError: 'theirs'" in text and "in raising" not in text and "in call" in text
        if folder != tmp_path:
            file.unlink()
    plain = UserError("task.x = 1: must be 2")
    keep_traceback(plain, tmp_path)
    assert str(plain) == "task.x = 1: must be 2"


def test_constructors_and_modules_that_raise(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "broken_worlds.py").write_text("import gymnasium\nraise OSError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match="task.id = 'broken_worlds:X-v0' cannot be made.*OSError: no lic"
    ):
        make_task("gym", id="broken_worlds:X-v0")
    with pytest.raises(
        UserError, match=r"task.id = 'Odd-v0' cannot be made with kwargs = .*KeyError"
    ):
        make_task("gym", id="Odd-v0", kwargs={"actions": "unknown"})
    with pytest.raises(UserError, match=r"'HalfCheetah-v2' .*gymnasium-robotics"):
        make_task("gym", id="HalfCheetah-v2")


SMALL = ["task.id=Odd-v0", "task.trials=4", "run.evaluate_every=0", "run.tensorboard=false"]


@pytest.mark.parametrize("optimizer", ["ppo", "a2c", "openes"])
def test_rewards_that_are_finite_but_huge_end_no_run_as_a_bug(
    tmp_path: Path, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gradients of them would not be finite; evolution and scores refuse the same."""
    args = ["gym-ppo", "--optimizer", optimizer, *overrides(*SMALL, "budget.generations=2")]
    args += overrides("optimizer.popsize=4") if optimizer == "openes" else []
    Odd.then = (OBS, 1e12, False, False, {})
    assert run_here(*args, "--out", tmp_path / "large") == 0
    theta, _ = load_theta(tmp_path / "large")
    assert all(bool(leaf.isfinite().all()) for leaf in theta.values())
    Odd.then = (OBS, 1e38, False, False, {})
    said = r"id = 'Odd-v0': step\(\) returned the reward 1e\+38; rewards must be .*TransformReward"
    with pytest.raises(EnvError, match=said):
        run_here(*args, "--out", tmp_path / "huge")
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "large"), "--trials", "4"]) == 2
    assert re.match(f"esmeta: error: {said}", capsys.readouterr().err.splitlines()[-1])


def test_an_environment_that_changes_the_working_directory_moves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> tuple:
        os.chdir(tmp_path / "elsewhere")
        return OBS, {}

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Odd, "first", staticmethod(away))
    assert run_here("gym-ppo", "--out", "run", *overrides(*SMALL, "budget.updates=1")) == 0
    assert (tmp_path / "run" / "theta.safetensors").is_file()
    assert not any((tmp_path / "elsewhere").iterdir())
