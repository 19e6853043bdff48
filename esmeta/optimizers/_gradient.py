"""What optimizers along gradients share, and the update of A2C and PPO.

An update is two calls: ``collect`` runs trials and makes all that is constant, ``loss`` can then be
evaluated on it with any parameters, as often as wanted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from esmeta import errors
from esmeta.agent import heads
from esmeta.agent.policy import Policy
from esmeta.modes import differentiating
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers._schedule import Schedule, scheduled
from esmeta.options import options_class
from esmeta.rl import losses
from esmeta.rl.returns import gae
from esmeta.rl.steppers import Adam, shortened
from esmeta.rng import Rng
from esmeta.rollout import Trajectory
from esmeta.tree import ravel, shapes_of, unravel_shapes
from esmeta.types import Comm, Metrics, Params


@dataclass(frozen=True)
class GradientState:
    """theta as a flat float32 vector ``[1, D]``, its Adam, and the number of updates done."""

    theta: Tensor
    adam: Adam
    update: int
    shapes: dict[str, tuple[int, ...]]

    def params(self) -> Params:
        """Theta as leaves ``[1, ...]``."""
        return unravel_shapes(self.theta, self.shapes)

    def along(self, gradient: Tensor, rate: float, eps: float) -> Self:
        """One step of Adam down ``gradient [1, D]``."""
        move, adam = self.adam.step(gradient, rate, eps=eps)
        return replace(self, theta=self.theta - move, adam=adam)


class GradientOptimizer:
    """What is kept of theta, and stored, by optimizers along gradients."""

    gradient: ClassVar[bool] = True

    def init(self, theta: Params, rng: Rng) -> Any:
        """The state before the first update."""
        flat = ravel(theta).detach().clone()
        return GradientState(flat, Adam.zeros(flat), 0, shapes_of(theta))

    def theta(self, state: Any) -> Params:
        """The meta-parameters, leaves ``[1, ...]``."""
        return state.params()

    def state_dict(self, state: Any) -> dict[str, Any]:
        """Everything a resumed run needs."""
        return {
            "theta": state.theta[0],
            "first_moment": state.adam.first[0],
            "second_moment": state.adam.second[0],
            "adam_steps": int(state.adam.updates),
            "update": state.update,
        }

    def load_state_dict(self, saved: dict[str, Any], theta: Params) -> Any:
        """The inverse of :meth:`state_dict`."""
        like = next(iter(theta.values()))
        names = ("theta", "first_moment", "second_moment")
        flat, first, second = (saved[name].to(like.device).unsqueeze(0) for name in names)
        updates = torch.full((1,), saved["adam_steps"], dtype=torch.int64, device=like.device)
        return GradientState(flat, Adam(first, second, updates), saved["update"], shapes_of(theta))


class Batch(NamedTuple):
    """What a loss is evaluated on: trials and, ``[T, 1, B]``, what is constant in it."""

    trajectory: Trajectory
    log_prob: Tensor
    advantage: Tensor
    target: Tensor

    def trials(self, chosen: Tensor) -> Batch:
        """Some trials only, by their place in the batch."""
        constants = (leaf.index_select(2, chosen) for leaf in self[1:])
        return Batch(self.trajectory.trials(chosen), *constants)


class Passes(NamedTuple):
    """How often an update goes over its trials: A2C once, PPO in passes of minibatches."""

    epochs: int = 1
    minibatches: int = 1
    clip: float = 0.0
    target_kl: float = 0.0


@options_class
class ActorCritic(GradientOptimizer):
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
    schedule: Schedule = "constant"
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

    @property
    def passes(self) -> Passes:
        """How an update goes over its trials."""
        return Passes()

    def check(self, objective: ReturnObjective, ranks: int) -> None:
        """Refuse what is no return of a policy with a value head, and fewer trials than ranks."""
        if not isinstance(objective, ReturnObjective):
            raise errors.UserError(
                f"{type(objective).__name__} is not the return of one policy, which a2c and ppo "
                "differentiate; write optimizer.name = 'openes', or objective.name = 'return'"
            )
        if objective.policy.value is None:
            raise errors.UserError(
                "the policy has no value head, which a2c and ppo need; make it with value=True"
            )
        trials = objective.trials
        if trials < ranks:
            raise errors.UserError(
                f"task.trials = {trials} is fewer than the {ranks} ranks; "
                f"write at least task.trials = {ranks}, or start fewer ranks"
            )
        own = -(-trials // ranks)
        objective.check_room(own, f"the {own} trials of an update on a rank are run at once")

    def step(
        self, state: GradientState, objective: ReturnObjective, comm: Comm, rng: Rng
    ) -> tuple[GradientState, Metrics]:
        """Record ``trials`` trials, then one step of Adam on each minibatch of each pass."""
        self.check(objective, comm.size)
        data, metrics = self.collect(state.params(), state.update, objective, comm)
        sums, norms = [], []
        for epoch in range(self.passes.epochs):
            draw = rng.fold("minibatches", state.update, epoch, comm.rank)
            for part in self._minibatches(data, draw):
                state, logged, norm = self._step(state, objective, part, comm)
                sums.append(logged)
                norms.append(norm)
            if 0.0 < self.passes.target_kl < float(sums[-1][3]):
                break
        names = ("policy_loss", "value_loss", "entropy", "kl", "clip_fraction")
        means = torch.stack(sums).mean(dim=0).tolist()
        found = dict(zip(names, means, strict=False)) | {"gradient_norm": sum(norms) / len(norms)}
        return replace(state, update=state.update + 1), metrics | found

    def _minibatches(self, data: Batch, rng: Rng) -> Iterator[Batch]:
        """Whole trials in random order, so that memory is re-run from where it began."""
        if self.passes.minibatches == 1:
            yield data
            return
        order = rng.numpy().permutation(data.advantage.shape[2])
        order = torch.from_numpy(order).to(data.advantage.device)
        for chosen in order.tensor_split(self.passes.minibatches):
            yield data.trials(chosen)

    # --- the two calls -------------------------------------------------------------------------

    def collect(
        self, params: Params, update: int, objective: ReturnObjective, comm: Comm
    ) -> tuple[Batch, Metrics]:
        """This rank's trials of an update and what is constant in their loss; metrics of all."""
        trajectory, last, scores = objective.trajectories(params, update, comm.rank, comm.size)
        return self._data(trajectory, last, comm), _metrics(trajectory, scores, comm)

    def loss(
        self, policy: Policy, params: Params, data: Batch, count: Tensor, entropy_coef: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss ``[P]``, a sum over steps divided by ``count``; and the sums that are logged."""
        out, _ = policy.unroll(params, data.trajectory.start, data.trajectory.steps)
        assert out.value is not None
        clip = self.passes.clip
        log_prob, active = heads.log_prob(out, data.trajectory.action), data.trajectory.active
        ratio = log_prob - data.log_prob
        gain = losses.policy_gradient(log_prob, data.advantage)
        if clip > 0:
            gain = losses.clipped(ratio, data.advantage, clip)
        terms = [gain, losses.value_error(out.value, data.target), heads.entropy(out)]
        if clip > 0:
            terms += [losses.kl_estimate(ratio), losses.outside(ratio, clip)]
        sums = torch.stack([(term * active).sum(dim=(0, 2)) for term in terms])
        loss = sums[0] + self.value_coef * sums[1] - entropy_coef * sums[2]
        return loss / count, sums.detach()

    def _data(self, recorded: Trajectory, last_value: Tensor, comm: Comm) -> Batch:
        """Advantages and value targets; the trial is one long episode (RL2): its end alone cuts."""
        out, active = recorded.out, recorded.active
        assert out is not None and out.value is not None
        value, over = out.value, recorded.over
        cut_short = over & recorded.after.truncated if self.bootstrap else over & False
        raw = gae(
            recorded.reward.to(value.dtype) * self.reward_scale,
            value,
            torch.cat([value[1:], last_value.unsqueeze(0)]),
            over & ~cut_short,
            cut_short,
            gamma=self.gamma,
            lambda_=self.gae_lambda,
        )
        # Rows after the end of a trial hold the value head's opinion of nothing.
        raw = raw * active
        advantage = _normalized(raw, active, comm) if self.normalize_advantage else raw
        log_prob = heads.log_prob(out, recorded.action)
        return Batch(recorded._replace(out=None), log_prob, advantage, raw + value)

    def _step(
        self, state: GradientState, objective: ReturnObjective, data: Batch, comm: Comm
    ) -> tuple[GradientState, Tensor, float]:
        """One step of Adam; gradients and logged sums are added over ranks in rank order.

        Returns the logged sums divided by the number of active steps too, and the norm of the
        gradient before clipping.
        """
        count = comm.sum_ordered(data.trajectory.active.sum().double()).to(state.theta.dtype)
        at = functools.partial(scheduled, self.schedule, state.update, self.schedule_updates)
        coef = at(self.entropy_coef, self.entropy_final)
        differentiate = functools.partial(self._gradient, objective.policy)
        captured = objective.evaluator.captured
        given = (state.params(), data, count, torch.full_like(count, coef))
        own = differentiate(*given) if captured is None else captured("loss", differentiate, *given)
        joint, size = comm.sum_ordered(own), state.theta.shape[1]
        flat, norm = joint[None, :size], float(joint[:size].norm())
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"update {state.update}: the gradient is not finite (fast weights or values "
                "exploded); lower optimizer.learning_rate or policy.depth, or set "
                "policy.squash_embedding = true"
            )
        rate = at(self.learning_rate, self.learning_rate_final)
        state = state.along(shortened(flat, self.max_grad_norm), rate, self.adam_eps)
        return state, joint[size:] / count, norm

    @differentiating
    @torch.enable_grad()
    def _gradient(
        self, policy: Policy, params: Params, data: Batch, count: Tensor, coef: Tensor
    ) -> Tensor:
        """The gradient by every parameter, and behind it the logged sums, flat."""
        leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
        loss, sums = self.loss(policy, leaves, data, count, coef)
        inputs = list(leaves.values())
        grads = torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)
        flat = [grad.reshape(-1) for grad in grads]
        return torch.cat([*flat, sums.flatten().to(flat[0].dtype)])


def _normalized(advantage: Tensor, active: Tensor, comm: Comm) -> Tensor:
    """Zero mean and unit deviation over the active steps of all ranks."""
    moments = torch.stack([active.sum(), advantage.sum(), (advantage**2).sum()]).double()
    count, total, squares = comm.sum_ordered(moments)
    mean = total / count
    deviation = (squares / count - mean**2).clamp_min(0.0).sqrt()
    return ((advantage - mean) / (deviation + 1e-8) * active).to(advantage.dtype)


def _metrics(recorded: Trajectory, scores: Metrics, comm: Comm) -> Metrics:
    """Mean return and scores over the trials of all ranks, and their steps."""
    trials, names = recorded.reward.shape[2], sorted(scores)
    sums = [float(recorded.reward.sum()), float(recorded.active.sum()), float(trials)]
    for name in names:
        # NaN: none of this rank's trials came so far.
        defined = not math.isnan(scores[name])
        sums += [trials * scores[name], trials] if defined else [0.0, 0.0]
    total = comm.sum_ordered(torch.tensor(sums, dtype=torch.float64, device="cpu")).tolist()
    metrics = {"return_mean": total[0] / total[2], "env_steps": total[1]}
    for name, value, count in zip(names, total[3::2], total[4::2], strict=True):
        metrics[name] = value / count if count else math.nan
    return metrics
