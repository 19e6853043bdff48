"""MetaGenRL's objective function: what an agent did and would do now, to one number per step.

Kirsch, van Steenkiste & Schmidhuber, "Improving Generalization in Meta Reinforcement Learning using
Learned Objectives", ICLR 2020, https://arxiv.org/abs/1910.04098, appendix; layers as in the
released code. What differs: steps behind the end of an episode are masked, where the release reads
its padding first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from esmeta import errors
from esmeta.agent import heads
from esmeta.agent.heads import half_range, middle
from esmeta.agent.nets import glorot
from esmeta.agent.policy import CRITICS, Need, Policy, steps_of
from esmeta.modes import affine, differentiating
from esmeta.rl.losses import Data, excess
from esmeta.rl.off_policy import state_values
from esmeta.rl.steppers import shortened
from esmeta.rng import Rng
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Params

Time = Literal["snippet", "episode", "none"]
Values = Literal["both", "now", "none"]
WIDTH = 32
_OTHER = 8
_EPS = 1e-5


@dataclass(frozen=True)
class ObjectiveNetwork:
    """The network; its parameters are alpha, 15,497 numbers for any task.

    Attributes:
        length: steps of a snippet.
        time: what t is: the place in the snippet / ``length`` (``snippet``, the release's), the
            place in the episode / the longest episode (``episode``, the paper's), 0 (``none``).
        values: V_t and V_{t+1} (``both``), V_t (``now``) or neither (``none``).
        bound: eta of ``eta tanh(l / eta)``.
        saturation: factor on the mean squared excess over 1 of what enters a policy's tanh.
    """

    length: int = 20
    time: Time = "snippet"
    values: Values = "both"
    bound: float = 1000.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        errors.positive_int("snippet", self.length, example=20)
        errors.one_of("time", self.time, get_args(Time))
        errors.one_of("values", self.values, get_args(Values))
        errors.finite_positive("bound", self.bound, example=1000.0)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Leaves of alpha, without the axis P."""
        layers = {
            "action.0": (2, WIDTH),
            "action.1": (WIDTH, WIDTH),
            "action.2": (WIDTH, WIDTH),
            "other.0": (4, WIDTH),
            "other.1": (WIDTH, WIDTH),
            "other.2": (WIDTH, _OTHER),
            "lstm": (WIDTH + _OTHER + WIDTH, 4 * WIDTH),
            "head.0": (WIDTH, WIDTH),
            "head.1": (WIDTH, WIDTH),
            "head.2": (WIDTH, 1),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in layers.items():
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[1:]
            if name.startswith("action") or name in ("head.0", "head.1"):
                shapes[f"{name}.gain"], shapes[f"{name}.shift"] = shape[1:], shape[1:]
        return shapes

    def init(self, rng: Rng) -> Params:
        """Fresh alpha ``[1, ...]``: Glorot-uniform weights, forget bias and gains 1, else 0."""
        first = torch.zeros(1, dtype=torch.int64, device="cpu")
        params: Params = {}
        for name, shape in self.shapes.items():
            if name.endswith("weight"):
                params[name] = glorot(rng.fold(name), first, *shape)
            else:
                fill = torch.ones if name.endswith("gain") else torch.zeros
                params[name] = fill(1, *shape, dtype=torch.float32, device="cpu")
        params["lstm.bias"][:, WIDTH : 2 * WIDTH] = 1.0  # gates: input, forget, cell, output
        return params

    def loss(self, alpha: Mapping[str, Tensor], share: float = 1.0) -> LearnedObjective:
        """The loss of agents with ``alpha``, leaves ``[P, ...]`` (or ``[1, ...]`` for all)."""
        return LearnedObjective(self, dict(alpha), share)


@dataclass(frozen=True)
class LearnedObjective:
    """A :class:`esmeta.rl.losses.Loss`: ``share * L_alpha - (1 - share) * Q_1(s, pi(s))``.

    What it is told of an agent besides ``pi(s)`` carries no gradient; else it could learn to be
    DDPG and nothing more. ``share`` is 1 but for the first steps of meta-training. The penalty on
    saturated policies, where the network has one, is added to both.
    """

    needs: frozenset[Need] = field(default=frozenset({"critics"}), init=False)
    context: int = field(default=0, init=False)

    network: ObjectiveNetwork
    alpha: Params
    share: float = 1.0

    @property
    def snippet(self) -> int:
        """Steps per snippet."""
        return self.network.length

    @torch.no_grad()
    def prepare(self, agent: Policy, params: Params, data: Data) -> Data:
        """Inputs that are not of the policy: z(r), t, z(V'), z(V) ``[P, n L, 4]``; constants."""
        snippets, shape = data.trajectory, data.trajectory.active.shape

        def by_snippet(leaf: Tensor) -> Tensor:
            return leaf.movedim(0, 2)

        reward, ended, terminated = (
            by_snippet(x) for x in (snippets.reward, snippets.ended, snippets.terminated)
        )
        inside = data.constants["inside"].unflatten(1, (shape[2], shape[0])).to(reward.dtype)
        values = by_snippet(state_values(agent, params, snippets))
        value, following = values[..., :-1], values[..., 1:]
        # A time limit hides what came next: V of the step itself stands for it.
        following = torch.where(~ended | terminated, following, value)
        seen = torch.cat([inside, inside[..., -1:] * ~ended[..., -1:]], dim=-1)
        mean, std = _moments(torch.cat([value, following[..., -1:]], dim=-1), seen)
        following = (following - mean) / std * ~terminated
        value = (value - mean) / std
        mean, std = _moments(reward, inside)
        none, shown = torch.zeros_like(value), self.network.values
        columns = [
            (reward - mean) / std,
            self._time(agent, data, reward),
            following if shown == "both" else none,
            none if shown == "none" else value,
        ]
        told = torch.stack(columns, dim=-1) * inside.unsqueeze(-1)
        return data._replace(constants=data.constants | {"told": told.flatten(1, 2)})

    def _time(self, agent: Policy, data: Data, reward: Tensor) -> Tensor:
        kind, length = self.network.time, reward.shape[-1]
        if kind == "episode":
            longest = agent.spec.horizon / agent.spec.episodes_per_trial
            time = data.constants["time"].unflatten(1, reward.shape[1:])
            return time.to(reward.dtype) / max(1.0, longest - 1.0)
        place = torch.arange(length, device=reward.device, dtype=reward.dtype) / length
        return (place if kind == "snippet" else torch.zeros_like(place)).expand_as(reward)

    def __call__(
        self, agent: Policy, params: Params, data: Data, rows: Tensor | None = None
    ) -> Tensor:
        """The loss ``[P]``: a mean over the steps of all snippets."""
        snippets, made = data.trajectory, data.constants
        inside, steps = made["inside"], snippets.steps
        weight = inside.to(snippets.reward.dtype)
        weight = weight / weight.sum(dim=1, keepdim=True)
        raw = agent.raw(params, snippets.start, steps)
        mean = agent.distribution.mean(raw)
        total = torch.zeros_like(weight[:, 0])
        if self.share > 0:
            shape = (snippets.active.shape[2], snippets.active.shape[0])
            action, now, told, within = (
                leaf.unflatten(1, shape)
                for leaf in (steps_of(snippets.action), mean, made["told"], inside)
            )
            each = self.steps(agent, action, now, told, within)
            total = total + self.share * (each.flatten(1, 2) * weight).sum(dim=1)
        if self.share < 1:
            worth = agent.critic(params, CRITICS[0], steps_of(steps.obs), mean)
            total = total - (1.0 - self.share) * (worth * weight).sum(dim=1)
        if self.network.saturation > 0:
            total = total + self.network.saturation * (excess(raw) * weight).sum(dim=1)
        return total

    def steps(
        self, agent: Policy, action: Tensor, now: Tensor, told: Tensor, inside: Tensor
    ) -> Tensor:
        """``l_t [P, m, L]`` of the actions that were taken and those the policy takes now."""
        spec = agent.spec.action
        # A pair per action dimension [P, m, L, A, 2]: weights know nothing of their number.
        pairs = (torch.stack([action, now], dim=-1) - middle(spec)) / half_range(spec)
        x = self._normalised("action", 3, pairs.flatten(1, -2))
        x = x.reshape(*pairs.shape[:-1], WIDTH).mean(dim=-2)
        x = self._scaled("action.2", x.flatten(1, 2)).reshape(x.shape)
        y = told.flatten(1, 2)
        for i in range(2):
            y = _half_square(self._dense(f"other.{i}", y))
        y = self._dense("other.2", y).reshape(*told.shape[:-1], _OTHER)
        h = self._backwards(torch.cat([x, y], dim=-1), inside)
        z = self._normalised("head", 2, h.flatten(1, 2))
        raw = self._dense("head.2", z, after="head.1").reshape(inside.shape)
        return self.network.bound * torch.tanh(raw / self.network.bound)

    def _backwards(self, x: Tensor, inside: Tensor) -> Tensor:
        """Hidden states ``[P, m, L, 32]`` of the LSTM over ``x [P, m, L, 40]``, last step first.

        The state stays zero until the first step that is inside.
        """
        weight = self.alpha["lstm.weight"].expand(len(x), -1, -1)
        inputs, own = weight[:, : x.shape[-1]], weight[:, x.shape[-1] :]
        bias = self.alpha["lstm.bias"].unsqueeze(1)
        # Cut once: a slice per step would have the gradient of each filled up to the whole snippet.
        x = x.transpose(1, 2)
        driven = affine(bias, x.flatten(1, 2), inputs).reshape(*x.shape[:-1], 4 * WIDTH).unbind(1)
        mask = inside.transpose(1, 2).to(x.dtype).unsqueeze(-1).unbind(1)
        c = torch.zeros_like(driven[0][..., :WIDTH])
        h, states = c, []
        for t in range(x.shape[1] - 1, -1, -1):
            gates = affine(driven[t], h, own)
            enter, keep, _, leave = torch.sigmoid(gates).chunk(4, dim=-1)
            new = torch.tanh(gates[..., 2 * WIDTH : 3 * WIDTH])
            c = (keep * c + enter * new) * mask[t]
            h = leave * torch.tanh(c)
            states.append(h)
        return torch.stack(states[::-1], dim=2)

    def _normalised(self, name: str, count: int, x: Tensor) -> Tensor:
        """``count`` layers with layer norm, of the last one without its gain and shift."""
        for i in range(count):
            after = f"{name}.{i - 1}" if i else ""
            x = _half_square(self._dense(f"{name}.{i}", x, after=after))
            x = layer_norm(x, x.shape[-1:])
        return x

    def _dense(self, name: str, x: Tensor, *, after: str = "") -> Tensor:
        """A linear layer of ``x [P, M, K]``, which lacks gain and shift of the layer ``after``.

        They are put into the weights: there are far more rows than weights.
        """
        weight, bias = self.alpha[f"{name}.weight"], self.alpha[f"{name}.bias"].unsqueeze(1)
        if after:
            bias = affine(bias, self.alpha[f"{after}.shift"].unsqueeze(1), weight)
            weight = self.alpha[f"{after}.gain"].unsqueeze(2) * weight
        return affine(bias, x, weight.expand(len(x), -1, -1))

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        gain, shift = self.alpha[f"{name}.gain"], self.alpha[f"{name}.shift"]
        return x * gain.unsqueeze(1) + shift.unsqueeze(1)


def _half_square(x: Tensor) -> Tensor:
    """ReLU of the first half of the features, squares of the second."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([torch.relu(first), second.square()], dim=-1)


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each agent's ``x [P, n, L]``, ``[P, 1, 1]``."""
    count = weight.sum(dim=(1, 2), keepdim=True).clamp_min(1.0)
    mean = (x * weight).sum(dim=(1, 2), keepdim=True) / count
    square = ((x - mean).square() * weight).sum(dim=(1, 2), keepdim=True) / count
    return mean, square.sqrt() + _EPS


def inner_scale(data: Data, reduction: Literal["sum", "mean"]) -> Tensor | float:
    """What turns the mean over all steps into their sum, ``[P]`` (1 for the mean)."""
    if reduction == "mean":
        return 1.0
    return data.constants["inside"].sum(dim=1).to(data.trajectory.reward.dtype)


@differentiating
def value_after(
    agent: Policy,
    params: Params,
    loss: LearnedObjective,
    batches: list[Data],
    where: Data,
    *,
    rate: float,
    reduction: Literal["sum", "mean"],
    clip: float = 0.0,
) -> Tensor:
    """Mean ``Q_1(s, pi_phi'(s))`` ``[P]`` over the steps of ``where``, after learning (eqs. 6, 8).

    ``phi' = phi - rate * grad L_alpha`` once per entry of ``batches``; a
    gradient that is longer than ``clip`` is cut to that norm (0: never).
    Differentiable in alpha, through Q_1's action alone: the critics and phi are constants.
    """
    frozen = {k: v.detach() for k, v in params.items()}
    phi = {k: frozen.pop(k).requires_grad_() for k in agent.part(frozen, "actor")}
    with torch.enable_grad():
        for data in batches:
            ready = loss.prepare(agent, {**frozen, **phi}, data)
            told = loss(agent, {**frozen, **phi}, ready)
            total = (told * inner_scale(data, reduction)).sum()
            found = torch.autograd.grad(
                total, list(phi.values()), create_graph=True, materialize_grads=True
            )
            step = shortened(ravel(dict(zip(phi, found, strict=True))), clip)
            moves = unravel_shapes(step, shapes_of(phi))
            phi = {k: v - rate * moves[k] for k, v in phi.items()}
        snippets = where.trajectory
        weight = where.constants["inside"].to(snippets.reward.dtype)
        action = heads.mode(agent.read({**frozen, **phi}, snippets.start, snippets.steps))
        worth = agent.critic(frozen, CRITICS[0], steps_of(snippets.steps.obs), action)
        return (worth * weight).sum(dim=1) / weight.sum(dim=1)
