"""What a Gymnasium environment gives and takes, held against its spaces.

Observations may be lists and of any real dtype, rewards and flags of any type of number; all else
that the spaces or the interface do not allow is refused in one line that says what to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
from gymnasium import spaces

from esmeta.errors import EnvError, EnvFailure, UserError
from esmeta.types import LARGEST_REWARD, Continuous, Discrete

_STEP = "return observation, reward, terminated, truncated, info"
_RESET = "return observation, info"

Read = Callable[[Any], Any]


class _Wrong(Exception):
    """What is wrong with an observation; private to the readers below."""


class Contract:
    """The spaces of the environment ``name`` as checks of what it gives, and maps to what it takes.

    Raises a ``UserError`` for spaces that have no place here.
    """

    def __init__(self, name: str, observation: spaces.Space, action: spaces.Space) -> None:
        self._name, self._space = name, observation
        for word, space in (("observation_space", observation), ("action_space", action)):
            if not isinstance(space, spaces.Space):
                self._refuse(
                    f"its {word} is {_told(space)}; it must be a space of gymnasium.spaces: set "
                    f"self.{word} in __init__"
                )
        self._read, self.obs_size = _reader(name, observation)
        self.act, self.action = _actor(name, action)

    def _refuse(self, text: str) -> NoReturn:
        raise EnvError(f"id = {self._name!r}: {text}")

    def first(self, given: Any) -> np.ndarray:
        """The observation float32 ``[n]`` that ``reset`` gave."""
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping)):
            self._refuse(f"reset() returned {_told(given)}; it must end with: {_RESET} (a dict)")
        return self._see(given[0], "reset()")

    def next(self, given: Any) -> tuple[np.ndarray, float, bool, bool]:
        """Observation float32 ``[n]``, reward, terminated and truncated that ``step`` gave."""
        if not (isinstance(given, tuple) and len(given) == 5 and isinstance(given[4], Mapping)):
            old = " (done of the old interface is terminated or truncated)"
            more = old if isinstance(given, tuple) and len(given) == 4 else ""
            self._refuse(
                f"step() returned {_told(given)}; it must end with: {_STEP} (a dict){more}"
            )
        seen, reward, terminated, truncated, _ = given
        reward = self._pay(reward)
        flags = self._flag("terminated", terminated), self._flag("truncated", truncated)
        return self._see(seen, "step()"), reward, *flags

    def _see(self, seen: Any, where: str) -> np.ndarray:
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                values = self._read(seen)
                obs = values.astype(np.float32)  # a copy: theirs may be written to later
        except _Wrong as wrong:
            self._refuse(
                f"{where} returned {wrong} as the observation; its observation_space is "
                f"{_short(self._space)}: return what that contains, or correct the space"
            )
        if not np.isfinite(obs).all():
            bad = np.flatnonzero(~np.isfinite(obs))[0]
            what = f"{where} returned an observation with {float(values[bad]):.4g}"
            self._not_finite(f"{what}; all numbers must be finite and fit into float32: clip or")
        return obs

    def _pay(self, reward: Any) -> float:
        if type(reward) is not float:
            number = _array(reward)
            if number is None or number.shape != () or number.dtype.kind not in "biuf":
                one = number is not None and number.size == 1 and number.dtype.kind in "biuf"
                cure = ": return float(reward.item())" if one else ""
                text = f"step() returned {_told(reward)} as the reward; it must be a number{cure}"
                self._refuse(text)
            reward = float(number)
        if not abs(reward) <= LARGEST_REWARD:  # nor NaN
            what = f"step() returned the reward {reward:.4g}"
            limit = f"must be finite and at most {LARGEST_REWARD:g} in size, as returns are squared"
            self._not_finite(f"{what}; rewards {limit} in float32: clip or")
        return reward

    def _flag(self, word: str, flag: Any) -> bool:
        if flag is True or flag is False:
            return flag
        given = _array(flag)
        if given is None or given.shape != () or given.dtype.kind not in "biu":
            self._refuse(f"step() returned {_told(flag)} as {word}; it must be True or False")
        value = given.item()
        if value not in (0, 1):
            self._refuse(f"step() returned {value} as {word}; it must be True or False")
        return bool(value)

    def _not_finite(self, text: str) -> NoReturn:
        raise EnvFailure(
            f"id = {self._name!r}: {text} scale them in the environment (or by a wrapper of "
            "Gymnasium, such as TransformReward), or end the episode before"
        )


def _array(value: Any) -> np.ndarray | None:
    """The value as numpy has it; None where it has none."""
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError):  # ragged lists, tensors on a GPU or with gradient
        return None


def _told(value: Any) -> str:
    """What a value is, in a few words."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        return f"{value!r:.40}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__}"


def _short(space: spaces.Space) -> str:
    if isinstance(space, spaces.Box):
        return f"a Box of shape {space.shape} and {space.dtype}"
    text = str(space)
    return text if len(text) < 100 else type(space).__name__


