"""Figures of a learned loss: what agents earn while they learn by it, and what it looks like."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from esmeta.analysis.plots import COLOURS, GREY, new_figure, save
from esmeta.lives import AgentLives
from esmeta.rl.diary import Diary
from esmeta.rl.losses import Data, Loss, PolicyGradient
from esmeta.tree import leaves_of, with_leaves
from esmeta.types import Params, Reference

if TYPE_CHECKING:
    from esmeta.objectives.epg import EpgObjective

LIVES = 32
"""Lives that a curve is the mean of."""
_GRID = 41


class LifeCurve(NamedTuple):
    """Reward per step over a life: mean over agents and its standard error, by update."""

    steps: np.ndarray
    mean: np.ndarray
    se: np.ndarray


def life_curve(
    lives: AgentLives, loss: Loss, split: str, count: int, *, updates: int, width: int = 1
) -> LifeCurve:
    """Let ``count`` agents learn by one loss, each on a task of its own.

    Points of the curve are means over ``width`` of their ``updates``.
    """
    diary, life = Diary(), lives.begin(torch.arange(count, device="cpu"), split)
    for _ in range(updates // width * width):
        life, new = lives.advance(life, loss, split)
        diary.add(new)
    period = width * lives.learner.period
    parts = diary.reward.unflatten(1, (-1, period)).mean(dim=2)
    steps = period * (np.arange(parts.shape[1]) + 1)
    spread = parts.std(dim=0) / math.sqrt(count)
    return LifeCurve(steps, parts.mean(dim=0).numpy(), spread.numpy())


def life_curves(objective: EpgObjective, eta: Params) -> dict[str, dict[str, LifeCurve]]:
    """Split -> name of a loss -> curve: the learned one, its first values, and PPO's.

    All on the same tasks, from the same first networks, with the same number of updates.
    """
    agents = torch.zeros(LIVES, dtype=torch.int64, device="cpu")
    learned, first = (
        objective.network.loss({k: leaf[agents] for k, leaf in tree.items() if "loss." in k})
        for tree in (eta, objective.init(objective.seed))
    )
    lives = objective.with_value()
    losses: Mapping[str, Loss] = {
        "learned loss": learned,
        "PPO": PolicyGradient(kl_coef=0.001),
        "untrained loss": first,
    }
    return {
        split: {
            name: life_curve(lives, loss, split, LIVES, updates=lives.updates)
            for name, loss in losses.items()
        }
        for split in ("train", "test")
    }


def draw_life_curves(curves: Mapping[str, Mapping[str, LifeCurve]], best: float, out: Path) -> Path:
    """One panel per split; ``best`` is the best possible reward per step."""
    figure, (panels,) = new_figure(len(curves))
    titles = {"train": "tasks of meta-training", "test": "tasks of the test"}
    for axes, (split, found) in zip(panels, curves.items(), strict=True):
        for (name, curve), colour in zip(found.items(), COLOURS, strict=False):
            axes.plot(curve.steps, curve.mean, color=colour, lw=2, label=name)
            low, high = curve.mean - curve.se, curve.mean + curve.se
            axes.fill_between(curve.steps, low, high, color=colour, alpha=0.2, lw=0)
        if math.isfinite(best):
            axes.axhline(best, color=GREY, lw=1, ls="--")
        axes.axhline(0.0, color=GREY, lw=1, ls=":")
        axes.set_title(titles.get(split, split), loc="left", fontsize=11)
        axes.set_xlabel("steps of the agent's life")
        axes.set_ylabel("reward per step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=9)
    return save(figure, out)


def loss_surface(
    objective: EpgObjective, eta: Params, agent: int, updates: int, split: str = "test"
) -> Tensor:
    """The loss of an agent's newest step as if its action and reward had been others.

    Rows: rewards over the range the agent has met; columns: displacement of the first action
    dimension from the policy's mean, -2 to 2 standard deviations. float32 ``[41, 41]``, 0 in the
    middle. ``updates`` (>= 1): how long the agent has learned before.
    """
    lives, learner = objective.lives, objective.learner
    loss = objective.network.loss({k: v for k, v in eta.items() if "loss." in k})
    life = lives.begin(torch.tensor([agent, agent], dtype=torch.int64, device="cpu"), split)
    for _ in range(updates):
        life, _ = lives.advance(life, loss, split)
    state: Any = life.state
    data, cells = learner.data(state), _GRID * _GRID
    whole, std = data.trajectory, state.statistics.mean_std()[1][0]
    out = learner.agent.read(state.params, whole.start, whole.steps, value=False)
    assert out.mean is not None and out.std is not None
    move = torch.linspace(-2.0, 2.0, _GRID, dtype=torch.float32, device="cpu") * out.std[0, -1, 0]
    most = whole.reward[:, 0].abs().max()
    reward = torch.linspace(-1.0, 1.0, _GRID, dtype=torch.float32, device="cpu") * most
    action = out.mean[0, -1].repeat(cells, 1)
    action[:, 0] += move.repeat(_GRID)
    change = (action - whole.action[-1, 0]) / std[learner.agent.spec.obs_size :]
    grid = _copies(data, cells)
    grid.trajectory.action[-1, :, 0] = action
    grid.trajectory.ts.reward[-1, :, 0] = reward.repeat_interleave(_GRID)
    grid.constants["scaled_action"][:, -1] += change
    params = _of_first(state.params, cells)
    rows = torch.full((cells, 1), data.newest - 1, dtype=torch.int64, device="cpu")
    with torch.no_grad():
        prepared = loss.prepare(learner.agent, params, grid)
        value = loss(learner.agent, params, prepared, rows).reshape(_GRID, _GRID)
    return value - value[_GRID // 2, _GRID // 2]


def _copies(data: Data, count: int) -> Data:
    """The first agent's data ``count`` times, to be written to."""
    whole = data.trajectory
    trajectory = whole._replace(
        start=_of_first(whole.start, count),
        ts=_of_first(whole.ts, count, axis=1),
        action=_of_first(whole.action, count, axis=1),
        active=_of_first(whole.active, count, axis=1),
        end=_of_first(whole.end, count),
    )
    return Data(trajectory, _of_first(data.constants, count), data.newest)


