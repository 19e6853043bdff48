"""Simulators of Gymnasium, one by one: how they are made, called, shared and closed.

What is raised below a call into an environment is the environment's (:class:`EnvFailure`), unless a
function of esmeta raised it. All simulators of one kind in this process are in one pool, so that
they can be counted, used again by whoever needs some next, and closed.
"""

from __future__ import annotations

import atexit
import copy
import gc
import importlib
import json
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from esmeta.envs._contract import Contract
from esmeta.errors import EnvError, EnvFailure, UserError, nearest, warn
from esmeta.sharing import MadeAgain, Turn
from esmeta.types import Continuous, Discrete

_EXTRAS = {"box2d": "box2d", "mujoco": "mujoco", "ale_py": "atari", "ale-py": "atari"}


@dataclass(frozen=True)
class Interface:
    """What a registered environment takes and gives.

    ``limit``: its registered steps per episode, ``threshold``: the return of an episode at which
    its makers count it as solved; None where they do not say.
    """

    obs_size: int
    action: Discrete | Continuous
    limit: int | None
    threshold: float | None


_SEEN: dict[tuple[str, str], tuple[object, Interface]] = {}
"""Of which registration an interface was seen: names can be registered anew, as notebooks do."""


def interface(name: str, kwargs: str) -> Interface:
    """Make the environment ``name`` once to look at it; ``kwargs`` as JSON.

    A ``UserError`` says what is wrong with the name, the arguments, the installation or a space.
    """
    found = _SEEN.get((name, kwargs))
    if found is None or found[0] is not _registered(name):
        seen = _look(name, kwargs)  # which may import what registers it
        found = _SEEN[name, kwargs] = _registered(name), seen
    return found[1]


def _registered(name: str) -> Any:
    return gymnasium.registry.get(name.rpartition(":")[2])


def _look(name: str, kwargs: str) -> Interface:
    world = World(name, json.loads(kwargs))
    try:
        contract, made = world.contract, world.env.spec
        assert made is not None, "made by its id"
        spec = gymnasium.spec(made.id)  # before the time limit was taken off
        return Interface(
            contract.obs_size, contract.action, spec.max_episode_steps, spec.reward_threshold
        )
    finally:
        world.close()


class World:
    """One simulator without Gymnasium's time limit: the horizon of the task takes its place."""

    def __init__(self, name: str, kwargs: Mapping[str, Any]) -> None:
        self.name = name
        self.env = _make(name, kwargs)
        self.contract = Contract(name, self.env.observation_space, self.env.action_space)

    def reset(self, seed: int, options: dict[str, Any] | None) -> np.ndarray:
        """Begin an episode: its first observation, float32 ``[n]``."""
        return self.contract.first(self._call("reset", seed=seed, options=options))

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool]:
        """Observation float32 ``[n]``, reward, terminated, truncated after one of our actions."""
        return self.contract.next(self._call("step", self.contract.act(action)))

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(self.env, method)(*args, **kwargs)
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:
            if _is_ours(error):
                raise
            text = f"id = {self.name!r}: {method}() raised {_short(error)}"
            if isinstance(error, TypeError) and "unexpected keyword argument" in text:
                cure = "write def reset(self, *, seed=None, options=None)"
                raise EnvError(f"{text}: {cure}") from error
            cure = "repair the environment"
            if method == "reset" and not kwargs["options"] and isinstance(error, TypeError):
                cure += ", or set task.task_key if it reads options, which are None without"
            raise EnvFailure(f"{text}: {cure}") from error

    def close(self) -> None:
        """Close the simulator; one that fails in that is given up, with a warning."""
        try:
            self.env.close()
        except (Exception, SystemExit) as error:  # whatever it is, nothing is left to be done
            if isinstance(error, SystemExit) and _is_ours(error):
                raise
            warn(f"id = {self.name!r}: close() raised {_short(error)}")


def _is_ours(error: BaseException) -> bool:
    """Whether a function of esmeta raised what came out of a call into an environment.

    So are the ``SystemExit`` of signals: their handlers are esmeta's.
    """
    trace = error.__traceback__
    trace = None if trace is None else trace.tb_next  # the first frame is the call
    if trace is None or isinstance(error, UserError):
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals.get("__name__", "").partition(".")[0] == "esmeta"


