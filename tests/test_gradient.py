"""A2C and PPO: exact ratios, gradients against naive loops, masks, ranks; and they learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from searches import on_ranks
from torch import Tensor

from esmeta import rollout as loop
from esmeta.agent import heads
from esmeta.errors import EnvError, UserError
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import _gradient as pg
from esmeta.optimizers import a2c, openes, ppo
from esmeta.optimizers._schedule import Schedule, scheduled
from esmeta.policy import Policy, make_policy
from esmeta.ranks.comm import SelfComm
from esmeta.rng import Rng
from esmeta.summary import summary
from esmeta.tasks import make_task
from esmeta.tree import ravel
from esmeta.types import Continuous, Params, Reference, Spec, Task, Tasks, TimeStep

# --- a task with continuous actions and trials of different lengths ----------------------------


class _PointState(NamedTuple):
    x: Tensor
    goal: Tensor
    time: Tensor
    over: Tensor


@dataclass(frozen=True)
class Point:
    """Walk on a line to a goal; the trial terminates within 0.3 of it, else is truncated."""

    horizon: int = 12

    @property
    def spec(self) -> Spec:
        return Spec(obs_size=2, action=Continuous(2), horizon=self.horizon)

    @property
    def reference(self) -> Reference:
        return Reference(random=-10.0, best=0.0, note="")

    def sample(self, batch: int | Tensor, split: str, rng: Rng) -> Tasks:
        index = (torch.arange(batch) if isinstance(batch, int) else batch).unsqueeze(0)
        return Tasks(index, {"goal": 2 * rng.fold(split).uniform(index, 1)[..., 0].float() - 1})

    def make_env(self, device: torch.device | str) -> Point:
        return self

    def reset(self, tasks: Tasks, rng: Rng, population: int = 1) -> tuple[_PointState, TimeStep]:
        goal = tasks.data["goal"].expand(population, -1)
        no = torch.zeros_like(goal, dtype=torch.bool)
        state = _PointState(torch.zeros_like(goal), goal, torch.zeros(()), no)
        zero = torch.zeros(*goal.shape, 2)
        return state, TimeStep(zero, zero, torch.zeros_like(goal), no, no, ~no, ~no)

    def step(self, state: _PointState, action: Tensor) -> tuple[_PointState, TimeStep]:
        moved = 0.5 * action.float().clamp(-1, 1).sum(-1)
        x = torch.where(state.over, state.x, state.x + moved)
        time = state.time + 1
        distance = (x - state.goal).abs()
        terminated = (distance < 0.3) & ~state.over
        truncated = (time >= self.horizon) & ~state.over & ~terminated
        over = state.over | terminated | truncated
        reward = torch.where(state.over, 0.0, -distance)
        obs = torch.stack([x, distance], dim=-1)
        ts = TimeStep(obs, action.float(), reward, terminated, truncated, over, over)
        return _PointState(x, state.goal, time, over), ts

    def metrics(self, state: _PointState) -> dict[str, Tensor]:
        return {"distance": (state.x - state.goal).abs()}


# --- fixtures of all tests -------------------------------------------------------------------

MEMORIES: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("metods", {"w0": "learned", "variant": "linear", "alpha_std": 0.3, "w0_std": 0.3}),
    "sampled": ("metods", {"w0": "sampled", "depth": 3, "alpha_std": 0.3, "w0_std": 0.3}),
    "gru": ("rl2", {}),
    "lstm": ("lstm", {}),
    "none": ("mlp", {}),
}
POINT_HEADS: dict[str, dict[str, Any]] = {
    "fixed": {"std": "fixed", "std_value": 0.5},
    "learned": {"std": "learned", "std_value": 0.5},
    "state": {"std": "state", "extra": "time"},
}


def setup(
    memory: str = "learned",
    task: Task | None = None,
    trials: int = 7,
    double: bool = False,
    neurons: int = 6,
    **options: Any,
) -> tuple[ReturnObjective, Params]:
    """An objective and a theta far from its initial value."""
    task = make_task("harlow", horizon=30, presentations=1) if task is None else task
    name, more = MEMORIES[memory]
    small: dict[str, Any] = {"neurons": neurons, "hidden": (6,), "head_hidden": 5}
    policy = make_policy(name, task.spec, value=True, **(small | more | options))
    draw = torch.Generator().manual_seed(1)
    theta = {}
    for leaf, value in policy.init(2).items():
        value = value + 0.2 * torch.randn(value.shape, generator=draw)
        theta[leaf] = value.double() if double else value
    return ReturnObjective(policy, task, trials=trials, seed=3, device="cpu"), theta


class Spy:
    """Notes the losses that are differentiated, and what goes into Adam."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sums: list[list[float]] = []
        self.coefs: list[float] = []
        self.gradients: list[Tensor] = []
        self.rates: list[float] = []
        loss, along = pg.ActorCritic.loss, pg.GradientState.along

        def noted_loss(
            config: Any, policy: Policy, params: Params, data: pg.Batch, *rest: Any
        ) -> Any:
            total, sums = loss(config, policy, params, data, *rest)
            self.sums.append((sums[:, 0] / rest[0]).tolist())
            self.coefs.append(float(rest[1]))
            return total, sums

        def noted_along(state: Any, gradient: Tensor, rate: float, eps: float) -> Any:
            self.gradients.append(gradient[0].clone())
            self.rates.append(rate)
            return along(state, gradient, rate, eps)

        monkeypatch.setattr(pg.ActorCritic, "loss", noted_loss)
        monkeypatch.setattr(pg.GradientState, "along", noted_along)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def run(
    optimizer: Any, objective: ReturnObjective, theta: Params, updates: int = 1, comm: Any = None
) -> tuple[pg.GradientState, list[dict[str, float]]]:
    state = optimizer.init(theta, Rng(0))
    log = []
    for _ in range(updates):
        state, metrics = optimizer.step(state, objective, comm or SelfComm(), Rng(0))
        log.append(metrics)
    return state, log


