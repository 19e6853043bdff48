"""What agents lived through, written down as leaves ``[P, n, L, ...]``, as losses read it."""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.rl.losses import Data
from esmeta.rollout import Trajectory
from esmeta.types import TimeStep


def trajectory(
    obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, ended: Tensor
) -> Trajectory:
    """n trials of L steps of each agent; ``obs [P, n, L + 1, S]`` has what followed too."""

    def after(leaf: Tensor, first: bool = False) -> Tensor:
        return torch.cat([torch.full_like(leaf[:, :, :1], first), leaf], dim=2)

    rows = [
        obs, after(action), after(reward), after(terminated), after(ended & ~terminated),
        after(ended, True), after(torch.zeros_like(ended)),
    ]  # fmt: skip
    ts, (action, active) = (
        [leaf.movedim(2, 0) for leaf in some] for some in (rows, (action, torch.ones_like(ended)))
    )
    return Trajectory({}, TimeStep(*ts), action, active, None, {})


def snippets(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminated: Tensor,
    ended: Tensor,
    time: Tensor | None = None,
) -> Data:
    """The same as a replay gives it: ``inside`` is what an episode's end does not hide."""
    inside = ended.long().cumsum(dim=-1) - ended.long() == 0
    time = torch.zeros_like(inside, dtype=torch.int64) if time is None else time
    constants = {"inside": inside.flatten(1, 2), "time": time.flatten(1, 2)}
    return Data(trajectory(obs, action, reward, terminated, ended), constants, obs.shape[2] - 1)


def window(
    obs: Tensor, action: Tensor, reward: Tensor, terminated: Tensor, ended: Tensor
) -> Trajectory:
    """T steps of each agent's one trial: leaves ``[P, T, ...]``, ``obs [P, T + 1, S]``."""
    return trajectory(*(leaf.unsqueeze(1) for leaf in (obs, action, reward, terminated, ended)))
