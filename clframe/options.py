"""Check options by name against the signature of the function or class that takes them.

The config schema leaves one thing open: the options of components, backbones and benchmarks. They are checked against
the constructor's annotations before it is called, so that a wrong name or type is one line that names the key.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from clframe.errors import ConfigError, Problems, nearest

REQUIRED: Final = inspect.Parameter.empty
"""Marks an option without a default."""


def option_types(constructor: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Map each keyword option of ``constructor`` to ``(annotation, default or REQUIRED)``.

    >>> def make(shape: tuple[int, ...], *, width: int = 8): ...
    >>> option_types(make)
    {'width': (<class 'int'>, 8)}
    """
    if isinstance(constructor, type) and dataclasses.is_dataclass(constructor):
        return dict(_field_types(constructor))
    hints = get_type_hints(constructor)
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


@cache
def _field_types(constructor: type) -> dict[str, tuple[Any, Any]]:
    """Compute :func:`option_types` of a dataclass; cached, because resolving annotations takes milliseconds."""
    hints = get_type_hints(constructor)
    fields = dataclasses.fields(constructor)
    return {field.name: (hints[field.name], _default(field)) for field in fields if field.init}


def check_options(
    constructor: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    where: str,
    block_keys: Iterable[str] = (),
    elsewhere: Callable[[str], Sequence[str]] = lambda _: (),
    complete: bool = True,
) -> dict[str, Any]:
    """Convert options to their declared types.

    Args:
        constructor: The function or class that takes them.
        given: Options from a config or a strategy expression.
        where: Key prefix for messages, such as ``components.er``; empty for none.
        block_keys: Further keys of the same config block, for the suggestions in messages.
        elsewhere: Returns the names of what has an option that ``constructor`` does not have, for messages.
        complete: Whether options without a default must be given.

    Raises:
        ConfigError: An unknown option (with the nearest one), a value of another type, or a missing option; each in
            its own line.

    >>> def make(*, width: int = 8): ...
    >>> check_options(make, {"width": 4}, where="backbone")
    {'width': 4}
    """
    known = option_types(constructor)
    checked: dict[str, Any] = {}
    problems, prefix = Problems(), f"{where}." if where else ""
    for name, value in given.items():
        with problems.attempt():
            if name not in known:
                close = nearest(str(name), (*known, *block_keys))
                advice = f"did you mean '{close}'?" if close else f"options are {', '.join(known) or 'none'}"
                if others := elsewhere(str(name)):
                    advice = f"it is an option of {', '.join(others)}"
                raise ConfigError(f"{prefix}{name}: unknown option; {advice}")
            annotation, _ = known[name]
            checked[name] = convert(value, annotation, where=f"{prefix}{name}")
    if not problems.found:
        for name in missing_options(constructor, checked) if complete else ():
            wanted = _describe(known[name][0])
            problems.add(ConfigError(f"{prefix}{name}: is missing and has no default; give {wanted}"))
    problems.raise_found()
    return checked


def convert_fields(instance: Any, *, where: str) -> None:
    """Check the fields of a dataclass that was built in Python as options of a config, and store them converted.

    Numbers and arrays of numpy count as numbers and lists. Nothing is checked if an annotation names what only a
    function knows.

    Args:
        instance: A dataclass, which may be frozen.
        where: Key prefix for messages, such as ``components.er``; empty for none.

    Raises:
        ConfigError: Values of another type than declared; each in its own line.
    """
    constructor = type(instance)
    try:
        known = option_types(constructor)
    except NameError:
        return
    given = {name: _plain_value(getattr(instance, name)) for name in known}
    for name, value in check_options(constructor, given, where=where).items():
        if value is not getattr(instance, name):
            object.__setattr__(instance, name, value)


def convert_argument(value: Any, annotation: Any, *, where: str) -> Any:
    """Convert an argument that was given in Python, as :func:`convert` does a value of a config.

    Numbers and arrays of numpy count as numbers and lists.

    Raises:
        ConfigError: A value of another type; the message begins with ``where``.

    >>> import numpy as np
    >>> convert_argument(np.arange(3), tuple[int, ...], where="class_order")
    (0, 1, 2)
    """
    return convert(_plain_value(value), annotation, where=where)


