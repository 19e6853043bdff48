"""The report: numbers of its tables, its figures, and a page that needs nothing else."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny_runs import overrides, run_here

import esmeta
from esmeta import names
from esmeta.analysis import groups, page, pictures, plots, series, trials
from esmeta.errors import UserError
from esmeta.run import config as configs
from esmeta.run import report, train
from esmeta.types import Reference

# The runs that all of these look at are made once.
pytestmark = pytest.mark.xdist_group("report")

TINY = ["task.trials=8", "task.horizon=30", "policy.neurons=6", "run.tensorboard=false"]
TINY += ["run.evaluate_every=2", "run.evaluate_trials=16"]


def make_run(out: Path, preset: str, *settings: str, seed: int = 0) -> Path:
    assert run_here(preset, "--seed", seed, "--out", out, *overrides(*TINY, *settings)) == 0
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of A2C and one run of evolution."""
    root = tmp_path_factory.mktemp("runs")
    few = ("budget.generations=3", "optimizer.popsize=8")
    return [
        make_run(root / "a2c-0", "harlow-a2c", "budget.updates=4"),
        make_run(root / "a2c-1", "harlow-a2c", "budget.updates=4", seed=1),
        make_run(root / "es", "harlow-openes", *few),
    ]


@pytest.fixture(scope="module")
def harlow(runs):
    return esmeta.load(runs[0])


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def reported(capsys, *args: object) -> str:
    capsys.readouterr()
    assert report.main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


def scores_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())["test"]


# --- the report -------------------------------------------------------------------------------


def test_table_holds_the_numbers_of_the_metrics(runs, tmp_path, capsys):
    out = reported(capsys, *runs, "--out", tmp_path)
    for run in runs:
        last, scored = lines(run)[-1], scores_of(run)
        row = f"{scored['test_return']:.3f} ± {scored['test_se']:.3f}"
        rows = [line for line in out.splitlines() if row in line]
        (found,) = [line for line in rows if line.split()[1] == str(last["step"])]
        assert f"{scored['test_sd']:.3f}" in found
        assert f"{last['env_steps']:,}" in found and f"{last['seconds']:,.1f}" in found
    scores = [scores_of(run)["test_return"] for run in runs[:2]]
    mean, error = statistics.mean(scores), statistics.stdev(scores) / math.sqrt(2)
    (row,) = [line for line in out.splitlines() if line.startswith("mean")]
    assert f"{mean:.3f} ± {error:.3f}" in row
    # Student's t with one degree of freedom: tan(0.475 pi).
    wide = math.tan(0.475 * math.pi) * error
    (row,) = [line for line in out.splitlines() if line.startswith("95 %")]
    assert f"{mean - wide:.3f} to {mean + wide:.3f}" in row
    assert "harlow metods a2c" in out and "harlow metods openes" in out
    assert "at equal budgets" in out
    # The third run has 3 generations, evaluated at 0, 2 and, as every finished run, at the end.
    assert "last evaluation" not in out


def test_a_run_without_test_scores_says_which_split_it_shows(runs, tmp_path, capsys):
    run = tmp_path / "old"
    shutil.copytree(runs[0], run)
    facts = json.loads((run / "run.json").read_text())
    facts.pop("test")
    (run / "run.json").write_text(json.dumps(facts))
    # As runs were written before there was a validation split.
    text = (run / "metrics.jsonl").read_text().replace("validation_", "heldout_")
    (run / "metrics.jsonl").write_text(text)
    config = (run / "config.toml").read_text().replace("evaluate_as_trained = false\n", "")
    (run / "config.toml").write_text(config)
    scored = [line for line in lines(run) if "heldout_return" in line][-1]
    out = reported(capsys, run, "--out", tmp_path)
    assert "validation return" in out and "test return" not in out
    assert f"{scored['heldout_return']:.3f} ± {scored['heldout_se']:.3f}" in out
    assert "not every run was scored on the test split" in out
    assert "made before there was a validation split: curves are of" in out
    # Going on neither gives the old scores another name nor hides what they are of.
    assert train.main(["--resume", str(run), "--set", "budget.updates=6"]) == 0
    assert [line for line in lines(run) if "heldout_return" in line][-1] == scored
    out = reported(capsys, run, "--out", tmp_path)
    assert f"validation split: curves up to step {scored['step']} are of the test split" in out
    assert "test return" in out


