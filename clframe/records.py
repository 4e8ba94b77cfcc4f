"""Frozen dataclasses as JSON values and back, readable across versions.

A field that a file has and the class does not is ignored; a field that the class has and the file does not takes its
default. So adding a field with a default keeps old files readable. A class whose fields were renamed or moved defines
``upgrade``, which turns the content of an older file into today's.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from clframe.errors import RunFolderError

R = TypeVar("R")
_LARGEST = 10**30
"""Of a whole number; Python formats none beyond 10**308."""


def to_json(record: Any) -> str:
    """Return a dataclass as JSON text, one field a line."""
    lines = (f"  {json.dumps(e.name)}: {json.dumps(to_plain(getattr(record, e.name)))}" for e in fields(record))
    return "{\n" + ",\n".join(lines) + "\n}\n"


def to_json_lines(content: Mapping[str, Any], rows: Mapping[str, Sequence[Any]] | None = None) -> str:
    """Return JSON text with a line for each entry of ``content``, and for each entry of the lists in ``rows``."""
    lines = [f"  {json.dumps(key)}: {_in_one_line(value)}" for key, value in content.items()]
    for key, entries in (rows or {}).items():
        listed = ",\n".join(f"    {_in_one_line(entry)}" for entry in entries)
        lines.append(f"  {json.dumps(key)}: [\n{listed}\n  ]")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _in_one_line(value: Any) -> str:
    return json.dumps(to_plain(value), ensure_ascii=False)


def to_json_rows(value: Any, *, indent: str = "") -> str:
    """Return plain values as JSON text with a line for each row of a table: a mapping or list that has none inside."""
    entries = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if not any(isinstance(entry, Mapping | list) and entry for entry in entries):
        return json.dumps(value)
    inner = f"{indent}  "
    if isinstance(value, Mapping):
        lines = [f"{inner}{json.dumps(key)}: {to_json_rows(entry, indent=inner)}" for key, entry in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    return "[\n" + ",\n".join(f"{inner}{to_json_rows(entry, indent=inner)}" for entry in value) + f"\n{indent}]"


def to_plain(value: Any) -> Any:
    """Return numbers, texts, lists and mappings of strict JSON: NaN becomes ``null``, infinity ``"Infinity"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if is_dataclass(value):
        return {e.name: to_plain(getattr(value, e.name)) for e in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(entry) for entry in value]
    return value


def as_tree(value: Any) -> Any:
    """Return a dataclass as nested mappings for a checkpoint, as ``dataclasses.asdict`` does.

    Tuples of numbers are shared, not copied: those of a long stream are most of its records.
    """
    if is_dataclass(value):
        return {e.name: as_tree(getattr(value, e.name)) for e in fields(value)}
    if isinstance(value, Mapping):
        return {key: as_tree(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list) and value and (isinstance(value[0], tuple | list) or is_dataclass(value[0])):
        return type(value)(as_tree(entry) for entry in value)
    return value


def read_record(kind: type[R], content: Mapping[str, Any], *, prefix: str = "") -> R:
    """Build a dataclass from the content of a JSON file, or from what ``dataclasses.asdict`` returned.

    Args:
        kind: The class; its annotations decide how each field is read.
        content: Values by field name.
        prefix: Start of error messages, such as ``"runs/a/results.json: "``.

    Raises:
        RunFolderError: A field without a default is missing, or a value has the wrong type.
    """
    upgrade = getattr(kind, "upgrade", None)
    content = content if upgrade is None else upgrade(content)
    hashable: Any = kind  # mypy: a type variable is not known to be hashable
    hints, values = _hints(hashable), dict[str, Any]()
    for entry in fields(kind):  # type: ignore[arg-type]
        if entry.name in content:
            values[entry.name] = _decode(hints[entry.name], content[entry.name], prefix + entry.name)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise RunFolderError(f"{prefix}{entry.name}: is missing; restore the file or run again")
    return kind(**values)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotation ``hint`` requires; raises :class:`RunFolderError`."""
    outer, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and is_dataclass(hint) and isinstance(value, Mapping):
        return read_record(hint, value, prefix=f"{where}.")
    if outer is types.UnionType:  # X | None
        return None if value is None else _decode(inner[0], value, where)
    if outer is tuple and isinstance(value, list | tuple):
        return tuple(_decode(inner[0], entry, where) for entry in value)
    if outer is Mapping and isinstance(value, Mapping):
        return {_key(inner[0], key, where): _decode(inner[1], entry, where) for key, entry in value.items()}
    if outer is Literal and value in inner:
        return value
    if hint is float and (value is None or value in ("Infinity", "-Infinity")):
        return float("nan") if value is None else float(value)
    if type(value) is int and abs(value) > _LARGEST:
        raise RunFolderError(f"{where}: found a number of more than 30 digits; restore the file or run again")
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise RunFolderError(f"{where}: found {json.dumps(value, default=str)[:40]}; restore the file or run again")


def _key(hint: Any, key: Any, where: str) -> Any:
    if hint is str:
        return str(key)
    try:
        return int(key)
    except ValueError:
        raise RunFolderError(f"{where}: found the key {key!r}, not a number; restore the file") from None
