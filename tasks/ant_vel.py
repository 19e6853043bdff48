"""Ant that must find out from reward how fast to walk.

Finn, Abbeel & Levine 2017 (MAML, arXiv 1703.03400), section 5.3: reward 1 - |dx/dt - v|
- 0.005 |a|^2 - 0.0005 |clip(f)|^2 + 0.05, v uniform in 0..3 m/s, terminated when the torso's height
leaves 0.2..1 m.
"""

from __future__ import annotations

from torch import Tensor

from esmeta.envs import ants
from esmeta.envs import locomotion as walk
from esmeta.envs.bodies import Data, Snapshot
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.types import Reference, Tasks


@options_class
class Task(ants.Ant):
    """Walk at an unknown speed. Options: :class:`esmeta.envs.ants.Ant`.

    Args:
        speed_min: slowest target in m/s.
        speed_max: fastest target in m/s.
    """

    speed_min: float = 0.0
    speed_max: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        walk.check_range("speed", self.speed_min, self.speed_max)

    def draw(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        """Speeds, see :func:`esmeta.envs.locomotion.speeds`."""
        low, high = self.speed_min, self.speed_max
        return walk.speeds(batch, split, rng, low, high, count=self.draws())

    def pay(self, now: Snapshot, velocity: Tensor, action: Tensor, data: Data) -> Tensor:
        """Reward ``1 - |v_x - speed|`` minus costs, plus ``alive_bonus``."""
        return 1.0 - (velocity[..., 0] - data["speed"]).abs() + self.upkeep(now, action)

    @property
    def reference(self) -> Reference:
        """Uniform actions; nothing gets above 1 and the bonus per step."""
        best = (1.0 + self.alive_bonus) * self.horizon
        return self.scores(best, "best: a bound that no body reaches")
