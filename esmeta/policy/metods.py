"""MetODS: meta-optimised dynamical synapses (Chalvidal et al. 2022), fast weights as the memory."""

from __future__ import annotations

from esmeta.agent.plastic import PlasticConfig as Config

__all__ = ["Config"]