def _short(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - of the environment's own class
        text = ""
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- making --------------------------------------------------------------------------------------


def _make(name: str, kwargs: Mapping[str, Any]) -> gymnasium.Env:
    try:
        # That there is a newer version is said once per simulator otherwise.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return gymnasium.make(
                _specification(name),
                disable_env_checker=True,
                max_episode_steps=-1,
                **kwargs,
            )
    except gymnasium.error.DependencyNotInstalled as error:
        extra = next((ours for word, ours in _EXTRAS.items() if word in str(error).lower()), "")
        cure = f"pip install 'esmeta[{extra}]'" if extra else "see its documentation"
        raise UserError(f"id = {name!r}: {error}; {cure}") from error
    except gymnasium.error.UnregisteredEnv as error:
        raise UserError(
            f"id = {name!r}: Gymnasium has no such environment{nearest(name, gymnasium.registry)}; "
            "write a registered id, or 'package.module:Name-v0' where importing the module "
            "registers it"
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(
            f"id = {name!r}: {str(error).rstrip('.')}; install it, or put it on PYTHONPATH"
        ) from error
    except gymnasium.error.Error as error:
        raise UserError(_cannot_be_made(name, kwargs, str(error))) from error
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            raise UserError(_cannot_be_made(name, kwargs, str(error))) from error
        if _is_ours(error):
            raise
        raise EnvFailure(_cannot_be_made(name, kwargs, _short(error))) from error


def _cannot_be_made(name: str, kwargs: Mapping[str, Any], text: str) -> str:
    return f"id = {name!r} cannot be made with kwargs = {dict(kwargs)!r}: {text}"


def _specification(name: str) -> Any:
    """What is registered as ``name``; its wrappers' arguments, copied: simulators share nothing."""
    module, _, name_there = name.rpartition(":")
    if module:
        importlib.import_module(module)
    found = copy.copy(gymnasium.registry.get(name_there))
    if found is None:
        return name
    found.additional_wrappers = copy.deepcopy(found.additional_wrappers)
    return found


# --- sharing -------------------------------------------------------------------------------------


class Pool(MadeAgain):
    """The simulators of one kind in this process: those in use, and those to be used again."""

    def __init__(self, name: str, kwargs: str, spec: object) -> None:
        self._name, self._kwargs = name, kwargs
        self._spec = spec  # kept, as its address is part of the pool's key
        self.forget()

    def forget(self) -> None:
        """See :class:`esmeta.sharing.MadeAgain`."""
        self._open: set[World] = set()
        self._idle: list[World] = []

    def __del__(self) -> None:
        for world in self._open:
            world.close()

    @property
    def used(self) -> int:
        """Simulators that trials run in."""
        return len(self._open) - len(self._idle)

    def take(self, count: int, most: int, *, new: bool = False) -> list[World]:
        """``count`` simulators, where no more than ``most`` are open then; else ``UserError``.

        ``new``: made for this.
        """
        with self.turn:
            if self.used + count > most:
                gc.collect()  # environments that are no longer needed may still hold some
            if self.used + count > most:
                raise UserError(
                    f"most_worlds is {most}: {count} simulators of {self._name!r} are needed, and "
                    f"{self.used} are in use; write most_worlds={self.used + count} or finish the "
                    "trials that use them"
                )
            again = 0 if new else min(count, len(self._idle))
            found = [self._idle.pop() for _ in range(again)]
            while self._idle and len(self._open) + count - again > most:
                self.drop(self._idle.pop())
            try:
                while len(found) < count:
                    found.append(self._new())
            except BaseException:
                self._idle += found
                raise
            return found

    def _new(self) -> World:
        try:
            world = World(self._name, json.loads(self._kwargs))
        except EnvFailure as failure:
            warn(f"{failure}; it is made again")
            world = World(self._name, json.loads(self._kwargs))
        self._open.add(world)
        first, here = interface(self._name, self._kwargs), world.contract
        if (here.obs_size, here.action) != (first.obs_size, first.action):
            self.drop(world)
            raise EnvError(
                f"id = {self._name!r}: observations of {here.obs_size} numbers and actions "
                f"{here.action}, where an environment that was made before had {first.obs_size} "
                f"and {first.action}; all that are made alike must have the same spaces"
            )
        return world

    def give(self, world: World) -> None:
        """Take back a simulator that is no longer used."""
        with self.turn:
            if world in self._open:
                self._idle.append(world)

    def drop(self, world: World) -> None:
        """Close a simulator for good."""
        with self.turn:
            if world in self._open:
                self._open.remove(world)
                world.close()

    def close(self, *, used: bool = False) -> None:
        """Close those that are not used; with ``used`` all."""
        with self.turn:
            worlds, self._idle = list(self._open if used else self._idle), []
            for world in worlds:
                self.drop(world)


_POOLS: weakref.WeakValueDictionary[Any, Pool] = weakref.WeakValueDictionary()
_LOOKING = Turn()


def pool(name: str, kwargs: str) -> Pool:
    """The pool of simulators made with ``kwargs`` (JSON); it lives as long as somebody holds it."""
    spec = _registered(name)
    key = name, kwargs, id(spec)
    with _LOOKING:
        found = _POOLS.get(key)
        if found is None:
            found = _POOLS[key] = Pool(name, kwargs, spec)
    return found


def close_all() -> None:
    """Close every simulator of this process; environments that used them begin anew."""
    for found in list(_POOLS.values()):
        found.close(used=True)


atexit.register(close_all)
