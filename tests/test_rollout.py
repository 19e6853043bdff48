"""The rollout loop: its order of calls, masks, early exit, noise, and what is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esmeta import rollout as loop
from esmeta.policy import make_policy
from esmeta.rng import Rng
from esmeta.tasks import make_task
from esmeta.types import Discrete, PolicyOut, Spec, Tasks, TimeStep

HORIZON = 10


class FakePolicy:
    """Writes every call to the tape; its state counts the steps."""

    def __init__(self, tape: list[Any], spec: Spec) -> None:
        self.tape, self.spec = tape, spec

    def initial_state(self, params: Any, batch: int, rng: Rng, index: Tensor) -> dict[str, Tensor]:
        self.tape.append(("initial_state", batch, index.tolist()))
        return {"count": torch.zeros(1, batch)}

    def bind(self, params: Any) -> str:
        return "bound"

    def step_bound(
        self,
        bound: Any,
        state: dict[str, Tensor],
        ts: TimeStep,
        t: int,
        *,
        in_place: bool = False,
    ) -> tuple[PolicyOut, dict[str, Tensor]]:
        self.tape.append(("policy", bound, t, int(state["count"][0, 0]), float(ts.obs[0, 0, 0])))
        out = PolicyOut(torch.full((1, ts.reward.shape[1], 2), float(t)), None, None, None)
        return out, {"count": state["count"] + 1}


class FakeEnv:
    """Trial b ends after ``lengths[b]`` steps; the k-th step pays k + 1 and shows k."""

    def __init__(self, tape: list[Any], lengths: list[int], dirty: bool = False) -> None:
        self.tape, self.lengths, self.dirty = tape, torch.tensor([lengths]), dirty

    def _ts(self, k: int) -> TimeStep:
        over = self.lengths <= k
        last = self.lengths == k
        shape = self.lengths.shape
        reward = torch.where(over & ~last, 0.0, torch.full(shape, float(k)))
        obs = torch.full((*shape, 1), float(k))
        none = torch.zeros_like(over)
        return TimeStep(obs, torch.zeros(*shape, 2), reward, last, none, over, over)

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[int, TimeStep]:
        self.tape.append(("reset", population))
        yes = torch.ones_like(self.lengths, dtype=torch.bool)
        return 0, self._ts(0)._replace(new_trial=yes, new_episode=yes)

    def step(self, state: int, action: Tensor) -> tuple[int, TimeStep]:
        self.tape.append(("env", state, action.tolist()))
        return state + 1, self._ts(state + 1)


class FakeCollector:
    def __init__(self, tape: list[Any]) -> None:
        self.tape = tape

    def record(
        self, ts: TimeStep, out: PolicyOut, action: Tensor, after: TimeStep, active: Tensor
    ) -> None:
        assert out.logits is not None
        before, then = float(ts.obs[0, 0, 0]), float(after.obs[0, 0, 0])
        self.tape.append(("record", before, float(out.logits[0, 0, 0]), then, active.tolist()))


def fake_run(lengths: list[int], **options: Any) -> tuple[list[Any], loop.End]:
    tape: list[Any] = []
    policy = FakePolicy(tape, Spec(1, Discrete(2), HORIZON))
    env = FakeEnv(tape, lengths)
    tasks = Tasks(torch.arange(len(lengths)).unsqueeze(0))
    begin = loop.start(policy, {"theta": torch.zeros(1, 3)}, env, tasks, Rng(0))  # type: ignore
    end = loop.rollout(policy, env, begin, FakeCollector(tape), **options)  # type: ignore
    return tape, end


def act(out: PolicyOut, noise: Tensor) -> Tensor:
    assert out.logits is not None
    return (out.logits[..., 0] + 100).long()


def test_tape_of_a_rollout() -> None:
    tape, end = fake_run([2, 1], act=act)
    assert tape[:10] == [
        ("reset", 1),
        ("initial_state", 2, [[0, 1]]),
        ("policy", "bound", 0, 0, 0.0),
        ("env", 0, [[100, 100]]),
        ("record", 0.0, 0.0, 1.0, [[True, True]]),
        ("policy", "bound", 1, 1, 1.0),
        ("env", 1, [[101, 101]]),
        ("record", 1.0, 1.0, 2.0, [[True, False]]),
        ("policy", "bound", 2, 2, 2.0),
        ("env", 2, [[102, 102]]),
    ]
    # All trials have ended after step 2; that is looked at after every fourth step.
    assert [call[0] for call in tape[2:]] == ["policy", "env", "record"] * 4
    assert tape[10][-1] == tape[13][-1] == [[False, False]]
    assert (
        end.env_state == 4
        and float(end.ts.obs[0, 0, 0]) == 4
        and int(end.state["count"][0, 0]) == 4
    )


@pytest.mark.parametrize(
    ("lengths", "steps"), [([4], 4), ([5], 8), ([1, 1], 4), ([99, 1], 10), ([8, 3], 8), ([10], 10)]
)
def test_early_exit_and_horizon(lengths: list[int], steps: int) -> None:
    tape, _ = fake_run(lengths, act=act)
    assert sum(call[0] == "env" for call in tape) == steps


def test_intervention_comes_before_every_step() -> None:
    def intervene(state: Any, ts: TimeStep) -> tuple[Any, TimeStep]:
        return {"count": state["count"] + 10}, ts._replace(obs=ts.obs + 0.5)

    tape, end = fake_run([4], act=act, intervene=intervene)
    seen = [(call[3], call[4]) for call in tape if call[0] == "policy"]
    assert seen == [(10, 0.5), (21, 1.5), (32, 2.5), (43, 3.5)]
    assert int(end.state["count"][0, 0]) == 44
    # What is recorded is what the policy saw.
    assert [call[1] for call in tape if call[0] == "record"] == [0.5, 1.5, 2.5, 3.5]


def test_returns_add_rewards_and_count_steps_of_the_trial() -> None:
    tape: list[Any] = []
    policy = FakePolicy(tape, Spec(1, Discrete(2), HORIZON))
    env = FakeEnv(tape, [3, 1, 10])
    tasks = Tasks(torch.arange(3).unsqueeze(0))
    begin = loop.start(policy, {"theta": torch.zeros(1, 3)}, env, tasks, Rng(0))  # type: ignore
    kept = loop.Returns(1, 3, "cpu")
    loop.rollout(policy, env, begin, kept, act=act)  # type: ignore
    assert kept.returns.dtype == torch.float64 and kept.steps.dtype == torch.int64
    assert kept.returns.tolist() == [[1 + 2 + 3, 1, 55]]
    assert kept.steps.tolist() == [[3, 1, 10]]


def test_a_recording_says_what_happened() -> None:
    task = make_task("harlow", horizon=60, presentations=1)
    policy = make_policy("metods", task.spec, value=True, neurons=6)
    env, tasks = task.make_env("cpu"), task.sample(6, "train", Rng(1))
    begin = loop.start(policy, policy.init(3), env, tasks, Rng(2))
    recorder = loop.Recorder(begin.state)
    end = loop.rollout(policy, env, begin, recorder)
    trajectory = recorder.trajectory(end)
    length = len(trajectory.reward)
    assert trajectory.active[0].all() and trajectory.over.sum(0).eq(1).all()
    # Replay the recorded actions: the same observations, rewards and flags.
    state, ts = env.reset(tasks, Rng(2), 1)
    alive = torch.ones(1, 6, dtype=torch.bool)
    total = torch.zeros(1, 6)
    for t in range(length):
        for name in ("obs", "prev_action", "reward", "terminated", "truncated", "new_episode"):
            assert torch.equal(getattr(trajectory.ts, name)[t], getattr(ts, name)), (name, t)
        assert torch.equal(trajectory.active[t], alive)
        state, ts = env.step(state, trajectory.action[t])
        assert torch.equal(trajectory.reward[t], ts.reward)
        assert torch.equal(trajectory.terminated[t], ts.terminated)
        assert torch.equal(trajectory.after.truncated[t], ts.truncated)
        assert torch.equal(trajectory.over[t], ts.new_trial & alive)
        alive = alive & ~ts.new_trial
        total += ts.reward
    assert not alive.any() and torch.equal(end.ts.reward, ts.reward)
    assert torch.allclose(trajectory.reward.sum(0), total)
    lengths = trajectory.active.sum(0)
    assert len(lengths.unique()) > 1, "the trials must differ in length for this to say anything"
    # Memory begins anew with a trial and where it is over, nowhere inside it.
    stale = trajectory.all_steps.new_trial
    assert stale[0].all() and torch.equal(stale[1:], ~trajectory.active)
    assert torch.equal(trajectory.steps.new_trial, stale[:-1])
    assert trajectory.start is begin.state
