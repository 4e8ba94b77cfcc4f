"""Load configs from files and overrides: merge layer by layer, check, convert to typed dataclasses.

Later layers win: the files named by ``defaults:``, the file itself, the overrides. Mappings merge key by key; lists and
scalars replace. Each layer is checked before it is merged, so a message names its file or override. Values may refer to
other keys (``${trainer.epochs}``) and to nothing else: no OmegaConf resolver is ever called.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clframe.config.files import (
    REGISTRIES,
    YAML,
    Registered,
    check_value,
    find_config,
    known_configs,
    parser_reason,
    read_yaml,
    shipped_configs,
)
from clframe.config.schema import OPEN_BLOCKS, Config
from clframe.config.typed import as_tree, check_keys, expand_shorthands, from_mapping, read_blocks, rename_keys
from clframe.errors import ClframeError, ConfigError, Problems
from clframe.options import format_value

_log = logging.getLogger(__name__)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the config ``name`` with overrides (``key.sub=value``) applied.

    ``benchmark=NAME`` and ``backbone=NAME`` replace the whole block by that of a config file or by a registered name,
    and ``strategy=NAME`` takes strategy and options from a file in configs/strategy unless NAME is a component. They
    are applied before all other overrides, of which the last one wins.

    Raises:
        ConfigError: An unknown key (with the nearest one), a wrong type or an impossible value.
        UnknownNameError: No such config.
    """
    if not isinstance(name, (str, Path)):
        raise ConfigError(f"config: found {format_value(name)}; give the name or path of a config")
    name = str(name)
    require_list(overrides)
    try:
        merged, problems, given = _merge_all(name, overrides)
        with problems.attempt():
            config = from_mapping(_resolve(merged))
            if not problems.found:
                _name_unused(config, given)
                return config
        problems.raise_found()
        raise AssertionError("unreachable")
    except RecursionError:
        raise ConfigError("config: is nested too deeply to be read; make it flatter") from None


