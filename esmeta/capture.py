"""Functions of tensors, recorded as a CUDA graph when they are first called and then replayed.

Small networks keep a GPU waiting for Python: a step of a rollout is some forty short kernels. A
graph launches those of a whole rollout, or of a whole gradient, by one call. What is recorded reads
and writes fixed memory, so tensors that come in are copied there, and results are copied out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esmeta.errors import UserError
from esmeta.sharing import MadeAgain, one_at_a_time
from esmeta.tree import leaves_of, with_leaves

CAPTURING = ("cuda",)
"""Kinds of devices that can."""
_WARM_UP = 2
"""Runs before the recording: kernels are compiled and libraries set up in the first ones."""

Function = Callable[..., Any]
Replay = Callable[[], None]


class _Recorded(NamedTuple):
    inputs: list[Tensor]
    result: Any
    replay: Replay


class Captured(MadeAgain):
    """Runs functions by replaying what they did when they were first called.

    A function must be made of operations on tensors alone, the same ones whatever their values:
    nothing may look at a tensor on the host. All else that it uses stays as it was in the first
    call. Keeps the recordings of the ``keep`` last kinds of call.
    """

    def __init__(self, device: torch.device, keep: int = 8) -> None:
        if device.type not in CAPTURING:
            raise UserError(
                f"capture = true: only what runs on a GPU can be captured, this runs on {device}; "
                "write --device cuda, or capture = false"
            )
        self._keep = keep
        self.forget()

    def forget(self) -> None:
        """See :class:`esmeta.sharing.MadeAgain`."""
        self._known: dict[Any, _Recorded] = {}

    @one_at_a_time
    def __call__(self, name: str, function: Function, *trees: Any) -> Any:
        """``function(*trees)``; ``name`` tells functions apart.

        ``trees`` and the result are nested tuples, lists and dicts of tensors. Calls of one name
        with tensors of the same shapes replay the same recording.
        """
        given = leaves_of(trees)
        key = name, tuple((leaf.shape, leaf.dtype, leaf.stride()) for leaf in given)
        recorded = self._known.pop(key, None)
        if recorded is None:
            inputs = [leaf.detach().clone() for leaf in given]
            held = with_leaves(trees, inputs)
            result, replay = record(lambda: function(*held))
            recorded = _Recorded(inputs, result, replay)
        self._known[key] = recorded  # the youngest comes last
        if len(self._known) > self._keep:
            del self._known[next(iter(self._known))]
        for held, leaf in zip(recorded.inputs, given, strict=True):
            held.copy_(leaf)
        recorded.replay()
        copies = [leaf.clone() for leaf in leaves_of(recorded.result)]
        return with_leaves(recorded.result, copies)


def record(function: Callable[[], Any]) -> tuple[Any, Replay]:
    """The tensors that a function leaves its results in, and how to compute them again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return result, graph.replay
