"""RL2 with an LSTM (Wang et al. 2016, arXiv 1611.05763)."""

from __future__ import annotations

from esmeta.agent.recurrent import Lstm, RecurrentConfig
from esmeta.options import options_class


@options_class
class Config(RecurrentConfig):
    """Options of every recurrent policy."""

    def memory(self) -> Lstm:
        return Lstm(self.hidden[-1], self.neurons)
