"""docs/learned-losses.md: its commands run, its presets are there, its rows are all rows."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from lived import window

from esmeta.rl.replay import Over, Replay
from esmeta.rng import Rng
from esmeta.run import config, learn
from esmeta.types import Continuous, Spec

PAGE = (ROOT / "docs" / "learned-losses.md").read_text(encoding="utf-8")
ROWS = PAGE.partition("### The rows of MetaGenRL's tables 1 and 2")[2].partition("\n## ")[0]
COMMANDS = [
    shlex.split(text)[3:]
    for text in re.findall(r"^python -m esmeta\.learn .*", ROWS.replace("\\\n", ""), re.MULTILINE)
]
SHORT = {  # steps that a command takes here, and what must fit into them
    "ppo": ["learner.period=300", "learner.minibatch=300", "learner.epochs=3"],
    "reinforce": ["learner.period=300", "learner.minibatch=300", "learner.value_epochs=3"],
    "td3": ["learner.start=500", "learner.update_after=500"],
    "offpolicy_reinforce": ["learner.start=500", "learner.update_after=550", "learner.batch=4"],
}
ENVIRONMENTS = {
    "hopper": [],
    "half_cheetah": [],
    "gym": ["task.id=LunarLanderContinuous-v3"],
}


def test_every_row_has_its_preset() -> None:
    named = re.findall(r"^\|[^|]*\| `([a-z0-9-]+)` \|", ROWS, re.MULTILINE)
    assert len(named) == len(set(named)) == 12 and set(named) <= set(config.preset_names())
    published = {name for name in config.preset_names() if name.endswith("-metagenrl")}
    small = {"pendulum-metagenrl", "displacement-metagenrl", "cheetah-lunar-small-metagenrl"}
    assert {name for name in named if name.endswith("-metagenrl")} == published - small
    for name in named:  # the numbers of the table are those of the preset's first lines
        text = (ROOT / "runs" / "presets" / f"{name}.toml").read_text(encoding="utf-8")
        head = " ".join(text.partition("[task]")[0].replace("#", "").split())
        line = next(line for line in ROWS.splitlines() if f"`{name}`" in line)
        numbers = [int(cell) for cell in re.findall(r" (-?\d+) (?=\|)", line)]
        assert len(numbers) == 3, line
        for environment, number in zip(("Cheetah", "Hopper", "Lunar"), numbers, strict=True):
            assert f"{environment} {number:,}" in head, (name, environment, head)


def test_every_engineered_row_has_its_command() -> None:
    assert [words[0] for words in COMMANDS] == ["ppo", "td3", "offpolicy_reinforce", "reinforce"]
    assert {words[0] for words in COMMANDS} == set(SHORT)
    for words in COMMANDS:
        args = learn.parser().parse_args(words)
        assert (args.task, args.steps, args.agents) == ("hopper", 1_000_000, 6)
        learn.build(args)  # a million steps are allowed


@pytest.mark.parametrize("task", sorted(ENVIRONMENTS))
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_the_commands_run(words: list[str], task: str, tmp_path: Path) -> None:
    if task == "gym" and importlib.util.find_spec("Box2D") is None:
        pytest.skip("LunarLander needs Box2D: pip install 'esmeta[box2d]'")
    more = [*SHORT[words[0]], "learner.hidden=[8]", *ENVIRONMENTS[task]]
    changed = [word for pair in more for word in ("--set", pair)]
    out = tmp_path / "curve.json"
    sizes = ["--steps", "600", "--agents", "2", "--parts", "2", "--task", task, "--out", str(out)]
    assert learn.main([*words, *changed, *sizes]) == 0
    curve = json.loads(out.read_text())["curve"]
    if task != "half_cheetah":  # its episodes last for 1,000 steps
        assert all(abs(row["return"]) < 2000 for row in curve)


def test_the_shares_of_whole_snippets_are_those_of_the_formula_and_of_a_replay() -> None:
    rows = [
        [float(cell.strip(" %").replace(",", "")) for cell in line.strip(" |").split("|")[1:]]
        for line in PAGE.splitlines()
        if re.match(
            r"\s*\| (steps of an episode|over episodes|over steps|steps of a snippet)", line
        )
    ]
    lengths, episodes, steps, mean = rows
    spec = Spec(obs_size=1, action=Continuous(1, -1.0, 1.0), horizon=1)
    for k, n in enumerate(map(int, lengths)):
        # Over steps: the n - 19 first steps of an episode begin a whole snippet, the others one of
        # as many steps as are left.
        exact = max(0, n - 19) / n, sum(min(20, n - step) for step in range(n)) / n
        assert episodes[k] == 100.0 * (n >= 20)
        assert abs(steps[k] - 100 * exact[0]) <= 0.51 and abs(mean[k] - exact[1]) <= 0.051
        replay, index = Replay.empty(1, 50 * n, spec, "cpu"), torch.tensor([0])
        ended = (torch.arange(50 * n) % n == n - 1).unsqueeze(0)
        none = torch.zeros(1, 50 * n)
        obs = torch.zeros(1, 50 * n + 1, 1)
        replay = replay.add(window(obs, none.unsqueeze(-1), none, ended, ended))
        shares: dict[Over, float] = {"episodes": episodes[k] / 100, "steps": exact[0]}
        for over, share in shares.items():
            drawn = replay.draw(Rng(1), index, 20_000, 20, spec, over)
            inside = drawn.constants["inside"].reshape(-1, 20).sum(dim=1).double()
            # The newest 19 steps begin none: a 50th of an episode at most, all of it cut snippets.
            assert abs(float((inside == 20).double().mean()) - share) < 0.015 + 20 / (50 * n)
            if over == "steps":
                assert abs(float(inside.mean()) - exact[1]) < 0.15 + 200 / (50 * n)
