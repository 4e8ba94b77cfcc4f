"""Types of the arguments that objects for use without a config are built with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clframe.errors import ConfigError
from clframe.options import convert, format_value


def require_types(given: Mapping[str, tuple[Any, Any]], *, where: str) -> None:
    """Refuse values that a key of a config with this annotation would refuse.

    Args:
        given: Value and annotation of each argument.
        where: Start of the error.

    Raises:
        ConfigError: A value of another type.

    >>> require_types({"drop_last": ("no", bool)}, where="LightningStrategy")
    Traceback (most recent call last):
    clframe.errors.ConfigError: LightningStrategy.drop_last: found 'no' (text); give true or false
    """
    for name, (value, annotation) in given.items():
        convert(value, annotation, where=f"{where}.{name}")


def require_objects(given: Mapping[str, tuple[Any, type]], *, where: str) -> None:
    """Refuse objects of another class; None means an argument that was left out.

    Args:
        given: Object and class of each argument.
        where: Start of the error.

    Raises:
        ConfigError: An object of another class.

    >>> require_objects({"plugins": (3, list), "model": (None, dict)}, where="LightningStrategy")
    Traceback (most recent call last):
    clframe.errors.ConfigError: LightningStrategy.plugins: found 3; give a list
    """
    for name, (value, kind) in given.items():
        if value is not None and not isinstance(value, kind):
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            raise ConfigError(f"{where}.{name}: found {format_value(value)}; give {article} {kind.__name__}")


def require_functions(given: Mapping[str, Any], *, where: str) -> None:
    """Refuse objects that cannot be called; None means an argument that was left out.

    Raises:
        ConfigError: Such an object.

    >>> require_functions({"criterion": "ce"}, where="LightningStrategy")
    Traceback (most recent call last):
    clframe.errors.ConfigError: LightningStrategy.criterion: found 'ce' (text); give a function
    """
    for name, value in given.items():
        if value is not None and not callable(value):
            raise ConfigError(f"{where}.{name}: found {format_value(value)}; give a function")


def require_plugins(plugins: Sequence[Any], *, where: str) -> None:
    """Refuse objects without a callback, which Avalanche would pass over.

    Raises:
        ConfigError: Such an object.

    >>> require_plugins(["er"], where="LightningStrategy")
    Traceback (most recent call last):
    clframe.errors.ConfigError: LightningStrategy.plugins[0]: found 'er' (text); give a plugin of Avalanche
    """
    for i, plugin in enumerate(plugins):
        names = () if isinstance(plugin, type) else dir(plugin)
        if not any(name.startswith(("before_", "after_")) for name in names):
            raise ConfigError(f"{where}.plugins[{i}]: found {format_value(plugin)}; give a plugin of Avalanche")