def readable_blocks(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return what can be read of a config that :func:`load_config` refuses: typed blocks and plain values by key."""
    try:
        merged, _, _ = _merge_all(name, overrides)
        return read_blocks(_resolve(merged))
    except (ClframeError, RecursionError):
        return {}


def _merge_all(name: str, overrides: Sequence[str]) -> tuple[DictConfig, Problems, set[str]]:
    """The merged layers and overrides, the problems of overrides, and the components that the user has named.

    Components in files that ship with clframe are not the user's: another strategy leaves them without effect.
    """
    merged, given = OmegaConf.create({}), set[str]()
    for where, layer in _read_layers(name):
        merged = _merge(merged, layer, where)
        components = layer.get("components")
        if isinstance(components, dict) and shipped_configs() not in Path(where).resolve().parents:
            given |= {str(key) for key in components}
    if _raw_contents(merged).get("name") is None:
        merged = _merge(merged, {"name": Path(name).stem}, "name")
    merged, problems = _apply(merged, overrides)
    for text in overrides:
        key = text.partition("=")[0].strip()
        if key.startswith("components."):
            given.add(key.split(".")[1])
    return merged, problems, given


def change_config(config: Config, overrides: Sequence[str], *, benchmark: Mapping[str, Any]) -> Config:
    """Apply overrides to a typed config, as :func:`load_config` does.

    Args:
        config: The config.
        overrides: ``key.sub=value``.
        benchmark: Values of the keys that the block ``benchmark`` lacks after the overrides.

    Raises:
        ConfigError: An unknown key (with the nearest one), a wrong type or an impossible value.
    """
    merged = OmegaConf.create(as_tree(config))
    assert isinstance(merged, DictConfig)
    for key in benchmark:
        merged["benchmark"].pop(key, None)
    merged, problems = _apply(merged, overrides)
    problems.raise_found()
    tree = _resolve(merged)
    tree["benchmark"] = {**benchmark, **tree["benchmark"]}
    return from_mapping(tree)


def require_list(overrides: object, *, where: str = "overrides") -> None:
    """Refuse a text or a mapping where a list of ``key=value`` belongs: their letters or keys would be read instead.

    Raises:
        ConfigError: The message has the list to give.

    >>> require_list("seed=3")
    Traceback (most recent call last):
    clframe.errors.ConfigError: overrides: found 'seed=3' (text); give a list such as ['seed=3']
    """
    example: object = "trainer.epochs=2"
    if isinstance(overrides, str):
        example = overrides or example
    elif isinstance(overrides, Mapping):
        example = next((f"{key}={value}" for key, value in overrides.items()), example)
    elif isinstance(overrides, Sequence):
        wrong = [entry for entry in overrides if not isinstance(entry, str)]
        if not wrong:
            return
        overrides = wrong[0]
    raise ConfigError(f"{where}: found {format_value(overrides)}; give a list such as [{example!r}]")


def sets_key(overrides: Sequence[str], key: str) -> bool:
    """Return whether overrides set a key, alone or in a mapping of its block; config files that they name do not count.

    >>> [sets_key([text], "benchmark.size") for text in ("benchmark={name: digits, size: 8}", "benchmark=digits")]
    [True, False]
    """
    *blocks, last = key.split(".")
    for text in overrides:
        found: Any = _Override(text).layer()
        for block in blocks:
            found = found.get(block) if isinstance(found, dict) else None
        if isinstance(found, dict) and last in found:
            return True
    return False


def _apply(base: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, Problems]:
    """``base`` with the overrides applied, and the problems of those that cannot be.

    Where a block cannot be replaced, overrides of its keys are left out: they are meant for another block than that in
    ``base``, so what is wrong with them there would mislead.
    """
    require_list(overrides)
    problems, changes, not_replaced = Problems(), [], set[str]()
    layers: list[tuple[str, dict[Any, Any]]] = []
    for text in overrides:
        with problems.attempt():
            changes.append(_Override(text))
    for change in sorted(changes, key=lambda change: not change.replaces_block):
        block, before = change.key.partition(".")[0], len(problems.found)
        if block in not_replaced:
            continue
        with problems.attempt():
            if change.replaces_block:
                base = change.replace_block(base)
            else:
                layers.append((change.where, _checked(change.layer(), change.where)))
        if change.replaces_block and len(problems.found) > before:
            not_replaced.add(block)
    return _merge_together(base, layers, problems), problems


def _merge_together(base: DictConfig, layers: Sequence[tuple[str, dict[Any, Any]]], problems: Problems) -> DictConfig:
    """Merge checked layers together if they fit each other, which merges into ``base`` only once; else one by one."""
    joined: dict[Any, Any] = {}
    if all(_join(joined, contents) for _, contents in layers):
        with suppress(OmegaConfBaseException, TypeError):  # one by one, the message names the override
            merged = OmegaConf.unsafe_merge(base, joined)
            assert isinstance(merged, DictConfig)
            return merged
    for where, contents in layers:
        with problems.attempt():
            base = _merge_checked(base, contents, where)
    return base


def _join(joined: dict[Any, Any], layer: Mapping[Any, Any]) -> bool:
    """Merge a layer into ``joined``; false where a mapping meets another value."""
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(joined.get(key), dict):
            if not _join(joined[key], value):
                return False
        elif key in joined and isinstance(value, dict) != isinstance(joined[key], dict):
            return False
        else:
            joined[key] = deepcopy(value)
    return True


def _name_unused(config: Config, given: Collection[str]) -> None:
    """Log the options of components that the strategy does not use, if the user has given them."""
    for name in config.components:
        used = re.search(rf"\b{re.escape(name)}\b", config.strategy)
        if name in given and name in REGISTRIES["strategy"] and not used:
            _log.warning(
                "components.%s: the strategy '%s' does not use it, its options have no effect; add it to the strategy "
                "or leave them out", name, config.strategy,
            )  # fmt: skip


def data_config(data: str, overrides: Sequence[str]) -> Config:
    """The config of a benchmark by name, with changes to its block.

    Raises:
        ConfigError: A change to anything else.
    """
    require_list(overrides)
    for text in overrides:
        if not text.startswith("benchmark.") and not text.startswith("seed="):
            raise ConfigError(f"override '{text}': does not change data; write it like benchmark.data_dir=DIR")
    return load_config("quickstart", [f"benchmark={data}", *overrides])


def _read_layers(
    name: str, *, group: str = "experiment", where: str = "config", parents: tuple[Path, ...] = ()
) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The files that make up a config, lowest first; paths in ``defaults`` are relative to the file with the list."""
    path = find_config(name, group=group, where=where)
    if isinstance(path, Registered):
        yield f"{path.group}/{path.name}", path.read()
        return
    here = path.resolve()
    if here in parents:
        chain = " > ".join(file.stem for file in (*parents, here))
        raise ConfigError(f"{path}: defaults form a circle ({chain}); remove one of them")
    layer = read_yaml(path)
    _refuse_calls(layer, str(path))
    defaults = layer.get("defaults")
    if not isinstance(defaults, (list, type(None))):
        raise ConfigError(f"{path}: defaults is {format_value(defaults)}; give a list such as [backbone/mlp]")
    for default in defaults or ():
        if not isinstance(default, str):
            raise ConfigError(f"{path}: defaults has {format_value(default)}; write group/name, such as backbone/mlp")
        inner = str(path.parent / default) if default.endswith(YAML) else default
        yield from _read_layers(inner, where=f"{path}: defaults", parents=(*parents, here))
    layer.pop("defaults", None)
    yield str(path), layer


def _merge(base: DictConfig, layer: dict[Any, Any], where: str) -> DictConfig:
    """Merge a layer into ``base``, which is changed."""
    return _merge_checked(base, _checked(layer, where), where)


def _checked(layer: dict[Any, Any], where: str) -> dict[Any, Any]:
    """The layer in the schema's terms, with keys that the schema has."""
    contents = expand_shorthands(rename_keys(layer))
    _refuse_calls(contents, where)
    check_keys(contents, where=where)
    return contents


def _merge_checked(base: DictConfig, contents: dict[Any, Any], where: str) -> DictConfig:
    try:
        merged = OmegaConf.unsafe_merge(base, contents)  # in place: copying takes half of the time of loading a config
    except (OmegaConfBaseException, TypeError) as error:  # TypeError: a mapping on a list, or a list on a mapping
        raise ConfigError(f"{where}: {parser_reason(error)}; fix the value") from None
    assert isinstance(merged, DictConfig)
    return merged


class _Override:
    """One ``key=value`` of the command line."""

    def __init__(self, text: str) -> None:
        self.where = f"override '{text if len(text) <= 80 else f'{text[:75]} ...'}'"
        key, equals, value = text.partition("=")
        self.key, self.value = key.strip(), value.strip()
        if not equals or any(not part.strip() for part in self.key.split(".")):
            raise ConfigError(f"{self.where}: is not key=value; write it like trainer.epochs=3")
        if self.key == "defaults":
            raise ConfigError(f"{self.where}: defaults cannot be overridden; override the keys that they set")
        self.replaces_block = (
            _is_preset(self.value)
            if self.key == "strategy"
            else self.key in OPEN_BLOCKS and not self.value.startswith("{")
        )

    def replace_block(self, base: DictConfig) -> DictConfig:
        """``base`` with the block replaced by that of another config of the group."""
        group, _, rest = self.value.rpartition("/")
        if group not in ("", self.key) and not rest.endswith(YAML):
            raise ConfigError(f"{self.where}: is not in the group {self.key}; see clframe list configs {self.key}")
        layers = list(_read_layers(self.value, group=self.key, where=self.where))
        # Options of a preset are merged like those of an expression: options of other components remain.
        merged = OmegaConf.masked_copy(base, [str(key) for key in base if key != self.key])
        for where, layer in layers:
            merged = _merge(merged, layer, where)
        if self.key not in merged:
            raise ConfigError(f"{self.where}: {layers[-1][0]} has no key '{self.key}'; give a file that has it")
        return merged

    def layer(self) -> dict[Any, Any]:
        """The value at its key, as a file would have it."""
        try:
            check_value(self.value)
            layer = OmegaConf.from_dotlist([f"{self.key}={self.value}"])
        except Exception as error:  # PyYAML and OmegaConf document no common base class for errors in broken values
            raise ConfigError(f"{self.where}: {parser_reason(error)}; fix the value or put it in quotes") from None
        return _raw_contents(layer)


def _is_preset(value: str) -> bool:
    """Whether ``strategy=value`` is a file in configs/strategy; a component's own name means the component."""
    name = value.removeprefix("strategy/")
    return isinstance(known_configs("strategy").get(f"strategy/{name}"), Path) and (
        name != value or name not in REGISTRIES["strategy"]
    )


def _raw_contents(node: DictConfig) -> dict[Any, Any]:
    """Keys and values as written, with references unresolved."""
    tree = OmegaConf.to_container(node, resolve=False)
    assert isinstance(tree, dict)
    return tree


_REFERENCE = re.compile(r"\$\{\.*[A-Za-z_][\w-]*(?:\.[\w-]+|\[[\w-]+\])*\}")
"""``${a.b}``, ``${.b}`` and ``${a[0]}``: any ``${`` that remains without these would call a resolver."""


def _refuse_calls(contents: Any, where: str, key: str = "") -> None:
    """Refuse ``???`` and every ``${...}`` that is not a reference to a key, before OmegaConf would evaluate it."""
    if isinstance(contents, (dict, list)):
        pairs = contents.items() if isinstance(contents, dict) else enumerate(contents)
        for name, value in pairs:
            _refuse_calls(value, where, f"{key}.{name}" if key else str(name))
    elif contents == "???":
        raise ConfigError(f"{where}: {key} is ???; give it a value")
    elif isinstance(contents, str) and "${" in _REFERENCE.sub("", contents):
        raise ConfigError(
            f"{where}: {key} is {format_value(contents)}, more than a reference to a key; write one such as "
            f"${{trainer.epochs}}, since configs do not read the environment"
        )


def _resolve(merged: DictConfig) -> dict[str, Any]:
    """The plain tree with references resolved."""
    try:
        tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{key}: {parser_reason(error)}; refer to another key or give a value") from None
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
