"""Turns untrusted mappings (JSON, YAML) into frozen dataclasses, and says exactly where they are wrong.

A dataclass is the schema: field names are the keys, annotations the types, defaults make a key optional. Supported
annotations: str, int, float, bool, unions of these, Literal of strings, tuple[X, ...], dict[str, X], X | None, object
(anything), other dataclasses.

A dataclass may check more in its ``__post_init__``, by raising `Mismatch` with a text that starts with the field's
name: ``Mismatch("size: expected ...")``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


class Mismatch(ValueError):
    """A value that does not fit its type; the text starts with the key path, such as ``graphs.decoder.inputs[0]``."""


def read(schema: type[T], value: object, path: str = "") -> T:
    """Check `value` against the dataclass `schema` and build it.

    Raises `Mismatch` for an unknown or missing key, or a value of the wrong type; nothing is converted, except that an
    integer is taken where a float is asked. Text must be valid Unicode, and numbers finite.
    """
    if not isinstance(value, dict):
        raise Mismatch(_say(path, f"expected keys and values, got {_kind(value)}"))
    fields = {field.name: field for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            hint = did_you_mean(shown_key(key), fields) or f"known: {', '.join(fields)}"
            raise Mismatch(_say(_join(path, key), f"unknown key; {hint}"))
    hints = _hints(typing.cast(Any, schema))
    arguments = {}
    for name, field in fields.items():
        if name in value:
            arguments[name] = _value(hints[name], value[name], _join(path, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Mismatch(_say(_join(path, name), "missing"))
    try:
        return schema(**arguments)
    except Mismatch as error:  # from a __post_init__, which does not know where it stands
        text = str(error)
        first = re.match(r"(\w+)[.\[:]", text)
        if path and first and first[1] in fields:
            raise Mismatch(f"{path}.{text}") from None
        raise Mismatch(_say(path, text)) from None


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A question after the known name that is most like this one; empty where none is. cutoff: of `difflib`'s."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""


def write(value: object) -> Any:
    """The inverse of `read`: plain dicts, lists and scalars; fields that hold None are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: write(item) for name, item in pairs if item is not None}
    if isinstance(value, dict):
        return {key: write(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [write(item) for item in value]
    return value


def shown(value: object) -> str:
    """`value` as an error text may quote it: at most 40 characters, all of them printable."""
    try:
        text = repr(value)
    except ValueError:  # a number of more digits than Python writes out
        return "a number of thousands of digits"
    return text if len(text) <= 40 else text[:37] + "..."


def shown_key(key: object) -> str:
    """`key` as it stands in a key path: plain where it is short and printable."""
    return key if isinstance(key, str) and key.isprintable() and 0 < len(key) <= 64 else shown(key)


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return typing.get_type_hints(schema)


def _value(kind: Any, value: object, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        if value is None and len(options) < len(arguments):
            return None
        if len(options) == 1:
            return _value(options[0], value, path)
        for option in options:
            if type(value) is option:  # not isinstance: True is no number
                return _value(option, value, path)
        raise Mismatch(_say(path, f"expected {' or '.join(_NAMES[option] for option in options)}, got {_kind(value)}"))
    if origin is typing.Literal:
        if value not in arguments:
            got = "; ".join(filter(None, (_kind(value), did_you_mean(str(value), arguments))))
            raise Mismatch(_say(path, f"expected one of {', '.join(arguments)}; got {got}"))
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise Mismatch(_say(path, f"expected a list, got {_kind(value)}"))
        return tuple(_value(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise Mismatch(_say(path, f"expected keys and values, got {_kind(value)}"))
        for key in value:
            if not isinstance(key, str):
                raise Mismatch(_say(path, f"key {shown(key)} is {_kind(key)}, expected text"))
            _check_unicode(key, path)
        return {key: _value(arguments[1], item, _join(path, key)) for key, item in value.items()}
    if kind is typing.Any or kind is object:
        return value
    if dataclasses.is_dataclass(kind):
        return read(typing.cast(type, kind), value, path)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise Mismatch(_say(path, f"expected a finite number, got {shown(value)}")) from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise Mismatch(_say(path, f"expected {_NAMES[kind]}, got {_kind(value)}"))
    if isinstance(value, float) and not math.isfinite(value):
        raise Mismatch(_say(path, f"expected a finite number, got {value}"))
    if isinstance(value, str):
        _check_unicode(value, path)
    return value


def _check_unicode(text: str, path: str) -> None:
    # JSON can spell half of a surrogate pair, which then breaks whatever prints or encodes it.
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Mismatch(_say(path, f"{shown(text)} is not valid Unicode")) from None


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def _kind(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "keys and values"
    if isinstance(value, list):
        return "a list"
    return f"{_NAMES.get(type(value), type(value).__name__)} ({shown(value)})"


def _join(path: str, key: object) -> str:
    return f"{path}.{shown_key(key)}" if path else shown_key(key)


def _say(path: str, what: str) -> str:
    return f"{path}: {what}" if path else what
