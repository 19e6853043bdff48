"""Half-cheetah that must find out from reward which way to run: forwards or backwards.

Finn, Abbeel & Levine 2017 (MAML, arXiv 1703.03400), section 5.3, and all that followed it: reward
dir * dx/dt - 0.05 |a|^2, never terminated. As MetODS has it by default: one episode of 200 steps
per trial, observation 20, so that a policy sees 27 numbers (with action and reward).
"""

from __future__ import annotations

from torch import Tensor

from esmeta.envs import cheetahs
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tasks import aid
from esmeta.types import Reference, Tasks


@options_class
class Task(cheetahs.Cheetah):
    """Run forwards or backwards. Options: :class:`esmeta.envs.cheetahs.Cheetah`.

    Args:
        mirrored: tasks 2k and 2k + 1 are twins: all is alike, noise included, but their directions
            are opposite, so that what a policy earns without reading rewards cancels exactly.
    """

    mirrored: bool = aid(False)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Directions (1, 0) and (-1, 0), see :func:`esmeta.envs.locomotion.directions`."""
        return walk.directions(
            batch, split, rng, "binary", mirrored=self.mirrored, count=self.draws()
        )

    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """Reward ``dir * v - ctrl_cost |a|^2``."""
        return data["direction"][..., 0] * velocity[..., 0] - self.effort(action)

    @property
    def reference(self) -> Reference:
        """Uniform actions, exact by symmetry; the speed that TD3 reaches on the standard task."""
        steps = self.horizon
        note = "random: exact; best: at the speed of TD3 on HalfCheetah (9637 in 1000 steps)"
        # A uniform action on -1..1 has a mean square of 1/3.
        return Reference(-self.ctrl_cost * 6 / 3 * steps, walk.TD3["half_cheetah"] * steps, note)
