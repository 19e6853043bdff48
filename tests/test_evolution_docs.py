"""docs/evolution.md names what there is."""

from __future__ import annotations

import json
import re
from importlib import import_module

import pytest
from conftest import ROOT
from searches import Objective, run, solo, sphere, start
from tiny_runs import run_here, write_preset

from esmeta.optimizers import evotorch_snes, openes, pgpe, sepcma, snes
from esmeta.run import config

PAGE = (ROOT / "docs" / "evolution.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
EVOLUTION = (openes, pgpe, snes, sepcma, evotorch_snes)


@pytest.mark.parametrize("module", EVOLUTION, ids=lambda module: module.__name__.split(".")[-1])
def test_every_metric_is_explained(module):
    _, [metrics] = run(module.Optimizer(popsize=4), Objective(sphere), start(3), 1, solo())
    assert set(metrics) <= NAMED, set(metrics) - NAMED


def test_every_column_of_a_run_is_explained(tmp_path):
    assert run_here(write_preset(tmp_path), "--out", tmp_path / "run") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    columns = {name for row in rows for name in row}
    unknown = {name for name in columns - NAMED if not name.startswith("validation_")}
    assert unknown <= {"step", "time"}, unknown


def test_every_evolution_strategy_is_in_the_table():
    folder = ROOT / "esmeta" / "optimizers"
    names = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    modules = {name: import_module(f"esmeta.optimizers.{name}") for name in names}
    evolution = {name for name, module in modules.items() if not module.Optimizer.gradient}
    assert {"openes", "cmaes"} <= evolution <= NAMED, evolution - NAMED


def test_its_presets_exist():
    presets = set(re.findall(r"[ \w]((?:harlow|maze|bandit)-[a-z0-9-]+)", PAGE))
    assert presets and presets <= set(config.preset_names())
