"""The networks of P agents that learn, each with parameters of its own.

Two published kinds: ``tanh`` (EPG, https://arxiv.org/abs/1802.04821: tanh layers, the
weights that leave an input of norm 1, at the output of norm 0.01, as in its code, and a Gaussian
whose log-std is a parameter) and
``relu`` (MetaGenRL, https://arxiv.org/abs/1910.04098: ReLU and then layer norm, Glorot-uniform
weights, a deterministic action ``limit * tanh``). All leaves are ``[P, ...]``, all products bmm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from esmeta.errors import UserError
from esmeta.modes import affine
from esmeta.rng import Rng
from esmeta.types import Continuous, Discrete, Params, PolicyOut, Spec, State, TimeStep

Style = Literal["tanh", "relu"]
Head = Literal["log_std", "value", "critics", "memory"]
HEADS: tuple[Head, ...] = ("log_std", "value", "critics", "memory")

MEMORY_INPUT, MEMORY = 64, 32
"""Width of EPG's memory unit: ones ``[64]`` to ``[32]``."""
CRITICS = ("q1", "q2")
_STD_FLOOR = 1e-3


def linear(x: Tensor, params: Params, name: str) -> Tensor:
    """``x [P, M, K]`` through the layer ``name``, weight ``[P, K, N]`` and bias ``[P, N]``."""
    return affine(params[f"{name}.bias"].unsqueeze(1), x, params[f"{name}.weight"])


def rows_of_norm(rng: Rng, index: Tensor, rows: int, columns: int, norm: float) -> Tensor:
    """Normal weights ``[P, rows, columns]``, those that leave an input scaled to ``norm``."""
    weight = rng.normal(index, rows * columns).reshape(-1, rows, columns)
    return (weight * (norm / weight.square().sum(2, keepdim=True).sqrt())).float()


def glorot(rng: Rng, index: Tensor, rows: int, columns: int) -> Tensor:
    """Uniform weights ``[P, rows, columns]`` within ``sqrt(6 / (rows + columns))``."""
    bound = math.sqrt(6.0 / (rows + columns))
    draw = rng.uniform(index, rows * columns).reshape(-1, rows, columns)
    return (bound * (2.0 * draw - 1.0)).float()


class Bound(NamedTuple):
    """Parameters of the acting policy and the statistics of its inputs."""

    params: Params
    mean: Tensor | None
    std: Tensor | None


