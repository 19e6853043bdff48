"""The return of an agent over a trial: the objective of MetODS, RL2 and plain evolution."""

from __future__ import annotations

import traceback
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from esmeta import rollout as loop
from esmeta.agent import heads
from esmeta.agent.plastic import composite_decay
from esmeta.errors import EnvError, EnvFailure, UserError, warn
from esmeta.evaluator import OwnEnv, PopulationEvaluator, numbers_at
from esmeta.lives import Lives, TrialLives
from esmeta.options import options_class
from esmeta.policy import Policy
from esmeta.rng import Rng
from esmeta.tasks import task_groups
from esmeta.types import LARGEST_REWARD, Fitness, Metrics, Params, Reference, State, Task

_Recorded = tuple[loop.Trajectory, Tensor, State, dict[str, Tensor]]


@options_class
class Objective:
    """Options of the return.

    Attributes:
        capture: whether rollouts and gradients are recorded as CUDA graphs and replayed.
    """

    capture: bool = False

    def reference(self, task: Task) -> Reference:
        """What its scores are read against: the task's own."""
        return task.reference

    def make(
        self,
        policy: Policy | None,
        task: Task,
        *,
        trials: int,
        seed: int,
        device: str | torch.device,
    ) -> ReturnObjective:
        """Tie the objective to a policy and a task distribution."""
        if policy is None:
            raise UserError(
                "policy.name = 'none': objective 'return' scores a policy; write for example "
                'policy.name = "metods"'
            )
        device = torch.device(device)
        return ReturnObjective(
            policy, task, trials=trials, seed=seed, device=device, capture=self.capture
        )