@pytest.mark.parametrize("freedom", [1, 2, 4, 9, 10, 19, 30])
def test_quantiles_of_student(freedom):
    # The density integrated from 0: (1 + x^2 / v)^(-(v + 1) / 2), up to its constant.
    x = np.linspace(0.0, groups._student(freedom), 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    whole = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi)
    assert whole / math.gamma(freedom / 2) * np.trapezoid(density, x) == pytest.approx(
        0.475, abs=1e-5
    )


def test_page_needs_nothing_but_itself(runs, tmp_path, capsys):
    target = tmp_path / "deep" / "result.html"
    reported(capsys, *runs, "--out", target, "--picture")
    text = target.read_text(encoding="utf-8")
    assert not re.search(r"https?:|file:|<script|<link|url\(", text)
    sources = re.findall(r'<img[^>]*src="([^"]*)"', text)
    assert len(sources) == 2 * 3 + 1  # per group: curve, trials, GIF; one comparison
    for source in sources:
        assert source.startswith(("data:image/png;base64,", "data:image/gif;base64,"))
    assert str(tmp_path) not in text and str(runs[0].parent) not in text
    for expected in (
        "python -m esmeta.train",
        "torch 2",
        "[optimizer]",
        "a2c-1, seed 1",
        "popsize = 8",
    ):
        assert expected in text, expected
    files = sorted(path.name for path in target.parent.iterdir())
    assert "result-compare.png" in files and "result-curve-harlow-metods-a2c.png" in files
    for path in target.parent.glob("*.png"):
        Image.open(path).verify()
        assert path.stat().st_size < 120_000, path.name
    for path in target.parent.glob("*.gif"):
        assert path.stat().st_size < 300_000
        assert Image.open(path).n_frames > 5


def test_the_film_is_of_the_runs_seed_in_its_time(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "_FILM_FPS", 3)  # of 8 steps per second each third is shown
    reported(capsys, runs[1], "--out", tmp_path, "--picture", "--trial", "2")
    frames = pictures.trial_frames(*esmeta.load(runs[1]), 2, seed=1, every=3)
    wanted = pictures.write_gif(frames, tmp_path / "wanted.gif", 8 / 3)
    (film,) = tmp_path.glob("trial-*.gif")
    assert film.read_bytes() == wanted.read_bytes()


def test_one_run_reports_beside_itself(runs, capsys):
    out = reported(capsys, runs[0])
    assert f"page: {runs[0] / 'report' / 'report.html'}" in out
    assert not (runs[0] / "report" / "compare.png").exists()


def test_a_task_without_pictures_is_told(tmp_path, capsys):
    run = make_run(
        tmp_path / "bandit", "bandit-a2c", "task.horizon=5", "budget.updates=2", "policy.depth=1"
    )
    capsys.readouterr()
    assert report.main([str(run), "--picture"]) == 0
    assert "no picture of bandit" in capsys.readouterr().err


def test_errors_exit_with_2(runs, tmp_path, capsys):
    empty = tmp_path / "new"
    empty.mkdir()
    (empty / "config.toml").write_text((runs[0] / "config.toml").read_text())
    (tmp_path / "file").write_text("")
    cases = [
        ([tmp_path / "nowhere"], "not a run directory"),
        ([runs[0], tmp_path], "not a run directory"),
        ([empty], "no metrics yet"),
        ([runs[0], "--out", tmp_path / "file" / "x"], "give a directory"),
    ]
    for args, words in cases:
        assert report.main([str(arg) for arg in args]) == 2
        err = capsys.readouterr().err
        assert err.startswith("esmeta: error: ") and words in err and err.count("\n") == 1


def test_help_is_fast_and_flags_are_frozen(run_cli):
    flags = {flag for action in report.parser()._actions for flag in action.option_strings}
    assert flags == {"-h", "--help", "--out", "--picture", "--trial", "--film"}
    done = run_cli("--help", module="esmeta.report")
    assert done.returncode == 0 and "--picture" in done.stdout
    code = "import sys, esmeta.run.report as r; r.parser().format_help(); "
    code += "print({'torch', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


# --- groups and curves ------------------------------------------------------------------------


