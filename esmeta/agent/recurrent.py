"""GRU and LSTM memories with the axis P (RL2; Duan et al. 2016, arXiv 1611.02779)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from esmeta.agent.linear import apply_linear, orthogonal
from esmeta.agent.policy import PolicyConfig
from esmeta.errors import UserError
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.types import Params, State


@options_class
class RecurrentConfig(PolicyConfig):
    """Options that every policy shares; ``neurons`` is the width of the memory.

    Its input weights follow the ``hidden`` tanh layers directly, with no linear layer between.
    """

    own_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden:
            raise UserError("hidden = []: must have at least one width; write for example [32]")
        if self.squash_embedding:
            raise UserError(
                "squash_embedding = true: the embedding of this policy always ends in tanh; "
                "write false"
            )


class _Prepared(NamedTuple):
    input_weight: Tensor
    input_bias: Tensor
    weight: Tensor
    bias: Tensor


class Recurrent(ABC):
    """A cell of ``gates`` gates, each of which reads the input and the last output ``h``.

    ``zeros`` names what it carries from step to step, all of it zero when a trial begins.
    """

    name: ClassVar[str]
    gates: ClassVar[int]
    zeros: ClassVar[tuple[str, ...]] = ("h",)

    def __init__(self, inputs: int, units: int) -> None:
        self.inputs = inputs
        self.size = units

    @abstractmethod
    def cell(self, gates: Tensor, hidden: Tensor, state: State) -> State:
        """The next state, from the products of the input and of ``h``, ``[P, B, gates * n]``."""

    def init(self, rng: Rng) -> Params:
        """Orthogonal gates, zero biases."""
        params: Params = {}
        for name, rows in (("input", self.inputs), ("hidden", self.size)):
            blocks = [
                orthogonal(rng.fold(name, g), rows, self.size, 1.0) for g in range(self.gates)
            ]
            params[f"{name}.weight"] = torch.cat(blocks, dim=1)
            params[f"{name}.bias"] = torch.zeros_like(params[f"{name}.weight"][0])
        return params

    def explain(self, device: torch.device | str, requires_grad: bool) -> str:
        return f"torch operations on {device} ({self.name}, n={self.size})"

    def prepare(self, params: Params) -> Any:
        return _Prepared(
            params["input.weight"],
            params["input.bias"].unsqueeze(1),
            params["hidden.weight"],
            params["hidden.bias"].unsqueeze(1),
        )

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State:
        weight = params["hidden.weight"]
        zeros = weight.new_zeros(weight.shape[0], batch, self.size)
        return dict.fromkeys(self.zeros, zeros)

    def reset(self, prepared: Any, state: State, new_trial: Tensor) -> State:
        return _kept(state, _share_kept(new_trial, state))

    def step(
        self, prepared: Any, state: State, x: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, State]:
        return self._next(prepared, _input_gates(prepared, x), state)

    def scan(
        self, prepared: Any, state: State, x: Tensor, new_trial: Tensor | None
    ) -> tuple[Tensor, State]:
        length, population, batch, width = x.shape
        x = x.transpose(0, 1).reshape(population, length * batch, width)
        gates = _input_gates(prepared, x).reshape(population, length, batch, -1)
        keep = None if new_trial is None else _share_kept(new_trial, state)
        outputs = []
        for t, now in enumerate(gates.unbind(1)):
            y, state = self._next(prepared, now, state if keep is None else _kept(state, keep[t]))
            outputs.append(y)
        return torch.stack(outputs), state

    def _next(self, prepared: _Prepared, gates: Tensor, state: State) -> tuple[Tensor, State]:
        hidden = apply_linear(state["h"], prepared.weight, prepared.bias)
        state = self.cell(gates, hidden, state)
        return state["h"], state


class Gru(Recurrent):
    """Gated recurrent unit: ``h = (1 - z) tanh(W x + r (U h + c)) + z h`` (Cho et al. 2014).

    Gate order reset, update, candidate.
    """

    name = "GRU"
    gates = 3

    def cell(self, gates: Tensor, hidden: Tensor, state: State) -> State:
        n = self.size
        both = _sigmoid(gates[..., : 2 * n] + hidden[..., : 2 * n])
        reset, update = both[..., :n], both[..., n:]
        candidate = torch.tanh(torch.addcmul(gates[..., 2 * n :], reset, hidden[..., 2 * n :]))
        return {"h": torch.lerp(candidate, state["h"], update)}


class Lstm(Recurrent):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with a forget gate.

    Gate order input, forget, output, g.
    """

    name = "LSTM"
    gates = 4
    zeros = ("h", "c")

    def init(self, rng: Rng) -> Params:
        """Orthogonal gates; zero biases but 1 for the forget gate."""
        params = super().init(rng)
        params["hidden.bias"][self.size : 2 * self.size] = 1.0
        return params

    def cell(self, gates: Tensor, hidden: Tensor, state: State) -> State:
        n = self.size
        gates = gates + hidden
        three = _sigmoid(gates[..., : 3 * n])
        write = three[..., :n] * torch.tanh(gates[..., 3 * n :])
        c = torch.addcmul(write, three[..., n : 2 * n], state["c"])
        return {"h": three[..., 2 * n :] * torch.tanh(c), "c": c}


def _input_gates(prepared: _Prepared, x: Tensor) -> Tensor:
    return apply_linear(x, prepared.input_weight, prepared.input_bias)


def _share_kept(new_trial: Tensor, state: State) -> Tensor:
    return (~new_trial).unsqueeze(-1).to(state["h"].dtype)


def _kept(state: State, keep: Tensor) -> State:
    return {name: leaf * keep for name, leaf in state.items()}


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid rounds the last elements of a tensor differently on a CPU, so that a trial's
    # bits would depend on the size of its batch; tanh does not.
    return torch.tanh(0.5 * x) * 0.5 + 0.5