# --- the ratio is exactly 1 --------------------------------------------------------------------


def cases() -> list[Any]:
    out = [pytest.param(m, None, {}, id=f"{m}-discrete") for m in MEMORIES]
    for memory in MEMORIES:
        out += [
            pytest.param(memory, Point(), h, id=f"{memory}-{n}") for n, h in POINT_HEADS.items()
        ]
    return out


@pytest.mark.parametrize(("memory", "task", "options"), cases())
def test_a_recording_is_re_evaluated_to_the_bit(
    memory: str, task: Task | None, options: dict[str, Any], spy: Spy
) -> None:
    objective, theta = setup(memory, task, trials=11, **options)
    recorded, _, _ = objective.trajectories(theta, 0)
    assert not recorded.active.all(), "trials must end at different times for this to say much"
    policy = objective.policy
    out, _ = policy.unroll(theta, recorded.start, recorded.steps)
    active = recorded.active
    for name, a, b in zip(out._fields, out, recorded.out, strict=True):
        if b is not None:
            assert a is not None
            shape = (*active.shape, *b.shape[3:])
            assert torch.equal(a.expand(shape)[active], b.expand(shape)[active]), name
    old = heads.log_prob(recorded.out, recorded.action)
    assert torch.equal(heads.log_prob(out, recorded.action)[active], old[active])
    for minibatches in (1, 4):
        spy.sums.clear()
        run(ppo.Optimizer(minibatches=minibatches, epochs=2, learning_rate=0.01), objective, theta)
        assert len(spy.sums) == 2 * minibatches
        assert spy.sums[0][3] == 0.0 and spy.sums[0][4] == 0.0
        assert all(sums[3] > 0.0 for sums in spy.sums[1:])


