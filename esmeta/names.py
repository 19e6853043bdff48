"""Tasks, policies, objectives, optimizers and learners by name: listed, loaded and built.

A name is that of a module in the folder of its kind, or ``package.module:Name`` for a class that
lies anywhere on PYTHONPATH. Either stands for a frozen dataclass whose fields are its options, so
that every default stands beside the code that reads it.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import pkgutil
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import Any, Literal, Union

from esmeta.errors import UserError, is_number, listed, nearest
from esmeta.options import plain

SPLITS = ("train", "validation", "test")
"""Sets of tasks: to learn on, to select on (when to stop, which theta is best), to report on."""
# kind -> (package that is searched, name of the dataclass in its modules)
KINDS = {
    "task": ("esmeta.tasks", "Task"),
    "policy": ("esmeta.policy", "Config"),
    "objective": ("esmeta.objectives", "Objective"),
    "optimizer": ("esmeta.optimizers", "Optimizer"),
    "learner": ("esmeta.learners", "Learner"),
}


def _modules(kind: str) -> dict[str, str]:
    """Public name -> module name; one trailing underscore stands for a Python keyword."""
    paths = importlib.import_module(KINDS[kind][0]).__path__
    modules = (info.name for info in pkgutil.iter_modules(paths))
    return {name.removesuffix("_"): name for name in modules if not name.startswith("_")}


def known(kind: str) -> list[str]:
    """The names that ship with esmeta, sorted, without importing their modules."""
    return sorted(_modules(kind))


def canonical(name: Any) -> Any:
    """The name of a module: ``cheetah-dir`` is ``cheetah_dir``, as module names have no hyphens."""
    return name.replace("-", "_") if isinstance(name, str) and ":" not in name else name


def load(kind: str, name: str) -> type:
    """The dataclass that ``name`` stands for."""
    name, class_name = canonical(name), KINDS[kind][1]
    if ":" in name:
        module_name, _, class_name = name.partition(":")
    else:
        modules = _modules(kind)
        if name not in modules:
            raise UserError(
                f"{kind} {name!r} does not exist{nearest(name, modules)}; there are: "
                f"{listed(modules)}; or write package.module:{class_name} for your own"
            )
        module_name = f"{KINDS[kind][0]}.{modules[name]}"
    module = _module(f"{kind} {name!r}", module_name, class_name)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UserError(
            f"{kind} {name!r}: module {module_name!r} has no class {class_name!r}"
            f"{nearest(class_name, classes)}; it must define one"
        )
    if not dataclasses.is_dataclass(found):
        raise UserError(
            f"{kind} {name!r}: {class_name} is not a dataclass; decorate it with "
            "@dataclass(frozen=True), so that its fields are its options"
        )
    return found


def function(address: str) -> Callable[..., Any]:
    """The function that is called ``package.module:name``."""
    module, _, name = address.partition(":")
    return getattr(_module(address, module, name), name)


def _module(what: str, module_name: str, attribute: str) -> types.ModuleType:
    """An imported module; errors begin with ``what`` was asked for."""
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError(f"{what}: not a name; write package.module:Name")
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = str(error.name)
        if f"{module_name}.".startswith(f"{missing}."):
            raise UserError(
                f"{what}: no module {module_name!r} can be imported; write package.module:Name of "
                "a module on PYTHONPATH"
            ) from error
        raise UserError(
            f"{what} needs the Python package {missing!r}, which is not installed; install it, "
            f"for example with: pip install {missing}"
        ) from error


def make(kind: str, name: str, options: Mapping[str, Any], where: str = "") -> Any:
    """The checked dataclass that ``name`` stands for, built from ``options``.

    Errors call an option ``where.option``, by default after the kind.
    """
    return check_options(load(kind, name), options, where or kind)


def from_table(kind: str, table: Mapping[str, Any], where: str, example: str) -> Any:
    """What a table of a name and options stands for, as the option ``where`` holds one.

    ``example`` is what that option should look like.
    """
    values = dict(table)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"{where}: {dict(table)!r} has no name; write for example "
            f"{where.rpartition('.')[2]} = {example}"
        )
    return make(kind, name, values, where)


# --- options against annotations -------------------------------------------------------------


class _Scope(dict[str, Any]):
    """Names of a module; those that are imported for type checkers only count as Any."""

    def __init__(self, module: str) -> None:
        super().__init__(vars(builtins) | vars(sys.modules[module]))

    def __missing__(self, key: str) -> Any:
        return Any


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls)
    except NameError:
        return typing.get_type_hints(cls, localns=_Scope(cls.__module__))


class _Mismatch(Exception):
    """What a value should have been; private to the conversion below."""


def _scalar(value: Any, hint: type) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if hint is int and is_int:
        return value
    if hint is float and is_number(value):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    words = {bool: "true or false", int: "an integer, for example 8", str: 'text, for example "x"'}
    raise _Mismatch(words.get(hint, "a finite number, for example 0.5"))


def _sequence(value: Any, hint: Any, origin: type, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _Mismatch("a list, for example [1, 2]")
    kinds = typing.get_args(hint) or (Any, ...)
    if origin is tuple and Ellipsis not in kinds:
        if len(kinds) != len(value):
            raise _Mismatch(f"a list of {len(kinds)} values")
        return tuple(_convert(v, k, where) for v, k in zip(value, kinds, strict=True))
    return origin(_convert(item, kinds[0], where) for item in value)


def _table(value: Any, hint: Any, where: str) -> Any:
    """A dictionary as it is, or the nested options of a dataclass ``hint``."""
    nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
    if nested and isinstance(value, hint):
        return value
    if not isinstance(value, Mapping):
        raise _Mismatch("a table, for example {key = 1}")
    return check_options(hint, value, where) if nested else value


def _union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    expected = []
    # TOML has no null; the word "none" stands for it wherever None is allowed.
    if type(None) in kinds and (value is None or value == "none"):
        return None
    for kind in kinds:
        if kind is type(None):
            expected.append('"none"')
            continue
        try:
            return _convert(value, kind, where)
        except _Mismatch as error:
            expected.append(str(error))
    raise _Mismatch(" or ".join(expected))


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if any(value == word and type(value) is type(word) for word in allowed):
            return value
        hint_text = nearest(str(value), [str(word) for word in allowed])
        raise _Mismatch(f"one of {', '.join(map(str, allowed))}{hint_text}")
    if origin in (Union, types.UnionType):
        return _union(value, typing.get_args(hint), where)
    for container in (tuple, list):
        if hint is container or origin is container:
            return _sequence(value, hint, container, where)
    if hint is dict or origin is dict or dataclasses.is_dataclass(hint):
        return _table(value, hint, where)
    if hint in (bool, int, float, str):
        return _scalar(value, hint)
    return value


def check_options(cls: type, options: Mapping[str, Any], section: str) -> Any:
    """An instance of the dataclass ``cls`` from the ``options`` of a TOML section.

    Unknown keys, wrong types and values that the class itself refuses are reported with the
    section in front, as ``section.key``. A field whose type is a dataclass takes a table.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = _hints(cls)
    values = {}
    for key, value in plain(dict(options)).items():
        if key not in fields:
            raise UserError(
                f"{section}.{key} is not an option{nearest(key, fields)}; options are: "
                f"{listed(fields)}"
            )
        try:
            values[key] = _convert(value, hints.get(key, Any), f"{section}.{key}")
        except _Mismatch as error:
            raise UserError(f"{section}.{key} = {value!r}: must be {error}") from None
    for key, item in fields.items():
        if key not in values and item.default is MISSING and item.default_factory is MISSING:
            raise UserError(f"{section}.{key} is missing; it has no default, so write a value")
    try:
        return cls(**values)
    except ValueError as error:
        text = str(error)
        names_a_field = text.split(" ", 1)[0].split(".")[0].rstrip(":,=") in fields
        raise UserError(f"{section}.{text}" if names_a_field else f"{section}: {text}") from error
