"""A memoryless policy, the control for every claim about memory."""

from __future__ import annotations

from esmeta.options import options_class
from esmeta.policy._core import PolicyConfig
from esmeta.policy._recurrent import Feedforward


@options_class
class Config(PolicyConfig):
    """Options that every policy shares; ``neurons`` is the width of the memory's output."""

    def memory(self) -> Feedforward:
        return Feedforward(self.neurons)