def test_ppo_clips_and_stops() -> None:
    objective, theta = setup("gru", trials=8)
    far = ppo.Optimizer(minibatches=1, epochs=6, learning_rate=0.3, clip=0.05)
    _, (metrics,) = run(far, objective, theta)
    assert metrics["clip_fraction"] > 0.2 and metrics["kl"] > 0.01
    stopped = ppo.Optimizer(minibatches=2, epochs=6, learning_rate=0.3, target_kl=0.01)
    state, _ = run(stopped, objective, theta)
    assert int(state.adam.updates) == 2
    free, _ = run(ppo.Optimizer(minibatches=2, epochs=6, learning_rate=0.3), objective, theta)
    assert int(free.adam.updates) == 12


def test_ppo_loss_by_hand() -> None:
    optimizer = ppo.Optimizer(clip=0.2, value_coef=0.5)
    chance = torch.tensor([0.5, 0.5, 0.5, 0.5])
    ratio = torch.tensor([1.5, 1.5, 0.5, 1.1])
    advantage = torch.tensor([1.0, -1.0, -1.0, 2.0]).view(4, 1, 1)
    p = chance * ratio
    logits = torch.stack([p.log(), (1 - p).log()], dim=-1).view(4, 1, 1, 2)
    out = loop.PolicyOut(logits, None, None, torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1))

    class Told:
        def unroll(self, *_: Any) -> Any:
            return out, {}

    rows, no = torch.zeros(5, 1, 1), torch.zeros(5, 1, 1, dtype=torch.bool)
    ts = TimeStep(rows, rows, rows, no, no, no, no)
    recorded = loop.Trajectory({}, ts, torch.zeros(4, 1, 1, dtype=torch.int64), ~no[1:], None, {})
    before, target = chance.log().view(4, 1, 1), torch.tensor([0.0, 2, 4, 4]).view(4, 1, 1)
    data = pg.Batch(recorded, before, advantage, target)
    policy: Any = Told()
    loss, sums = optimizer.loss(policy, {}, data, torch.tensor(4.0), torch.tensor(0.1))
    gain = 1.2 * 1 + 1.5 * -1 + 0.8 * -1 + 1.1 * 2  # min of the clipped and the free
    entropy = float(-(p * p.log() + (1 - p) * (1 - p).log()).sum())
    value = 1.0 + 0 + 1 + 0
    assert float(loss) == pytest.approx((-gain + 0.5 * value - 0.1 * entropy) / 4, rel=1e-5)
    kl = float((ratio - 1 - ratio.log()).sum())
    assert sums[:, 0].tolist() == pytest.approx([-gain, value, entropy, kl, 3.0], rel=1e-5)


# --- the gradient ------------------------------------------------------------------------------


def naive_loss(
    policy: Policy, theta: Params, recorded: loop.Trajectory, index: Tensor, c: a2c.Optimizer
) -> Tensor:
    """The A2C loss, trial by trial and step by step, advantages by their definition."""
    total = torch.zeros((), dtype=torch.float64)
    steps = 0
    bound = policy.bind(theta)
    for b in range(recorded.reward.shape[2]):
        length = int(recorded.active[:, 0, b].sum())
        rewards = [float(r) * c.reward_scale for r in recorded.reward[:length, 0, b]]
        values = [float(v) for v in recorded.out.value[:length, 0, b]]  # type: ignore[index]
        start = Rng(3).fold("trials", "train")
        state = policy.initial_state(theta, 1, start, index[:, b : b + 1])
        for t in range(length):
            advantage, weight = 0.0, 1.0
            for s in range(t, length):
                following = values[s + 1] if s + 1 < length else 0.0
                advantage += weight * (rewards[s] + c.gamma * following - values[s])
                weight *= c.gamma * c.gae_lambda
            ts = TimeStep(*(leaf[t, :, b : b + 1] for leaf in recorded.ts))
            out, state = policy.step_bound(bound, state, ts, t)
            action = recorded.action[t, :, b : b + 1]
            log_prob, entropy = heads.log_prob(out, action), heads.entropy(out)
            assert out.value is not None
            error = (advantage + values[t] - out.value) ** 2
            term = -log_prob * advantage + c.value_coef * error - c.entropy_coef * entropy
            total = total + term.sum()
            steps += 1
    return total / steps


