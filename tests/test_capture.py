"""What is captured for a GPU, replayed here by repeating recorded operations in fixed memory.

A CUDA graph knows no Python: it repeats operations on the memory that they were recorded with. So
does :class:`Tape`, in float64, where the memory runs in torch operations; and it refuses what a
capture refuses, to look at a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import esmeta
from esmeta import capture
from esmeta.capture import Captured
from esmeta.errors import UserError
from esmeta.kernels import _dispatch
from esmeta.objectives.return_ import ReturnObjective
from esmeta.optimizers import a2c, ppo
from esmeta.ranks.comm import SelfComm
from esmeta.rng import Rng
from esmeta.tree import leaves_of
from esmeta.types import Params

torch.set_num_threads(1)

# They bring a value to the host, make memory of a size that depends on one, or bring data from
# the host, which a capture does only from memory that stays.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "lift_fresh")


class Tape(TorchDispatchMode):
    """Keeps every operation with its tensors, to run it again into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in FORBIDDEN, f"a capture cannot hold {name}"
        out = func(*args, **(kwargs or {}))
        # Views are of the memory as it is: there is nothing to do again.
        if not func.is_view:
            self._rows.append((func, args, kwargs or {}, _tensors(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, held in self._rows:
            for old, new in zip(held, _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [leaf for leaf in out if isinstance(leaf, Tensor)] if out is not None else []


def taped(function: Callable[[], Any]) -> tuple[Any, capture.Replay]:
    tape = Tape()
    with tape:
        result = function()
    for leaf in leaves_of(result):
        leaf.detach().fill_(77)  # only a replay brings the result

    def replay() -> None:
        with torch.no_grad():
            tape.replay()

    return result, replay


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captures work on the CPU, and hosts look no more than they would on a GPU."""
    monkeypatch.setattr(capture, "record", taped)
    monkeypatch.setattr(capture, "CAPTURING", ("cuda", "cpu"))
    monkeypatch.setattr(_dispatch, "LOOKS", ())


def double(params: Params) -> Params:
    return {name: leaf.double() for name, leaf in params.items()}


def make(task_name: str, policy_name: str, **options: Any) -> tuple[Any, Any]:
    task = esmeta.make_task(task_name)
    policy = esmeta.make_policy(policy_name, task.spec, neurons=5, hidden=(6,), **options)
    return task, policy


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("task_name", ["bandit", "harlow", "maze"])
@pytest.mark.parametrize("policy_name", ["metods", "rl2"])
def test_captured_scores_are_those_of_the_loop(task_name: str, policy_name: str) -> None:
    options: dict[str, Any] = {"depth": 2, "extra": "time"} if policy_name == "metods" else {}
    task, policy = make(task_name, policy_name, **options)
    plain = esmeta.PopulationEvaluator(policy, task, trials=8)
    captured = esmeta.PopulationEvaluator(policy, task, trials=8, capture=True)
    for seed in range(3):
        params = double(policy.init(seed=seed, population=3))
        want, got = plain(params, seed=seed), captured(params, seed=seed)
        assert torch.equal(got.returns, want.returns) and torch.equal(got.steps, want.steps)
        for name, score in want.metrics.items():
            assert torch.equal(got.metrics[name].nan_to_num(9), score.nan_to_num(9))
    assert captured.captured is not None and len(captured.captured._known) == 1
    assert want.returns.std() > 0


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("optimizer", [a2c.Optimizer(), ppo.Optimizer(epochs=2, minibatches=2)])
@pytest.mark.parametrize("task_name", ["bandit", "harlow"])
def test_captured_updates_are_those_of_the_loop(optimizer: Any, task_name: str) -> None:
    task, policy = make(task_name, "metods", depth=2, value=True)
    thetas = []
    for on in (False, True):
        objective = ReturnObjective(policy, task, trials=8, seed=0, device="cpu", capture=on)
        state = optimizer.init(double(policy.init(seed=0)), Rng(0))
        for _ in range(3):
            state, metrics = optimizer.step(state, objective, SelfComm(), Rng(0))
        thetas.append(state.theta)
        assert metrics["gradient_norm"] > 0
    # A loop that asks whether trials go on may end earlier, so that sums have fewer zeros in them.
    assert torch.allclose(thetas[0], thetas[1], rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("emulated")
def test_what_looks_at_a_tensor_is_refused() -> None:
    captured = Captured(torch.device("cpu"))
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        captured("look", lambda x: x * 2 if x.sum() > 0 else x, torch.ones(3))


@pytest.mark.usefixtures("emulated")
def test_every_shape_has_a_recording_and_results_are_the_callers_own() -> None:
    captured = Captured(torch.device("cpu"), keep=2)
    double_it = lambda tree: {"y": tree["x"] * 2}  # noqa: E731
    first = captured("double", double_it, {"x": torch.ones(3)})["y"]
    second = captured("double", double_it, {"x": torch.full((3,), 5.0)})["y"]
    assert first.tolist() == [2.0] * 3 and second.tolist() == [10.0] * 3
    for size in (4, 5, 3):
        assert captured("double", double_it, {"x": torch.ones(size)})["y"].tolist() == [2.0] * size
    assert len(captured._known) == 2


def test_capture_needs_a_gpu() -> None:
    task, policy = make("bandit", "metods", depth=1)
    with pytest.raises(UserError, match="capture = true.*cpu.*--device cuda"):
        esmeta.PopulationEvaluator(policy, task, capture=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("task_name", ["bandit", "harlow", "maze"])
def test_captured_scores_on_a_gpu(task_name: str) -> None:
    task, policy = make(task_name, "metods", depth=2)
    plain, captured = (
        esmeta.PopulationEvaluator(policy, task, trials=8, device="cuda", capture=on)
        for on in (False, True)
    )
    for seed in range(3):
        params = policy.init(seed=seed, population=3)
        want, got = plain(params, seed=seed), captured(params, seed=seed)
        assert torch.equal(got.returns, want.returns) and torch.equal(got.steps, want.steps)