def test_groups_differ_in_more_than_the_seed(runs, tmp_path):
    found = groups.group_runs([*runs, runs[1] / ".." / runs[0].name])
    assert [[run.seed for run in group.runs] for group in found] == [[0, 1], [0]]
    other = tmp_path / "other"
    other.mkdir()
    for name in ("metrics.jsonl", "config.toml", "run.json"):
        (other / name).write_text((runs[0] / name).read_text())
    text = (runs[0] / "config.toml").read_text()
    (other / "config.toml").write_text(
        re.sub("learning_rate = .*", "learning_rate = 0.5", text, count=1)
    )
    labels = [group.label for group in groups.group_runs([runs[0], other])]
    assert labels[0] != labels[1] and labels[1].endswith("learning_rate=0.5")
    # The same seed twice is told, because it is not a second sample.
    twin = tmp_path / "twin"
    twin.mkdir()
    for name in ("metrics.jsonl", "config.toml"):
        (twin / name).write_text((runs[0] / name).read_text())
    (group,) = groups.group_runs([runs[0], twin])
    remarks = " ".join(group.remarks())
    assert "seed 0 occurs more than once" in remarks and "not finished" in remarks


def test_groups_say_which_training_aids_their_scores_are_without(tmp_path):
    for kept, words in ((False, "without"), (True, "with")):
        config = configs.resolve(
            configs.load("harlow-openes"), [f"run.evaluate_as_trained={kept}".lower()]
        )
        run = groups.RunData(
            tmp_path, configs.to_tables(config), {"stopped_by": "steps"}, [], old_scores=None
        )
        run.rows.append({"step": 1, "validation_return": 0.0})
        note = groups.Group.of("x", [run]).remarks()[-1]
        aids = f"{words} task.mirrored = True, task.forfeit = 1.0"
        assert note == f"scores are of the validation split, {aids}"


def test_equal_budget_is_where_the_shortest_run_ends():
    rows = [
        [{"step": k, "env_steps": x, "validation_return": y} for k, (x, y) in enumerate(points)]
        for points in ([(0, 0.0), (100, 10.0)], [(0, 0.0), (50, 1.0), (400, 8.0)])
    ]
    curves = [series.from_rows(r, "validation_return", "env_steps") for r in rows]
    assert series.common_end(curves) == 100
    assert curves[1].at(100)[0] == pytest.approx(2.0)
    mean = series.over_seeds(curves)
    assert mean.x.tolist() == [0, 50, 100]
    assert mean.y.tolist() == pytest.approx([0, 3, 6])
    assert mean.se.tolist() == pytest.approx([0, 2, 4])


def test_mean_se_leaves_out_nan():
    assert groups.mean_se([1.0, math.nan, 3.0]) == pytest.approx((2.0, 1.0))
    assert groups.mean_se([2.0])[0] == 2.0 and math.isnan(groups.mean_se([2.0])[1])
    assert all(map(math.isnan, groups.mean_se([math.nan])))


