"""One step of many agents, each down the gradient of its own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esmeta.agent.policy import Policy
from esmeta.modes import differentiating
from esmeta.rl.steppers import Adam, shortened
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Params


class Adams(NamedTuple):
    """Adam of each part of the agents (``actor``, ``value``, ...), by its name."""

    parts: dict[str, Adam]

    @classmethod
    def zeros(cls, agent: Policy, params: Params) -> Adams:
        """Those of fresh parameters."""
        groups = dict.fromkeys(agent.group(name) for name in params)
        return cls({name: Adam.zeros(ravel(agent.part(params, name))) for name in groups})

    def renewed(self, agent: Policy, fresh: Params) -> Adams:
        """With those of the ``fresh`` leaves as at first."""
        return Adams(self.parts | Adams.zeros(agent, fresh).parts)


@differentiating
def descend(
    agent: Policy,
    loss: Callable[[Params], Tensor],
    params: Params,
    adams: Adams,
    rate: float,
    *,
    only: tuple[str, ...] = (),
    clip: float = 0.0,
) -> tuple[Params, Adams]:
    """One Adam step of every agent on its ``loss [P]``; parts that it does not depend on stay.

    ``only`` names the parts that may move (default: all); ``clip`` limits the norm of each agent's
    gradient, over all of them (0: no limit).
    """
    own = {name: leaf for name, leaf in params.items() if not only or agent.group(name) in only}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in own.items()}
    with torch.enable_grad():
        # Agents share no parameter, so the gradient of the sum is each agent's own.
        total = loss({**params, **leaves}).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    gradients = dict(zip(leaves, found, strict=True))
    moved = dict.fromkeys(agent.group(n) for n, g in gradients.items() if g is not None)
    rows = {
        part: torch.cat([
            (torch.zeros_like(own[n]) if g is None else g).reshape(len(own[n]), -1)
            for n, g in gradients.items() if agent.group(n) == part
        ], dim=1)
        for part in moved
    }  # fmt: skip
    if clip > 0:
        sizes = [row.shape[1] for row in rows.values()]
        short = shortened(torch.cat(list(rows.values()), dim=1), clip)
        rows = dict(zip(rows, short.split(sizes, dim=1), strict=True))
    params, parts = dict(params), dict(adams.parts)
    for part, gradient in rows.items():
        step, parts[part] = parts[part].step(gradient, rate)
        before = agent.part(params, part)
        params |= unravel_shapes(ravel(before) - step, shapes_of(before))
    return params, Adams(parts)
