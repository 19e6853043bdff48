"""GRU and LSTM memories with the axis P (RL2; Duan et al. 2016, arXiv 1611.02779)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

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


def _init(rng: Rng, inputs: int, units: int, gates: int) -> Params:
    def blocks(name: str, rows: int) -> Tensor:
        parts = [orthogonal(rng.fold(name, g), rows, units, 1.0) for g in range(gates)]
        return torch.cat(parts, dim=1)

    return {
        "input.weight": blocks("input", inputs),
        "input.bias": torch.zeros(gates * units, dtype=torch.float32, device="cpu"),
        "hidden.weight": blocks("hidden", units),
        "hidden.bias": torch.zeros(gates * units, dtype=torch.float32, device="cpu"),
    }


def _prepare(params: Params) -> _Prepared:
    return _Prepared(
        params["input.weight"],
        params["input.bias"].unsqueeze(1),
        params["hidden.weight"],
        params["hidden.bias"].unsqueeze(1),
    )


def _sigmoid(x: Tensor) -> Tensor:
    # torch.sigmoid rounds the last elements of a tensor differently on a CPU, so that a trial's
    # bits would depend on the size of its batch; tanh does not.
    return torch.tanh(0.5 * x) * 0.5 + 0.5


def _keep(new_trial: Tensor, like: Tensor) -> Tensor:
    return (~new_trial).unsqueeze(-1).to(like.dtype)


def _input_gates(prepared: _Prepared, x: Tensor) -> Tensor:
    """Input products of all T steps at once, ``[T, P, B, gates * n]``."""
    length, population, batch, width = x.shape
    flat = x.transpose(0, 1).reshape(population, length * batch, width)
    gates = apply_linear(flat, prepared.input_weight, prepared.input_bias)
    return gates.reshape(population, length, batch, -1).transpose(0, 1)


class Gru:
    """Gated recurrent unit: ``h = (1 - z) tanh(W x + r (U h + c)) + z h`` (Cho et al. 2014)."""

    def __init__(self, inputs: int, units: int) -> None:
        self.inputs = inputs
        self.size = units

    def init(self, rng: Rng) -> Params:
        """Orthogonal gates, zero biases; gate order reset, update, candidate."""
        return _init(rng, self.inputs, self.size, 3)

    def explain(self, device: torch.device | str, requires_grad: bool) -> str:
        return f"torch operations on {device} (GRU, n={self.size})"

    def prepare(self, params: Params) -> _Prepared:
        return _prepare(params)

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State:
        weight = params["hidden.weight"]
        return {"h": weight.new_zeros(weight.shape[0], batch, self.size)}

    def reset(self, prepared: _Prepared, state: State, new_trial: Tensor) -> State:
        return {"h": state["h"] * _keep(new_trial, state["h"])}

    def _cell(self, prepared: _Prepared, gates: Tensor, h: Tensor) -> Tensor:
        hidden = apply_linear(h, prepared.weight, prepared.bias)
        n = self.size
        both = _sigmoid(gates[..., : 2 * n] + hidden[..., : 2 * n])
        reset, update = both[..., :n], both[..., n:]
        candidate = torch.tanh(torch.addcmul(gates[..., 2 * n :], reset, hidden[..., 2 * n :]))
        return torch.lerp(candidate, h, update)

    def step(
        self, prepared: _Prepared, state: State, x: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, State]:
        gates = apply_linear(x, prepared.input_weight, prepared.input_bias)
        h = self._cell(prepared, gates, state["h"])
        return h, {"h": h}

    def scan(
        self, prepared: _Prepared, state: State, x: Tensor, new_trial: Tensor | None
    ) -> tuple[Tensor, State]:
        h, outputs = state["h"], []
        keep = None if new_trial is None else _keep(new_trial, h)
        for t, gates in enumerate(_input_gates(prepared, x)):
            h = self._cell(prepared, gates, h if keep is None else h * keep[t])
            outputs.append(h)
        return torch.stack(outputs), {"h": h}


class Lstm:
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with a forget gate."""

    def __init__(self, inputs: int, units: int) -> None:
        self.inputs = inputs
        self.size = units

    def init(self, rng: Rng) -> Params:
        """Orthogonal gates (input, forget, output, g); zero biases but 1 for the forget gate."""
        params = _init(rng, self.inputs, self.size, 4)
        params["hidden.bias"][self.size : 2 * self.size] = 1.0
        return params

    def explain(self, device: torch.device | str, requires_grad: bool) -> str:
        return f"torch operations on {device} (LSTM, n={self.size})"

    def prepare(self, params: Params) -> _Prepared:
        return _prepare(params)

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State:
        weight = params["hidden.weight"]
        zeros = weight.new_zeros(weight.shape[0], batch, self.size)
        return {"h": zeros, "c": zeros}

    def reset(self, prepared: _Prepared, state: State, new_trial: Tensor) -> State:
        keep = _keep(new_trial, state["h"])
        return {"h": state["h"] * keep, "c": state["c"] * keep}

    def _cell(self, prepared: _Prepared, gates: Tensor, state: State) -> State:
        gates = gates + apply_linear(state["h"], prepared.weight, prepared.bias)
        n = self.size
        three = _sigmoid(gates[..., : 3 * n])
        write = three[..., :n] * torch.tanh(gates[..., 3 * n :])
        c = torch.addcmul(write, three[..., n : 2 * n], state["c"])
        return {"h": three[..., 2 * n :] * torch.tanh(c), "c": c}

    def step(
        self, prepared: _Prepared, state: State, x: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, State]:
        gates = apply_linear(x, prepared.input_weight, prepared.input_bias)
        state = self._cell(prepared, gates, state)
        return state["h"], state

    def scan(
        self, prepared: _Prepared, state: State, x: Tensor, new_trial: Tensor | None
    ) -> tuple[Tensor, State]:
        outputs = []
        for t, gates in enumerate(_input_gates(prepared, x)):
            if new_trial is not None:
                state = self.reset(prepared, state, new_trial[t])
            state = self._cell(prepared, gates, state)
            outputs.append(state["h"])
        return torch.stack(outputs), state
