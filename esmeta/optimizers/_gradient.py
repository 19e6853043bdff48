"""What A2C and PPO share: advantages, masked means, and one Adam step summed over ranks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from esmeta import errors
from esmeta.modes import differentiating
from esmeta.objectives.return_ import ReturnObjective
from esmeta.options import options_class
from esmeta.policy import Policy
from esmeta.policy import _heads as heads
from esmeta.returns import gae
from esmeta.rollout import Trajectory
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Comm, Metrics, Params, PolicyOut, State, TimeStep


@options_class
class GradientConfig:
    """Options of both policy-gradient optimizers.

    ``gamma`` discount; ``gae_lambda``; ``value_coef`` and ``entropy_coef`` weights of the loss;
    ``max_grad_norm`` of the global gradient (0: no clipping); ``normalize_advantage`` over all
    steps of the update; ``reward_scale`` multiplies rewards in the loss only;
    ``bootstrap``: add the value of what follows a trial that was cut by its horizon (off: the
    horizon is part of the task); ``schedule`` of learning rate and entropy
    weight, which reach ``learning_rate_final`` and ``entropy_final`` after ``schedule_updates``.
    """

    learning_rate: float = 1e-3
    gamma: float = 0.99
    gae_lambda: float = 0.95
    value_coef: float = 0.4
    entropy_coef: float = 0.03
    max_grad_norm: float = 0.5
    normalize_advantage: bool = False
    reward_scale: float = 1.0
    bootstrap: bool = False
    adam_eps: float = 1e-8
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_updates: int = 1000
    learning_rate_final: float = 0.0
    entropy_final: float = 0.0

    def __post_init__(self) -> None:
        errors.finite_positive("learning_rate", self.learning_rate)
        errors.fraction("gamma", self.gamma)
        errors.fraction("gae_lambda", self.gae_lambda)
        errors.non_negative("value_coef", self.value_coef)
        errors.non_negative("entropy_coef", self.entropy_coef)
        errors.non_negative("max_grad_norm", self.max_grad_norm)
        errors.finite_positive("reward_scale", self.reward_scale)
        errors.finite_positive("adam_eps", self.adam_eps)
        errors.positive_int("schedule_updates", self.schedule_updates)
        errors.non_negative("learning_rate_final", self.learning_rate_final)
        errors.non_negative("entropy_final", self.entropy_final)

    def check(self, objective: ReturnObjective, ranks: int) -> None:
        """Refuse fewer trials per update than ranks, and what is no return of a policy."""
        if not isinstance(objective, ReturnObjective):
            raise errors.UserError(
                f"{type(objective).__name__} is not the return of one policy, which a2c and ppo "
                "differentiate; write optimizer.name = 'openes', or objective.name = 'return'"
            )
        trials = objective.trials
        if trials < ranks:
            raise errors.UserError(
                f"task.trials = {trials} is fewer than the {ranks} ranks; "
                f"write at least task.trials = {ranks}, or start fewer ranks"
            )
        objective.check_room(ranks)

    def at(self, step: int, first: float, last: float) -> float:
        """A scheduled number at update ``step``."""
        done = min(1.0, step / self.schedule_updates)
        if self.schedule == "linear":
            return first + (last - first) * done
        if self.schedule == "cosine":
            return last + (first - last) * 0.5 * (1.0 + math.cos(math.pi * done))
        return first


@dataclass
class GradientState:
    """theta and Adam's moments as flat float32 vectors ``[D]``, and the number of updates done."""

    theta: Tensor
    first_moment: Tensor
    second_moment: Tensor
    adam_steps: int
    update: int
    shapes: dict[str, tuple[int, ...]]

    def params(self) -> Params:
        return unravel_shapes(self.theta.unsqueeze(0), self.shapes)


def init_state(theta: Params) -> GradientState:
    flat = ravel(theta)[0].detach().clone()
    zeros = torch.zeros_like(flat)
    return GradientState(flat, zeros, zeros.clone(), 0, 0, shapes_of(theta))


