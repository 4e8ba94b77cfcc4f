"""Configs from files and overrides: merged layer by layer, checked, typed.

Later layers win: the files that ``defaults:`` names, the file itself, the overrides. Mappings merge key by
key; lists and scalars replace. Each layer is checked as it comes, so a message names its file or override.
Values may refer to other keys (``${trainer.epochs}``) and to nothing else: no resolver is ever called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clframe.config.files import YAML, find_config, known_configs, read_yaml, reason
from clframe.config.schema import OPEN_BLOCKS, Config
from clframe.config.typed import check_keys, from_mapping
from clframe.core import COMPONENTS
from clframe.errors import ConfigError
from clframe.options import shown


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config that a file and overrides (``key.sub=value``) amount to.

    ``benchmark=NAME`` and ``backbone=NAME`` put the block of that file in the place of the one there was, and
    ``strategy=NAME`` takes strategy and options from a file of configs/strategy, unless NAME is a component;
    they come before all other overrides, of which the last one wins.

    Raises:
        ConfigError: An unknown key (with the nearest one), a wrong type or an impossible value.
        UnknownNameError: No such config file.
    """
    try:
        merged = OmegaConf.create({})
        for where, layer in _layers(find_config(name)):
            merged = _merge(merged, layer, where)
        if _contents(merged).get("name") is None:
            merged = _merge(merged, OmegaConf.create({"name": Path(name).stem}), "name")
        changes = [_Override(text) for text in overrides]
        for change in sorted(changes, key=lambda change: not change.swaps):
            merged = change.swapped(merged) if change.swaps else change.merged(merged)
        return from_mapping(_resolved(merged))
    except RecursionError:
        raise ConfigError("config: is nested too deeply to be read; make it flatter") from None


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, DictConfig]]:
    """The files that ``path`` amounts to, lowest first; files in ``defaults`` are relative to their namer."""
    here = path.resolve()
    if here in seen:
        chain = " > ".join(file.stem for file in (*seen, here))
        raise ConfigError(f"{path}: defaults form a circle ({chain}); take one of them out")
    layer = read_yaml(path)
    _refuse_calls(_contents(layer), str(path))
    defaults = _contents(layer).get("defaults")
    if not isinstance(defaults, (list, type(None))):
        raise ConfigError(f"{path}: defaults is {shown(defaults)}; give a list such as [backbone/mlp]")
    for default in defaults or ():
        if not isinstance(default, str):
            raise ConfigError(f"{path}: defaults names {shown(default)}; write group/name, such as backbone/mlp")
        name = str(path.parent / default) if default.endswith(YAML) else default
        yield from _layers(find_config(name, where=f"{path}: defaults"), (*seen, here))
    layer.pop("defaults", None)
    yield str(path), layer


def _merge(base: DictConfig, layer: DictConfig, where: str) -> DictConfig:
    contents = _contents(layer)
    _refuse_calls(contents, where)
    check_keys(contents, where=where)
    try:
        merged = OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {reason(error)}; mend the value") from None
    assert isinstance(merged, DictConfig)
    return merged


class _Override:
    """One ``key=value`` of the command line."""

    def __init__(self, text: str) -> None:
        self.where = f"override '{text if len(text) <= 80 else f'{text[:75]} ...'}'"
        key, equals, value = text.partition("=")
        self.key, self.value = key.strip(), value.strip()
        if not equals or any(not part.strip() for part in self.key.split(".")):
            raise ConfigError(f"{self.where}: is no key=value; write it like trainer.epochs=3")
        if self.key == "defaults":
            raise ConfigError(f"{self.where}: comes too late; override the keys that the defaults bring")
        self.swaps = (
            _is_preset(self.value)
            if self.key == "strategy"
            else self.key in OPEN_BLOCKS and not self.value.startswith("{")
        )

    def swapped(self, base: DictConfig) -> DictConfig:
        """``base`` with the block of another file of the group in the place of its own."""
        group, _, rest = self.value.rpartition("/")
        if group not in ("", self.key) and not rest.endswith(YAML):
            raise ConfigError(f"{self.where}: is not in configs/{self.key}; see clframe list configs {self.key}")
        path = find_config(self.value, group=self.key, where=self.where)
        # A preset's options are merged, as those of an expression would be: another component's stay.
        merged = OmegaConf.masked_copy(base, [str(key) for key in base if key != self.key])
        for where, layer in _layers(path):
            merged = _merge(merged, layer, where)
        if self.key not in merged:
            raise ConfigError(f"{self.where}: {path} has no key '{self.key}'; give a file that has")
        return merged

    def merged(self, base: DictConfig) -> DictConfig:
        """``base`` with the value at the key."""
        try:
            layer = OmegaConf.from_dotlist([f"{self.key}={self.value}"])
        except Exception as error:  # what a parser may say of a broken value is not listed anywhere
            raise ConfigError(f"{self.where}: {reason(error)}; mend the value or put it in quotes") from None
        return _merge(base, layer, self.where)


def _is_preset(value: str) -> bool:
    """Whether ``strategy=value`` names a file of configs/strategy: a component's own name means the component."""
    name = value.removeprefix("strategy/")
    if f"strategy/{name}" not in known_configs("strategy"):
        return False
    return name != value or name not in COMPONENTS.names()


def _contents(node: DictConfig) -> dict[Any, Any]:
    """Keys and values as they were written, references not followed."""
    tree = OmegaConf.to_container(node, resolve=False)
    assert isinstance(tree, dict)
    return tree


_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w-]*(?:\.[\w-]+|\[[\w-]+\])*\}")
"""``${a.b}``, ``${.b}`` and ``${a[0]}``: what is left of ``${`` without these would call a resolver."""


def _refuse_calls(contents: Any, where: str, key: str = "") -> None:
    """Refuse every ``${...}`` but a reference to a key, before OmegaConf would follow it, and ``???``."""
    if isinstance(contents, (dict, list)):
        pairs = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for name, value in pairs:
            _refuse_calls(value, where, f"{key}.{name}" if key else str(name))
    elif contents == "???":
        raise ConfigError(f"{where}: {key} is ???; give it a value")
    elif isinstance(contents, str) and "${" in _REFERENCE.sub("", contents):
        raise ConfigError(
            f"{where}: {key} is {shown(contents)}, more than a reference to a key; write one such as "
            f"${{trainer.epochs}}, since configs read nothing of this machine"
        )


def _resolved(merged: DictConfig) -> dict[str, Any]:
    try:
        tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: {reason(error)}; refer to another key or give a value") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def data_config(data: str, overrides: Sequence[str]) -> Config:
    """The config of a benchmark by name, with changes of its block.

    Raises:
        ConfigError: A change of anything else.
    """
    for text in overrides:
        if not text.startswith("benchmark.") and not text.startswith("seed="):
            raise ConfigError(f"override '{text}': changes no data; write it like benchmark.data_dir=DIR")
    return load_config("quickstart", [f"benchmark={data}", *overrides])
