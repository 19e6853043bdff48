"""What copies, threads and forked processes may share of objects that hold simulators.

A simulator lies in the memory of one process, tensors here are views of it, and it is in one state
at a time. So nothing of it is copied: a copy is made anew from what the object was made from
(:class:`MadeAgain`), a forked process begins without the simulators of its parent, and a method
that uses them lets one thread in at a time (:func:`one_at_a_time`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import torch

from esmeta.errors import UserError

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_TURNS: weakref.WeakSet[Turn] = weakref.WeakSet()
_HOLDERS: weakref.WeakSet[MadeAgain] = weakref.WeakSet()
_INHERITED: list[Any] = []
"""What a forked process found: destroying it could wait for threads that only its parent has."""


class Turn:
    """A lock that a thread may take more than once; copies and forked processes get a free one."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _TURNS.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    @contextlib.contextmanager
    def or_refuse(self, why: str) -> Iterator[None]:
        """Instead of waiting for another thread, refuse with ``why``."""
        if not self._lock.acquire(blocking=False):
            raise UserError(why)
        try:
            yield
        finally:
            self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()


class MadeAgain:
    """Holds what cannot be copied: copies and pickles repeat the call that made the object.

    They start as it did, whatever it was used for since.
    """

    _call: tuple[tuple[Any, ...], dict[str, Any]]
    turn: Turn

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        made._call, made.turn = (args, kwargs), Turn()
        _HOLDERS.add(made)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _make, (type(self), *self._call)

    def forget(self) -> None:
        """Let go of all that belongs to this process, as if it had never been used."""
        raise NotImplementedError


def _make(cls: type[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return cls(*args, **kwargs)


def one_at_a_time(
    method: Callable[Concatenate[Any, _Given], _Result],
) -> Callable[Concatenate[Any, _Given], _Result]:
    """A method of an object with a :class:`Turn` that other threads wait for."""

    @functools.wraps(method)
    def alone(self: Any, *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        with self.turn:
            return method(self, *args, **kwargs)

    return alone


class HostedState:
    """Names the trials that simulators run and their ``step``; the simulators hold the rest.

    It is what it is: no copy of it can be stepped, nor after later trials began.
    """

    def __init__(self, trials: int, step: int) -> None:
        self.trials, self.step = trials, step

    def __reduce__(self) -> NoReturn:
        raise UserError(
            f"trials at step {self.step} cannot be copied or pickled: their simulators are in the "
            "middle of them; copy the evaluator, the task or the environment instead, which start "
            "anew, or finish the trials first"
        )


def check_newest(state: HostedState, newest: HostedState, who: str) -> None:
    """Raise unless a state is the newest one of the simulators of ``who``."""
    if state is not newest:
        raise RuntimeError(
            f"trials {state.trials} at step {state.step} were left: {who} now run trials "
            f"{newest.trials} at step {newest.step} and cannot go back; finish trials before new "
            "ones begin, or make another environment"
        )


def _begin_anew() -> None:
    """In a forked process, which has what its parent's threads hold, but not these threads."""
    if _TURNS:
        torch.set_num_threads(1)  # OpenMP would wait for those of the parent
    for turn in list(_TURNS):
        turn._lock = threading.RLock()
    for holder in list(_HOLDERS):
        _INHERITED.append(dict(vars(holder)))
        holder.forget()


if hasattr(os, "register_at_fork"):  # not on every system
    os.register_at_fork(after_in_child=_begin_anew)
