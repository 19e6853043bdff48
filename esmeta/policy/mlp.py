"""A memoryless policy, the control for every claim about memory."""

from __future__ import annotations

from esmeta.options import options_class
from esmeta.policy._core import Policy, PolicyConfig
from esmeta.policy._recurrent import Feedforward
from esmeta.types import Spec


@options_class
class Config(PolicyConfig):
    """Options that every policy shares; ``neurons`` is the width of the memory's output."""


def build(spec: Spec, config: Config, *, value: bool) -> Policy:
    """A policy with Feedforward between embedding and heads."""
    return Policy(spec, config, Feedforward(config.neurons), value=value)
