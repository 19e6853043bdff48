"""Figures of a learned objective function: returns of agents that learn by it, and its shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from esmeta.analysis.losses import LifeCurve, draw_life_curves, life_curve
from esmeta.analysis.plots import new_figure, save
from esmeta.rl.losses import Loss
from esmeta.rl.off_policy import DeterministicGradient
from esmeta.types import Params, Reference

if TYPE_CHECKING:
    from esmeta.objectives.metagenrl import MetaGenRLObjective

AGENTS = 8
"""Agents that a curve is the mean of."""
_GRID = 41


def life_curves(
    objective: MetaGenRLObjective, alpha: Params, count: int = AGENTS
) -> dict[str, dict[str, LifeCurve]]:
    """Split -> name of a loss -> curve: the learned one, its first values, and DDPG's.

    All with the same critics, schedule, tasks, first networks and noise.
    """
    lives, spec = objective.agent_lives(objective.task, objective.seed), objective.task.spec
    agent, length = lives.learner.agent, objective.network.length
    # Windows are shorter than episodes: the mean over one is what is paid wherever it is.
    width = max(1, round(spec.horizon / spec.episodes_per_trial / lives.learner.period))
    updates = objective.config.steps // lives.learner.period
    losses: dict[str, Loss] = {
        "learned objective": objective.network.loss(alpha),
        "DDPG (TD3's critics)": DeterministicGradient(1 if agent.stateless else length),
        "untrained objective": objective.network.loss(objective.init(objective.seed)),
    }
    return {
        split: {
            name: life_curve(lives, loss, split, count, updates=updates, width=width)
            for name, loss in losses.items()
        }
        for split in ("train", "test")
    }


def loss_surface(objective: MetaGenRLObjective, alpha: Params, value: float, told: float) -> Tensor:
    """l_t of the middle of a snippet, ``[41, 41]``, less its value where both actions are 0.

    Rows: the action the policy would take now; columns: the action that was taken, both -1 to 1 in
    units of the limit. At that step, z(r) and z(V') - z(V) are ``told`` and ``value``; the rest of
    the snippet has zeros.
    """
    network, agent = objective.network, objective.environments[0].learner.agent
    length, spec = network.length, agent.spec.action
    axis = torch.linspace(-1.0, 1.0, _GRID, dtype=torch.float32, device="cpu")
    action = torch.zeros(1, _GRID * _GRID, length, spec.size, dtype=torch.float32, device="cpu")
    now, inside = action.clone(), torch.ones_like(action[..., 0], dtype=torch.bool)
    middle = length // 2
    low, high = getattr(spec, "low", -1.0), getattr(spec, "high", 1.0)
    action[:, :, middle, 0], now[:, :, middle, 0] = (
        axis.repeat(_GRID),
        axis.repeat_interleave(_GRID),
    )
    action, now = ((high + low) / 2 + (high - low) / 2 * x for x in (action, now))
    inputs = torch.zeros(1, _GRID * _GRID, length, 4, dtype=torch.float32, device="cpu")
    if network.time == "snippet":
        inputs[..., 1] = torch.arange(length, dtype=torch.float32, device="cpu") / length
    inputs[:, :, middle, 0], inputs[:, :, middle, 2] = told, value
    with torch.no_grad():
        each = network.loss(alpha).steps(agent, action, now, inputs, inside)
    surface = each[0].sum(dim=-1).reshape(_GRID, _GRID)
    return surface - surface[_GRID // 2, _GRID // 2]


def figures(
    objective: MetaGenRLObjective,
    alpha: Params,
    reference: Reference,
    place: Callable[[str], Path],
) -> list[tuple[Path, str]]:
    """What the objective function does for agents, and its shape; see :class:`Illustrated`."""
    spec = objective.task.spec
    best = reference.best / (spec.horizon / spec.episodes_per_trial)
    lives = draw_life_curves(life_curves(objective, alpha), best, place("lives"))
    caption = f"{AGENTS} agents that learn, mean ± s.e.; dashed: the best known."
    shape = "The sum of l_t over a snippet in which one step is not zero, against both actions."
    return [(lives, caption), (draw_gallery(objective, alpha, place("loss")), shape)]


def draw_gallery(objective: MetaGenRLObjective, alpha: Params, out: Path) -> Path:
    """The loss of a step against both actions, where it went worse, as expected, and better."""
    figure, (panels,) = new_figure(3)
    for axes, value in zip(panels, (-2.0, 0.0, 2.0), strict=True):
        surface: Any = loss_surface(objective, alpha, value, 0.0).numpy()
        most = max(float(np.abs(surface).max()), 1e-12)
        axes.imshow(
            surface, origin="lower", cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto",
            extent=(-1, 1, -1, 1),
        )  # fmt: skip
        axes.plot([-1, 1], [-1, 1], color="black", lw=0.6, ls=":")
        axes.set_title(f"z(V') = {value:+.0f}, up to ±{most:.2g}", loc="left", fontsize=10)
        axes.set_xlabel("action taken")
    panels[0].set_ylabel("the policy's action now")
    return save(figure, out)
