"""Dataclasses from plain data, every key and value checked against their fields, and plain data from dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from ..errors import RecipeError


def build(
    kind: type, data: Any, where: str, *, strict: bool = True, unread: Mapping[str, str] = types.MappingProxyType({})
) -> Any:
    """An instance of dataclass `kind` from a mapping, every key and value checked against its fields.

    Null counts as absent, but for fields of which it is a value. What `kind.unread` or the argument of that name has
    may not stand in `data`, whatever its value; where not `strict`, it is left out instead.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: holds {data!r}, needs a mapping.")
    hints = typing.get_type_hints(kind)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(kind)}
    check_keys(data, fields, where)
    data = {k: v for k, v in data.items() if v is not None or type(None) in typing.get_args(fields[k])}
    missing = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in data]
    if missing:
        raise RecipeError(f"{where}: needs {', '.join(f'`{name}`' for name in missing)}.")
    built = kind(**{key: _coerce(value, fields[key], f"{where}.{key}") for key, value in data.items()})
    ignored = {**(built.unread() if hasattr(built, "unread") else {}), **unread}
    ignored = {key: reason for key, reason in ignored.items() if data.get(key) is not None}
    if ignored and not strict:
        return build(kind, {key: value for key, value in data.items() if key not in ignored}, where)
    for key, reason in ignored.items():
        raise RecipeError(f"{where}.{key}: {reason}")
    if hasattr(built, "validate"):
        built.validate(where)
    return built


def check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"{where}: unknown key {key!r}.{nearest(str(key), known)} Known: {', '.join(known)}.")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as `hint`, or RecipeError. Only widening is done: int to float, list to tuple, layers: 3 to "3"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _coerce(value, option, where)
            except RecipeError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        near = nearest(str(value), [str(a) for a in arguments])
        raise RecipeError(f"{where}: {value!r} is not allowed.{near} Allowed: {', '.join(map(str, arguments))}.")
    elif origin is dict:
        if isinstance(value, Mapping):
            return {
                _coerce(key, arguments[0], where): _coerce(item, arguments[1], f"{where}.{key}")
                for key, item in value.items()
            }
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_coerce(item, arguments[0], where) for item in value)
    elif hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as a string
        except ValueError:
            pass
    elif hint is int and isinstance(value, str):
        try:
            if float(value).is_integer():
                return int(float(value))  # and 1e6 too
        except ValueError:
            pass
    elif hint is str and where.endswith(".layers") and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise RecipeError(f"{where}: {value!r} is of type {type(value).__name__}, needs {_spell(hint)}.")


def _spell(hint: Any) -> str:
    """A type as users write it: `bool | 'global'`."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union, Literal):
        return " | ".join(repr(a) if origin is Literal else _spell(a) for a in typing.get_args(hint))
    if hint is types.NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint).replace("typing.", "")


def nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def plain(value: Any) -> Any:
    """Dataclasses to dicts without fields that hold their default (except the rewriter), tuples to lists."""
    if dataclasses.is_dataclass(value):
        return {
            f.name: plain(getattr(value, f.name))
            for f in sorted(dataclasses.fields(value), key=lambda f: f.name not in ("name", "description", "rewriter"))
            if f.name in ("rewriter", "name") or getattr(value, f.name) != f.default
        }
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_name(where: str, what: str, name: str, known: Collection[str]) -> None:
    """Refuse a name that no registry has.

    Raises:
        RecipeError: with the nearest name, and all that are known.
    """
    if name not in known:
        raise RecipeError(f"{where}: no {what} {name!r}.{nearest(name, known)} Known: {', '.join(known)}.")