def test_curves_of_runs_that_logged_little(tmp_path):
    """A picture is drawn whatever there is: train draws one at the end of every run."""
    (tmp_path / "metrics.jsonl").write_text("")
    out = plots.learning_curve([tmp_path], tmp_path / "a.png", Reference(math.nan, 1.0, ""))
    Image.open(out).verify()
    row = {
        "step": 0,
        "env_steps": 0,
        "seconds": 0.1,
        "validation_return": 1.0,
        "validation_x_1": None,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    Image.open(plots.learning_curve([tmp_path], out, Reference(0.0, 1.0, ""))).verify()
    Image.open(plots.compare({"a": [tmp_path], "b": []}, out)).verify()


def test_page_escapes_what_it_is_given():
    text = page.page("<t>", [page.table([["a"], ["<b>"]]), page.folded("x", "1 < 2 & 3")])
    assert "<b>" not in text and "&lt;b&gt;" in text and "1 &lt; 2 &amp; 3" in text


# --- pictures ---------------------------------------------------------------------------------


def test_the_trial_shown_is_the_trial_scored(harlow):
    policy, params, task = harlow
    evaluator = esmeta.PopulationEvaluator(policy, task, trials=5)
    scored = evaluator(params, seed=3, split="test")
    for index in (0, 4):
        trial = pictures.run_trial(policy, params, task, index, "test", 3)
        assert trial.rewards.sum() == pytest.approx(float(scored.returns[0, index]), abs=1e-6)
        assert len(trial.rewards) == len(trial.actions) == int(scored.steps[0, index])
        assert len(trial.states) == len(trial.rewards) + 1


def test_frames_and_files(harlow, tmp_path):
    policy, params, task = harlow
    frames = pictures.trial_frames(policy, params, task, index=1, max_steps=7)
    assert len(frames) == 8
    assert frames[0].dtype == np.uint8 and frames[0].shape == frames[-1].shape
    gif = Image.open(pictures.write_gif(frames, tmp_path / "a.gif", fps=5))
    assert gif.info["loop"] == 0 and gif.info["duration"] == 200
    png = Image.open(pictures.write_png(frames[2], tmp_path / "a.png"))
    assert (np.asarray(png.convert("RGB")) == frames[2]).all()
    with pytest.raises(UserError, match="max_steps"):
        pictures.trial_frames(policy, params, task, max_steps=0)
    with pytest.raises(UserError, match="no frames"):
        pictures.write_gif([], tmp_path / "b.gif")


def test_large_gifs_lose_frames_not_their_length(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_GIF_BYTES", 20_000)
    noise = np.random.default_rng(0).integers(0, 256, (16, 48, 48, 3), dtype=np.uint8)
    path = pictures.write_gif(list(noise), tmp_path / "noise.gif", fps=10)
    assert path.stat().st_size <= 20_000
    gif = Image.open(path)
    assert 1 < gif.n_frames < 16
    assert gif.info["duration"] * gif.n_frames == 16 * 100


def test_harlow_trials_show_where_the_good_object_is(harlow, tmp_path):
    policy, params, task = harlow
    seen = 0
    for index in range(12):
        trial = pictures.run_trial(policy, params, task, index, "test", 0)
        picture, places, _ = trials._harlow_rows(trial, task)
        assert (np.abs(np.diff(places)) <= 1).all()
        for t in np.flatnonzero(np.abs(trial.rewards) > 0.5):
            colour = trials._GOOD if trial.rewards[t] > 0 else trials._BAD
            assert tuple(picture[t, places[t + 1]]) == colour
            seen += 1
    assert seen > 0
    drawn = trials.draw_harlow(policy, params, task, tmp_path / "harlow.png", (0, 1))
    Image.open(drawn).verify()


def test_maze_paths_move_cell_by_cell_and_end_on_the_target(tmp_path):
    task = esmeta.make_task("maze", size=4, horizon=60)
    policy = esmeta.make_policy("mlp", task.spec)
    params = policy.init(seed=0, population=1)
    hits = 0
    for index in range(4):
        trial = pictures.run_trial(policy, params, task, index)
        side, target = trial.data["walls"].shape[0], int(trial.data["target"])
        paths, complete = trials._maze_paths(trial)
        done = paths if complete else paths[:-1]
        assert len(done) == int((trial.rewards > 0).sum())
        assert sum(len(path) - 1 for path in paths) == len(trial.rewards)
        for path in paths:
            assert not trial.data["walls"].flatten()[path].any()
            y, x = np.divmod(path, side)
            assert (np.abs(np.diff(y)) + np.abs(np.diff(x)) <= 1).all()
        assert all(path[-1] == target for path in done)
        hits += len(done)
    assert hits > 0
    Image.open(names.function(task.figures)(policy, params, task, tmp_path / "paths.png")).verify()


def test_pictures_leave_the_global_generator_alone(harlow):
    policy, params, task = harlow
    before = torch.get_rng_state()
    pictures.trial_frames(policy, params, task, max_steps=2)
    assert torch.equal(before, torch.get_rng_state())


def test_runs_that_share_no_time_have_no_scores_at_equal_time(tmp_path):
    points = {"a": [(0.0, 1.0), (1.0, 2.0)], "b": [(3.0, 5.0), (4.0, 6.0)], "c": [(0.0, 0.0)]}
    runs = {
        name: groups.RunData(
            tmp_path,
            {},
            {},
            [{"step": k, "seconds": x, "validation_return": y} for k, (x, y) in enumerate(rows)],
            old_scores=None,
        )
        for name, rows in points.items()
    }
    both = groups.Group("both", [runs["a"], runs["b"]], Reference(0.0, 1.0, ""))
    end, scores = groups.equal_budget([both], "seconds")
    assert end == 1.0 and math.isnan(scores["both"][0])
