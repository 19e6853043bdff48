"""RL2 with an LSTM (Wang et al. 2016, arXiv 1611.05763)."""

from __future__ import annotations

from esmeta.agent.policy import Policy, policy_of
from esmeta.agent.recurrent import Lstm, RecurrentConfig
from esmeta.options import options_class
from esmeta.types import Spec


@options_class
class Config(RecurrentConfig):
    """Options of every recurrent policy."""


def build(spec: Spec, config: Config, *, value: bool) -> Policy:
    """A policy with Lstm between the tanh layers of the embedding and the heads."""
    memory = Lstm(config.hidden[-1], config.neurons)
    return policy_of(spec, config, memory, value=value, tanh_layers_only=True)