@dataclass(frozen=True)
class Agent:
    """What every agent consists of; its parameters are made by :meth:`init`.

    ``heads`` are those that the loss needs: ``log_std`` (a learned spread of actions), ``value``
    (V(s)), ``critics`` (two Q(s, a)), ``memory`` (EPG's memory unit). It acts in a rollout
    (:class:`esmeta.rollout.Actor`) with parameters that may hold ``norm.mean`` and ``norm.std``
    ``[P, S]`` of its observations; ``std`` is the spread of actions without ``log_std``,
    ``log_std`` the logarithm of what it is at first with it.
    """

    spec: Spec
    hidden: tuple[int, ...] = (64, 64)
    style: Style = "tanh"
    heads: frozenset[Head] = frozenset({"log_std"})
    std: float = 0.1
    log_std: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.spec.action, Discrete) and (
            self.style == "relu" or "critics" in self.heads
        ):
            raise UserError(
                f"the task has {self.spec.action.n} discrete actions, but this learner needs "
                "continuous ones (its critics are differentiated in the action); choose a task "
                "with continuous actions, or a learner such as ppo"
            )

    @property
    def outputs(self) -> int:
        """Width of the policy's output: logits, or one mean per action dimension."""
        return self.spec.action.size

    @property
    def statistics(self) -> int:
        """Width of what a learned loss is told of the policy at a state."""
        return self.outputs * (1 if isinstance(self.spec.action, Discrete) else 2)

    def init(self, rng: Rng, index: Tensor) -> Params:
        """Fresh parameters, leaves ``[P, ...]``; those of agent ``index[p]`` depend on it alone."""
        # Agents of one number are alike: each number is drawn once.
        numbers, place = index.unique(return_inverse=True)
        params = self._mlp(rng, numbers, "policy", self.spec.obs_size, self.outputs)
        count = len(numbers)
        if "log_std" in self.heads and isinstance(self.spec.action, Continuous):
            shape, start = (count, self.outputs), float(self.log_std)
            params["log_std"] = torch.full(shape, start, dtype=torch.float32, device="cpu")
        if "value" in self.heads:
            params |= self._mlp(rng, numbers, "value", self.spec.obs_size, 1)
        if "critics" in self.heads:
            width = self.spec.obs_size + self.outputs
            for name in CRITICS:
                params |= self._mlp(rng, numbers, name, width, 1)
        if "memory" in self.heads:
            layer = rng.fold("memory")
            params["memory.weight"] = rows_of_norm(layer, numbers, MEMORY_INPUT, MEMORY, 0.01)
            params["memory.bias"] = torch.zeros(count, MEMORY, dtype=torch.float32, device="cpu")
        return {name: leaf[place].to(index.device) for name, leaf in params.items()}

    def _mlp(self, rng: Rng, index: Tensor, name: str, inputs: int, outputs: int) -> Params:
        sizes = [inputs, *self.hidden, outputs]
        params: Params = {}
        for i, (rows, columns) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            last = i == len(self.hidden)
            layer = rng.fold(name, i)
            if self.style == "tanh":
                weight = rows_of_norm(layer, index, rows, columns, 0.01 if last else 1.0)
            else:
                weight = glorot(layer, index, rows, columns)
            params[f"{name}.{i}.weight"] = weight.to(index.device)
            params[f"{name}.{i}.bias"] = torch.zeros(
                len(index), columns, dtype=torch.float32, device=index.device
            )
            if self.style == "relu" and not last:
                params[f"{name}.{i}.gain"] = torch.ones(
                    len(index), columns, dtype=torch.float32, device=index.device
                )
                params[f"{name}.{i}.shift"] = torch.zeros(
                    len(index), columns, dtype=torch.float32, device=index.device
                )
        return params

    def network(self, params: Params, name: str, x: Tensor) -> Tensor:
        """``x [P, M, K]`` through the network ``name``."""
        for i in range(len(self.hidden)):
            x = linear(x, params, f"{name}.{i}")
            if self.style == "tanh":
                x = torch.tanh(x)
            else:
                x = layer_norm(torch.relu(x), x.shape[-1:])
                gain, shift = params[f"{name}.{i}.gain"], params[f"{name}.{i}.shift"]
                x = x * gain.unsqueeze(1) + shift.unsqueeze(1)
        return linear(x, params, f"{name}.{len(self.hidden)}")

    def policy(self, params: Params, obs: Tensor) -> PolicyOut:
        """The policy at observations ``[P, M, S]`` (normalised, where they are): heads' outputs."""
        raw = self.network(params, "policy", obs)
        action = self.spec.action
        if isinstance(action, Discrete):
            return PolicyOut(raw, None, None, None)
        if self.style == "relu":
            std = self.std * (action.high - action.low) / 2
            return PolicyOut(None, self.limited(raw), torch.full_like(raw[..., :1], std), None)
        if "log_std" not in params:
            return PolicyOut(None, raw, torch.full_like(raw[..., :1], self.std), None)
        std = torch.exp(params["log_std"]).clamp_min(_STD_FLOOR).unsqueeze(1)
        return PolicyOut(None, raw, std, None)

    def limited(self, raw: Tensor) -> Tensor:
        """The action of ``relu`` agents whose policy network says ``raw [P, M, A]``."""
        spec = self.spec.action
        assert isinstance(spec, Continuous)
        middle, limit = (spec.high + spec.low) / 2, (spec.high - spec.low) / 2
        return middle + limit * torch.tanh(raw)

    def saturation(self, raw: Tensor) -> Tensor:
        """Squared excess over 1 of what enters the tanh, summed over actions: ``[P, M]``."""
        return (raw.abs() - 1.0).relu().square().sum(dim=-1)

    def policy_statistics(self, params: Params, obs: Tensor) -> Tensor:
        """Mean and log-std (or probabilities) at ``obs [P, M, S]``: ``[P, M, statistics]``."""
        out = self.policy(params, obs)
        if out.logits is not None:
            return torch.softmax(out.logits, dim=-1)
        assert out.mean is not None and out.std is not None
        return torch.cat([out.mean, torch.log(out.std).expand_as(out.mean)], dim=-1)

    def value(self, params: Params, obs: Tensor) -> Tensor:
        """V ``[P, M]`` of observations ``[P, M, S]``."""
        return self.network(params, "value", obs).squeeze(-1)

    def critic(self, params: Params, name: str, obs: Tensor, action: Tensor) -> Tensor:
        """Q ``[P, M]`` by the critic ``q1`` or ``q2``; actions are divided by their limit."""
        spec = self.spec.action
        assert isinstance(spec, Continuous)
        middle, limit = (spec.high + spec.low) / 2, (spec.high - spec.low) / 2
        x = torch.cat([obs, (action - middle) / limit], dim=-1)
        return self.network(params, name, x).squeeze(-1)

    def memory(self, params: Params) -> Tensor:
        """EPG's memory unit ``[P, 32]``: a constant input, so that its weights are the memory."""
        ones = torch.ones_like(params["memory.weight"][:, :1, :1]).expand(-1, 1, MEMORY_INPUT)
        return torch.tanh(linear(ones, params, "memory")).squeeze(1)

    # --- acting, as rollouts want it -----------------------------------------------------------

    def bind(self, params: Params) -> Bound:
        """Parameters ``[P, ...]`` of the policy, prepared for many steps."""
        return Bound(params, params.get("norm.mean"), params.get("norm.std"))

    def initial_state(
        self, params: Params, batch: int, rng: Rng | None = None, index: Tensor | None = None
    ) -> State:
        """Nothing: what these agents know is in their parameters."""
        return {}

    def step_bound(
        self, bound: Bound, state: State, ts: TimeStep, t: int = 0, *, in_place: bool = False
    ) -> tuple[PolicyOut, State]:
        """The policy at ``ts.obs [P, B, S]``."""
        obs = ts.obs
        if bound.mean is not None and bound.std is not None:
            obs = (obs - bound.mean.unsqueeze(1)) / bound.std.unsqueeze(1)
        return self.policy(bound.params, obs), state


def parameters_of(params: Params, names: Sequence[str]) -> Params:
    """The leaves of the networks ``names``, in the tree's own order."""
    return {k: v for k, v in params.items() if k.partition(".")[0] in names}
