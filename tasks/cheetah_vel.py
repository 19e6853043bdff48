"""Half-cheetah that must find out from reward how fast to run.

Finn, Abbeel & Levine 2017 (MAML, arXiv 1703.03400), section 5.3: reward -|dx/dt - v| - 0.05 |a|^2,
never terminated, v uniform in 0..2 m/s there and in MAML's descendants, in 0..3 m/s in PEARL and
variBAD.
"""

from __future__ import annotations

from torch import Tensor

from esmeta.envs import cheetahs
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.types import Reference, Tasks


@options_class
class Task(cheetahs.Cheetah):
    """Run at an unknown speed. Options: :class:`esmeta.envs.cheetahs.Cheetah`.

    Args:
        speed_min: slowest target in m/s.
        speed_max: fastest target in m/s: 2 (MAML) or 3 (PEARL, variBAD).
    """

    speed_min: float = 0.0
    speed_max: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        walk.check_range("speed", self.speed_min, self.speed_max)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Speeds, see :func:`esmeta.envs.locomotion.speeds`."""
        low, high = self.speed_min, self.speed_max
        return walk.speeds(batch, split, rng, low, high, count=self.draws())

    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """Reward ``-|v - speed| - ctrl_cost |a|^2``."""
        return -(velocity[..., 0] - data["speed"]).abs() - self.effort(action)

    @property
    def reference(self) -> Reference:
        """Uniform actions; nothing gets above 0."""
        return self.scores(0.0, "best: a bound that no body reaches")
