"""A policy is embedding -> memory -> heads, over the axes P and B."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.options import options_class
from esmeta.policy._linear import Mlp, apply_mlp, bind_mlp, init_mlp
from esmeta.rng import Rng
from esmeta.tree import shapes_of, size_of, stack_members
from esmeta.types import Continuous, Memory, Params, PolicyOut, Spec, State, TimeStep

_MIN_STD = 1e-3


@options_class
class PolicyConfig:
    """Options that every policy shares; a policy is one of these that names its :meth:`memory`.

    ``hidden``: widths of the embedding's tanh layers; ``head_hidden``: width of the one tanh layer
    of each head; ``extra``: one more input, a constant 1 (``bias``), t/T (``time``) or ``none``;
    ``reward_input_scale``: factor on the reward as an input (0: it is not shown);
    ``episode_input``: one more input that is 1 at the first step of an episode (the d of RL2, for
    tasks whose state jumps there); ``std``: standard deviation of a Gaussian policy, ``fixed`` at
    ``std_value``, ``learned``, or given by the ``state``; ``squash_embedding``: a tanh on the
    embedding's output.
    """

    neurons: int = 20
    hidden: tuple[int, ...] = (32,)
    head_hidden: int = 32
    extra: Literal["bias", "time", "none"] = "bias"
    reward_input_scale: float = 1.0
    episode_input: bool = False
    std: Literal["fixed", "learned", "state"] = "fixed"
    std_value: float = 0.1
    squash_embedding: bool = False
    own_inputs: ClassVar[bool] = False
    """Whether the memory has input weights of its own, so that the embedding ends before them."""

    def memory(self) -> Memory:
        """What carries information from step to step, between embedding and heads."""
        raise NotImplementedError(f"{type(self).__qualname__} defines no memory()")

    def make(self, spec: Spec, *, value: bool) -> Policy:
        """The policy for tasks of ``spec``; with a value head if ``value`` is set."""
        return Policy(spec, self, self.memory(), value=value)

    def __post_init__(self) -> None:
        from esmeta import errors

        errors.positive_int("neurons", self.neurons)
        errors.positive_int("head_hidden", self.head_hidden)
        for width in self.hidden:
            errors.positive_int("hidden", width)
        errors.finite_positive("std_value", self.std_value)
        errors.non_negative("reward_input_scale", self.reward_input_scale)


class Bound(NamedTuple):
    """Parameters prepared once for many steps: what does not change inside a rollout."""

    embed: Mlp
    memory: Any
    head: Mlp
    value: Mlp
    std: Tensor | None
    """Of actions, ``[P or 1, 1, A or 1]``; None where the state gives it."""


class Policy:
    """Embedding, memory and heads of P members at once.

    ``step`` and ``unroll`` compute the same numbers: ``unroll`` runs embedding and heads on all T
    steps as large products and only the memory in sequence.

    The embedding ends after the ``hidden`` tanh layers where the memory has ``own_inputs``; else a
    linear layer of ``neurons`` (squashed, if wanted) follows.
    """

    def __init__(self, spec: Spec, config: PolicyConfig, memory: Memory, *, value: bool) -> None:
        self.spec = spec
        self.config = config
        self.memory = memory
        self.has_value = value
        self._widths = config.hidden if config.own_inputs else (*config.hidden, config.neurons)
        self._squash = config.own_inputs or config.squash_embedding
        self._embed_gain = 1.0 if config.squash_embedding else math.sqrt(2.0)
        self.input_size = spec.obs_size + spec.action.size + 1
        self.input_size += config.episode_input + (config.extra != "none")
        self.shapes = shapes_of({k: v[None] for k, v in self._init_member(Rng(0)).items()})
        self.size = size_of(self.shapes)

    def _init_member(self, rng: Rng) -> Params:
        config, action = self.config, self.spec.action
        outputs = action.size * (2 if config.std == "state" and self._gaussian else 1)
        params = init_mlp("embed", [self.input_size, *self._widths], self._embed_gain, rng)
        params |= {f"memory.{k}": v for k, v in self.memory.init(rng.fold("memory")).items()}
        width = self.memory.size
        params |= init_mlp("head", [width, config.head_hidden, outputs], 0.01, rng)
        if self._gaussian and config.std == "learned":
            start = math.log(config.std_value)
            params["head.log_std"] = torch.full(
                (action.size,), start, dtype=torch.float32, device="cpu"
            )
        if self.has_value:
            params |= init_mlp("value", [width, config.head_hidden, 1], 1.0, rng)
        return params

    @property
    def _gaussian(self) -> bool:
        return isinstance(self.spec.action, Continuous)

    def init(self, seed: int = 0, population: int = 1) -> Params:
        """Initial parameters ``[population, ...]``; member p depends on (seed, p) only."""
        rng = Rng(seed).fold("init")
        return stack_members([self._init_member(rng.fold(p)) for p in range(population)])

    def initial_state(
        self, params: Params, batch: int, rng: Rng | None = None, index: Tensor | None = None
    ) -> State:
        """State at the start of a trial, leaves ``[P, batch, ...]``.

        ``rng`` and ``index`` (int64 ``[P or 1, batch]``) address what is drawn per trial (a sampled
        W0); without them the draws are those of trials 0..batch-1 of seed 0.
        """
        first = next(iter(params.values()))
        if index is None:
            index = torch.arange(batch, device=first.device).unsqueeze(0)
        memory = {k.removeprefix("memory."): v for k, v in params.items() if k[:7] == "memory."}
        return self.memory.initial_state(memory, batch, rng or Rng(0), index)

    def bind(self, params: Params) -> Bound:
        """Prepare parameters for many calls of :meth:`step_bound` or one of :meth:`unroll`.

        Inside ``torch.no_grad`` the parameters are constants for all of these calls.
        Raises ``UserError`` where they are not all of one floating-point dtype, on one device.
        """
        kinds = {(leaf.dtype, leaf.device) for leaf in params.values()}
        if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise UserError(
                f"the parameters are {found}, but one floating-point dtype on one device is "
                "needed: write {name: leaf.float() for name, leaf in params.items()}"
            )
        if not torch.is_grad_enabled():
            params = {name: leaf.detach() for name, leaf in params.items()}
        memory = {k.removeprefix("memory."): v for k, v in params.items() if k[:7] == "memory."}
        return Bound(
            embed=bind_mlp(params, "embed", self._squash),
            memory=self.memory.prepare(memory),
            head=bind_mlp(params, "head"),
            value=bind_mlp(params, "value"),
            std=self._std(params),
        )

    def _std(self, params: Params) -> Tensor | None:
        if "head.log_std" in params:
            return torch.exp(params["head.log_std"]).clamp_min(_MIN_STD).unsqueeze(1)
        if not self._gaussian or self.config.std == "state":
            return None
        return next(iter(params.values())).new_full((1, 1, 1), self.config.std_value)

    def inputs(self, ts: TimeStep, t: int | Tensor, like: Tensor) -> list[Tensor]:
        """Parts ``[..., P, B, K_i]`` of the network's input at step ``t`` of the trial."""
        scale = self.config.reward_input_scale
        reward = ts.reward if scale == 1.0 else ts.reward * scale
        parts = [ts.obs, ts.prev_action, reward.unsqueeze(-1)]
        if self.config.episode_input:
            parts.append(ts.new_episode.unsqueeze(-1).to(ts.obs.dtype))
        if self.config.extra == "bias":
            parts.append(torch.ones_like(parts[2]))
        elif self.config.extra == "time":
            # Filled there, because a number that comes from the host cannot be captured.
            time = t.to(ts.obs) if isinstance(t, Tensor) else ts.obs.new_full((), t)
            time = time.reshape(time.shape + (1,) * (reward.ndim + 1 - time.ndim))
            parts.append((time / self.spec.horizon).expand_as(parts[2]))
        dtype = like.dtype
        return [part if part.dtype == dtype else part.to(dtype) for part in parts]

    def heads(self, bound: Bound, y: Tensor) -> PolicyOut:
        """Read-outs of the memory's output ``[(T,) P, B, size]``."""
        raw = apply_mlp(bound.head, y)
        value = apply_mlp(bound.value, y).squeeze(-1) if bound.value.layers else None
        if not self._gaussian:
            return PolicyOut(raw, None, None, value)
        if bound.std is None:
            mean, log_std = raw.chunk(2, dim=-1)
            return PolicyOut(None, mean, torch.exp(log_std).clamp_min(_MIN_STD), value)
        one = bound.std.shape[-1] == 1  # fixed: one number for all
        std = bound.std.expand(*raw.shape[:-1], 1) if one else bound.std
        return PolicyOut(None, raw, std, value)

    def step_bound(
        self, bound: Bound, state: State, ts: TimeStep, t: int = 0, *, in_place: bool = False
    ) -> tuple[PolicyOut, State]:
        """One step with prepared parameters, inside a trial (``new_trial`` is not looked at).

        ``in_place`` says that ``state`` may be overwritten: the same bits, less memory.
        """
        x = self.inputs(ts, t, bound.embed.layers[0][0])
        x = apply_mlp(bound.embed, *x)
        y, state = self.memory.step(bound.memory, state, x, in_place=in_place)
        return self.heads(bound, y), state

    def step(
        self, params: Params, state: State, ts: TimeStep, t: int = 0
    ) -> tuple[PolicyOut, State]:
        """One step of all trials; memory is reset first where ``ts.new_trial`` is set."""
        bound = self.bind(params)
        state = self.memory.reset(bound.memory, state, ts.new_trial)
        return self.step_bound(bound, state, ts, t)

    def unroll(
        self, params: Params, state: State, recorded: TimeStep, start: int = 0
    ) -> tuple[PolicyOut, State]:
        """Re-evaluate a recorded sequence, leaves ``[T, P, B, ...]``; differentiable.

        Equal to :meth:`step` in a loop, bit for bit. ``recorded.new_trial`` resets memory inside
        the sequence; ``start`` is the step number of the first row within its trial.
        """
        bound = self.bind(params)
        length = recorded.reward.shape[0]
        t = torch.arange(start, start + length, device=recorded.reward.device)
        x = self.inputs(recorded, t, bound.embed.layers[0][0])
        x = apply_mlp(bound.embed, *x)
        y, state = self.memory.scan(bound.memory, state, x, recorded.new_trial)
        return self.heads(bound, y), state