def save_state(state: GradientState) -> dict[str, Any]:
    return {
        "theta": state.theta,
        "first_moment": state.first_moment,
        "second_moment": state.second_moment,
        "adam_steps": state.adam_steps,
        "update": state.update,
    }


def load_state(saved: dict[str, Any], theta: Params) -> GradientState:
    like = next(iter(theta.values()))
    placed: dict[str, Any] = {
        k: v.to(like.device) if isinstance(v, Tensor) else v for k, v in saved.items()
    }
    return GradientState(**placed, shapes=shapes_of(theta))


class Batch(NamedTuple):
    """What a loss needs of an update's trials, leaves ``[T, 1, B]``, all constants."""

    start: State
    ts: TimeStep
    action: Tensor
    log_prob: Tensor
    value: Tensor
    advantage: Tensor
    target: Tensor
    active: Tensor

    def trials(self, chosen: Tensor) -> Batch:
        """The same for some trials only, by their place in the batch."""
        return Batch(
            {name: leaf[:, chosen] for name, leaf in self.start.items()},
            TimeStep(*(leaf[:, :, chosen] for leaf in self.ts)),
            *(leaf[:, :, chosen] for leaf in self[2:]),
        )


def make_batch(
    config: GradientConfig, recorded: Trajectory, last_value: Tensor, comm: Comm
) -> Batch:
    """Advantages and value targets of a recorded rollout.

    The trial is one long episode (RL2): only its end cuts the sums.
    """
    assert recorded.out.value is not None
    value = recorded.out.value
    cut_short = recorded.ended & recorded.truncated if config.bootstrap else recorded.ended & False
    next_value = torch.cat([value[1:], last_value.unsqueeze(0)])
    active = recorded.active.to(value.dtype)
    raw = gae(
        recorded.reward.to(value.dtype) * config.reward_scale,
        value,
        next_value,
        recorded.ended & ~cut_short,
        cut_short,
        gamma=config.gamma,
        lambda_=config.gae_lambda,
    )
    # Rows after the end of a trial hold the value head's opinion of nothing.
    raw = raw * active
    advantage = _normalized(raw, active, comm) if config.normalize_advantage else raw
    return Batch(
        start=recorded.start,
        ts=recorded.ts,
        action=recorded.action,
        log_prob=heads.log_prob(recorded.out, recorded.action),
        value=value,
        advantage=advantage,
        target=raw + value,
        active=active,
    )


def _normalized(advantage: Tensor, active: Tensor, comm: Comm) -> Tensor:
    """Zero mean and unit deviation over the active steps of all ranks."""
    moments = torch.stack([active.sum(), advantage.sum(), (advantage**2).sum()]).double()
    count, total, squares = comm.sum_ordered(moments)
    mean = total / count
    deviation = (squares / count - mean**2).clamp_min(0.0).sqrt()
    return ((advantage - mean) / (deviation + 1e-8) * active).to(active.dtype)