# --- observations --------------------------------------------------------------------------------


def _reader(name: str, space: spaces.Space) -> tuple[Read, int]:
    """From an observation to a flat row of numbers, and how many; raises :class:`_Wrong`."""
    try:
        clean = _cleaner(space)
        if isinstance(space, spaces.Box):
            return lambda seen: clean(seen).reshape(-1), int(np.prod(space.shape))
        return lambda seen: np.asarray(spaces.flatten(space, clean(seen))), spaces.flatdim(space)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"id = {name!r}: observations {space} have no fixed number of values; wrap the "
            "environment to give a Box, or Discrete, MultiBinary, MultiDiscrete, Dict or Tuple"
        ) from error


def _cleaner(space: spaces.Space) -> Read:
    """From what an environment gave to what ``space`` contains; raises :class:`_Wrong`."""
    if isinstance(space, spaces.Dict):
        return _parts({key: _cleaner(part) for key, part in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return _entries([_cleaner(part) for part in space.spaces])
    if isinstance(space, spaces.Box):
        return _numbers(space.shape, space.dtype)
    if isinstance(space, spaces.Discrete):
        return _whole((), int(space.start), int(space.start + space.n))
    if isinstance(space, spaces.MultiBinary):
        return _whole(space.shape, 0, 2)
    if isinstance(space, spaces.MultiDiscrete):
        return _whole(space.shape, space.start, space.start + space.nvec)

    def other(seen: Any) -> Any:
        if not space.contains(seen):
            raise _Wrong(_told(seen))
        return seen

    return other


def _numbers(shape: tuple[int, ...], dtype: Any) -> Read:
    """Real numbers for a Box; whole ones where its dtype is, flags only where it is of flags."""
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[np.dtype(dtype).kind]

    def clean(seen: Any) -> np.ndarray:
        values = _array(seen)
        if values is None or isinstance(seen, Mapping):
            raise _Wrong(_told(seen))
        fits = values.dtype.kind in kinds or (
            kinds == "iu" and values.dtype.kind == "f" and bool((values == np.floor(values)).all())
        )
        if not fits or values.shape != shape:
            raise _Wrong(_told(seen if values.dtype.kind in "OUS" else values))
        return values

    return clean


def _whole(shape: tuple[int, ...], low: Any, end: Any) -> Read:
    """Whole numbers from ``low`` to below ``end``; ``shape`` () also takes an array of one."""

    def clean(seen: Any) -> Any:
        values = _array(seen)
        if values is None or values.dtype.kind not in "biu":
            raise _Wrong(_told(seen))
        values = values.reshape(()) if shape == () and values.size == 1 else values
        if values.shape != shape or not ((low <= values) & (values < end)).all():
            raise _Wrong(_told(seen))
        return values.astype(np.int64)

    return clean


def _parts(readers: Mapping[Any, Read]) -> Read:
    def clean(seen: Any) -> dict[Any, Any]:
        if not isinstance(seen, Mapping):
            raise _Wrong(_told(seen))
        if set(seen) != set(readers):
            raise _Wrong(f"a dict with the keys {sorted(map(str, seen))}")
        return {key: read(seen[key]) for key, read in readers.items()}

    return clean


def _entries(readers: list[Read]) -> Read:
    def clean(seen: Any) -> tuple[Any, ...]:
        if not isinstance(seen, tuple | list) or len(seen) != len(readers):
            raise _Wrong(_told(seen))
        return tuple(read(part) for read, part in zip(readers, seen, strict=True))

    return clean


# --- actions -------------------------------------------------------------------------------------


def _actor(
    name: str, space: spaces.Space
) -> tuple[Callable[[np.ndarray], Any], Discrete | Continuous]:
    """From one of our actions to one that ``space`` contains, and what ours are."""
    if isinstance(space, spaces.Discrete):
        kind = np.dtype(space.dtype or np.int64).type
        return lambda action: kind(int(space.start) + int(action)), Discrete(int(space.n))
    if (
        not isinstance(space, spaces.Box)
        or not np.issubdtype(space.dtype, np.floating)
        or 0 in space.shape
    ):
        raise UserError(
            f"id = {name!r}: actions {space} are not supported; they must be Discrete or a Box of "
            "real numbers: wrap the environment, for example with gymnasium.ActionWrapper"
        )
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    bounded = np.isfinite(low) & np.isfinite(high)
    # The middle first: for bounds of -h and h an action a is exactly h times a.
    middle = np.where(bounded, np.where(bounded, low, 0) / 2 + np.where(bounded, high, 0) / 2, 0)
    half = np.where(bounded, np.where(bounded, high, 0) - middle, 1.0)

    def act(action: np.ndarray) -> np.ndarray:
        scaled = middle + half * action.reshape(low.shape).astype(np.float64)
        # Cast between bounds that the dtype has exactly, so that rounding does not leave them.
        return np.asarray(np.clip(scaled, low, high), dtype=space.dtype)

    return act, Continuous(int(np.prod(space.shape)))
