"""Options by name, checked against the annotations of the function or class that takes them.

The one open place of a config is where a component, backbone or benchmark gets its own options. Here
they are held against the constructor's signature before it is called, so that a wrong name or type is
one line that names the key.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clframe.errors import ConfigError, nearest


def option_types(constructor: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Keyword options of ``constructor``: name -> (annotation, default).

    >>> def make(shape: tuple[int, ...], *, width: int = 8): ...
    >>> option_types(make)
    {'width': (<class 'int'>, 8)}
    """
    if isinstance(constructor, type) and dataclasses.is_dataclass(constructor):
        hints = get_type_hints(constructor)
        return {
            field.name: (hints[field.name], _default(field))
            for field in dataclasses.fields(constructor)
            if field.init
        }
    hints = get_type_hints(constructor)
    return {
        name: (hints.get(name, Any), parameter.default)
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def check_options(
    constructor: Callable[..., Any], given: Mapping[str, Any], *, where: str
) -> dict[str, Any]:
    """The options converted to their declared types.

    Args:
        constructor: Whoever will be called with them.
        given: Options as a config or an expression states them.
        where: Key prefix for messages, such as ``components.er``.

    Raises:
        ConfigError: An unknown option (with the nearest one), or a value of another type.

    >>> def make(*, width: int = 8): ...
    >>> check_options(make, {"width": 4}, where="backbone")
    {'width': 4}
    """
    known = option_types(constructor)
    checked: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            close = nearest(name, known)
            advice = f"did you mean '{close}'?" if close else f"options are {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}.{name}: unknown option; {advice}")
        annotation, _ = known[name]
        checked[name] = convert(value, annotation, where=f"{where}.{name}")
    return checked


def convert(value: Any, annotation: Any, *, where: str) -> Any:
    """``value`` as the annotated type, or a :class:`ConfigError` naming the key.

    Whole numbers are accepted for floats; nothing else changes its type, so ``"3"`` is no integer and
    ``true`` is no number.

    >>> convert(2, float, where="lr")
    2.0
    """
    if annotation is Any:
        return value
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        close = nearest(str(value), [str(a) for a in args])
        advice = f"did you mean '{close}'?" if close else "choose one of"
        raise ConfigError(f"{where}: found {value!r}; {advice} ({', '.join(map(str, args))})")
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where=where)
    if origin in (tuple, list):
        return _convert_sequence(value, origin, args, where=where)
    if annotation is float and type(value) is int:
        return float(value)
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    raise ConfigError(f"{where}: found {value!r} ({_kind(value)}); give {_describe(annotation)}")


def _convert_union(value: Any, args: tuple[Any, ...], *, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    error: ConfigError | None = None
    for choice in args:
        if choice is type(None):
            continue
        try:
            return convert(value, choice, where=where)
        except ConfigError as failure:
            error = error or failure
    choices = " or ".join(_describe(a) for a in args)
    raise ConfigError(f"{where}: found {value!r} ({_kind(value)}); give {choices}") from error


def _convert_sequence(value: Any, origin: Any, args: tuple[Any, ...], *, where: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: found {value!r} ({_kind(value)}); give a list")
    item = args[0] if args else Any
    return origin(convert(v, item, where=f"{where}[{i}]") for i, v in enumerate(value))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def _describe(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (tuple, list):
        return "a list"
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(annotation)))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in get_args(annotation))
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _kind(value: Any) -> str:
    return _WORDS.get(type(value), type(value).__name__)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
