"""Learning, measured: one-shot learning on Harlow in a minute, and the lesions that break it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import overrides, run_here

from esmeta.evaluator import PopulationEvaluator
from esmeta.run import evaluate
from esmeta.types import Fitness


def scores(run: Path, lesion: str, trials: int = 512) -> Fitness:
    policy, params, task = evaluate.load(run)
    evaluator = PopulationEvaluator(policy, task, trials=trials)
    change = evaluate.lesion(lesion, policy, params)
    return evaluator(params, split="test", index=torch.arange(trials), intervene=change)


def accuracy(fitness: Fitness, presentations: range) -> float:
    """Share of right choices; a presentation that was not reached counts as a wrong one."""
    found = [fitness.metrics[f"accuracy_{k}"].nan_to_num(0.0).mean() for k in presentations]
    return float(torch.stack(found).mean())


def train_here(preset: str, out: Path, *changes: str) -> None:
    quiet = ("run.evaluate_every=0", "run.tensorboard=false")
    assert run_here(preset, "--out", out, *overrides(*changes, *quiet)) == 0


def check_lesions(run: Path) -> None:
    """Without memory or without reward the agent is at chance, though it still finishes."""
    for lesion in ("reset-memory", "zero-reward"):
        broken = scores(run, lesion)
        assert float(broken.metrics["presentations"].mean()) > 4.5, lesion
        assert abs(accuracy(broken, range(2, 6)) - 0.5) < 0.06, lesion


def test_one_shot_learning_on_harlow_and_its_lesions(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here("harlow-ppo", run, "budget.updates=130")
    intact = scores(run, "none")
    assert abs(accuracy(intact, range(1, 2)) - 0.5) < 0.08  # 3.6 standard errors
    assert accuracy(intact, range(2, 6)) >= 0.85
    check_lesions(run)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_harlow_preset_reaches_its_score(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here("harlow-ppo", run)
    intact = scores(run, "none", trials=2000)
    assert abs(accuracy(intact, range(1, 2)) - 0.5) < 0.05
    assert accuracy(intact, range(2, 6)) >= 0.90
    check_lesions(run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_maze_preset_reaches_its_score(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_here("maze-ppo", run)
    policy, params, task = evaluate.load(run)
    fitness = scores(run, "none", trials=1000)
    assert float(fitness.returns.mean()) >= 4 * task.reference.random
    assert float(fitness.metrics["success"].mean()) >= 0.8
