"""Plain values as the YAML text of ``OmegaConf.to_yaml``, without its containers, which take most of its time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from pathlib import PurePath
from typing import Any

import yaml
from yaml.representer import RepresenterError

from clframe.errors import ConfigError
from clframe.options import format_value
from clframe.printable import printable

_SafeDumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # PyYAML may have been built without libyaml


class _Dumper(_SafeDumper):  # type: ignore[misc]  # chosen above
    """Writes the types that OmegaConf reads: plain values and paths."""


def _represent_text(dumper: Any, text: str) -> yaml.ScalarNode:
    node: yaml.ScalarNode = dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="'" if _needs_quotes(text) else None
    )
    return node


def _needs_quotes(text: str) -> bool:
    """Whether OmegaConf, unlike PyYAML, which quotes its own cases, might read the text as another type."""
    if text in ("y", "Y", "n", "N"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True


def _represent_path(dumper: Any, path: PurePath) -> yaml.SequenceNode:
    tag = f"tag:yaml.org,2002:python/object/apply:pathlib.{type(path).__name__}"
    node: yaml.SequenceNode = dumper.represent_sequence(tag, [str(path)])
    return node


_Dumper.add_representer(str, _represent_text)
_Dumper.add_multi_representer(PurePath, _represent_path)
for _unreadable in (set, date, datetime):  # PyYAML writes them, OmegaConf does not accept them
    _Dumper.add_representer(_unreadable, _SafeDumper.represent_undefined)


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return plain values as YAML in the order of their keys; :func:`~clframe.config.files.parse_yaml` reads it.

    Raises:
        ConfigError: A value that a config cannot hold, such as a number of NumPy, or a path that is not UTF-8.
    """
    try:
        text = yaml.dump(tree, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
    except RepresenterError as error:
        raise ConfigError(
            f"config: found {format_value(error.args[-1])}, which a config cannot hold; give a number, text, list or "
            f"mapping of Python"
        ) from None
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"config: found the text {printable(error.object)}, which is not UTF-8; rename the file or folder"
        ) from None
    return str(text)
