"""A memoryless policy, the control for every claim about memory."""

from __future__ import annotations

from esmeta.agent.feedforward import Feedforward
from esmeta.agent.policy import PolicyConfig
from esmeta.options import options_class


@options_class
class Config(PolicyConfig):
    """Options that every policy shares; ``neurons`` is the width of the memory's output."""

    def memory(self) -> Feedforward:
        return Feedforward(self.neurons)
