"""A policy is embedding -> memory -> heads, over the axes P and B, whoever trains it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from esmeta import errors
from esmeta.agent.heads import Distribution, half_range, middle
from esmeta.agent.nets import Net, rows_of_norm
from esmeta.modes import affine
from esmeta.options import options_class
from esmeta.rng import Rng
from esmeta.tree import shapes_of, size_of, stack_members
from esmeta.types import Memory, Params, PolicyOut, Spec, State, TimeStep

Need = Literal["value", "critics", "unit"]
"""What a loss needs of a policy besides its actions: V(s), two Q(s, a), EPG's memory unit."""
CRITICS = ("q1", "q2")
UNIT_INPUT, UNIT = 64, 32
"""EPG's memory unit: ones ``[64]`` through a layer and a tanh to ``[32]``."""


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
        """The policy for tasks of ``spec``; with a value head if ``value`` is set.

        The embedding ends after the ``hidden`` tanh layers where the memory has ``own_inputs``;
        else a linear layer of ``neurons`` (squashed, if wanted) follows.
        """
        inputs = Inputs(True, self.reward_input_scale, self.episode_input, self.extra)
        widths = self.hidden if self.own_inputs else (*self.hidden, self.neurons)
        gain = 1.0 if self.squash_embedding else math.sqrt(2.0)
        squash = self.own_inputs or self.squash_embedding
        distribution = Distribution(spec.action, self.std, self.std_value)
        memory = self.memory()
        last = memory.size, self.head_hidden
        return Policy(
            spec,
            inputs=inputs,
            embed=Net("embed", (inputs.size(spec), *widths), gain=gain, squash=squash),
            memory=memory,
            head=Net("head", (*last, distribution.width), gain=0.01),
            distribution=distribution,
            value=Net("value", (*last, 1)) if value else None,
            config=self,
        )

    def __post_init__(self) -> None:
        errors.positive_int("neurons", self.neurons)
        errors.positive_int("head_hidden", self.head_hidden)
        for width in self.hidden:
            errors.positive_int("hidden", width)
        errors.finite_positive("std_value", self.std_value)
        errors.non_negative("reward_input_scale", self.reward_input_scale)


@dataclass(frozen=True)
class Inputs:
    """What of a time step a policy reads: the observation and, with ``past``, what led to it."""

    past: bool = True
    reward_scale: float = 1.0
    episode: bool = False
    extra: Literal["bias", "time", "none"] = "none"

    def size(self, spec: Spec) -> int:
        """Width of the parts together."""
        if not self.past:
            return spec.obs_size
        return spec.obs_size + spec.action.size + 1 + self.episode + (self.extra != "none")

    def parts(self, ts: TimeStep, t: int | Tensor, horizon: int) -> list[Tensor]:
        """Parts ``[..., P, B, K_i]`` at step ``t`` of the trial."""
        if not self.past:
            return [ts.obs]
        reward = ts.reward if self.reward_scale == 1.0 else ts.reward * self.reward_scale
        parts = [ts.obs, ts.prev_action, reward.unsqueeze(-1)]
        if self.episode:
            parts.append(ts.new_episode.unsqueeze(-1).to(ts.obs.dtype))
        if self.extra == "bias":
            parts.append(torch.ones_like(parts[2]))
        elif self.extra == "time":
            # Filled there, because a number that comes from the host cannot be captured.
            time = t.to(ts.obs) if isinstance(t, Tensor) else ts.obs.new_full((), t)
            time = time.reshape(time.shape + (1,) * (reward.ndim + 1 - time.ndim))
            parts.append((time / horizon).expand_as(parts[2]))
        return parts


class Bound(NamedTuple):
    """Parameters prepared once for many steps: what does not change inside a rollout."""

    embed: Any
    memory: Any
    head: Any
    value: Any
    std: Tensor | None
    """Of actions, ``[P or 1, 1, A or 1]``; None where the state gives it."""
    norm: tuple[Tensor, Tensor] | None
    """Mean and deviation ``[P, 1, S]`` that observations are measured in, where there are any."""
    dtype: torch.dtype


