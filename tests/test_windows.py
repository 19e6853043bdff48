"""Chunks, windows and restarts of memory: what belongs to a member, a batch or a trial stays so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probe import Probe
from test_epg import members, objective
from torch import Tensor

from esmeta import make_policy
from esmeta import rollout as loop
from esmeta.kernels import prepare, step_prepared
from esmeta.objectives.epg import EpgObjective
from esmeta.objectives.return_ import ReturnObjective
from esmeta.rng import Rng
from esmeta.tree import leaves_of
from esmeta.types import Params, State, TimeStep


def aimed(objective: ReturnObjective, *means: float) -> Params:
    """Members whose mean action is as given, and moves a little with what they see."""
    theta = objective.policy.init(0, len(means))
    last = next(name for name in reversed(theta) if name.startswith("head.") and "bias" in name)
    return theta | {last: torch.tensor(means).unsqueeze(1)}


def returns(trials: int = 3, **options: Any) -> ReturnObjective:
    task = Probe(**options)
    policy = make_policy("mlp", task.spec, neurons=4)
    return ReturnObjective(policy, task, trials=trials, seed=3, device="cpu")


def test_members_with_tasks_of_their_own_keep_them_in_every_chunk() -> None:
    made = returns()
    params = aimed(made, 0.0, 0.1, 0.2, 0.3, 0.4)
    steps = torch.tensor([7, 3, 9, 3, 0])
    made.evaluator.chunk = 5
    whole = made.fitness(params, steps).returns
    for chunk in (2, 3):
        made.evaluator.chunk = chunk
        assert torch.equal(made.fitness(params, steps).returns, whole)
    for k, step in enumerate(steps.tolist()):
        one = {name: leaf[k : k + 1] for name, leaf in params.items()}
        assert torch.equal(made.fitness(one, step).returns[0], whole[k])


def test_batches_that_stopped_at_different_steps_go_on_together() -> None:
    """Members 0 and 1 end at once, so that their batch stops early, and its clock with it."""
    made = returns(horizon=14, bar=5.0)
    params = aimed(made, 9.0, 9.0, 0.0, 0.1)
    made.evaluator.chunk = 2
    lives, _ = made.advance(made.begin(params, 2), params, 6)
    clocks = [int(part.end.env_state.time) for part in lives.parts]
    assert [part.end.t for part in lives.parts] == clocks == [4, 6]
    saved = made.save(lives)
    _, whole = made.advance(lives, params, 14)
    assert (whole.steps[:2] == 0).all() and (whole.steps[2:] == 8).all()
    for rows in ([0, 1, 2, 3], [2, 0], [3, 1, 2]):
        made.evaluator.chunk = 4
        some = {name: leaf[rows] for name, leaf in saved.items()}
        mine = {name: leaf[rows] for name, leaf in params.items()}
        later, got = made.advance(made.restore(some), mine, 14)
        assert torch.equal(got.returns, whole.returns[rows])
        assert torch.equal(got.steps, whole.steps[rows])
        assert later.parts[0].end.t == int(later.parts[0].end.env_state.time) == 14


def test_epgs_share_of_ppo_is_that_of_the_generation_a_life_began_in() -> None:
    mixed: EpgObjective = objective("objective.ppo_generations=4")
    params = members(mixed, 2)
    alone: EpgObjective = objective("objective.ppo_generations=0")
    for life in (1, 4):
        learned, windows = [], mixed.life_steps
        for made in (mixed, alone):
            lives, _ = made.advance(made.begin(params, life), params, windows)
            learned.append(lives.parts[0].life.state.params["policy.0.weight"])
        assert torch.equal(*learned) == (life == 4), "from generation 4 on by the loss alone"
        whole = mixed.fitness(params, life).returns
        _, fitness = mixed.advance(mixed.begin(params, life), params, windows)
        torch.testing.assert_close(fitness.returns, whole, rtol=0, atol=1e-12)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["W", "v", "alpha", "kappa"])
def test_weights_that_a_gradient_is_asked_for_are_kept(asked: str) -> None:
    draw = torch.Generator().manual_seed(0)
    given = {
        "v": torch.randn(2, 3, 6, generator=draw),
        "alpha": torch.randn(2, 6, 6, generator=draw),
        "kappa": torch.randn(2, 2, 3, generator=draw),
        "beta": torch.randn(2, 2, 3, generator=draw),
    }
    # As a step leaves it, so that the next one may write into it.
    rule = prepare(given["alpha"], given["kappa"], given["beta"])
    given["W"] = step_prepared(rule, torch.randn(2, 3, 6, 6, generator=draw), given["v"])[1]
    kept = given["W"].clone()
    free = step_prepared(rule, given["W"], given["v"])[1]
    assert step_prepared(rule, free, given["v"], in_place=True)[1].data_ptr() == free.data_ptr()
    gradients = []
    for in_place in (False, True):
        given[asked] = given[asked].detach().requires_grad_()
        prepared = prepare(given["alpha"], given["kappa"], given["beta"])
        y, W = step_prepared(prepared, given["W"], given["v"], in_place=in_place)
        gradients += torch.autograd.grad(y.sum() + W.square().sum(), given[asked])
        assert torch.equal(given["W"], kept)
    assert torch.equal(*gradients) and float(gradients[0].abs().sum()) > 0


def test_a_rollout_overwrites_nothing_that_others_hold() -> None:
    task = Probe(horizon=6)
    policy = make_policy("metods", task.spec, neurons=4, alpha_std=0.5, w0_std=0.5)
    env, params = task.make_env("cpu"), policy.init(0, 2)
    begin = loop.start(policy, params, env, task.sample(8, "train", Rng(0)), Rng(1))

    def lived(begin: loop.Start, **how: Any) -> tuple[loop.End, Tensor]:
        kept = loop.Returns(2, 8, "cpu")
        with torch.no_grad():
            return loop.rollout(policy, env, begin, kept, **how), kept.returns

    # Left as a step leaves it, so that the next one may write into it.
    left, _ = lived(begin, until=2)
    held = [leaf.clone() for leaf in leaves_of([begin.state, left.state, left.ts])]
    going = loop.go_on(policy, params, left, begin.noise)
    (_, first), (_, again) = lived(going), lived(going)
    assert torch.equal(first, again)

    # A memory that is put back before every step is that of the first one for ever.
    def lesion(state: State, ts: TimeStep) -> tuple[State, TimeStep]:
        return left.state, ts

    lesioned = lived(going, intervene=lesion)[1]
    assert not torch.equal(lesioned, first)
    after = leaves_of([begin.state, left.state, left.ts])
    assert all(torch.equal(a, b) for a, b in zip(after, held, strict=True))
