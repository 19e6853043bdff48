"""The command line: its flags, what a run leaves behind, and the same theta on any ranks."""

from __future__ import annotations

import json
import math
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment
from tiny_runs import final_hash, overrides, run_here, summary, write_preset

import esmeta
from esmeta.run import config as configs
from esmeta.run import evaluate, launch, train
from esmeta.run.record import load_checkpoint, load_theta, read_metrics
from esmeta.tree import theta_sha256

NATIVE = ["openes", "nres", "pes", "pgpe", "snes", "sepcma"]
SEARCHERS = [*NATIVE, "evotorch_pgpe", "evotorch_snes", "cem", "xnes", "cmaes"]


def flags(parser: Any) -> list[str]:
    return sorted(word for action in parser._actions for word in action.option_strings)


def test_flags_are_frozen() -> None:
    """A new flag needs a reason: everything else is ``--set``."""
    expected = ["--device", "--help", "--list", "--objective", "--optimizer", "--out", "--resume"]
    expected += ["--seed", "--set", "--task", "-h"]
    assert flags(train.parser()) == sorted(expected)
    expected = ["--help", "--hosts", "--launcher", "--max-restarts", "--ranks", "-h", "-n"]
    assert flags(launch.parser()) == expected
    for parser in (train.parser(), evaluate.parser(), launch.parser()):
        assert all(action.help for action in parser._actions)


