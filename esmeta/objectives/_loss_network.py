"""EPG's loss network: what an agent has lived through and its policy, to one number.

Houthooft, Chen, Isola, Stadie, Wolski, Ho & Abbeel, "Evolved Policy Gradients", NeurIPS 2018,
https://arxiv.org/abs/1802.04821; layer sizes as in the released code (the paper's appendix prints
others). Three known defects of the release are not repeated: rewards and ends are written to the
rows that are filled, the loss reads the newest M steps and not the oldest of the buffer, and the
running statistics see every step once.

What differs besides: ``aux``, in the release an exploration bonus that is never fitted and hence
constant, is 1 here for every step lived through (there it passes the normaliser and is about 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from esmeta.agent import heads
from esmeta.agent.heads import half_range, middle
from esmeta.agent.policy import UNIT, Need, Policy, pick, steps_of
from esmeta.errors import UserError
from esmeta.modes import affine
from esmeta.rl.losses import Data, excess
from esmeta.rng import Rng
from esmeta.types import Discrete, Params, Spec

_KERNELS = ((6, 5), (4, 2))
"""Width and stride of both convolutions over time."""
_CHANNELS = (16, 32)
_CONTEXT = 32
_HIDDEN = 16
_SLOPE = 0.2


@dataclass(frozen=True)
class LossNetwork:
    """The network for agents of one task; its parameters are eta.

    Features of a step: scaled observation and action, reward (unless ``reward`` is off: then 0),
    aux, end of an episode, policy statistics (mean and log-std) and the memory unit.

    Attributes:
        spec: of the task.
        buffer: steps that it reads, N.
        reward: whether it sees rewards.
        memory: whether the memory unit may learn; else its first values are constant inputs.
        saturation: factor on the mean squared excess of the policy's mean over the limits of the
            actions, a part of the loss that is not learned; 0: none, as published.
    """

    spec: Spec
    buffer: int
    reward: bool = True
    memory: bool = False
    saturation: float = 0.0

    def __post_init__(self) -> None:
        if self.saturation > 0 and isinstance(self.spec.action, Discrete):
            raise UserError(
                f"saturation = {self.saturation}: the task has {self.spec.action.n} discrete "
                "actions, which have no limits to exceed; write saturation = 0"
            )
        if self.positions[-1] < 1:
            raise UserError(
                f"buffer = {self.buffer}: too short for the two convolutions over time; write at "
                f"least buffer = {(_KERNELS[1][0] - 1) * _KERNELS[0][1] + _KERNELS[0][0]}"
            )

    @property
    def positions(self) -> list[int]:
        """Places in time that are left behind each convolution."""
        lengths, length = [], self.buffer
        for width, stride in _KERNELS:
            length = (length - width) // stride + 1 if length >= width else 0
            lengths.append(length)
        return lengths

    @property
    def features(self) -> int:
        """Width of a step: 55 for Hopper."""
        action = self.spec.action
        statistics = heads.Distribution(action).statistics
        return self.spec.obs_size + action.size + 3 + statistics + UNIT

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Leaves of eta, without the axis P; inputs first."""
        sizes = {
            "conv.0": (_KERNELS[0][0] * self.features, _CHANNELS[0]),
            "conv.1": (_KERNELS[1][0] * _CHANNELS[0], _CHANNELS[1]),
            "context": (_CHANNELS[1], _CONTEXT),
            "head.0": (self.features + _CONTEXT, _HIDDEN),
            "head.1": (_HIDDEN, 1),
        }
        return {
            f"loss.{name}.{leaf}": shape if leaf == "weight" else shape[1:]
            for name, shape in sizes.items()
            for leaf in ("weight", "bias")
        }

    def init(self, rng: Rng) -> Params:
        """Fresh eta ``[1, ...]``: normal weights of std ``1 / sqrt(fan_in)``, zero biases."""
        params: Params = {}
        for name, shape in self.shapes.items():
            if name.endswith("bias"):
                params[name] = torch.zeros(1, *shape, dtype=torch.float32, device="cpu")
                continue
            first = torch.zeros(1, dtype=torch.int64, device="cpu")
            draw = rng.fold(name).normal(first, math.prod(shape))
            params[name] = (draw / math.sqrt(shape[0])).reshape(1, *shape).float()
        return params

    def loss(self, eta: Mapping[str, Tensor]) -> LearnedLoss:
        """The loss of agents with parameters ``eta``, leaves ``[P, ...]`` (or ``[1, ...]``)."""
        return LearnedLoss(self, dict(eta))


