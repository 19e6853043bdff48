"""The run directory: whatever happens to process, disk or bytes, a run can go on from it."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from tiny_runs import files, overrides, run_here

from esmeta.errors import UserError
from esmeta.ranks import wire
from esmeta.ranks.comm import SelfComm
from esmeta.ranks.wire import decode, encode, share
from esmeta.run import config, progress, record
from esmeta.run.record import NullRun, RunDir, load_checkpoint, load_theta
from esmeta.tree import theta_sha256


def make_config(seed: int = 0, tensorboard: bool = False, **options: Any) -> config.Config:
    def section(name: str, **values: Any) -> config.Section:
        return config.Section(name, values, None)

    return config.Config(
        task=section("maze", size=8),
        trials=16,
        policy=section("metods", neurons=20),
        objective=section("return"),
        optimizer=section("openes", **({"popsize": 64, "sigma": 0.05} | options)),
        budget=config.Budget(generations=10),
        run=config.Run(seed=seed, tensorboard=tensorboard),
    )


def theta(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"w.b": torch.full((1, 3), value), "a": torch.arange(4.0).reshape(1, 2, 2) + value}


def saved_run(path: Path, steps: int = 2) -> RunDir:
    run = RunDir.create(path, make_config())
    for step in range(1, steps + 1):
        run.log(step, {"return": step / 2})
        run.save_checkpoint(step, theta(step), {"step": step})
    return run


# --- frames ------------------------------------------------------------------------------------

PAYLOAD: dict[str, Any] = {
    "tensor": torch.tensor([[1.0, float("nan")], [float("-inf"), -0.0]]),
    "ints": torch.tensor([2**62, -1]),
    "flags": torch.tensor([True, False]),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "bytes": bytes(range(256)),
    "big": 2**64 - 1,
    "float": 0.1,
    "inf": float("inf"),
    "none": None,
    "yes": True,
    "text": "θ\n",
    "list": [1, "a", [torch.ones(2)]],
    "tuple": (1, 2.0),
    "nested": {"a": {"b": b"\x00", 3: "number keys"}},
}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and all(map(equal, a, b)) and len(a) == len(b)
    return type(a) is type(b) and a == b


def test_plain_data_survive_bit_by_bit() -> None:
    assert equal(decode(encode(PAYLOAD)), PAYLOAD)
    assert equal(share(SelfComm(), PAYLOAD), PAYLOAD) and share(SelfComm(), None) is None


def test_a_view_does_not_drag_its_storage_along() -> None:
    big = torch.zeros(1_000_000, requires_grad=True)
    assert len(encode({"x": big[:10]})) < 10_000
    assert not decode(encode({"x": big[:10]}))["x"].requires_grad


@pytest.mark.parametrize("bad", [object(), {1, 2}, torch.nn.Linear(1, 1), lambda: 0])
def test_what_a_safe_loader_cannot_read_is_refused_when_written(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"payload\.state\[1\] is a"):
        encode({"state": [1, bad]})


def test_any_cut_and_any_flipped_byte_is_noticed() -> None:
    block = encode(PAYLOAD)
    rng = random.Random(1)
    head = len(wire.MAGIC) + 44
    for cut in [0, 1, head - 1, head, len(block) - 1] + rng.sample(range(len(block)), 100):
        with pytest.raises(ValueError, match="cut off|not an esmeta"):
            decode(block[:cut])
    for at in [*range(head + 5)] + rng.sample(range(len(block)), 100):
        damaged = bytearray(block)
        damaged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(ValueError):
            decode(bytes(damaged))
    with pytest.raises(ValueError, match="cut off"):
        decode(block + b"x")


# --- checkpoints -------------------------------------------------------------------------------


def test_checkpoint_round_trip_and_previous(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    run = RunDir.create(tmp_path / "r", make_config())
    assert run.resumed is None and load_checkpoint(tmp_path / "r") is None
    run.save_checkpoint(1, theta(1), PAYLOAD)
    run.save_checkpoint(2, theta(2), {"now": 2})
    found = load_checkpoint(tmp_path / "r")
    assert found and found.step == 2 and found.payload == {"now": 2}
    assert equal(found.theta, theta(2)) and found.seconds > 0
    assert found.digest == config.digest(make_config())
    names = sorted(p.name for p in (tmp_path / "r/checkpoint").iterdir())
    assert names == ["current.ckpt", "previous.ckpt"]
    (tmp_path / "r/checkpoint/current.ckpt").unlink()
    older = load_checkpoint(tmp_path / "r")
    assert older and older.step == 1 and equal(older.payload, PAYLOAD)


def test_a_damaged_current_falls_back_and_never_becomes_previous(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_run(tmp_path, 3).close()
    current = tmp_path / "checkpoint/current.ckpt"
    current.write_bytes(current.read_bytes()[:-7])
    run = RunDir.create(tmp_path, make_config(), resume=True)
    assert run.resumed and run.resumed.step == 2
    warning = capsys.readouterr().err
    assert "current.ckpt: cut off" in warning and "previous.ckpt, step 2" in warning
    run.save_checkpoint(3, theta(30), {})
    assert load_checkpoint(tmp_path).step == 3  # type: ignore[union-attr]
    current.write_bytes(b"")
    again = load_checkpoint(tmp_path)
    assert again and again.step == 2, "the good previous must have been kept"
    (tmp_path / "checkpoint/previous.ckpt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"current\.ckpt.*previous\.ckpt.*restore.*--out"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_theta_that_is_not_finite_is_never_saved(tmp_path: Path, bad: float) -> None:
    run = saved_run(tmp_path, 1)
    broken = theta()
    broken["a"][0, 1, 1] = bad
    with pytest.raises(UserError, match=r"not finite after step 2 \(in a\)"):
        run.save_checkpoint(2, broken, {})
    with pytest.raises(UserError, match="not finite"):
        run.finish(2, broken, env_steps=1, ranks=1, stopped_by="generations")
    assert load_checkpoint(tmp_path).step == 1  # type: ignore[union-attr]
    assert not (tmp_path / "theta.safetensors").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_explained_and_the_last_checkpoint_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run = saved_run(tmp_path, 2)
    before = files(tmp_path / "checkpoint")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UserError, match=r"current\.ckpt.*No space left.*--resume"):
            run.save_checkpoint(3, theta(3), {})
        if call == "fsync":  # no temporary file is left
            assert files(tmp_path / "checkpoint") == before
        with pytest.raises(UserError, match=r"theta\.safetensors.*No space left"):
            run.finish(3, theta(3), env_steps=1, ranks=1, stopped_by="generations")
    found = load_checkpoint(tmp_path)
    assert found and found.step == 2
    run.save_checkpoint(3, theta(3), {})
    assert load_checkpoint(tmp_path).step == 3  # type: ignore[union-attr]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_metrics(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 1)
    run._metrics = open("/dev/full", "a")
    with pytest.raises(UserError, match=r"metrics\.jsonl.*No space left"):
        run.log(2, {"x": 1})


# --- create and resume -------------------------------------------------------------------------


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    RunDir.create(tmp_path / "empty", make_config()).close()
    with pytest.raises(UserError, match=r"empty exists; pass --resume to go on, or another --out"):
        RunDir.create(tmp_path / "empty", make_config())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file exists"):
        RunDir.create(tmp_path / "file", make_config())
    with pytest.raises(UserError, match="not a run"):
        RunDir.create(tmp_path / "file", make_config(), resume=True)
    with pytest.raises(UserError, match="leave out --resume"):
        RunDir.create(tmp_path / "absent", make_config(), resume=True)
    assert not (tmp_path / "absent").exists()


def test_config_is_written_resolved_and_again_on_resume(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 1)
    run.close()
    text = (tmp_path / "config.toml").read_text()
    assert text == config.to_toml(make_config())
    longer = make_config()
    object.__setattr__(longer, "budget", config.Budget(generations=99))
    RunDir.create(tmp_path, longer, resume=True).close()
    assert tomllib.loads((tmp_path / "config.toml").read_text())["budget"]["generations"] == 99


def test_resume_drops_metrics_after_the_checkpoint(tmp_path: Path) -> None:
    run = saved_run(tmp_path, 2)
    run.log(3, {"return": 1.5})
    run.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "retu')
    again = RunDir.create(tmp_path, make_config(), resume=True)
    again.log(3, {"return": 30.0})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and lines[2]["return"] == 30.0


def test_resume_before_the_first_checkpoint_starts_at_zero(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, make_config())
    run.log(1, {})
    run.close()
    again = RunDir.create(tmp_path, make_config(), resume=True)
    assert again.resumed is None and record.read_metrics(tmp_path) == []


# --- metrics, theta, summary -------------------------------------------------------------------


def test_metrics_are_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, make_config())
    numbers = {"nan": float("nan"), "inf": torch.tensor(float("inf")), "n": torch.tensor(3)}
    run.log(1, {**numbers, "theta_sha256": "ab", "x": 0.5})
    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 1, "nan": None, "inf": None, "n": 3, "theta_sha256": "ab", "x": 0.5}
    assert json.loads(line, parse_constant=pytest.fail) == expected


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDir.create(tmp_path, make_config(tensorboard=True))
    for step in (1, 2):
        run.log(step, {"return": step / 4, "theta_sha256": "ab", "gap": float("nan")})
        if step == 1:
            run.save_checkpoint(step, theta(), {})
    run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["return"]
    assert [(e.step, e.value) for e in events.Scalars("return")] == [(1, 0.25), (2, 0.5)]
    again = RunDir.create(tmp_path, make_config(tensorboard=True), resume=True)
    again.log(2, {"return": 0.75})
    again.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("return")] == [(1, 0.25), (2, 0.75)]


def test_without_tensorboard_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = RunDir.create(tmp_path, make_config(tensorboard=True))
    run.log(1, {"x": 1})
    run.close()
    assert "no TensorBoard events" in capsys.readouterr().err


def test_theta_keeps_order_bits_and_hash(tmp_path: Path) -> None:
    original = {"z": torch.randn(1, 5, 2).transpose(1, 2), "a": torch.ones(1, dtype=torch.float64)}
    record.save_theta(tmp_path / "t.safetensors", original, {"note": "θ"})
    found, meta = load_theta(tmp_path / "t.safetensors")
    assert list(found) == ["z", "a"] and meta == {"note": "θ"}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in original.items())
    assert theta_sha256(found) == theta_sha256(original)
    with pytest.raises(UserError, match="does not exist"):
        load_theta(tmp_path)
    (tmp_path / "theta.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        load_theta(tmp_path)


def test_summary_says_what_ran_but_not_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "esmeta.train",
        "maze",
        "--out",
        "/home/someone/x",
        "--config=/home/someone/y.toml",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    run = saved_run(tmp_path / "r", 2)
    running = json.loads((tmp_path / "r/run.json").read_text())
    assert running["stopped_by"] is None and running["versions"]["torch"]
    run.finish(2, theta(2), env_steps=640, ranks=3, stopped_by="generations")
    text = (tmp_path / "r/run.json").read_text()
    summary = json.loads(text)
    assert summary["steps"] == 2 and summary["env_steps"] == 640 and summary["ranks"] == 3
    assert summary["threads"] == 1 and summary["seconds"] >= 0
    assert summary["stopped_by"] == "generations"
    assert summary["theta_sha256"] == theta_sha256(load_theta(tmp_path / "r")[0])
    assert summary["command"] == ["maze", "--out", "x", "--config=y.toml"]
    assert {"python", "torch", "numpy", "esmeta"} <= set(summary["versions"])
    assert "someone" not in text and os.uname().nodename not in text.split('"')
    assert str(tmp_path) not in text


def test_null_run_has_the_same_methods_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    null = NullRun()
    null.log(1, {"x": 1})
    null.save_checkpoint(1, theta(), {})
    null.finish(1, theta(), env_steps=1, ranks=2, stopped_by="seconds")
    null.close()
    assert null.resumed is None and null.seconds == 0.0 and not list(tmp_path.iterdir())
    public = {n for n in [*vars(RunDir), "path", "resumed"] if not n.startswith("_")} - {"create"}
    assert public == {n for n in vars(NullRun) if not n.startswith("_")}


# --- progress ----------------------------------------------------------------------------------


def test_progress_lines_are_few_and_the_last_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress(100, "maze") as bar:
        for step in range(51, 61):  # a resumed run: the first 50 steps are not its work
            now += 1.0
            bar.update(step, step / 100, **{"return": 0.123456})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "maze 51/100  return 0.1235"
    assert lines[-1].startswith("maze 60/100") and lines[-1].endswith("0:00:40 left")


def test_progress_is_silent_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress(None, "maze", rank=1) as bar:
        bar.update(1, 0.1, x=2)
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal() -> None:
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    with open(follower, "w") as terminal, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        with progress.progress(3, "maze") as bar:
            bar.update(3, 1.0, x=0.5)
        shown = ""
        while "3/3" not in shown:  # a read returns what has arrived, in pieces
            shown += os.read(leader, 100_000).decode(errors="replace")
    os.close(leader)
    assert "maze" in shown and "3/3" in shown and "x 0.5" in shown


def test_simulators_are_recorded_and_another_version_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = {
        "task": {"name": "cheetah-dir", "trials": 2, "horizon": 3},
        "policy": {"name": "mlp", "neurons": 3},
        "optimizer": {"name": "openes", "popsize": 4},
        "budget": {"generations": 2},
    }
    path = tmp_path / "run"
    preset = tmp_path / "body.toml"
    preset.write_text(tomli_w.dumps(raw), encoding="utf-8")
    off = overrides("run.tensorboard=false", "run.evaluate_every=0", "run.checkpoint_every=1")
    assert run_here(preset, "--out", path, *off) == 0
    version = metadata.version("mujoco")
    assert json.loads((path / "run.json").read_text())["versions"]["mujoco"] == version
    saved = record.load_checkpoint(path)
    assert saved is not None and saved.simulators == {"mujoco": version}
    assert 'contact_rule = "legacy"' in saved.config_toml
    assert "another" not in capsys.readouterr().err
    monkeypatch.setattr(record, "simulators", lambda: {"mujoco": "3.3.0"})
    again = config.resolve(config.load(path / "config.toml"))
    run = record.RunDir.create(path, again, resume=True)
    assert run.resumed is not None
    run.save_checkpoint(2, run.resumed.theta, run.resumed.payload)
    run.close()
    capsys.readouterr()
    record.RunDir.create(path, again, resume=True).close()
    assert f"made with mujoco 3.3.0, this is {version}" in capsys.readouterr().err
