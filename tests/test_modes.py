"""Numbers do not depend on torch's defaults and modes; what cannot be right is refused."""

from __future__ import annotations

import ast
import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import any_mode
import pytest
import torch
from conftest import ROOT, environment

from esmeta import kernels, make_policy, make_task
from esmeta.errors import UserError
from esmeta.rng import Rng

scores, steps = functools.cache(any_mode.scores), functools.cache(any_mode.steps)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "another device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("mode", [*MODES, "inference_mode"])
def test_scores_are_the_same(mode: str) -> None:
    want = scores()
    with MODES.get(mode, torch.inference_mode)():
        assert any_mode.scores() == want


@pytest.mark.parametrize("mode", ["float64", "autocast", "no_grad"])
def test_training_is_the_same(mode: str) -> None:
    want = steps()
    with MODES[mode]():
        dtype = torch.get_default_dtype()
        assert any_mode.steps() == want
        assert torch.get_default_dtype() == dtype, "what the caller has set stays"


def test_first_use_under_other_defaults_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "any_mode.py")],
        env=environment(None), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    under, after = map(ast.literal_eval, done.stdout.splitlines())
    assert under == scores() | steps() and after == scores()


def test_training_inside_inference_mode_is_refused() -> None:
    from test_presets import tiny

    from esmeta.ranks.comm import SelfComm
    from esmeta.run import train

    parts = train.build(tiny("harlow-ppo"))
    with torch.inference_mode(), pytest.raises(UserError, match=r"write torch\.no_grad"):
        parts.optimizer.step(parts.state, parts.objective, SelfComm(), parts.rng)


def test_policies_take_observations_of_another_dtype_and_one_dtype_of_parameters() -> None:
    task = make_task("pendulum", horizon=8)
    for name in ("metods", "rl2", "lstm", "mlp"):
        policy = make_policy(name, task.spec, neurons=6)
        wide = {k: v.double() for k, v in policy.init(0).items()}
        env = task.make_env("cpu")
        _, ts = env.reset(task.sample(2, "train", Rng(0)), Rng(0), 1)
        out, _ = policy.step(wide, policy.initial_state(wide, 2), ts)
        assert ts.obs.dtype == torch.float32 and out.mean is not None
        assert out.mean.dtype == torch.float64
        mixed = wide | {"head.0.bias": wide["head.0.bias"].float()}
        for wrong in (mixed, {k: v.long() for k, v in wide.items()}):
            with pytest.raises(UserError, match="one floating-point dtype"):
                policy.bind(wrong)


def rule(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = (1, 2, 1, 1), (1, 2, 1), (1, 1, 1), (1, 2, 3), (1, 2, 3)
    return [torch.randn(s, generator=rng).to(device, dtype) for s in shapes]


@pytest.mark.parametrize("wrong", range(5))
@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, "cpu"), (torch.float32, "meta"), (torch.int64, "cpu")]
)
def test_fast_weights_of_several_kinds_are_refused(wrong: int, dtype: Any, device: str) -> None:
    given = rule()
    alpha, kappa, beta = given[2:]
    given[wrong] = rule(dtype, device)[wrong]
    with pytest.raises(UserError, match="needed: write"):
        kernels.plastic_step(*given)
    if wrong < 2:
        with pytest.raises(UserError, match="needed: write"):
            kernels.step_prepared(kernels.prepare(alpha, kappa, beta), given[0], given[1])


def test_values_stored_with_the_other_sign_are_read_right() -> None:
    want = kernels.plastic_step(*rule())
    stored = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in rule()]
    assert all(t.is_neg() for t in stored)
    got = kernels.plastic_step(*stored)
    assert all(map(torch.equal, got, want))
    weights, biases = (torch.ones(1, 1, 2),), (torch.zeros(1, 2),)
    x = torch.complex(torch.zeros(1, 3, 1), torch.ones(1, 3, 1)).conj().imag
    y = kernels.dense(kernels.network(weights, biases, False), x)
    assert torch.equal(y, -torch.ones(1, 3, 2))


def test_layers_and_inputs_that_do_not_go_together_are_refused() -> None:
    weights, biases = (
        (torch.ones(2, 3, 4), torch.ones(2, 4, 1)),
        (torch.ones(2, 4), torch.ones(2, 1)),
    )
    for wrong in (
        ((weights[0], torch.ones(2, 5, 1)), biases),
        (weights, (torch.ones(2, 3), biases[1])),
        ((weights[0], torch.ones(1, 4, 1)), biases),
        ((weights[0].double(), weights[1]), biases),
        ((weights[0].to("meta"), weights[1]), biases),
    ):
        with pytest.raises(UserError):
            kernels.network(*wrong, False)
    net = kernels.network(weights, biases, False)
    for x in (torch.ones(2, 5, 2), torch.ones(1, 5, 3), torch.ones(2, 5, 3).double()):
        with pytest.raises(UserError):
            kernels.dense(net, x)
    alpha, kappa, beta = rule()[2:]
    prepared = kernels.prepare(alpha, kappa, beta)
    for W, v in (((1, 2, 1, 1), (1, 3, 1)), ((2, 2, 1, 1), (2, 2, 1)), ((1, 2, 2, 2), (1, 2, 2))):
        with pytest.raises(UserError):
            kernels.step_prepared(prepared, torch.ones(W), torch.ones(v))
