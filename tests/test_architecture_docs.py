"""docs/architecture.md: what it names is there, and every room of the house is on it."""

from __future__ import annotations

import re

from conftest import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_file_that_it_names_exists() -> None:
    named = set(re.findall(r"`(esmeta/[\w/]+\.py)", PAGE))
    assert len(named) > 25
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_every_folder_has_a_room() -> None:
    rooms = PAGE.partition("## The rooms")[2].partition("## Walk 1")[0]
    folders = {path.parent.name for path in (ROOT / "esmeta").glob("*/__init__.py")}
    assert {"agent", "rl", "evolution", "kernels"} < folders
    assert not [name for name in sorted(folders) if f"`{name}/`" not in rooms]


def test_names_of_the_walks_are_defined_where_it_says() -> None:
    where = {
        "collect": "esmeta/optimizers/_gradient.py",
        "unroll": "esmeta/agent/policy.py",
        "read": "esmeta/agent/policy.py",
        "bind": "esmeta/agent/policy.py",
        "Recorder": "esmeta/rollout.py",
        "state_dict": "esmeta/evolution/search.py",
    }
    for name, file in where.items():
        assert name in PAGE
        assert re.search(rf"^ *(def|class) {name}\b", (ROOT / file).read_text(), re.MULTILINE), name
