# SPDX-License-Identifier: Apache-2.0
"""Strict JSON for frozen dataclasses: what is written, sent and ordered has one form.

A dataclass is an object whose keys are its fields in snake_case; a union of dataclasses carries
``"type"`` with the class name. Unknown keys, missing keys and wrong types raise DataError with
the path of the offending value; nothing is coerced. What stands in the text is shown by its
repr and cut, so that it can forge no line of a log.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from k3sagentd.errors import DataError

T = TypeVar("T")
STRING_LIMIT = 64 * 1024  # characters; the longest legitimate one is a PEM certificate


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def to_plain(value: Any) -> Any:
    """Turn ``value`` into what ``json.dumps`` takes."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **plain}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple, frozenset)):
        items = sorted(value) if isinstance(value, frozenset) else value
        return [to_plain(item) for item in items]
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    return value


def dumps(value: Any, *, indent: int | None = None) -> str:
    """JSON text of ``value``, the same for equal values."""
    separators = (",", ":") if indent is None else None
    return json.dumps(to_plain(value), sort_keys=True, indent=indent, separators=separators)


def from_plain(kind: Any, plain: Any, where: str = "", *, newer: bool = False) -> Any:
    """Build a ``kind`` (a type or a typing construct) from parsed JSON; raises DataError.

    ``newer``: it may be of a later version of us, whose further keys are passed over.
    """
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(kind, plain, where, newer)
    if origin is typing.Literal:
        if plain in typing.get_args(kind):
            return plain
        allowed = typing.get_args(kind)
        raise DataError(f"{where or 'value'} is {_short(plain)}, not one of {allowed}")
    if origin is tuple:
        item = typing.get_args(kind)[0]
        _expect(isinstance(plain, list), where, plain, "a list")
        return tuple(
            from_plain(item, each, f"{where}[{i}]", newer=newer) for i, each in enumerate(plain)
        )
    if origin in (Mapping, dict):
        key_kind, item_kind = typing.get_args(kind)
        _expect(isinstance(plain, dict), where, plain, "an object")
        return {
            from_plain(key_kind, key, where): from_plain(
                item_kind, each, f"{where}[{_short(key)}]", newer=newer
            )
            for key, each in plain.items()
        }
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, plain, where, newer)
    return _scalar(kind, plain, where)


def _scalar(kind: Any, plain: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        try:
            return kind(plain)
        except ValueError:
            allowed = ", ".join(str(member.value) for member in kind)
            raise DataError(
                f"{where or 'value'} is {_short(plain)}, not one of {allowed}"
            ) from None
    if kind is float:
        _expect(type(plain) in (int, float), where, plain, "a number")
        try:
            return float(plain)
        except OverflowError:
            raise DataError(f"{where or 'value'} is {_short(plain)}, not a number") from None
    if isinstance(kind, typing.NewType):
        return from_plain(kind.__supertype__, plain, where)
    _expect(type(plain) is kind, where, plain, str(getattr(kind, "__name__", kind)))
    if kind is str:
        _expect(len(plain) <= STRING_LIMIT, where, "a string", f"at most {STRING_LIMIT} characters")
    return plain


def loads(kind: type[T], text: str | bytes) -> T:
    """Parse JSON ``text`` into a ``kind``; raises DataError."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    return typing.cast(T, from_plain(kind, plain))


def _expect(ok: bool, where: str, found: Any, wanted: str) -> None:
    if not ok:
        raise DataError(f"{where or 'value'} is {_short(found)}, not {wanted}")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def _union(kind: Any, plain: Any, where: str, newer: bool) -> Any:
    members: tuple[Any, ...] = typing.get_args(kind)
    if plain is None and type(None) in members:
        return None
    classes: dict[str, Any] = {
        str(m.__name__): m for m in members if isinstance(m, type) and dataclasses.is_dataclass(m)
    }
    if isinstance(plain, dict) and plain.get("type") in classes:
        return _dataclass(classes[plain["type"]], plain, where, newer)
    others = [m for m in members if m is not type(None) and m not in classes.values()]
    for member in others:
        try:
            return from_plain(member, plain, where, newer=newer)
        except DataError:
            if len(others) == 1 and not classes:
                raise
    names = ", ".join([*classes, *(str(m) for m in others)])
    raise DataError(f"{where or 'value'} is {_short(plain)}, not one of {names}")


def _dataclass(kind: Any, plain: Any, where: str, newer: bool) -> Any:
    _expect(isinstance(plain, dict), where, plain, f"an object ({kind.__name__})")
    hints = _hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = f"{where}." if where else ""
    if plain.get("type", kind.__name__) != kind.__name__:
        raise DataError(f"{prefix}type is {_short(plain['type'])}, not {kind.__name__!r}")
    unknown = plain.keys() - fields.keys() - {"type"}
    if unknown and not newer:
        raise DataError(f"unknown key {_short(sorted(unknown)[0])} in {where or kind.__name__}")
    values = {}
    for name, field in fields.items():
        if name in plain:
            values[name] = from_plain(hints[name], plain[name], f"{prefix}{name}", newer=newer)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise DataError(f"missing key {prefix}{name} in {kind.__name__}")
    try:
        return kind(**values)
    except ValueError as error:
        raise DataError(f"{where or kind.__name__}: {error}") from error