class Policy:
    """Embedding, memory and heads of P members at once.

    ``step`` and ``unroll`` compute the same numbers: ``unroll`` runs embedding and heads on all T
    steps as large products and only the memory in sequence.

    Args:
        spec: of the task.
        inputs: what enters the embedding.
        embed: the embedding; with one size there is none.
        memory: what carries information between steps.
        head: the network of the actions' distribution, on the memory's output.
        distribution: what its output means.
        value: V, on the memory's output; None: there is none.
        critics: networks Q(s, a) on observations and actions (in units of their limits).
        episodic: whether memory begins anew with every episode, and not with a trial alone, as it
            does for agents that learn inside a trial.
        unit: whether it has EPG's memory unit, whose weights are the memory of a learned loss.
        config: the options it was made from.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        inputs: Inputs,
        embed: Net,
        memory: Memory,
        head: Net,
        distribution: Distribution,
        value: Net | None = None,
        critics: tuple[Net, ...] = (),
        unit: bool = False,
        episodic: bool = False,
        config: PolicyConfig | None = None,
    ) -> None:
        self.spec = spec
        self.inputs = inputs
        self.embed = embed
        self.memory = memory
        self.head = head
        self.distribution = distribution
        self.value = value
        self.critics = {net.name: net for net in critics}
        self.unit = unit
        self.episodic = episodic
        self._config = config
        self.input_size = inputs.size(spec)
        one = torch.zeros(1, dtype=torch.int64, device="cpu")
        params = self.init_at(Rng(0), one)
        self.shapes = shapes_of(params)
        self.size = size_of(self.shapes)
        self.stateless = not self.initial_state(params, 1)

    @property
    def config(self) -> PolicyConfig:
        """The options it was made from."""
        assert self._config is not None, "a published network has no options of its own"
        return self._config

    # --- parameters ----------------------------------------------------------------------------

    def init_at(self, rng: Rng, numbers: Tensor) -> Params:
        """First parameters ``[P, ...]``; those of member ``numbers`` int64 ``[P]`` depend on it."""
        # Members of one number are alike: each is drawn once.
        known, place = numbers.unique(return_inverse=True)
        params = self.embed.init(rng, known)
        members = [self.memory.init(rng.fold(p).fold("memory")) for p in known.tolist()]
        params |= {f"memory.{k}": v for k, v in stack_members(members).items()}
        params |= self.head.init(rng, known)
        for name, leaf in self.distribution.init().items():
            params[name] = leaf.expand(len(known), *leaf.shape)
        for net in (self.value, *self.critics.values()):
            params |= {} if net is None else net.init(rng, known)
        if self.unit:
            weight = rows_of_norm(rng.fold("memory"), known, UNIT_INPUT, UNIT, 0.01)
            params |= {"unit.weight": weight, "unit.bias": torch.zeros_like(weight[:, 0])}
        return {k: v[place.to(v.device)].to(numbers.device) for k, v in params.items()}

    def init(self, seed: int = 0, population: int = 1) -> Params:
        """Initial parameters ``[population, ...]``; member p depends on (seed, p) only."""
        numbers = torch.arange(int(population), device="cpu")
        return self.init_at(Rng(seed).fold("init"), numbers)

    def group(self, name: str) -> str:
        """What a leaf belongs to: ``value``, ``critics``, ``unit``, or ``actor``."""
        net = name.partition(".")[0]
        return "critics" if net in self.critics else net if net in ("value", "unit") else "actor"

    def part(self, params: Params, group: str) -> Params:
        """The leaves of one group."""
        return {name: leaf for name, leaf in params.items() if self.group(name) == group}

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
        return self.memory.initial_state(_memory(params), batch, rng or Rng(0), index)

    def bind(self, params: Params) -> Bound:
        """Prepare parameters for many calls of :meth:`step_bound` or one of :meth:`unroll`.

        Inside ``torch.no_grad`` the parameters are constants for all of these calls. Leaves
        ``norm.mean`` and ``norm.std`` ``[P, S]`` are what observations are measured in.
        Raises ``UserError`` where they are not all of one floating-point dtype, on one device.
        """
        kinds = {(leaf.dtype, leaf.device) for leaf in params.values()}
        if len(kinds) > 1 or not next(iter(kinds))[0].is_floating_point:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise errors.UserError(
                f"the parameters are {found}, but one floating-point dtype on one device is "
                "needed: write {name: leaf.float() for name, leaf in params.items()}"
            )
        if not torch.is_grad_enabled():
            params = {name: leaf.detach() for name, leaf in params.items()}
        norm = None
        if "norm.mean" in params:
            norm = params["norm.mean"].unsqueeze(1), params["norm.std"].unsqueeze(1)
        return Bound(
            embed=self.embed.bind(params),
            memory=self.memory.prepare(_memory(params)),
            head=self.head.bind(params),
            value=None if self.value is None else self.value.bind(params),
            std=self.distribution.spread(params),
            norm=norm,
            dtype=next(iter(kinds))[0],
        )

    # --- acting --------------------------------------------------------------------------------

    def _embedded(self, bound: Bound, ts: TimeStep, t: int | Tensor) -> Tensor:
        return self.embed.apply(bound.embed, *self._parts(bound, ts, t))

    def _parts(self, bound: Bound, ts: TimeStep, t: int | Tensor) -> list[Tensor]:
        if bound.norm is not None:
            ts = ts._replace(obs=(ts.obs - bound.norm[0]) / bound.norm[1])
        parts = self.inputs.parts(ts, t, self.spec.horizon)
        return [part if part.dtype == bound.dtype else part.to(bound.dtype) for part in parts]

    def heads(
        self, bound: Bound, y: Tensor, *, action: bool = True, value: bool = True
    ) -> PolicyOut:
        """Read-outs of the memory's output ``[(T,) P, B, size]``; of actions, of V, or both."""
        worth = None
        if value and self.value is not None and bound.value is not None:
            worth = self.value.apply(bound.value, y).squeeze(-1)
        if not action:
            return PolicyOut(None, None, None, worth)
        return self.distribution.of(self.head.apply(bound.head, y), bound.std, worth)

    def step_bound(
        self, bound: Bound, state: State, ts: TimeStep, t: int = 0, *, in_place: bool = False
    ) -> tuple[PolicyOut, State]:
        """One step with prepared parameters, inside a trial (``new_trial`` is not looked at).

        ``in_place`` says that ``state`` may be overwritten: the same bits, less memory.
        """
        x = self._embedded(bound, ts, t)
        if self.episodic:
            state = self.memory.reset(bound.memory, state, ts.new_episode)
        y, state = self.memory.step(bound.memory, state, x, in_place=in_place)
        return self.heads(bound, y), state

    def step(
        self, params: Params, state: State, ts: TimeStep, t: int = 0
    ) -> tuple[PolicyOut, State]:
        """One step of all trials; memory is reset first where ``ts.new_trial`` is set."""
        bound = self.bind(params)
        state = self.memory.reset(bound.memory, state, ts.new_trial)
        return self.step_bound(bound, state, ts, t)

    # --- reading what was recorded -------------------------------------------------------------

    def unroll(
        self, params: Params, state: State, recorded: TimeStep, start: int = 0
    ) -> tuple[PolicyOut, State]:
        """Re-evaluate a recorded sequence, leaves ``[T, P, B, ...]``; differentiable.

        Equal to :meth:`step` in a loop, bit for bit. ``recorded.new_trial`` resets memory inside
        the sequence, to what it starts from by ``params``, so that gradients reach that; ``start``
        is the step number of the first row within its trial.
        """
        bound = self.bind(params)
        length = recorded.reward.shape[0]
        t = torch.arange(start, start + length, device=recorded.reward.device)
        x = self._embedded(bound, recorded, t)
        y, state = self.memory.scan(bound.memory, state, x, self._anew(recorded))
        return self.heads(bound, y), state

    def _anew(self, recorded: TimeStep) -> Tensor:
        """The steps before which memory begins anew."""
        new = recorded.new_trial
        return new | recorded.new_episode if self.episodic else new

    def read(
        self,
        params: Params,
        state: State,
        recorded: TimeStep,
        rows: Tensor | None = None,
        *,
        action: bool = True,
        value: bool = True,
    ) -> PolicyOut:
        """The policy at steps of a recorded sequence, leaves ``[P, M, ...]``; differentiable.

        Steps are numbered trial by trial, M = B T of them; or ``rows`` int64 ``[P, m]`` of these.
        ``action`` and ``value`` say what is wanted. Without a memory nothing but the rows is
        computed.
        """
        bound, y = self._remembered(params, state, recorded, rows)
        return self.heads(bound, y, action=action, value=value)

    def raw(self, params: Params, state: State, recorded: TimeStep) -> Tensor:
        """What the head says at steps, ``[P, M, width]``, before it is made a distribution."""
        bound, y = self._remembered(params, state, recorded, None)
        return self.head.apply(bound.head, y)

    def _remembered(
        self, params: Params, state: State, recorded: TimeStep, rows: Tensor | None
    ) -> tuple[Bound, Tensor]:
        """The memory's output ``[P, M, size]`` at steps of a recorded sequence."""
        bound = self.bind(params)
        t = torch.arange(recorded.reward.shape[0], device=recorded.reward.device)
        if self.stateless:
            parts = [_chosen(part, rows) for part in self._parts(bound, recorded, t)]
            x = self.embed.apply(bound.embed, *parts)
            return bound, self.memory.step(bound.memory, state, x)[0]
        x = self._embedded(bound, recorded, t)
        y, _ = self.memory.scan(bound.memory, state, x, self._anew(recorded))
        return bound, _chosen(y, rows)

    def critic(self, params: Params, name: str, obs: Tensor, action: Tensor) -> Tensor:
        """Q ``[P, M]`` by the critic ``name`` at ``obs [P, M, S]`` and ``action [P, M, A]``."""
        action = (action - middle(self.spec.action)) / half_range(self.spec.action)
        net = self.critics[name]
        return net.apply(net.bind(params), obs, action).squeeze(-1)

    def unit_output(self, params: Params) -> Tensor:
        """EPG's memory unit ``[P, 1, 32]``: a constant input, so that its weights remember."""
        weight, bias = params["unit.weight"], params["unit.bias"].unsqueeze(1)
        ones = torch.ones_like(weight[:, :1, :1]).expand(-1, 1, UNIT_INPUT)
        return torch.tanh(affine(bias, ones, weight))


def _memory(params: Mapping[str, Tensor]) -> Params:
    return {k.removeprefix("memory."): v for k, v in params.items() if k.startswith("memory.")}


def steps_of(leaf: Tensor) -> Tensor:
    """Steps ``[T, P, B, ...]`` trial by trial, ``[P, B T, ...]``."""
    return leaf.movedim(0, 2).flatten(1, 2)


def pick(leaf: Tensor, rows: Tensor) -> Tensor:
    """Rows int64 ``[P, m]`` of a leaf ``[P, M, ...]``."""
    return leaf.gather(1, rows.reshape(*rows.shape, *[1] * (leaf.ndim - 2)).expand(
        *rows.shape, *leaf.shape[2:]))  # fmt: skip


def _chosen(leaf: Tensor, rows: Tensor | None) -> Tensor:
    leaf = steps_of(leaf)
    return leaf if rows is None else pick(leaf, rows)
