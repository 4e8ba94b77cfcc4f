"""Entries of a config that are names of classes, with or without options: Avalanche's plugins, Lightning's loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clframe.errors import ConfigError, nearest
from clframe.options import format_value

BLOCK = "avalanche"
"""The key in ``components`` that is reserved for Avalanche plugins."""
WHERE = f"components.{BLOCK}.plugins"
_EXAMPLE = "[LwFPlugin, {EWCPlugin: {ewc_lambda: 0.1}}]"
LOGGERS = ("tensorboard", "csv")
"""Loggers available in both engines."""


def named_plugins(components: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Class names and options of the Avalanche plugins in a config's ``components``, in order.

    Raises:
        ConfigError: The block has another key, or an entry is neither a name nor a name with options.

    >>> named_plugins({"avalanche": {"plugins": ["LwFPlugin", {"EWCPlugin": {"ewc_lambda": 0.1}}]}})
    (('LwFPlugin', {}), ('EWCPlugin', {'ewc_lambda': 0.1}))
    """
    block = components.get(BLOCK, {})
    for key in block:
        if key != "plugins":
            close = f"did you mean 'plugins'? it is a list such as {_EXAMPLE}"
            advice = close if nearest(str(key), ["plugins"]) else f"give plugins: {_EXAMPLE}"
            raise ConfigError(f"components.{BLOCK}.{key}: unknown key; {advice}")
    listed = block.get("plugins", [])
    if not isinstance(listed, (list, tuple)):
        raise ConfigError(f"{WHERE}: found {format_value(listed)}; give a list such as {_EXAMPLE}")
    return tuple(_read_named(entry, f"{WHERE}[{i}]") for i, entry in enumerate(listed))


def plugin_list(components: Mapping[str, Mapping[str, Any]]) -> str:
    """Class names of the Avalanche plugins in a config's ``components``, as text; empty without plugins.

    >>> plugin_list({"avalanche": {"plugins": ["LwFPlugin", "EWCPlugin"]}})
    'LwFPlugin, EWCPlugin'
    """
    return ", ".join(name for name, _ in named_plugins(components))


def lightning_loggers(loggers: Sequence[Any]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Class names and options of the entries of ``trainer.loggers`` that are loggers of Lightning.

    >>> lightning_loggers(["csv", {"WandbLogger": {"offline": True}}])
    (('WandbLogger', {'offline': True}),)
    """
    example = "[csv, {WandbLogger: {offline: true}}]"
    named = [_read_named(entry, f"trainer.loggers[{i}]", example) for i, entry in enumerate(loggers)]
    for i, (name, options) in enumerate(named):
        if name in LOGGERS and options:
            raise ConfigError(f"trainer.loggers[{i}].{name}: found {format_value(options)}; it takes no options")
    return tuple((name, options) for name, options in named if name not in LOGGERS)


def _read_named(entry: Any, where: str, example: str = _EXAMPLE) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"{where}: found {format_value(entry)}; give a name, or one with options as in {example}")
    ((name, options),) = entry.items()
    if not isinstance(options, (dict, type(None))):
        raise ConfigError(f"{where}.{name}: found {format_value(options)}; give a mapping of its options")
    return str(name), {str(key): value for key, value in (options or {}).items()}