@dataclass(eq=False)
class ReturnObjective(OwnEnv):
    """Sum of rewards over a trial; every step has its own ``trials`` training tasks.

    Its trials can be run in windows: it is a :class:`esmeta.types.Lifetimes`.

    Step k of a run uses training tasks k * trials .. (k + 1) * trials - 1 of the run's seed, on
    all ranks and for all members. ``capture`` is that of :class:`Objective`.
    """

    policy: Policy
    task: Task
    _: KW_ONLY
    trials: int
    seed: int
    device: torch.device
    capture: bool = False

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        self.evaluator = PopulationEvaluator(
            self.policy, self.task, self.trials, self.device, capture=self.capture
        )
        self._lives = TrialLives(self.evaluator, self.seed)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Leaves of theta, without the axis P: the policy's."""
        return self.policy.shapes

    def init(self, seed: int) -> Params:
        """A fresh policy, leaves ``[1, ...]``."""
        return self.policy.init(seed=seed)

    def explain(self, gradient: bool) -> str:
        """In one line, which code runs the memory."""
        return self.policy.memory.explain(str(self.device), gradient)

    def fitness(self, params: Params | Tensor, step: int | Tensor) -> Fitness:
        """Returns of members on the tasks of ``step`` (int64 ``[P]``: of each its own)."""
        index = numbers_at(step, self.trials)
        return self.evaluator(params, seed=self.seed, split="train", index=index)

    @property
    def life_steps(self) -> int:
        """A life is a trial: the task's horizon."""
        return self._lives.steps

    def begin(self, params: Params | Tensor, life: int) -> Lives:
        """Trials on the tasks of step ``life``, to be run in windows; see :class:`Lifetimes`."""
        return self._lives.begin(params, life)

    def advance(self, lives: Lives, params: Params | Tensor, steps: int) -> tuple[Lives, Fitness]:
        """The trials after ``steps`` more steps, and the returns of that window."""
        return self._lives.advance(lives, params, steps)

    def save(self, lives: Lives) -> State:
        """Trials as plain tensors, leaves ``[P, ...]``."""
        return self._lives.save(lives)

    def restore(self, saved: State) -> Lives:
        """The inverse of :meth:`save`."""
        return self._lives.restore(saved)

    def heldout(
        self,
        params: Params | Tensor,
        trials: int,
        seed: int | None = None,
        first: int = 0,
        split: str = "test",
        *,
        act: loop.Act = heads.sample,
        intervene: loop.Intervention | None = None,
    ) -> Fitness:
        """Returns on the tasks ``first`` .. ``trials`` - 1 of a split, the same for a seed."""
        seed = self.seed if seed is None else seed
        index = torch.arange(first, trials, device="cpu")
        return self.evaluator(
            params, seed, split, index, act=act, intervene=intervene, mark_failed=True
        )

    def groups(self, index: Tensor, split: str) -> Tensor:
        """Numbers ``[B]``, the same for trials that share randomness."""
        return task_groups(self.task, index, split)

    @torch.no_grad()
    def trajectories(
        self, params: Params, step: int, rank: int = 0, size: int = 1
    ) -> tuple[loop.Trajectory, Tensor, Metrics]:
        """Record this rank's share of the trials of ``step`` with one policy ``[1, ...]``.

        Returns the trajectory, the value ``[1, B]`` of what follows its last step (zeros without a
        value head) and the task's metrics, averaged. Where a simulator fails, all trials are run
        once more.
        """
        try:
            return self._trajectories(params, step, rank, size)
        except EnvFailure as failure:
            warn(f"{failure}; the trials of update {step} are run again")
            traceback.clear_frames(failure.__traceback__)
        return self._trajectories(params, step, rank, size)

    def _trajectories(
        self, params: Params, step: int, rank: int, size: int
    ) -> tuple[loop.Trajectory, Tensor, Metrics]:
        low, high = self.trials * rank // size, self.trials * (rank + 1) // size
        index = step * self.trials + torch.arange(low, high, device="cpu")
        tasks = self.task.sample(index, "train", Rng(self.seed).fold("tasks"))
        tasks = self.evaluator.place(tasks)
        rng = Rng(self.seed).fold("trials", "train")
        captured = self.evaluator.captured
        with self.whole_trials():
            begin = loop.start(self.policy, params, self.env, tasks, rng)
            if captured is None:
                recorded = self._record(begin)
            else:
                recorded = captured("record", self._again, params, *begin[1:5])
        trajectory, last, state, scores = recorded
        self._check(trajectory.reward)
        metrics = {name: float(score.nanmean()) for name, score in scores.items()}
        return trajectory, last, metrics | _memory_metrics(params, state)

    def _check(self, reward: Tensor) -> None:
        """Refuse rewards that no gradient comes from, of a task of the user's own."""
        largest = float(reward.abs().max())
        if not largest <= LARGEST_REWARD:  # nor NaN
            kind = type(self.task)
            raise EnvError(
                f"the task {kind.__module__}:{kind.__qualname__} gave a reward of {largest:.4g} in "
                f"size; rewards must be finite and at most {LARGEST_REWARD:g}, as returns are "
                "squared in float32: clip or scale them in the task"
            )

    def _again(self, params: Params, *first: Any) -> _Recorded:
        return self._record(loop.Start(self.policy.bind(params), *first), ask=False)

    def _record(self, begin: loop.Start, *, ask: bool = True) -> _Recorded:
        """The trajectory, the value of what follows, the memory after it, the task's metrics."""
        recorder = loop.Recorder(begin.state)
        end = loop.rollout(self.policy, self.env, begin, recorder, ask=ask)
        out, _ = self.policy.step_bound(begin.bound, end.state, end.ts, self.policy.spec.horizon)
        last = torch.zeros_like(end.ts.reward) if out.value is None else out.value
        return recorder.trajectory(end), last, end.state, self.env.metrics(end.env_state)


def _memory_metrics(params: Params, state: State) -> Metrics:
    """Largest fast weight after the rollout, and the share of W that one step keeps (b_S).

    A memory that is about to explode shows up here first.
    """
    if "W" not in state:
        return {}
    decay = composite_decay(params["memory.beta"])
    return {"fast_weight_max": float(state["W"].abs().max()), "memory_decay": float(decay)}
