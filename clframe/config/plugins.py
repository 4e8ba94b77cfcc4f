"""The block ``components.avalanche``: plugins of Avalanche's by class name, each with its options.

It is no component and has no place in the strategy's expression: what it names acts beside the components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clframe.core.options import shown
from clframe.errors import ConfigError, nearest

BLOCK = "avalanche"
"""The one name inside ``components`` that no component can have."""
WHERE = f"components.{BLOCK}.plugins"
_EXAMPLE = "[LwFPlugin, {EWCPlugin: {ewc_lambda: 0.1}}]"


def named_plugins(components: Mapping[str, Mapping[str, Any]]) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Class names and options of the plugins that a config's ``components`` name, in order.

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
        raise ConfigError(f"{WHERE}: found {shown(listed)}; give a list such as {_EXAMPLE}")
    return tuple(_named(entry, f"{WHERE}[{i}]") for i, entry in enumerate(listed))


def _named(entry: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ConfigError(f"{where}: found {shown(entry)}; give a name, or one with its options as in {_EXAMPLE}")
    ((name, options),) = entry.items()
    if not isinstance(options, (dict, type(None))):
        raise ConfigError(f"{where}.{name}: found {shown(options)}; give a mapping of its options")
    return str(name), {str(key): value for key, value in (options or {}).items()}
