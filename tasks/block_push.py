"""Gripper that must find out from reward which of five blocks to push, and where to.

Block pushing of MAESN (Gupta et al. 2018, https://arxiv.org/abs/1802.07245): a gripper that slides
and turns in the plane starts at the origin before five blocks, one in each band of 0.2 m of y, at
x in 0.35..0.65 m. The goal lies behind one of them, at x in 0.75..0.95 m in its band. Episodes of
100 steps of 0.01 s. Dense reward -5 |block - goal|; the gated one is -5 |goal| where the block is
farther from the goal than 0.2 m. Nothing is random but the task. The gripper is a model of our own
(motors -2..2, damping 0.5; blocks of half size 0.03 m, damping 1.5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Body, Data, Definition, Noise, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid, check_split, task_numbers
from esmeta.types import Reference, Spec, Tasks

from . import _maesn as maesn

BLOCKS = 5
GRIPPER = 3
"""Coordinates of the gripper; those of the blocks follow, x and y of each."""
BAND, LOWEST = 0.2, -0.5
NEAR_X, FAR_X = (0.35, 0.65), (0.75, 0.95)
WEIGHT = 5.0
STILL = Noise("uniform", 0.0, "uniform", 0.0)


@options_class
class Task(walk.Simulated):
    """Push an unknown block to an unknown place. Observation 26: qpos and qvel. Three motors.

    Options, beside :class:`esmeta.envs.locomotion.Simulated`:

    Args:
        reward: ``"dense"`` or ``"gated"``.
        tolerance: how far the block may be from the goal, in m, where the gated reward begins;
            closer is a success.
    """

    renewable = False

    horizon: int = 100
    reward: str = aid("dense", published="gated")
    tolerance: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        maesn.check(self.reward, self.tolerance)

    def body(self) -> Body:
        """Gripper and blocks."""
        xml = str(maesn.MODELS / "block_push.xml")
        return Body(xml, 1, None, self.integrator, self.contact_rule)

    @property
    def spec(self) -> Spec:
        """Twenty-six numbers, three motors."""
        return self.trial(26, 3)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Where the blocks lie (``pose [1, B, 13]``), which one counts, and where it belongs.

        ``chosen`` float64 ``[1, B, 5]`` is 1 for the block that counts, ``goal [1, B, 2]`` in m.
        The splits are different draws.
        """
        check_split(split)
        index, stream = task_numbers(batch), rng.fold("blocks", split)
        # The order of uniform numbers is a random one; band[k] is that of block k.
        band = stream.fold("bands").uniform(index, BLOCKS).argsort(-1)
        u, v = stream.fold("places").uniform(index, 2 * BLOCKS).chunk(2, -1)
        x = NEAR_X[0] + (NEAR_X[1] - NEAR_X[0]) * u
        places = torch.stack([x, LOWEST + BAND * (band + v)], dim=-1)
        gripper = torch.zeros(*index.shape, GRIPPER, dtype=torch.float64, device=index.device)
        number = stream.fold("chosen").integers(index, 1, BLOCKS)
        u, v = stream.fold("goal").uniform(index, 2).unbind(-1)
        row = band.gather(-1, number).squeeze(-1)
        goal = [FAR_X[0] + (FAR_X[1] - FAR_X[0]) * u, LOWEST + BAND * (row + v)]
        data = {
            "pose": torch.cat([gripper, places.flatten(-2)], dim=-1),
            "chosen": torch.nn.functional.one_hot(number.squeeze(-1), BLOCKS).double(),
            "goal": torch.stack(goal, dim=-1),
        }
        return Tasks(index, data)

    def definition(self) -> Definition:
        """Reward ``-5 distance``."""

        def distance(now: Snapshot, data: Data) -> Tensor:
            blocks = now.qpos[..., GRIPPER:].unflatten(-1, (BLOCKS, 2))
            block = (data["chosen"].unsqueeze(-1) * blocks).sum(-2)
            return maesn.length(block - data["goal"])

        def near(now: Snapshot, data: Data) -> Tensor:
            return distance(now, data) <= self.tolerance

        def reward(now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
            far = distance(now, data)
            return -WEIGHT * maesn.paid_distance(self.reward, far, near(now, data), data["goal"])

        return Definition(_place, _observe, reward, None, STILL, success=near)

    @property
    def reference(self) -> Reference:
        """Uniform actions; nothing gets above 0."""
        return self.scores(0.0, "best: a bound that no gripper reaches")


def _place(now: Snapshot) -> Tensor:
    return now.qpos[..., :2]


def _observe(now: Snapshot) -> Tensor:
    return torch.cat([now.qpos, now.qvel], dim=-1)