GRADIENT_CASES = [
    ("learned", None, {}),
    ("sampled", None, {}),
    ("gru", None, {}),
    ("lstm", Point(8), POINT_HEADS["state"]),
    ("learned", Point(8), POINT_HEADS["learned"]),
]


@pytest.mark.parametrize(("memory", "task", "options"), GRADIENT_CASES)
def test_a2c_gradient_is_that_of_a_naive_loop(
    memory: str, task: Task | None, options: dict[str, Any], spy: Spy
) -> None:
    task = task or make_task("harlow", horizon=14, presentations=1, cells=7)
    objective, theta = setup(memory, task, trials=3, double=True, neurons=4, **options)
    config = a2c.Optimizer(
        max_grad_norm=0.0,
        gamma=0.9,
        gae_lambda=0.8,
        value_coef=0.3,
        entropy_coef=0.2,
        reward_scale=0.5,
    )
    recorded, _, _ = objective.trajectories(theta, 0)
    assert not recorded.active.all()
    _, (metrics,) = run(config, objective, theta)
    (got,) = spy.gradients
    assert got.dtype == torch.float64
    index = torch.arange(3).unsqueeze(0)

    def loss(params: Params) -> Tensor:
        return naive_loss(objective.policy, params, recorded, index, config)

    leaves = {k: v.clone().requires_grad_() for k, v in theta.items()}
    grads = torch.autograd.grad(loss(leaves), list(leaves.values()))
    want = torch.cat([g.reshape(-1) for g in grads])
    assert torch.allclose(got, want, rtol=1e-8, atol=1e-11)
    assert metrics["gradient_norm"] == pytest.approx(float(want.norm()), rel=1e-9)
    draw = torch.Generator().manual_seed(5)
    for _ in range(2):
        direction = {
            k: torch.randn(v.shape, generator=draw, dtype=torch.float64) for k, v in theta.items()
        }
        h = 1e-5
        up = loss({k: v + h * direction[k] for k, v in theta.items()})
        down = loss({k: v - h * direction[k] for k, v in theta.items()})
        slope = float(ravel(direction)[0] @ got)
        assert float(up - down) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    "optimizer",
    [
        a2c.Optimizer(bootstrap=True),
        ppo.Optimizer(minibatches=2, epochs=2),
        a2c.Optimizer(normalize_advantage=True),
    ],
)
@pytest.mark.parametrize("memory", ["learned", "lstm", "none"])
def test_steps_after_a_trial_have_no_influence(
    memory: str, optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, theta = setup(memory, Point(), trials=9, std="state")
    clean, log = run(optimizer, objective, theta)
    plain = ReturnObjective.trajectories

    def poisoned(self: ReturnObjective, *args: Any) -> Any:
        recorded, last, metrics = plain(self, *args)
        dead = ~recorded.active
        assert dead.any()
        ended = dead[-1] | recorded.over[-1]
        stale = torch.cat([dead, ended.unsqueeze(0)]).unsqueeze(-1)
        earned = torch.cat([dead[:1] & False, dead])
        ts, out = recorded.ts, recorded.out
        assert out is not None and out.value is not None
        changed = recorded._replace(
            ts=ts._replace(
                obs=torch.where(stale, 50.0, ts.obs),
                reward=torch.where(earned, 1e4, ts.reward),
                prev_action=torch.where(stale, 9.0, ts.prev_action),
            ),
            action=torch.where(dead.unsqueeze(-1), 5.0, recorded.action),
            out=out._replace(value=torch.where(dead, 1e3, out.value)),
        )
        assert float(recorded.reward.sum() - changed.reward.sum()) != 0.0
        ended_early = dead[-1] | recorded.terminated.any(0)
        return changed, torch.where(ended_early, 1e5, last), metrics

    monkeypatch.setattr(ReturnObjective, "trajectories", poisoned)
    dirty, dirty_log = run(optimizer, objective, theta)
    assert torch.equal(clean.theta, dirty.theta)
    for name in ("policy_loss", "value_loss", "entropy", "gradient_norm"):
        assert log[0][name] == dirty_log[0][name], name


def data_of(
    objective: ReturnObjective, theta: Params, comm: Any = None, **options: Any
) -> pg.Batch:
    return a2c.Optimizer(**options).collect(theta, 0, objective, comm or SelfComm())[0]


def test_advantages_are_normalised_over_active_steps_of_all_ranks() -> None:
    objective, theta = setup("gru", trials=7)

    def work(comm: Any) -> tuple[Tensor, Tensor]:
        data = data_of(objective, theta, comm, normalize_advantage=True)
        return data.advantage, data.trajectory.active

    raw = data_of(objective, theta)
    for size in (1, 2, 3):
        parts = on_ranks(size, work)
        longest = max(len(a) for a, _ in parts)
        padded = [torch.nn.functional.pad(a, (0, 0, 0, 0, 0, longest - len(a))) for a, _ in parts]
        advantage = torch.cat(padded, dim=2)
        kept = torch.cat([a[active > 0] for a, active in parts]).double()
        assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
        assert float(kept.std(unbiased=False)) == pytest.approx(1, abs=1e-5)
        own = raw.advantage[raw.trajectory.active].double()
        mean, std = own.mean(), own.std(unbiased=False)
        expected = ((raw.advantage - mean) / std * raw.trajectory.active).float()
        assert torch.allclose(advantage, expected[:longest], atol=1e-5)


# --- rates, clipping, Adam ---------------------------------------------------------------------


def test_schedules() -> None:
    half = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    ways: dict[Schedule, list[float]] = {
        "constant": [1.0] * 5, "linear": [1, 0.8, 0.6, 0.2, 0.2], "cosine": [1, half, 0.6, 0.2, 0.2]
    }  # fmt: skip
    for kind, way in ways.items():
        found = [scheduled(kind, step, 4, 1.0, 0.2) for step in (0, 1, 2, 4, 9)]
        assert found == pytest.approx(way)
    assert scheduled("linear", 9, 0, 1.0, 0.2) == 1.0


def test_schedules_reach_the_step(spy: Spy) -> None:
    objective, theta = setup("none", make_task("bandit", horizon=3))
    options: dict[str, Any] = {
        "schedule": "linear",
        "schedule_updates": 2,
        "learning_rate": 0.01,
        "learning_rate_final": 0.002,
        "entropy_coef": 0.5,
        "entropy_final": 0.1,
    }
    run(a2c.Optimizer(**options), objective, theta, 4)
    assert spy.rates == pytest.approx([0.01, 0.006, 0.002, 0.002])
    assert spy.coefs == pytest.approx([0.5, 0.3, 0.1, 0.1])
    spy.rates.clear()
    run(ppo.Optimizer(epochs=2, minibatches=1, **options), objective, theta, 2)
    assert spy.rates == pytest.approx([0.01, 0.01, 0.006, 0.006])


def test_gradients_are_clipped_to_a_norm(spy: Spy) -> None:
    objective, theta = setup("gru")
    norms = {}
    for limit in (0.0, 1e-3, 1e6):
        _, (metrics,) = run(a2c.Optimizer(max_grad_norm=limit), objective, theta)
        norms[limit] = metrics["gradient_norm"]
    free, tight, loose = spy.gradients
    assert len(set(norms.values())) == 1 and norms[0.0] == pytest.approx(float(free.norm()))
    assert float(tight.norm()) == pytest.approx(1e-3, rel=1e-2)
    assert torch.allclose(tight / tight.norm(), free / free.norm(), atol=1e-6)
    assert torch.equal(loose, free)


def test_a_gradient_that_is_not_finite_is_said() -> None:
    objective, theta = setup("gru")
    theta["value.1.bias"] = torch.full_like(theta["value.1.bias"], math.inf)
    with pytest.raises(FloatingPointError, match="update 0.*learning_rate"):
        run(a2c.Optimizer(), objective, theta)


@pytest.mark.parametrize("reward", [-3e38, math.inf, math.nan])
def test_a_task_whose_rewards_no_gradient_comes_from_is_named(
    monkeypatch: pytest.MonkeyPatch, reward: float
) -> None:
    objective, theta = setup("gru", Point())
    plain = Point.step

    def step(self: Point, state: Any, action: Tensor) -> Any:
        after, ts = plain(self, state, action)
        return after, ts._replace(reward=torch.where(ts.new_trial & ~state.over, reward, 0.0))

    monkeypatch.setattr(Point, "step", step)
    with pytest.raises(EnvError, match=r"test_gradient:Point gave a reward of .*at most 1e\+12"):
        run(a2c.Optimizer(), objective, theta)


# --- metrics, state, refusals --------------------------------------------------------------------


def test_metrics_are_those_of_the_trials() -> None:
    objective, theta = setup("gru", trials=7)
    recorded, _, task_metrics = objective.trajectories(theta, 0)
    for size in (1, 3):
        logs = on_ranks(size, lambda c: run(a2c.Optimizer(), objective, theta, 1, c)[1])
        for (metrics,) in logs:
            assert metrics["env_steps"] == int(recorded.active.sum())
            assert metrics["return_mean"] == pytest.approx(
                float(recorded.reward.double().sum()) / 7, abs=1e-6
            )
            assert metrics["length"] == pytest.approx(task_metrics["length"], rel=1e-5)
    learned, theta = setup("learned", trials=4)
    _, (metrics,) = run(a2c.Optimizer(), learned, theta)
    assert 0 < metrics["fast_weight_max"] < math.inf


RANKED = [
    a2c.Optimizer(learning_rate=1e-3),
    a2c.Optimizer(learning_rate=1e-3, normalize_advantage=True),
    ppo.Optimizer(learning_rate=1e-3, minibatches=1, epochs=2),
]


@pytest.mark.parametrize("optimizer", RANKED, ids=["a2c", "a2c-normalised", "ppo"])
@pytest.mark.parametrize("memory", ["sampled", "gru"])
def test_ranks_take_the_same_steps_as_one(memory: str, optimizer: Any) -> None:
    objective, theta = setup(memory, trials=7)
    # In float32 Adam makes whole steps of what rounding left of a gradient near zero.
    theta = {name: leaf.double() for name, leaf in theta.items()}
    alone, _ = run(optimizer, objective, theta, 3)
    assert alone.theta.dtype == torch.float64
    moved = float((alone.theta - ravel(theta)).abs().max())
    assert moved > 1e-3
    for size in (2, 3):
        states = on_ranks(size, lambda comm: run(optimizer, objective, theta, 3, comm)[0])
        for state in states:
            assert torch.equal(state.theta, states[0].theta)
        assert float((states[0].theta - alone.theta).abs().max()) < 1e-9


def test_ppo_ranks_shuffle_by_themselves_and_agree() -> None:
    objective, theta = setup("gru", trials=9)
    optimizer = ppo.Optimizer(minibatches=2, epochs=2)
    one, two = (s.theta for s in on_ranks(2, lambda c: run(optimizer, objective, theta, 2, c)[0]))
    assert torch.equal(one, two)


def test_what_cannot_be_trained_is_refused() -> None:
    objective, theta = setup("gru", trials=3)
    with pytest.raises(UserError, match="task.trials = 3.*4 ranks.*write at least"):
        on_ranks(4, lambda comm: run(a2c.Optimizer(), objective, theta, 1, comm))
    with pytest.raises(UserError, match="minibatches = 4.*3 trials.*write at most 3"):
        run(ppo.Optimizer(minibatches=4), objective, theta)
    task = make_task("bandit")
    without = ReturnObjective(make_policy("rl2", task.spec), task, trials=3, seed=0, device="cpu")
    with pytest.raises(UserError, match="no value head.*value=True"):
        a2c.Optimizer().check(without, 1)


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (a2c.Optimizer, {"gamma": 1.1}, "gamma = 1.1.*0 and 1"),
        (a2c.Optimizer, {"gae_lambda": -0.1}, "gae_lambda = -0.1"),
        (a2c.Optimizer, {"max_grad_norm": -1.0}, "max_grad_norm = -1.0.*>= 0"),
        (a2c.Optimizer, {"schedule_updates": 0}, "schedule_updates = 0"),
        (ppo.Optimizer, {"clip": 0.0}, "clip = 0.0"),
        (ppo.Optimizer, {"epochs": 0}, "epochs = 0"),
        (ppo.Optimizer, {"minibatches": 0}, "minibatches = 0"),
        (ppo.Optimizer, {"target_kl": -1.0}, "target_kl = -1.0"),
    ],
)
def test_bad_options_are_refused(cls: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cls(**options)


# --- learning ------------------------------------------------------------------------------------

PLASTIC: dict[str, Any] = {"variant": "linear", "alpha_std": 0.2, "squash_embedding": True}
PG: dict[str, Any] = {"gamma": 0.9, "gae_lambda": 1.0, "entropy_coef": 0.01}
BY_PPO = ppo.Optimizer(learning_rate=5e-3, epochs=4, minibatches=2, **PG)
BY_ES = openes.Optimizer(popsize=64, sigma=0.1, learning_rate=0.05)


def learned(
    name: str, options: dict[str, Any], task: Task, optimizer: Any, trials: int, steps: int
) -> tuple[float, float]:
    """Held-out return after training, and its standard error."""
    shape: dict[str, Any] = {"neurons": 8, "hidden": (8,), "head_hidden": 8}
    policy = make_policy(name, task.spec, value=optimizer.gradient, **(shape | options))
    objective = ReturnObjective(policy, task, trials=trials, seed=0, device="cpu")
    state = optimizer.init(policy.init(0), Rng(0))
    for _ in range(steps):
        state, _ = optimizer.step(state, objective, SelfComm(), Rng(0))
    return summary(objective.heldout(optimizer.theta(state), 2000).returns.flatten())[:2]


def one_step_of_memory(p: float, horizon: int) -> float:
    """Win-stay, lose-shift: the best that last action and reward allow (test_task_bandit)."""
    return 0.5 + (horizon - 1) * (p * p + (1 - p) ** 2)


@pytest.mark.parametrize(
    ("p", "horizon", "optimizer", "trials", "steps"),
    [
        (0.8, 20, BY_PPO, 64, 60),
        (0.8, 20, BY_ES, 32, 75),
        (0.9, 10, a2c.Optimizer(learning_rate=0.01, **PG), 64, 240),
    ],
    ids=["ppo", "openes", "a2c"],
)
def test_fast_weights_learn_to_remember(
    p: float, horizon: int, optimizer: Any, trials: int, steps: int
) -> None:
    task = make_task("bandit", reward_probability=p, horizon=horizon)
    options = PLASTIC | ({"alpha_std": 0.1} if optimizer.gradient else {})
    mean, error = learned("metods", options, task, optimizer, trials, steps)
    assert one_step_of_memory(p, horizon) + 4 * error < mean < task.reference.best + 3 * error


@pytest.mark.parametrize(("optimizer", "steps"), [(BY_PPO, 60), (BY_ES, 75)], ids=["ppo", "openes"])
def test_without_memory_nothing_more_than_the_last_step_is_learned(
    optimizer: Any, steps: int
) -> None:
    task = make_task("bandit")
    mean, error = learned("mlp", {}, task, optimizer, 32, steps)
    bound = one_step_of_memory(0.8, 20)
    assert 0.5 * (bound + 10.0) < mean < bound + 3 * error
