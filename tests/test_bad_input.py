"""Every mistake of a user is one line that names value, range and cure; nothing is touched."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import environment
from tiny_runs import PRESET, files, overrides, run_here, write_preset

from esmeta.errors import UserError


def refused(folder: Path, *args: object) -> str:
    """The message of a refused command line; checks that ``folder`` was left alone."""
    before = files(folder)
    with pytest.raises(UserError) as caught:
        run_here(*args)
    assert files(folder) == before, "files were changed by a command that was refused"
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def assert_says(message: str, *words: str) -> None:
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# (flags, what the message must say)
# What test_config.py says of any option, such as types and limits of the budget, is not here.
WRONG: list[tuple[list[str], list[str]]] = [
    (["--task", "bandid"], ["'bandid'", "did you mean 'bandit'", "harlow"]),
    (["--optimizer", "opnes"], ["'opnes'", "did you mean 'openes'", "cmaes", "ppo"]),
    (["--objective", "retrun"], ["'retrun'", "did you mean 'return'"]),
    (["--set", "policy.name=metod"], ["'metod'", "did you mean 'metods'", "rl2"]),
    (["--set", "optimizer.popsise=8"], ["optimizer.popsise", "did you mean 'popsize'", "sigma"]),
    (["--set", "optimizer.popsize=many"], ["optimizer.popsize = 'many'", "an integer"]),
    (["--set", "optimizer.popsize=7"], ["popsize = 7", "even integer >= 2", "256"]),
    (["--set", "optimizer.popsize=1"], ["popsize = 1", "even integer >= 2", "256"]),
    (["--optimizer", "snes", "--set", "optimizer.popsize=7"], ["popsize = 7", "even"]),
    (["--set", "optimizer.sigma=0"], ["optimizer.sigma = 0.0", "> 0", "0.05"]),
    (["--set", "optimizer.learning_rate=nan"], ["optimizer.learning_rate = nan", "finite"]),
    (["--set", "optimizer.learning_rate=-1"], ["optimizer.learning_rate = -1", "> 0"]),
    (["--set", "optimizer.shaping=rank"], ["'rank'", "centered"]),
    (["--optimizer", "a2c", "--set", "optimizer.learning_rate=nan"], ["learning_rate = nan"]),
    (["--optimizer", "a2c", "--set", "optimizer.gamma=2"], ["optimizer.gamma = 2.0", "0 and 1"]),
    (["--optimizer", "ppo", "--set", "optimizer.epochs=0"], ["optimizer.epochs = 0", ">= 1"]),
    (["--optimizer", "a2c", "--set", "optimizer.popsize=8"], ["optimizer.popsize", "gamma"]),
    (["--set", "policy.depth=0"], ["policy.depth = 0", ">= 1"]),
    (["--set", "policy.neurons=-4"], ["policy.neurons = -4", ">= 1"]),
    (["--set", "policy.hidden=[0]"], ["policy.hidden", "0", ">= 1"]),
    (["--set", "policy.variant=lineal"], ["'lineal'", "did you mean 'linear'"]),
    (["--set", "policy.w0=random"], ["'random'", "learned, sampled, fixed"]),
    (["--set", "task.horizon=0"], ["task", "horizon is 0", "1 to 10000", "horizon=1"]),
    (["--set", "task.reward_probability=0.5"], ["0.5", "at most 1", "0.8"]),
    (["--set", "run.rank_timeout=-1"], ["run.rank_timeout = -1.0", ">= 0", "120"]),
    (["--device", "cuda:99"], ["run.device = 'cuda:99'", "CUDA devices", "--device cpu"]),
]


@pytest.mark.parametrize(("flags", "words"), WRONG, ids=lambda x: " ".join(x)[:60])
def test_wrong_options(tmp_path: Path, flags: list[str], words: list[str]) -> None:
    preset = write_preset(tmp_path)
    assert_says(refused(tmp_path, preset, "--out", tmp_path / "run", *flags), *words)


def test_wrong_presets(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    message = refused(tmp_path, "harlow-a2d", *out)
    assert_says(message, "'harlow-a2d'", "did you mean 'harlow-a2c'", "bandit-openes", ".toml")
    assert_says(refused(tmp_path, tmp_path / "none.toml", *out), "none.toml", "No such file")
    (tmp_path / "a folder.toml").mkdir()
    assert_says(refused(tmp_path, tmp_path / "a folder.toml", *out), "a folder.toml", "directory")
    bad = tmp_path / "bad.toml"
    bad.write_text(PRESET.replace("trials = 3", "trials = "), encoding="utf-8")
    assert_says(refused(tmp_path, bad, *out), "bad.toml", "not valid TOML", "line 4")
    bad.write_bytes(b"\xff\xfe\x00")
    assert_says(refused(tmp_path, bad, *out), "bad.toml", "UTF-8")
    bad.write_text(PRESET.replace("[policy]", "[polici]"), encoding="utf-8")
    assert_says(refused(tmp_path, bad, *out), "[polici]", "did you mean 'policy'")
    bad.write_text(PRESET.replace('name = "openes"', ""), encoding="utf-8")
    assert_says(refused(tmp_path, bad, *out), "optimizer.name is missing", "snes")
    bad.write_text('task = "bandit"', encoding="utf-8")
    assert_says(refused(tmp_path, bad, *out), "task = 'bandit'", "[task]")


def test_sizes_that_do_not_go_together(tmp_path: Path) -> None:
    preset, out = write_preset(tmp_path), tmp_path / "run"
    message = refused(tmp_path, preset, "--out", out, "--optimizer", "ppo")
    assert_says(message, "minibatches = 4", "only 3 trials", "at most 3", "raise task.trials")


def test_windows_longer_than_a_life(tmp_path: Path) -> None:
    args = ["--optimizer", "nres", *overrides("optimizer.window=9")]
    message = refused(tmp_path, write_preset(tmp_path), "--out", tmp_path / "run", *args)
    assert_says(message, "optimizer.window = 9", "a life has 5 steps", "at most 5")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    preset = write_preset(tmp_path)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work", encoding="utf-8")
    for args in ((), ("--resume",)):
        message = refused(tmp_path, preset, "--out", full, *args)
        assert_says(message, str(full), "--resume")
    assert_says(refused(tmp_path, preset, "--out", preset), "tiny.toml exists", "--out")
    below = refused(tmp_path, preset, "--out", preset / "run")
    assert_says(below, "cannot be written", "Not a directory", "--out")
    assert_says(refused(tmp_path, preset, "--resume"), "--resume needs a run directory")
    missing = refused(tmp_path, preset, "--resume", tmp_path / "nowhere")
    assert_says(missing, "nowhere", "--resume")
    assert_says(refused(tmp_path, "--resume", tmp_path / "nowhere"), "nowhere")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run of four generations with two checkpoints."""
    args = overrides("budget.generations=4", "run.evaluate_every=0")
    assert run_here(write_preset(tmp_path), "--out", tmp_path / "run", *args) == 0
    return tmp_path / "run"