@dataclass(frozen=True)
class LearnedLoss:
    """A :class:`esmeta.rl.losses.Loss`; every agent may have an eta of its own."""

    needs: frozenset[Need] = field(default=frozenset({"unit"}), init=False)
    snippet: int = field(default=0, init=False)

    network: LossNetwork
    eta: Params

    @property
    def context(self) -> int:
        """The whole buffer."""
        return self.network.buffer

    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        """Features of all steps that do not depend on the policy: ``[P, N, ...]``."""
        steps, made = data.trajectory, data.constants
        reward, ended = steps_of(steps.reward), steps_of(steps.ended)
        filled = made["inside"].to(reward.dtype)
        reward = reward if self.network.reward else torch.zeros_like(reward)
        flags = torch.stack([reward, filled, ended.to(reward.dtype)], dim=-1)
        flags = flags * filled.unsqueeze(-1)
        x = torch.cat([steps_of(steps.steps.obs), made["scaled_action"], flags], dim=-1)
        return data._replace(constants=made | {"x": x})

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        """Loss ``[P]``: mean over ``rows`` of the newest steps.

        Its gradient reaches the policy by its statistics at those steps and, through the context,
        at all steps of the buffer; the memory unit only at those steps.
        """
        x, whole = data.constants["x"], data.trajectory
        rows = data.rows() if rows is None else pick(data.rows(), rows)
        out = agent.read(params, whole.start, whole.steps, value=False)
        statistics, unit = heads.statistics(out), agent.unit_output(params)
        if not self.network.memory:
            unit = unit.detach()
        everywhere = unit.detach().expand(-1, x.shape[1], -1)
        context = self.read(torch.cat([x, statistics, everywhere], dim=-1))
        chosen = pick(torch.cat([x, statistics], dim=-1), rows)
        own, policy = chosen[..., : x.shape[-1]], chosen[..., x.shape[-1] :]
        spread = (len(x), rows.shape[1], -1)
        y = torch.cat(
            [own, context.unsqueeze(1).expand(spread), policy, unit.expand(spread)], dim=-1
        )
        y = leaky_relu(self._layer("head.0", y), _SLOPE)
        return self._layer("head.1", y).squeeze(-1).mean(dim=1) + self._excess(policy)

    def _excess(self, policy: Tensor) -> Tensor | float:
        """The penalty ``[P]`` on policies with the statistics ``policy [P, m, 2 A]``."""
        action = self.network.spec.action
        if self.network.saturation == 0 or isinstance(action, Discrete):
            return 0.0
        mean = (policy[..., : action.size] - middle(action)) / half_range(action)
        return self.network.saturation * excess(mean).mean(dim=1)

    def read(self, x: Tensor) -> Tensor:
        """The context ``[P, 32]`` of a buffer of features ``[P, N, features]``."""
        for i, (width, stride) in enumerate(_KERNELS):
            windows = x.unfold(1, width, stride).transpose(2, 3).flatten(2)
            x = leaky_relu(self._layer(f"conv.{i}", windows), _SLOPE)
        return self._layer("context", x.mean(dim=1, keepdim=True)).squeeze(1)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.eta[f"loss.{name}.weight"], self.eta[f"loss.{name}.bias"]
        weight = weight.expand(len(x), -1, -1)
        return affine(bias.unsqueeze(1), x, weight)
