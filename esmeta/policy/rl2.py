"""RL2 with a GRU (Duan et al. 2016, arXiv 1611.02779): the recurrent state is the memory."""

from __future__ import annotations

from esmeta.agent.recurrent import Gru, RecurrentConfig
from esmeta.options import options_class


@options_class
class Config(RecurrentConfig):
    """Options of every recurrent policy."""

    def memory(self) -> Gru:
        return Gru(self.hidden[-1], self.neurons)
