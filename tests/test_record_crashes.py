"""A disk that forgets what was not synced: what a power cut leaves of the files of a run."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_record import equal, make_config, saved_run, theta

from esmeta.run.record import RunDir, load_checkpoint

Files = dict[str, bytes]


class Disk:
    """What one folder may hold after a power cut at any moment.

    A file's bytes are safe once it was synced, and the folder's names once the folder was. Until
    then a file may be empty, and names may be those of any moment since the last sync. ``cuts``
    are all states that a power cut between two calls could have left.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.files: dict[int, int] = {}  # inode to descriptor; open, so that no inode is used again
        self.names = [self._names()]
        self.safe = {inode: self._bytes(inode) for inode in self.files}
        self.cuts: list[Files] = []
        self._real = os.fsync, os.replace
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(os, "replace", self._replace)

    def now(self) -> list[Files]:
        """What a power cut at this moment could leave."""
        self.names.append(self._names())
        return [
            {name: self._after(inode, forgets) for name, inode in names.items()}
            for names in self.names
            for forgets in (True, False)
        ]

    def _names(self) -> dict[str, int]:
        found = {}
        for path in self.folder.iterdir():
            if path.is_file():
                found[path.name] = path.stat().st_ino
                if found[path.name] not in self.files:
                    self.files[found[path.name]] = os.open(path, os.O_RDONLY)
        return found

    def _bytes(self, inode: int) -> bytes:
        size = os.fstat(self.files[inode]).st_size
        return os.pread(self.files[inode], size, 0)

    def _after(self, inode: int, forgets: bool) -> bytes:
        current = self._bytes(inode)
        return b"" if forgets and self.safe.get(inode) != current else current

    def _fsync(self, handle: int) -> None:
        self.cuts += self.now()
        found = os.fstat(handle)
        if found.st_ino == self.folder.stat().st_ino and stat.S_ISDIR(found.st_mode):
            self.names = [self._names()]
        elif found.st_ino in self.files:
            self.safe[found.st_ino] = self._bytes(found.st_ino)
        self.cuts += self.now()

    def _replace(self, source: Path, target: Path) -> None:
        self.cuts += self.now()
        self._real[1](source, target)
        self.cuts += self.now()

    def close(self) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)


def loaded(files: Files, folder: Path) -> int:
    """The step that a run would go on from, if these files were left."""
    (folder / "checkpoint").mkdir(parents=True)
    for name, data in files.items():
        (folder / "checkpoint" / name).write_bytes(data)
    found = load_checkpoint(folder)
    return -1 if found is None else found.step


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_power_cut_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], before: int
) -> None:
    run = saved_run(tmp_path / "run", before)
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "run" / "checkpoint", patch)
        run.save_checkpoint(before + 1, theta(3), {})
        end = disk.now()
    assert len(disk.cuts) > 10
    last = before if before else -1
    for number, files in enumerate(disk.cuts):
        assert loaded(files, tmp_path / str(number)) in (last, before + 1)
    # Once it is said to be saved, it is; and the one before it too.
    for number, files in enumerate(end):
        assert loaded(files, tmp_path / f"end{number}") == before + 1
        assert set(files) == {"current.ckpt", *(["previous.ckpt"] if before else [])}
        if before:
            assert loaded({"current.ckpt": files["previous.ckpt"]}, tmp_path / f"p{number}") == last
    assert "warning" not in capsys.readouterr().err  # no cut leaves a damaged file
    disk.close()
    run.close()


def begun(path: Path) -> RunDir:
    run = saved_run(path, 2)
    run.log(3, {"return": 1.5})  # to be cut off by a resume
    run.save_best(1, theta(1), 0.5)
    run.finish(2, theta(2), env_steps=1, ranks=1, stopped_by="steps")
    run.close()
    return RunDir.create(path, make_config(), resume=True)


def new_best(run: RunDir) -> None:
    run.save_best(3, theta(3), 0.75)


def finished(run: RunDir) -> None:
    run.finish(3, theta(3), env_steps=9, ranks=1, stopped_by="steps")


def gone_on_with(run: RunDir) -> None:
    run.close()
    RunDir.create(run.path, make_config(), resume=True).close()


WRITTEN: dict[Callable[[RunDir], Any], set[str]] = {
    new_best: {"best.safetensors"},
    finished: {"theta.safetensors", "run.json"},
    gone_on_with: {"metrics.jsonl"},
}


def unlocked(files: Files) -> Files:
    """Without the lock, which comes and goes; a power cut leaves one that is taken over."""
    return {name: data for name, data in files.items() if not name.startswith("run.lock")}


@pytest.mark.parametrize("action", WRITTEN, ids=lambda action: action.__name__)
def test_a_power_cut_leaves_a_file_as_it_was_or_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[RunDir], Any]
) -> None:
    run = begun(tmp_path / "run")
    if action is gone_on_with:
        run.log(4, {"return": 2.0})
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "run", patch)
        (old,) = {tuple(sorted(unlocked(files).items())) for files in disk.now()}
        action(run)
        end = [unlocked(files) for files in disk.now()]
    new = end[-1]
    changed = {name for name in new if dict(old).get(name) != new[name]}
    assert WRITTEN[action] <= changed and not any(name.endswith(".tmp") for name in new)
    for files in map(unlocked, disk.cuts):
        for name, data in files.items():
            assert name.endswith(".tmp") or data in (dict(old).get(name), new[name]), name
        assert {name for name, _ in old} <= set(files)
    assert all(equal(files, new) for files in end)
    disk.close()
