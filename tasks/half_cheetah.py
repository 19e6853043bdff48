"""HalfCheetah as gymnasium's HalfCheetah-v5 has it (Wawrzynski 2009; Towers et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Definition, Snapshot
from esmeta.options import options_class
from esmeta.types import Reference

from . import _standard as standard


@options_class
class Task(standard.Standard):
    """Run forwards. Observation 17, six joints, five steps of 0.01 s per control step."""

    xml = "half_cheetah.xml"
    frame_skip = 5
    sizes = (17, 6)

    def definition(self) -> Definition:
        """Reward ``v - 0.1 |a|^2``; never terminated."""
        return Definition(_place, _observe, _reward, None, walk.GYM_NOISE)

    @property
    def reference(self) -> Reference:
        """Uniform actions; TD3."""
        best = walk.TD3["half_cheetah"] * self.horizon
        return self.scores(best, "best: TD3 (2018)")


def _place(now: Snapshot) -> Tensor:
    return now.qpos[..., :1]


def _observe(now: Snapshot) -> Tensor:
    return torch.cat([now.qpos[..., 1:], now.qvel], dim=-1)


def _reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
    return velocity[..., 0] - 0.1 * (action * action).sum(-1)
