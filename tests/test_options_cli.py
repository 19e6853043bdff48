"""Every flag of evaluate and learn, and every key of [run] and [budget], changes what it says."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import overrides, run_here, summary, write_preset

from esmeta.run import config as configs
from esmeta.run import evaluate, learn
from esmeta.run.record import read_metrics


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Long names of all flags but --help."""
    words = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    return words - {"--help"}


# --- evaluate -----------------------------------------------------------------------------------

# Twins, so that there is an aid to keep; steps so large that the best theta is not the last; a
# seed that is not 0, which --seed 0 must be told from.
HARLOW = (
    "task.horizon=200", "task.presentations=3", "task.mirrored=true", "task.trials=4", "run.seed=3",
    "optimizer.learning_rate=0.3", "optimizer.popsize=4", "budget.generations=6",
    "run.evaluate_every=1", "run.evaluate_trials=16",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    out = folder / "run"
    assert (
        run_here(write_preset(folder), "--task", "harlow", "--out", out, *overrides(*HARLOW)) == 0
    )
    scores = [line["validation_return"] for line in read_metrics(out)]
    assert scores.index(max(scores)) < len(scores) - 1
    return out


EVALUATE: dict[str, tuple[list[str], list[str]]] = {
    "--trials": (["--trials", "6"], ["--trials", "20"]),
    "--seed": (["--seed", "0"], ["--seed", "5"]),
    "--split": (["--split", "train"], ["--split", "validation"]),
    "--as-trained": (["--as-trained"], []),
    "--set": (["--set", "task.horizon=100"], ["--set", "task.horizon=150"]),
    "--lesion": (["--lesion", "zero-reward"], ["--lesion", "reset-memory-each-step"]),
    "--greedy": (["--greedy"], []),
    "--best": (["--best"], []),
}


def scored(run: Path, args: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    given = args if "--trials" in args else [*args, "--trials", "300"]
    assert evaluate.main([str(run), *given, "--json"]) == 0, capsys.readouterr().err
    rows = json.loads(capsys.readouterr().out)
    return {name: row for name, row in rows.items() if isinstance(row, dict)}


@pytest.mark.parametrize("flag", EVALUATE)
def test_flags_of_evaluate(trained: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (scored(trained, args, capsys) for args in EVALUATE[flag])
    plain = scored(trained, [], capsys)
    # How often it chooses and how long that takes tells more of a policy than what it earns.
    means = [{name: row["mean"] for name, row in table.items()} for table in (one, two, plain)]
    assert means[0] != means[1] and means[0] != means[2]


def test_the_table_and_the_object_are_of_the_same_numbers(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = scored(trained, ["--trials", "6"], capsys)
    assert evaluate.main([str(trained), "--trials", "6"]) == 0
    assert f"{rows['return']['mean']:.4f}" in capsys.readouterr().out
    assert flags(evaluate.parser()) == {*EVALUATE, "--json"}, "give new flags a row"


# --- learn --------------------------------------------------------------------------------------

LEARN: dict[str, tuple[list[str], list[str]]] = {
    "learner": (["reinforce"], ["ppo"]),
    "--task": (["--task", "double_integrator"], ["--task", "pendulum"]),
    "--steps": (["--steps", "32"], ["--steps", "48"]),
    "--agents": (["--agents", "2"], ["--agents", "3"]),
    "--set": (["--set", "learner.gamma=0.5"], ["--set", "learner.gamma=0.9"]),
    "--split": (["--split", "train"], ["--split", "validation"]),
    "--seed": (["--seed", "1"], ["--seed", "2"]),
    "--policy": (["--policy", "mlp"], ["--policy", "rl2"]),
    "--parts": (["--parts", "2"], ["--parts", "4"]),
    "--test-episodes": (["--test-episodes", "1"], ["--test-episodes", "2"]),
    "--test-steps": (["--test-steps", "3"], ["--test-steps", "5"]),
}


def learned(folder: Path, args: list[str]) -> dict[str, Any]:
    name, more = ("ppo", args) if not args or args[0].startswith("--") else (args[0], args[1:])
    given = ["--task", "pendulum", "--steps", "64", "--agents", "4", "--parts", "8"]
    given += ["--test-episodes", "3", "--test-steps", "8", "--out", str(folder / "out.json")]
    small = ["period=16", "minibatch=4", "learning_rate=0.05"]
    small += [] if "--policy" in args else ["hidden=[4]"]  # of the published networks
    given += [word for text in small for word in ("--set", f"learner.{text}")]
    assert learn.main([name, *given, "--set", "task.episode_steps=16", *more]) == 0
    found = json.loads((folder / "out.json").read_text())
    return {"curve": found["curve"], "test": found["test"]}


@pytest.mark.parametrize("flag", LEARN)
def test_flags_of_learn(tmp_path: Path, flag: str) -> None:
    one, two = (learned(tmp_path, args) for args in LEARN[flag])
    about = "test" if flag.startswith("--test") else "curve"
    plain = learned(tmp_path, [])
    assert one[about] != two[about]
    assert one[about] != plain[about] or flag == "--task"
    if about == "test":  # what comes after a life does not reach into it
        assert one["curve"] == two["curve"]


def test_lives_are_on_the_device_of_learn() -> None:
    args = ["ppo", "--task", "pendulum", "--steps", "2000", "--device"]
    for device in ("cpu", "meta"):
        lives, _ = learn.build(learn.parser().parse_args([*args, device]))
        assert lives.device == torch.device(device)


def test_no_flag_of_learn_is_left_out(tmp_path: Path) -> None:
    """Every argument has a row above that fails if it is not forwarded, or a test by name."""
    names = {(action.option_strings or [action.dest])[-1] for action in learn.parser()._actions}
    assert names == {*LEARN, "--help", "--out", "--device"}, "give new flags a row"
    assert all(flag in (args[0], "learner") for flag, row in LEARN.items() for args in row)
    words = ["ppo", "--task", "pendulum", "--steps", "4", "--set", "learner.period=2"]
    words += ["--set", "learner.minibatch=2", "--parts", "1", "--out"]
    for name in ("one.json", "two.json"):
        assert learn.main([*words, str(tmp_path / name)]) == 0
        assert (tmp_path / name).exists()


# --- [budget] and [run] -------------------------------------------------------------------------


def ran(folder: Path, *given: str) -> dict[str, Any]:
    """Of a tiny run: steps and the reason for the end, files, steps that were logged and scored,
    threads, and the hash of theta."""
    out = folder / f"run{len(list(folder.iterdir()))}"
    assert run_here(write_preset(folder), "--out", out, *overrides(*given)) == 0
    facts, lines = summary(out), read_metrics(out)
    known = {"steps", "stopped_by", "restarts", "theta_sha256", "threads", "device"}
    previous = out / "checkpoint" / "previous.ckpt"
    from esmeta.run.record import _read_checkpoint

    found = {k: v for k, v in facts.items() if k in known}
    found["previous"] = _read_checkpoint(previous).step if previous.exists() else None
    found["logged"] = [line["step"] for line in lines]
    found["scored"] = [line["step"] for line in lines if "validation_return" in line]
    found["score"] = [line["validation_return"] for line in lines if "validation_return" in line]
    found["events"] = (out / "tensorboard").exists()
    return found


FAST = ("optimizer.learning_rate=0.5", "run.evaluate_every=1", "budget.generations=60")
TWINS = ("task.name=harlow", "task.horizon=30", "task.mirrored=true")
# key -> (one, two, what differs, circumstances)
KEYS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "budget.generations": ("3", "4", "steps logged", ()),
    "budget.updates": ("2", "3", "steps logged", ()),
    "budget.env_steps": ("600", "1200", "steps logged", ()),
    "budget.seconds": ("1e-9", "1e9", "steps stopped_by", ()),
    "budget.target": ("-1", "1e9", "steps stopped_by", ()),
    "budget.plateau": ("2", "4", "steps", FAST),
    "budget.restarts": ("1", "2", "restarts steps", (*FAST, "budget.plateau=3")),
    "run.seed": ("1", "2", "theta_sha256 score", ()),
    "run.threads": ("2", "1", "threads", ()),
    "run.checkpoint_every": ("1", "4", "previous", ()),
    "run.evaluate_every": ("1", "2", "scored", ()),
    "run.evaluate_trials": ("4", "32", "score", ()),
    "run.metrics_every": ("2", "4", "logged", ("run.evaluate_every=0",)),
    "run.tensorboard": ("true", "false", "events", ()),
    "run.evaluate_as_trained": ("true", "false", "score", TWINS),
}
# Of several ranks, of a GPU, or of long runs: tests of these are in test_faults.py,
# test_env_remote.py, test_bad_input.py and test_outer_loop.py.
ELSEWHERE = {"run.metrics_per_second", "run.rank_timeout", "run.remote_envs", "run.device"}


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_budget_and_run(tmp_path: Path, key: str) -> None:
    one, two, shows, given = KEYS[key]
    results = [ran(tmp_path, *given, f"{key}={value}") for value in (one, two)]
    for what in shows.split():
        assert results[0][what] != results[1][what], what
    if key == "run.threads":
        assert results[0]["threads"] == 2
    if key.startswith("run.") and key != "run.seed":  # how a run is carried out, not what it finds
        assert results[0]["theta_sha256"] == results[1]["theta_sha256"]
    torch.set_num_threads(1)


def test_no_key_is_left_out() -> None:
    keys = {f"budget.{field.name}" for field in dataclasses.fields(configs.Budget)}
    keys |= {f"run.{field.name}" for field in dataclasses.fields(configs.Run)}
    assert keys == set(KEYS) | ELSEWHERE, "give new keys a row"