def test_a_checkpoint_of_another_configuration(finished: Path) -> None:
    args = overrides("optimizer.name=snes", "budget.generations=9")
    message = refused(finished, "--resume", finished, *args)
    assert_says(message, "another configuration", "another --out")
    assert_says(message, "optimizer.name = 'openes' there, 'snes' here")


# --- exit codes, in processes of their own -----------------------------------------------------


def command(folder: Path, *args: object, module: str = "esmeta.train") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=folder,
        env=environment(None),
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["harlow-a2d"], "did you mean 'harlow-a2c'"),
        (["harlow-a2c", "--set", "optimizer.learning_rate=nan"], "learning_rate = nan"),
        (["harlow-a2c", "--out", "file/run"], "file/run cannot be written"),
        (["harlow-a2c", "--optimiser=snes"], "--optimiser is not an option (did you mean '--opti"),
        (["harlow-a2c", "snes"], "'snes' is one argument too many; see --help"),
        (["harlow-a2c", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
    ],
)
def test_exit_code_and_one_line(tmp_path: Path, args: list[str], words: str) -> None:
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    before = files(tmp_path)
    code, out, err = command(tmp_path, *args)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"esmeta: error: [^\n]+\n", err), err
    assert words in err
    assert files(tmp_path) == before


def test_evaluate_exit_code_and_one_line(tmp_path: Path) -> None:
    code, out, err = command(tmp_path, "nowhere", module="esmeta.evaluate")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"esmeta: error: nowhere: not a run directory [^\n]+\n", err), err


def test_evaluate_refuses_in_one_line(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from esmeta.run import evaluate

    for args, words in (
        (["--trials", "0"], "--trials = 0: must be an integer >= 1"),
        (["--seed", "-1"], "--seed = -1: must be an integer >= 0"),
        (["--set", "policy.neurons=3"], "write task.KEY=VALUE or objective.KEY=VALUE"),
        (["--set", "objective.name=epg"], "write task.KEY=VALUE or objective.KEY=VALUE"),
        (["--set", "task.name=harlow"], "other shapes"),
        (["--set", "task.horizn=3"], "did you mean 'horizon'"),
    ):
        before = files(finished)
        assert evaluate.main([str(finished), *args]) == 2
        err = capsys.readouterr().err
        assert re.fullmatch(r"esmeta: error: [^\n]+\n", err) and words in err, err
        assert files(finished) == before
    theta = finished / "theta.safetensors"
    theta.write_bytes(theta.read_bytes()[:100])
    assert evaluate.main([str(finished)]) == 2
    assert "theta.safetensors cannot be read" in capsys.readouterr().err


@pytest.mark.mpi
def test_ranks_that_disagree(tmp_path: Path, mpirun: Any) -> None:
    preset = write_preset(tmp_path)
    before = files(tmp_path)
    one = ["-m", "esmeta.train", preset, "--out", tmp_path / "run", "--seed"]
    done = mpirun(1, *one, 0, ":", "-n", 1, sys.executable, *one, 1)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("esmeta: error:")]
    assert len(lines) == 1 and "the ranks were given different configurations" in lines[0]
    assert "same command line" in lines[0] and "Traceback" not in done.stderr
    assert files(tmp_path) == before


@pytest.mark.mpi
def test_all_ranks_refuse_with_one_line(tmp_path: Path, mpirun: Any) -> None:
    preset = write_preset(tmp_path)
    before = files(tmp_path)
    args = ["-m", "esmeta.train", preset, "--out", tmp_path / "run"]
    done = mpirun(2, *args, "--optimizer", "opnes")
    assert done.returncode == 2 and files(tmp_path) == before
    assert done.stderr.strip().startswith("esmeta: error: optimizer 'opnes'")
    assert len(done.stderr.strip().splitlines()) == 1
    # Only rank 0 sees that the place is taken; all ranks end.
    done = mpirun(2, *args[:-1], preset)
    assert done.returncode == 2 and files(tmp_path) == before
    assert "tiny.toml exists" in done.stderr and "Traceback" not in done.stderr


def test_nan_is_not_a_number_anywhere() -> None:
    """Every float option of every section refuses nan, whoever wrote its class."""
    import dataclasses

    from esmeta import names

    for kind in names.KINDS:
        for name in names.known(kind):
            cls = names.load(kind, name)
            for field in dataclasses.fields(cls):
                if isinstance(field.default, float):
                    with pytest.raises(UserError, match=rf"{field.name} = nan"):
                        names.check_options(cls, {field.name: math.nan}, kind)
