"""No memory: what comes in goes out."""

from __future__ import annotations

import torch
from torch import Tensor

from esmeta.rng import Rng
from esmeta.types import Params, State


class Feedforward:
    """The output is the embedding, through a tanh where ``squash`` is set."""

    def __init__(self, units: int, squash: bool = True) -> None:
        self.size = units
        self.squash = squash

    def init(self, rng: Rng) -> Params:
        return {}

    def explain(self, device: torch.device | str, requires_grad: bool) -> str:
        return "none"

    def prepare(self, params: Params) -> None:
        return None

    def initial_state(self, params: Params, batch: int, rng: Rng, index: Tensor) -> State:
        return {}

    def reset(self, prepared: None, state: State, new_trial: Tensor) -> State:
        return state

    def step(
        self, prepared: None, state: State, x: Tensor, *, in_place: bool = False
    ) -> tuple[Tensor, State]:
        return torch.tanh(x) if self.squash else x, state

    def scan(
        self, prepared: None, state: State, x: Tensor, new_trial: Tensor | None
    ) -> tuple[Tensor, State]:
        return self.step(prepared, state, x)