Loss = Callable[[Batch, PolicyOut, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(batch, heads' outputs, number of active steps over all ranks, entropy weight) to the loss and
a vector of sums over steps that is logged."""


def gradient_step(
    config: GradientConfig,
    state: GradientState,
    objective: ReturnObjective,
    batch: Batch,
    loss_fn: Loss,
    comm: Comm,
) -> tuple[Tensor, float]:
    """One Adam step on a batch; gradients and logged sums are added over ranks in rank order.

    Changes ``state`` in place. Returns the logged sums divided by the number of active steps, and
    the norm of the gradient before clipping.
    """
    count = comm.sum_ordered(batch.active.sum().double()).to(state.theta.dtype)
    coef = config.at(state.update, config.entropy_coef, config.entropy_final)
    weights = count, torch.full_like(count, coef)
    differentiate = functools.partial(_gradient, objective.policy, loss_fn)
    captured, given = objective.evaluator.captured, (state.params(), batch, *weights)
    own = differentiate(*given) if captured is None else captured("loss", differentiate, *given)
    joint = comm.sum_ordered(own)
    flat, sums = joint[: len(state.theta)], joint[len(state.theta) :]
    norm = float(flat.norm())
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"update {state.update}: the gradient is not finite (fast weights or values exploded); "
            "lower optimizer.learning_rate or policy.depth, or set policy.squash_embedding = true"
        )
    if config.max_grad_norm > 0.0:
        flat = flat * min(1.0, config.max_grad_norm / (norm + 1e-6))
    rate = config.at(state.update, config.learning_rate, config.learning_rate_final)
    adam(state, flat, rate, config.adam_eps)
    return sums / count, norm


@differentiating
@torch.enable_grad()
def _gradient(
    policy: Policy, loss_fn: Loss, params: Params, batch: Batch, count: Tensor, coef: Tensor
) -> Tensor:
    """The gradient by every parameter, and behind it the logged sums, flat."""
    leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
    out, _ = policy.unroll(leaves, _restart(policy, leaves, batch.start), batch.ts)
    loss, sums = loss_fn(batch, out, count, coef)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    flat = [
        (torch.zeros_like(leaf) if grad is None else grad).reshape(-1)
        for leaf, grad in zip(leaves.values(), grads, strict=True)
    ]
    return torch.cat([*flat, sums.to(flat[0].dtype)])


def _restart(policy: Policy, leaves: Params, recorded: State) -> State:
    """The recorded first state, with the gradient path to a learned W0 put back."""
    if "memory.W0" not in leaves:
        return recorded
    first = recorded["W"]
    return recorded | {"W": leaves["memory.W0"].unsqueeze(1).expand_as(first)}


def adam(state: GradientState, gradient: Tensor, rate: float, eps: float) -> None:
    """Adam (Kingma & Ba 2015, algorithm 1) on flat vectors, descending."""
    state.adam_steps += 1
    state.first_moment = torch.lerp(gradient, state.first_moment, 0.9)
    state.second_moment = torch.lerp(gradient * gradient, state.second_moment, 0.999)
    first = state.first_moment / (1.0 - 0.9**state.adam_steps)
    second = state.second_moment / (1.0 - 0.999**state.adam_steps)
    state.theta = state.theta - rate * first / (second.sqrt() + eps)


def collect(
    config: GradientConfig, state: GradientState, objective: ReturnObjective, comm: Comm
) -> tuple[Batch, Metrics]:
    """Record this rank's trials and turn them into a batch; metrics are over all ranks."""
    check(config, state.shapes, objective, comm)
    recorded, last, task_metrics = objective.trajectories(
        state.params(), state.update, comm.rank, comm.size
    )
    trials = recorded.reward.shape[2]
    names = sorted(task_metrics)
    sums = [float(recorded.reward.sum()), float(recorded.active.sum()), float(trials)]
    for name in names:
        # NaN: none of this rank's trials came so far.
        defined = not math.isnan(task_metrics[name])
        sums += [trials * task_metrics[name], trials] if defined else [0.0, 0.0]
    total = comm.sum_ordered(torch.tensor(sums, dtype=torch.float64, device="cpu")).tolist()
    metrics = {"return_mean": total[0] / total[2], "env_steps": total[1]}
    for name, value, count in zip(names, total[3::2], total[4::2], strict=True):
        metrics[name] = value / count if count else math.nan
    return make_batch(config, recorded, last, comm), metrics


def check(
    config: GradientConfig, leaves: Iterable[str], objective: ReturnObjective, comm: Comm
) -> None:
    """Refuse what a policy gradient cannot train, before any work."""
    if not any(name.startswith("value.") for name in leaves):
        raise errors.UserError(
            "the policy has no value head, which a2c and ppo need; make it with value=True"
        )
    config.check(objective, comm.size)
