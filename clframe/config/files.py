"""Config files and registered names: where they are found and how a file is read."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from copy import deepcopy
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

from clframe.core import COMPONENTS
from clframe.data import SOURCES
from clframe.errors import ConfigError, UnknownNameError, nearest, unknown_name
from clframe.files import read_text
from clframe.nn import BACKBONES
from clframe.own_code import is_dotted
from clframe.registry import Registry

_PACKAGE = Path(__file__).resolve().parents[1]

YAML = (".yaml", ".yml")
"""Endings by which a file is recognized; anything else is a name."""

MOST_YAML = 2**24
"""Bytes of a config file; those of runs have a few kilobytes."""
MOST_KEPT = 2**16
"""Characters of a config whose contents are kept, so that the same text is not parsed again."""
MOST_DEPTH = 500
"""Levels of brackets in a config."""
MOST_NODES = 2 * 10**5
"""Values of a config after every alias has been expanded."""

REGISTRIES: dict[str, Registry[Any]] = {"backbone": BACKBONES, "benchmark": SOURCES, "strategy": COMPONENTS}
"""Registries by config group: a name registered there is a config without a file."""


class Registered(NamedTuple):
    """A registered name without a file: a config that sets this name and nothing else."""

    group: str
    name: str

    def read(self) -> dict[Any, Any]:
        """The contents that a file for this name would have."""
        return {self.group: self.name if self.group == "strategy" else {"name": self.name}}


def shipped_configs() -> Path:
    """The folder of the YAML files that come with clframe.

    An installed wheel carries them inside the package, as ``clframe/_configs``; a checkout, including one installed
    with ``pip install -e``, has them in the folder ``configs`` next to the package. Raises
    :class:`~clframe.errors.ConfigError` where neither exists.

    >>> shipped_configs().is_dir()
    True
    """
    installed = _PACKAGE / "_configs"
    if installed.is_dir():
        return installed
    checkout = _PACKAGE.parent
    # site-packages may contain a "configs" of another package: require our pyproject.toml next to it.
    if (checkout / "configs").is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout / "configs"
    raise ConfigError(
        f"configs: neither {installed} nor a checkout's {checkout / 'configs'} exists; install clframe again"
    )


def config_folders() -> list[Path]:
    """Folders searched for configs: ``./configs`` first, then those that ship with clframe."""
    own = Path("configs")
    return ([own] if own.is_dir() else []) + [shipped_configs()]


def known_configs(group: str | None = None) -> dict[str, Path | Registered]:
    """Every config by ``group/name``: your files, then shipped files, then registered names without a file."""
    found: dict[str, Path | Registered] = {
        f"{kind}/{name}": Registered(kind, name)
        for kind, registry in REGISTRIES.items()
        if group in (None, kind)
        for name in registry.names()
    }
    for folder in reversed(config_folders()):
        for name in glob(f"{group or '*'}/*.yaml", root_dir=folder):
            found[name.removesuffix(".yaml").replace(os.sep, "/")] = folder / name
    return dict(sorted(found.items()))


def _find_key(key: str) -> Path | Registered | None:
    """Return the entry of :func:`known_configs` for ``group/name``, without a search through all others."""
    group, _, name = key.partition("/")
    if group and not group.startswith(".") and not name.startswith("."):
        for folder in config_folders():
            with suppress(OSError, ValueError):  # no such group, or a name that no folder can have
                if f"{name}.yaml" in os.listdir(folder / group):
                    return folder / group / f"{name}.yaml"
    return Registered(group, name) if group in REGISTRIES and name in REGISTRIES[group] else None


def find_config(name: str, *, group: str = "experiment", where: str = "config") -> Path | Registered:
    """The config called ``name``: a path ending in .yaml, ``group/name``, or a name within ``group``.

    Raises:
        UnknownNameError: No such config; the message begins with ``where`` and offers the nearest name.
    """
    if not name.endswith(YAML) and (found := _find_key(name if "/" in name else f"{group}/{name}")):
        return found
    known = known_configs()
    if name.endswith(YAML):
        path = Path(name)
        if path.is_file():
            return path
        siblings = [str(other) for other in sorted(path.parent.glob("*.y*ml")) if other.is_file()]
        close = nearest(name, siblings) or next((key for key in known if key.endswith(f"/{path.stem}")), None)
        advice = f"did you mean '{close}'?" if close else "give a file, or a name from clframe list configs"
        raise UnknownNameError(f"{where}: no file '{name}'; {advice}")
    if group in ("backbone", "benchmark") and is_dotted(name):
        return Registered(group, name)
    for key in known:
        if name and key.endswith(f"/{name}"):
            article = "an" if group[0] in "aeiou" else "a"
            raise UnknownNameError(f"{where}: '{name}' is not {article} {group}; did you mean '{key}'?")
    if os.path.isfile(os.path.join(name, "config.yaml")):  # Path.is_file raises for names that are too long
        raise UnknownNameError(
            f"{where}: {name} is the folder of a run; continue it with --resume {name}, or run its config again: "
            f"{Path(name) / 'config.yaml'}"
        )
    own = [key.removeprefix(f"{group}/") for key in known if key.startswith(f"{group}/")]
    kind = "config" if "/" in name or group not in REGISTRIES else group
    message = unknown_name(kind, name, known if "/" in name else own, where=where)
    if group in REGISTRIES and REGISTRIES[group].not_loaded:
        message += f"; not loaded: {'; '.join(REGISTRIES[group].not_loaded)}"
    raise UnknownNameError(message)


def read_yaml(path: Path) -> dict[Any, Any]:
    """A YAML file that holds one mapping, as plain values with references as they are written.

    Raises:
        ConfigError: The file is unreadable, invalid YAML, or not a mapping.
    """
    try:
        loaded = parse_yaml(read_text(path, most=MOST_YAML))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ValueError as error:
        raise ConfigError(f"{path}: invalid YAML ({parser_reason(error)}); fix the file") from None
    if loaded is None:
        raise ConfigError(f"{path}: not a mapping of keys to values; write lines like 'strategy: er'")
    return loaded


def parse_yaml(text: str) -> dict[Any, Any] | None:
    """Parse YAML text to plain values, references as they are written; None if it is not a mapping.

    Raises:
        ValueError: Invalid YAML, brackets in more than :data:`MOST_DEPTH` levels, aliases that expand to more than
            :data:`MOST_NODES` values, or a number that :func:`check_value` refuses.
    """
    return deepcopy(_kept(text) if len(text) <= MOST_KEPT else _parse(text))


@lru_cache(maxsize=64)
def _kept(text: str) -> dict[Any, Any] | None:
    return _parse(text)


def _parse(text: str) -> dict[Any, Any] | None:
    _check_depth(text)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(root)
        loaded = OmegaConf.create(text) if isinstance(root, (yaml.MappingNode, type(None))) else None
    except Exception as error:  # PyYAML and OmegaConf document no common base class for errors in broken files
        raise ValueError(parser_reason(error)) from None
    contents = OmegaConf.to_container(loaded, resolve=False) if isinstance(loaded, DictConfig) else None
    assert contents is None or isinstance(contents, dict)
    return contents


def _check_depth(text: str) -> None:
    """Refuse deep brackets before they are parsed, which takes time quadratic in their number."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        if depth > MOST_DEPTH:
            raise ValueError(f"its brackets have more than {MOST_DEPTH} levels, which is too deep a recursion")


