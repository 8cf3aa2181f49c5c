"""Checks and JSON reading shared by the frozen config dataclasses.

Every config of this project is ``@dataclass(frozen=True, kw_only=True, slots=True)``: a run is a value, and a variant
is ``dataclasses.replace`` of another, so that a preset can never leak into the next one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def require_choice(field: str, value: object, choices: Collection[object]) -> None:
    """Raise ``ValueError`` naming ``field``, its value, the nearest valid one and all of them, unless it is one."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{field}={value!r} is not valid{hint}; choose one of: {', '.join(map(str, choices))}")


def require_positive(field: str, value: float) -> None:
    """Raise ``ValueError`` naming ``field`` unless ``value > 0``."""
    if not value > 0:
        raise ValueError(f"{field}={value!r} must be greater than 0")


def require_in_range(field: str, value: float, low: float, high: float) -> None:
    """Raise ``ValueError`` naming ``field`` unless ``low <= value <= high``."""
    if not low <= value <= high:
        raise ValueError(f"{field}={value!r} must lie in [{low}, {high}]")


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build the (nested) config dataclass ``cls`` from plain JSON values.

    Args:
        cls: A dataclass type.
        values: Its fields; nested configs are nested mappings, tuples may come as lists.
        path: Where ``values`` stands in the whole config, for error messages.

    Raises:
        ValueError: An unknown key (the nearest valid name is given), or a value of the wrong kind.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else key
        if key not in fields:
            require_choice(f"{path or cls.__name__}: the key", key, list(fields))
        arguments[key] = _coerce(hints[key], value, where)
    missing = [
        name
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{path or cls.__name__}: missing {', '.join(missing)}")
    return cls(**arguments)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _coerce(typing.get_args(hint)[0], value, where)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union([arm for arm in typing.get_args(hint) if arm is not type(None)], value, where)
    if origin is dict:
        return _coerce_dict(typing.get_args(hint)[1], value, where)
    if origin is typing.Literal:
        require_choice(where, value, typing.get_args(hint))
        return value
    if origin is tuple:
        return _coerce_tuple(typing.get_args(hint)[0], value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r} must be a mapping of {hint.__name__} fields")
        return from_dict(hint, value, where)
    return _coerce_plain(hint, value, where)


def _coerce_tuple(item: Any, value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}={value!r} must be a list")
    return tuple(_coerce(item, entry, f"{where}[{i}]") for i, entry in enumerate(value))


def _coerce_union(arms: list[Any], value: Any, where: str) -> Any:
    if value is None:
        return None
    first_error: ValueError | None = None
    for arm in arms:
        try:
            return _coerce(arm, value, where)
        except ValueError as error:
            first_error = first_error or error
    assert first_error is not None  # a union has arms
    raise first_error


def _coerce_dict(item: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}={value!r} must be a mapping")
    return {str(key): _coerce(item, entry, f"{where}.{key}") for key, entry in value.items()}


def _coerce_plain(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int to Python, not to a reader of a config.
    if isinstance(hint, type) and (not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool)):
        raise ValueError(f"{where}={value!r} must be of type {hint.__name__}")
    return value
