"""Networks with the axis P, by how they are initialised and what follows their layers.

Three published kinds: ``orthogonal`` (orthogonal weights, tanh; MetODS and RL2 here), ``epg``
(weights that leave an input of norm 1, at the output of norm 0.01, and tanh, as in
https://github.com/openai/EPG) and ``metagenrl`` (Glorot-uniform weights, ReLU and then layer norm,
as in https://github.com/louiskirsch/metagenrl). All leaves are ``[P, ...]``, all products bmm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from esmeta.agent.linear import apply_mlp, bind_mlp, orthogonal
from esmeta.modes import affine
from esmeta.rng import Rng
from esmeta.types import Params

Kind = Literal["orthogonal", "epg", "metagenrl"]


@dataclass(frozen=True)
class Net:
    """A network whose leaves are ``name.0.weight``, ``name.0.bias``, ...

    Attributes:
        name: of its leaves, and the address of their first values.
        sizes: widths from the input to the output; one alone is no network: x goes through.
        kind: see the head of this module.
        gain: of the last layer's orthogonal weights.
        squash: whether a tanh follows the last layer too (``orthogonal`` only).
    """

    name: str
    sizes: tuple[int, ...]
    kind: Kind = "orthogonal"
    gain: float = 1.0
    squash: bool = False

    def init(self, rng: Rng, numbers: Tensor) -> Params:
        """First values ``[P, ...]``; those of member ``numbers[p]`` depend on it alone."""
        params: Params = {}
        for i, (rows, columns) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            last, layer = i == len(self.sizes) - 2, rng.fold(self.name, i)
            if self.kind == "orthogonal":
                gain, draws = self.gain if last else math.sqrt(2.0), map(rng.fold, numbers.tolist())
                weight = torch.stack(
                    [orthogonal(draw.fold(self.name, i), rows, columns, gain) for draw in draws]
                )
            elif self.kind == "epg":
                weight = rows_of_norm(layer, numbers, rows, columns, 0.01 if last else 1.0)
            else:
                weight = glorot(layer, numbers, rows, columns)
            params[f"{self.name}.{i}.weight"] = weight
            params[f"{self.name}.{i}.bias"] = torch.zeros_like(weight[:, 0])
            if self.kind == "metagenrl" and not last:
                params[f"{self.name}.{i}.gain"] = torch.ones_like(weight[:, 0])
                params[f"{self.name}.{i}.shift"] = torch.zeros_like(weight[:, 0])
        return params

    def bind(self, params: Params) -> Any:
        """Its leaves prepared for many calls of :meth:`apply`; None if ``params`` lacks them."""
        if f"{self.name}.0.weight" not in params:
            return None
        if self.kind == "orthogonal":
            return bind_mlp(params, self.name, self.squash)
        own = f"{self.name}."
        return {k.removeprefix(own): v for k, v in params.items() if k.startswith(own)}

    def apply(self, bound: Any, *parts: Tensor) -> Tensor:
        """Its output for parts ``[(T,) P, B, K_i]`` of an input."""
        if len(self.sizes) == 1:
            return _joined(parts)
        *lead, population, batch = parts[0].shape[:-1]
        if lead:
            parts = tuple(x.transpose(0, 1).flatten(1, 2) for x in parts)
        if self.kind == "orthogonal":
            x = apply_mlp(bound, *parts)
        else:
            x = self._layers(bound, _joined(parts))
        return x.reshape(population, *lead, batch, -1).transpose(0, 1) if lead else x

    def _layers(self, bound: Params, x: Tensor) -> Tensor:
        last = len(self.sizes) - 2
        for i in range(last + 1):
            x = affine(bound[f"{i}.bias"].unsqueeze(1), x, bound[f"{i}.weight"])
            if i == last:
                return x
            if self.kind == "epg":
                x = torch.tanh(x)
            else:
                x = layer_norm(torch.relu(x), x.shape[-1:])
                x = x * bound[f"{i}.gain"].unsqueeze(1) + bound[f"{i}.shift"].unsqueeze(1)
        return x


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def rows_of_norm(rng: Rng, numbers: Tensor, rows: int, columns: int, norm: float) -> Tensor:
    """Normal weights ``[P, rows, columns]``, those that leave an input scaled to ``norm``."""
    weight = rng.normal(numbers, rows * columns).reshape(-1, rows, columns)
    return (weight * (norm / weight.square().sum(2, keepdim=True).sqrt())).float()


def glorot(rng: Rng, numbers: Tensor, rows: int, columns: int) -> Tensor:
    """Uniform weights ``[P, rows, columns]`` within ``sqrt(6 / (rows + columns))``."""
    bound = math.sqrt(6.0 / (rows + columns))
    draw = rng.uniform(numbers, rows * columns).reshape(-1, rows, columns)
    return (bound * (2.0 * draw - 1.0)).float()
