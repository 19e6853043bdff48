"""A memoryless policy, the control for every claim about memory."""

from __future__ import annotations

from esmeta.agent.feedforward import Feedforward
from esmeta.agent.policy import Policy, PolicyConfig, policy_of
from esmeta.options import options_class
from esmeta.types import Spec


@options_class
class Config(PolicyConfig):
    """Options that every policy shares; ``neurons`` is the width of the memory's output."""


def build(spec: Spec, config: Config, *, value: bool) -> Policy:
    """A policy with Feedforward between embedding and heads."""
    return policy_of(spec, config, Feedforward(config.neurons), value=value)
