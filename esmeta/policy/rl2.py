"""RL2 with a GRU (Duan et al. 2016, arXiv 1611.02779): the recurrent state is the memory."""

from __future__ import annotations

from esmeta.agent.policy import Policy, policy_of
from esmeta.agent.recurrent import Gru, RecurrentConfig
from esmeta.options import options_class
from esmeta.types import Spec


@options_class
class Config(RecurrentConfig):
    """Options of every recurrent policy."""


def build(spec: Spec, config: Config, *, value: bool) -> Policy:
    """A policy with Gru between the tanh layers of the embedding and the heads."""
    memory = Gru(config.hidden[-1], config.neurons)
    return policy_of(spec, config, memory, value=value, tanh_layers_only=True)
