"""docs/extending.md: its files make a package, its names work, and its numbers are right."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import searches
import torch
from conftest import ROOT
from torch import Tensor

import esmeta
from esmeta import names
from esmeta.objectives.return_ import ReturnObjective
from esmeta.rng import Rng
from esmeta.run import learn

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = re.findall(r"^python -m (esmeta\.\w+) (.*)$", PAGE, re.MULTILINE)
KINDS = {
    "task": "mylab.recall:Task",
    "policy": "mylab.hebbian:Config",
    "objective": "mylab.careful:Objective",
    "optimizer": "mylab.ars:Optimizer",
    "learner": "mylab.decayed:Learner",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lab")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def module(name: str) -> ModuleType:
    return importlib.import_module(f"mylab.{name}")


def test_the_commands_run(lab: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(lab)
    assert [name for name, _ in COMMANDS] == [
        "esmeta.train", "esmeta.train", "esmeta.evaluate", "esmeta.report", "esmeta.learn",
    ]  # fmt: skip
    hook = sys.excepthook
    for name, words in COMMANDS:
        assert importlib.import_module(name).main(shlex.split(words)) == 0, words
    sys.excepthook = hook
    facts = json.loads((lab / "mine" / "run.json").read_text())
    assert facts["steps"] == 60 and facts["test"]["test_return"] > 0.95
    without = re.search(r"lesion.*\n +return +(\S+)", capsys.readouterr().out)
    assert without is not None and abs(float(without[1]) - 0.5) < 0.15
    page = (lab / "mine" / "report" / "report.html").read_text()
    assert all(name in page for kind, name in KINDS.items() if kind != "learner")
    _, _, task = esmeta.load(lab / "mine")
    assert task == esmeta.make_task(KINDS["task"])


def test_every_kind_is_shown_and_checked_as_those_within(lab: Path) -> None:
    assert set(KINDS) == set(names.KINDS)
    for kind, name in KINDS.items():
        assert names.load(kind, name) is getattr(module(name.split(".")[1].split(":")[0]),
                                                 names.KINDS[kind][1])  # fmt: skip
        with pytest.raises(ValueError, match=f"{kind}.nonsense is not an option"):
            names.make(kind, name, {"nonsense": 1})


def test_the_memory_writes_its_trace_and_starts_anew(lab: Path) -> None:
    memory: Any = module("hebbian").Hebbian(3, 0.25)
    params = {name: leaf[None] for name, leaf in memory.init(Rng(1)).items()}
    prepared = memory.prepare(params)
    index = torch.arange(2)[None]
    state = memory.initial_state(params, 2, Rng(0), index)
    x = torch.randn(4, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    y, after = memory.step(prepared, state, x[0])
    assert torch.allclose(y, torch.tanh(x[0] @ params["w"]), atol=1e-6)
    assert torch.allclose(after["H"], 0.25 * x[0].unsqueeze(-1) * y.unsqueeze(-2), atol=1e-6)
    second, _ = memory.step(prepared, after, x[1])
    weights = params["w"][:, None] + params["alpha"][:, None] * after["H"]
    assert torch.allclose(second, torch.tanh(x[1].unsqueeze(-2) @ weights).squeeze(-2), atol=1e-6)
    new = torch.zeros(4, 1, 2, dtype=torch.bool)
    new[2, 0, 1] = True
    outputs, _ = memory.scan(prepared, state, x, new)
    first, _ = memory.step(prepared, state, x[2])
    assert torch.equal(outputs[1], second)
    assert torch.equal(outputs[2][0, 1], first[0, 1]) and not torch.equal(outputs[2], first)


def test_the_task_pays_for_what_was_shown(lab: Path) -> None:
    task: Any = esmeta.make_task("mylab.recall:Task", horizon=3)
    env, tasks = task.make_env("cpu"), task.sample(64, "train", Rng(0))
    state, ts = env.reset(tasks, Rng(1), 2)
    cue = tasks.data["cue"].expand(2, -1)
    assert torch.equal(ts.obs[..., 0] > 0, cue == 1) and 16 < int(cue[0].sum()) < 48
    for t in range(3):
        state, ts = env.step(state, cue)
        assert (ts.obs == 0).all()
        assert torch.equal(ts.reward, torch.ones(2, 64) if t == 2 else -cue.float())
        assert (ts.new_trial == (t == 2)).all()
    assert (env.metrics(state)["right"] == 1).all()
    assert (env.step(state, cue)[1].reward == 0).all()


def test_the_objective_counts_the_spread(lab: Path) -> None:
    task = esmeta.make_task("mylab.recall:Task")
    policy = esmeta.make_policy("mylab.hebbian:Config", task.spec, neurons=4, hidden=())
    made = {"trials": 16, "seed": 3, "device": "cpu"}
    options: Any = names.make("objective", "mylab.careful:Objective", {"aversion": 2.0})
    theta = policy.init(seed=0, population=3)
    plain = ReturnObjective(policy, task, **made).fitness(theta, 5).returns  # type: ignore[arg-type]
    found = options.make(policy, task, **made).fitness(theta, 5)
    spread = plain.var(dim=1).sqrt()
    assert (spread > 0).any()
    assert torch.allclose(found.mean(), plain.mean(dim=1) - 2.0 * spread)


def test_the_search_follows_its_best_pairs(lab: Path) -> None:
    search: Any = names.make("optimizer", "mylab.ars:Optimizer", {"popsize": 8, "sigma": 0.1})
    search = replace(search, learning_rate=0.3)
    seen: list[Tensor] = []

    def sphere(members: Tensor) -> Tensor:
        seen.append(members)
        return searches.sphere(members)

    comm, theta = searches.solo(), searches.start(3)
    state = search.init(theta, Rng(7))
    begun = state.theta.astype(np.float64)
    state, _ = search.step(state, searches.Objective(sphere), comm, Rng(7))
    members = torch.cat(seen)
    pairs = searches.sphere(members).reshape(-1, 2).numpy()
    best = np.argsort(-pairs.max(axis=1))[:2]
    eps = (members.numpy()[0::2] - begun) / 0.1
    step = ((pairs[best, 0] - pairs[best, 1])[:, None] * eps[best]).sum(0) / 2 / pairs[best].std()
    assert np.allclose(state.theta - begun, 0.3 * step, atol=1e-5)


def test_the_learner_pulls_towards_zero(lab: Path) -> None:
    words = ["mylab.decayed:Learner", "--task", "displacement", "--steps", "64"]
    words += ["--set", "learner.period=32", "--set", "learner.minibatch=32"]
    norms = []
    for decay in ("0", "1000"):
        lives, loss = learn.build(
            learn.parser().parse_args([*words, "--set", f"learner.decay={decay}"])
        )
        life = lives.begin(torch.arange(2), "train")
        for _ in range(2):
            life, _ = lives.advance(life, loss, "train")
        state: Any = life.state
        norms.append(float(sum(leaf.square().sum() for leaf in state.params.values())))
    assert norms[1] < 0.99 * norms[0]