def _of_first(tree: Any, count: int, axis: int = 0) -> Any:
    leaves = [leaf.narrow(axis, 0, 1).repeat_interleave(count, axis) for leaf in leaves_of(tree)]
    return with_leaves(tree, leaves)


def figures(
    objective: EpgObjective, eta: Params, reference: Reference, place: Callable[[str], Path]
) -> list[tuple[Path, str]]:
    """What the loss does for agents, and what it looks like; see :class:`Illustrated`."""
    episode = min(objective.config.test_steps, objective.task.spec.horizon)
    curves = life_curves(objective, eta)
    lives = draw_life_curves(curves, reference.best / episode, place("lives"))
    caption = f"Agents that learn, {LIVES} lives each, mean ± s.e.; dashed: the best possible."
    seen = "Its value at an agent's newest step, as if action and reward had been others."
    loss = draw_gallery(objective, eta, place("loss"))
    return [(lives, caption), (loss, f"The learned loss. {seen}")]


def draw_gallery(objective: EpgObjective, eta: Params, out: Path) -> Path:
    """The loss against displacement and reward: four agents, at three times of their lives."""
    from matplotlib.figure import Figure

    updates = objective.lives.updates
    times = sorted({1, max(1, updates // 4), max(1, updates - 1)})
    figure = Figure(figsize=(9.0, 2.3 * len(times)), dpi=72, layout="constrained")
    grid: Sequence[Sequence[Any]] = figure.subplots(len(times), 4, squeeze=False).tolist()
    for row, updates in zip(grid, times, strict=True):
        for agent, axes in enumerate(row):
            surface = loss_surface(objective, eta, agent, updates).numpy()
            most = max(float(np.abs(surface).max()), 1e-12)
            axes.imshow(
                surface, origin="lower", cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto",
                extent=(-2, 2, -1, 1),
            )  # fmt: skip
            axes.contour(
                np.linspace(-2, 2, _GRID), np.linspace(-1, 1, _GRID), surface, 6,
                colors="black", linewidths=0.4,
            )  # fmt: skip
            if updates == times[0]:
                axes.set_title(f"agent {agent}", fontsize=9)
            if agent == 0:
                axes.set_ylabel(f"after {updates} updates\nreward", fontsize=8)
            axes.tick_params(labelsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("action - mean (std)", fontsize=8)
    return save(figure, out)