def _plain_value(value: Any) -> Any:
    """Return numbers and arrays of numpy, which configs cannot have, as numbers and lists of Python."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):  # importing numpy takes a tenth of a second
        return value.tolist()
    if type(value) in (list, tuple) and any(type(item).__module__ == "numpy" for item in value):
        return type(value)(map(_plain_value, value))
    return value


def rename_options(given: Mapping[str, Any], renamed: Mapping[str, str], *, where: str) -> dict[str, Any]:
    """Replace former option names by their present ones, so that older configs and run folders stay readable.

    Args:
        given: Options from a config or a strategy expression.
        renamed: Present names by former ones.
        where: Key prefix for messages, such as ``components.er``.

    Raises:
        ConfigError: An option given under both names.

    >>> rename_options({"buffer": 50}, {"buffer": "memory"}, where="components.er")
    {'memory': 50}
    """
    for former, present in renamed.items():
        if former in given and present in given:
            raise ConfigError(f"{where}.{former}: is the former name of '{present}', which is given too; remove it")
    return {renamed.get(name, name): value for name, value in given.items()}


def missing_options(constructor: Callable[..., Any], given: Mapping[str, Any]) -> tuple[str, ...]:
    """List options without a default that are missing from ``given``.

    >>> def make(*, path: str, width: int = 8): ...
    >>> missing_options(make, {"width": 4})
    ('path',)
    """
    known = option_types(constructor)
    return tuple(name for name, (_, default) in known.items() if default is REQUIRED and name not in given)


def convert(value: Any, annotation: Any, *, where: str) -> Any:
    """Convert ``value`` to the annotated type, or raise a :class:`ConfigError` that names the key.

    Whole numbers are accepted for floats and text for paths. Nothing else is converted, so ``"3"`` is not an integer
    and ``true`` is not a number. Numbers must be finite, and whole numbers must fit in 64 bits.

    >>> convert(2, float, where="lr")
    2.0
    """
    if annotation is Any:
        return value
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Literal:
        return _convert_literal(value, args, where=where)
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where=where)
    if origin in _SEQUENCES and isinstance(value, (list, tuple)):
        return _convert_sequence(value, origin, args, where=where)
    if origin in _MAPPINGS and isinstance(value, dict):
        inner = args[1] if args else Any
        return {key: convert(item, inner, where=f"{where}.{key}") for key, item in value.items()}
    if annotation is float and type(value) in (int, float):
        return _finite(value, where=where)
    if annotation is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}: found {format_value(value)}; give a number that fits 64 bits")
    if annotation is Path and (type(value) is str or isinstance(value, Path)):
        return Path(value)
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    quotes = ", in quotes" if annotation is str and isinstance(value, (bool, int, float)) else ""
    raise ConfigError(f"{where}: found {format_value(value)}; give {_describe(annotation)}{quotes}")


_SEQUENCES = (tuple, list, collections.abc.Sequence)
_MAPPINGS = (dict, collections.abc.Mapping)


def require_count(value: Any, *, least: int, where: str) -> None:
    """Raise ConfigError unless ``value`` is a whole number, of Python or numpy, of at least ``least``.

    >>> require_count(0, least=0, where="epochs")
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ConfigError(f"{where}: found {format_value(value)}; give a whole number of at least {least}")
    if value < least:
        raise ConfigError(f"{where}: found {value}; give at least {least}")


def _convert_literal(value: Any, choices: tuple[Any, ...], *, where: str) -> Any:
    if any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    close = nearest(str(value), [str(choice) for choice in choices])
    advice = f"did you mean '{close}'?" if close else "give one of them"
    raise ConfigError(f"{where}: found {format_value(value)}; {advice} (known: {', '.join(map(str, choices))})")


def _convert_union(value: Any, choices: tuple[Any, ...], *, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    same_kind: list[ConfigError] = []
    for choice in choices:
        try:
            return convert(value, choice, where=where)
        except ConfigError as failure:
            if _is_kind(value, get_origin(choice) or choice):
                same_kind.append(failure)
    if len(same_kind) == 1:  # for example a list where a list is allowed: the fault is in one of its items
        raise same_kind[0]
    words = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
    close = nearest(value, map(str, words)) if isinstance(value, str) else None
    advice = f"did you mean '{close}'? give" if close else "give"
    raise ConfigError(f"{where}: found {format_value(value)}; {advice} {_join(choices)}")


def _is_kind(value: Any, origin: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return origin in (_MAPPINGS if isinstance(value, dict) else _SEQUENCES)
    return origin is type(value) or (origin is float and type(value) is int)


def _convert_sequence(value: Any, origin: Any, args: tuple[Any, ...], *, where: str) -> Any:
    kind = list if origin is list else tuple
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise ConfigError(f"{where}: found {format_value(value)}; give a list of {len(args)}")
        items = args
    else:
        items = (args[0] if args else Any,) * len(value)
    return kind(
        convert(item, annotation, where=f"{where}[{i}]")
        for i, (item, annotation) in enumerate(zip(value, items, strict=True))
    )


def _finite(value: float, *, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{where}: found {format_value(value)}; give a finite number")
    return number


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_KINDS: dict[Any, str] = {str: " (text)", list: " (a list)", tuple: " (a list)", dict: " (a mapping)"}


def format_value(value: Any, *, limit: int = 60) -> str:
    """Format a value for messages: null and booleans as in YAML, long values shortened, text and lists labeled.

    >>> format_value(None), format_value(True), format_value(3), format_value("er")
    ('null', 'true', '3', "'er' (text)")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = " ".join(repr(list(value) if type(value) is tuple else value).splitlines())  # an error is one line
    if len(text) > limit:
        text = f"{text[: limit - 10]} ... {text[-5:]}"
    return text + _KINDS.get(type(value), "")


def _describe(annotation: Any) -> str:
    origin = get_origin(annotation) or annotation
    if origin in _SEQUENCES:
        return "a list"
    if origin in _MAPPINGS:
        return "a mapping"
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return _join(get_args(annotation))
    if annotation is Path:
        return "a path"
    name: str = getattr(annotation, "__name__", str(annotation))
    return _WORDS.get(annotation, name)


def _join(choices: tuple[Any, ...]) -> str:
    return " or ".join(_describe(choice) for choice in choices)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return REQUIRED if field.default is dataclasses.MISSING else field.default