def check_value(text: str) -> None:
    """Refuse the value of an override that YAML would not read as it is written.

    Raises:
        ValueError: A comment, which would be dropped, or a number with another base than its digits suggest.

    >>> check_value("photos #2")
    Traceback (most recent call last):
    ValueError: found '#2', a comment
    """
    with suppress(yaml.YAMLError):  # reading the value names it
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_nodes(root)
        if root is not None and (rest := text[root.end_mark.index :].strip()):
            raise ValueError(f"found {rest!r}, a comment")


def _check_number(node: yaml.ScalarNode) -> None:
    """Refuse whole numbers in base 8 and in base 60, which YAML 1.1 makes of ``010`` and ``1:30``."""
    if node.style is None and node.tag in _NUMBERS and re.fullmatch(r"[-+]?0[0-7_]+|.*:.*", node.value):
        base = 60 if ":" in node.value else 8
        line = f" in line {node.start_mark.line + 1}" if node.start_mark.line else ""
        raise ValueError(f"found {node.value}{line}, which YAML reads in base {base}")


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _check_nodes(root: yaml.Node | None) -> None:
    """Refuse numbers in an unexpected base, and a text of which OmegaConf would make too many values.

    It copies a node for every alias of it.
    """
    counts: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        if id(node) not in counts:
            counts[id(node)] = MOST_NODES + 1  # of a node that contains itself
            parts: list[yaml.Node] = []
            if isinstance(node, yaml.ScalarNode):
                _check_number(node)
            if isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            total = 1 + sum(map(count, parts))
            if total > MOST_NODES:
                raise ValueError(f"its aliases expand to more than {MOST_NODES:,} values")
            counts[id(node)] = total
        return counts[id(node)]

    if root is not None:
        count(root)


def parser_reason(error: Exception) -> str:
    """The first line of a parser's message, with the line number where the parser gives one."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem:
        return f"{problem} in line {mark.line + 1}" if mark is not None else str(problem)
    return str(error).strip().partition("\n")[0] or type(error).__name__