@pytest.mark.parametrize("module", ["train", "evaluate", "launch"])
def test_help_is_quick(module: str, tmp_path: Path) -> None:
    code = (
        f"import sys; from esmeta import {module} as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "assert not {'torch', 'numpy', 'evotorch', 'mpi4py'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(None),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m esmeta.{module}" in done.stdout


def test_list_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--list") == 0
    names = capsys.readouterr().out.split()
    assert names == sorted(path.stem for path in (ROOT / "runs" / "presets").glob("*.toml"))
    assert "harlow-a2c" in names


def test_a_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset, out = write_preset(tmp_path), tmp_path / "run"
    assert run_here(preset, "--out", out, *overrides("run.tensorboard=true")) == 0
    printed = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {
        "best.safetensors",
        "checkpoint",
        "config.toml",
        "curve.png",
        "metrics.jsonl",
        "run.json",
        "tensorboard",
        "theta.safetensors",
    }
    assert sorted(p.name for p in (out / "checkpoint").iterdir()) == [
        "current.ckpt",
        "previous.ckpt",
    ]
    config = configs.resolve(configs.load(out / "config.toml"))
    given = configs.resolve(configs.load(preset))
    assert configs.digest(config) == configs.digest(given)
    assert "learning_rate = 0.02" in (out / "config.toml").read_text()  # a default, written out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    assert all(re.fullmatch("[0-9a-f]{64}", line["theta_sha256"]) for line in lines)
    # A generation in which all members earn the same changes nothing; here there is one at most.
    moved = [line for line in lines[1:] if not line["flat"]]
    assert len({line["theta_sha256"] for line in lines}) == 1 + len(moved) >= 6
    # 22 members, 3 trials of 5 pulls.
    assert [line["env_steps"] for line in lines] == [330 * step for step in range(7)]
    assert [line["step"] for line in lines if "validation_return" in line] == [0, 3, 6]
    assert all(math.isfinite(line["fitness_mean"]) for line in lines[1:])
    theta, meta = load_theta(out)
    first = build(preset).theta
    assert lines[0]["theta_sha256"] == theta_sha256(first)
    assert theta_sha256(theta) == lines[-1]["theta_sha256"] == meta["theta_sha256"]
    facts = summary(out)
    assert final_hash(out) == theta_sha256(theta)
    assert (facts["steps"], facts["env_steps"], facts["ranks"]) == (6, 1980, 1)
    assert facts["stopped_by"] == "steps"
    checkpoint = load_checkpoint(out)
    assert checkpoint is not None and checkpoint.step == 6
    assert theta_sha256(checkpoint.theta) == final_hash(out)
    assert "stopped by steps after 6 steps, 1,980 environment steps" in printed
    assert "test return" in printed and "curve.png" in printed


def build(preset: Path) -> train.Parts:
    return train.build(configs.resolve(configs.load(preset)))


def short(tmp_path: Path, name: str, *args: str) -> Path:
    """A finished run of two generations without held-out scores."""
    out = tmp_path / name
    base = ("budget.generations=2", "run.evaluate_every=0")
    assert run_here(write_preset(tmp_path), "--out", out, *overrides(*base), *args) == 0
    return out


def test_flags_choose_task_optimizer_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--task", "harlow", "--optimizer", "a2c", "--objective", "return", "--seed", "7"]
    args += overrides("budget.updates=1", "task.horizon=9", "run.evaluate_every=0")
    assert run_here(write_preset(tmp_path), "--device", "cpu", *args) == 0
    (out,) = (tmp_path / "runs" / "out").iterdir()
    assert re.fullmatch(r"tiny-7-\d{8}-\d{6}", out.name)
    config = configs.resolve(configs.load(out / "config.toml"))
    assert (config.task.name, config.optimizer.name, config.run.seed) == ("harlow", "a2c", 7)
    assert config.trials == 3 and config.task.instance.horizon == 9
    assert config.policy.instance.neurons == 4
    policy, params, _ = esmeta.load(out)
    assert policy.value is not None and "value.0.weight" in params


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from esmeta.tasks.bandit import Task as Mine\n"
    (tmp_path / "my_cli_task.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    out = short(tmp_path, "own", "--task", "my_cli_task:Mine", "--set", "task.horizon=5")
    assert final_hash(out) == final_hash(short(tmp_path, "built-in"))


# --- ranks -----------------------------------------------------------------------------------

GENERATIONS = 12
MANY = f"""
import sys
from esmeta.run import train
train.Trainer.test = lambda _: dict()
train.report = lambda *_: None  # a picture of what was learned
preset, prefix, *names = sys.argv[1:]
for name in names:
    train.main([preset, "--optimizer", name, "--out", prefix + name,
          "--set", "optimizer.popsize=22", "--set", "budget.generations={GENERATIONS}",
          "--set", "run.evaluate_every=0"])
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hash of theta of every searcher in one process."""
    folder = tmp_path_factory.mktemp("alone")
    preset = write_preset(folder)
    hashes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", lambda *_: None)
        for name in SEARCHERS:
            args = overrides(
                "optimizer.popsize=22", f"budget.generations={GENERATIONS}", "run.evaluate_every=0"
            )
            assert run_here(preset, "--optimizer", name, "--out", folder / name, *args) == 0
            hashes[name] = final_hash(folder / name)
    assert len(set(hashes.values())) == len(SEARCHERS)
    return hashes


@pytest.mark.mpi
@pytest.mark.parametrize(
    "ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4, 8))]
)
def test_the_same_theta_on_any_number_of_ranks(
    tmp_path: Path, mpirun: Any, alone: dict[str, str], ranks: int
) -> None:
    preset, script = write_preset(tmp_path), tmp_path / "many.py"
    script.write_text(MANY, encoding="utf-8")
    done = mpirun(ranks, script, preset, f"{tmp_path}/", *SEARCHERS)
    assert done.returncode == 0, done.stderr
    for name in SEARCHERS:
        assert final_hash(tmp_path / name) == alone[name], name
        assert summary(tmp_path / name)["ranks"] == ranks
        steps = [line["step"] for line in read_metrics(tmp_path / name)]
        assert steps == list(range(1, GENERATIONS + 1)), "only one rank may write"
        if name not in NATIVE:
            assert not any(line["resync"] for line in read_metrics(tmp_path / name))


# Page faults of an evaluation whose fast weights are 4 MB, before and after esmeta prepared memory.
FAULTS = """
import resource
import torch
torch.set_num_threads(1)
import esmeta
from esmeta.run.cli import prepare_process
task = esmeta.make_task("harlow", horizon=60)
policy = esmeta.make_policy("metods", task.spec, neurons=12, depth=2)
evaluator = esmeta.PopulationEvaluator(policy, task, trials=16, chunk=256)
params = policy.init(population=256)
def faults():
    evaluator(params)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    evaluator(params)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
prepare_process()
print(plain, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, env=environment(None), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain, kept = map(int, done.stdout.split())
    assert 4 * kept < plain, (plain, kept)


def test_a_run_in_ones_own_process_gives_signals_back(tmp_path: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    mine = [signal.getsignal(number) for number in numbers]
    try:
        assert train.main([str(write_preset(tmp_path)), "--out", str(tmp_path / "run")]) == 0
        assert [signal.getsignal(number) for number in numbers] == mine
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
