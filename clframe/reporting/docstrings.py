"""Docstrings as data: what listings and method cards say of a class or function, and of each of its options."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from clframe.core.options import REQUIRED, option_types

_SECTION = re.compile(r"^(Args|Class attributes|Example|Examples|Raises|Returns|Yields):$")
_ENTRY = re.compile(r"^ {4}(\w+): (.*)$")


@dataclass(frozen=True)
class Option:
    """One keyword option: its type in words, its default as YAML writes it (None: it must be given), and its text."""

    name: str
    kind: str
    default: str | None
    text: str


@dataclass(frozen=True)
class Described:
    """A class or function in its own words: the first sentence, the paragraphs behind it, and its options."""

    summary: str
    paragraphs: tuple[str, ...]
    options: tuple[Option, ...]


def described(entry: Callable[..., Any]) -> Described:
    """What the docstring and the annotations of ``entry`` say.

    >>> def make(shape: tuple[int, ...], *, width: int = 8, path: str | None = None):
    ...     '''A layer.
    ...
    ...     Cheap, and
    ...     small.
    ...
    ...     Args:
    ...         shape: Of inputs.
    ...         width: Units; more
    ...             learn more.
    ...     '''
    >>> described(make).paragraphs
    ('Cheap, and small.',)
    >>> described(make).options[0]
    Option(name='width', kind='whole number', default='8', text='Units; more learn more.')
    """
    sections = _sections(inspect.getdoc(entry) or "")
    summary, *paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", sections[""])]
    texts = _entries(sections.get("Args", ""))
    options = tuple(
        Option(name, in_words(annotation), None if default is REQUIRED else as_yaml(default), texts.get(name, ""))
        for name, (annotation, default) in option_types(entry).items()
    )
    return Described(summary, tuple(paragraph for paragraph in paragraphs if paragraph), options)


def in_words(annotation: Any) -> str:
    """A type as readers of a config know it.

    >>> in_words(float | None), in_words(Literal["all", "past"])
    ('number or null', 'all or past')
    """
    origin = get_origin(annotation) or annotation
    if origin is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(choice) for choice in get_args(annotation)))
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path", type(None): "null"}
    if origin in names:
        return names[origin]
    return "mapping" if isinstance(origin, type) and issubclass(origin, dict) else "list"


def as_yaml(value: Any) -> str:
    """A default as a config would state it.

    >>> as_yaml(None), as_yaml(True), as_yaml(("crop", 2)), as_yaml("")
    ('null', 'true', '[crop, 2]', "''")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value) or "''"


def _sections(text: str) -> dict[str, str]:
    """The docstring cut at its headings; what stands before the first is called ''."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in text.splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading[1]
        found.setdefault(current, [])
        if not heading:
            found[current].append(line)
    return {name: "\n".join(lines).strip("\n") for name, lines in found.items()}


def _entries(section: str) -> dict[str, str]:
    """Text of each ``name: text`` of an Args section, on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            name, found[entry[1]] = entry[1], entry[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found
