"""docs/learned-losses.md: its commands run, its presets are there, its rows are all rows."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from esmeta import config, learn

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
