"""Configs from files and overrides: found, merged layer by layer, checked, typed.

Later layers win: the files that ``defaults:`` names, the file itself, the overrides. Mappings merge key by
key; lists and scalars replace. Each layer is checked as it comes, so a message names its file or override.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from clframe.config.paths import shipped_configs
from clframe.config.schema import OPEN_BLOCKS, Config
from clframe.core.options import convert
from clframe.errors import ConfigError, UnknownNameError, nearest, unknown_name

GROUPS = ("benchmark", "backbone", "strategy", "experiment", "smoke")


def config_folders() -> list[Path]:
    """Where configs are looked for: ``./configs`` first, then those that ship with clframe."""
    own = Path("configs")
    return ([own] if own.is_dir() else []) + [shipped_configs()]


def known_configs(group: str | None = None) -> dict[str, Path]:
    """Every config by ``group/name``; a file of yours hides the shipped one of the same name."""
    found: dict[str, Path] = {}
    for folder in reversed(config_folders()):
        for path in sorted(folder.glob("*/*.yaml")):
            if group is None or path.parent.name == group:
                found[f"{path.parent.name}/{path.stem}"] = path
    return dict(sorted(found.items()))


def find_config(name: str, *, group: str = "experiment") -> Path:
    """The file that ``name`` means: a path ending in .yaml, ``group/name``, or a name of ``group``.

    Raises:
        UnknownNameError: No such config; the message has the nearest name.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UnknownNameError(f"config: no file {name}; give the path of a file or a name of clframe list configs")
        return path
    known = known_configs()
    for key in (name, f"{group}/{name}"):
        if key in known:
            return known[key]
    short = [key.removeprefix(f"{group}/") for key in known if "/" in name or key.startswith(f"{group}/")]
    raise UnknownNameError(unknown_name("config", name, short, where="config"))


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config that a file and overrides (``key.sub=value``) amount to.

    Raises:
        ConfigError: An unknown key (with the nearest one), a wrong type or an impossible value.
        UnknownNameError: No such config file.
    """
    merged = OmegaConf.create({})
    for where, layer in _layers(find_config(name)):
        merged = _merge(merged, layer, where)
    if OmegaConf.select(merged, "name") is None:
        merged = _merge(merged, OmegaConf.create({"name": Path(name).stem}), "name")
    for text in overrides:
        merged = _override(merged, text)
    return from_mapping(_plain(merged))


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """The typed config of a plain tree, such as a resolved ``config.yaml``."""
    config = _typed(Config, dict(tree), where="")
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that :func:`from_mapping` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(as_tree(config)))


def as_tree(config: Config) -> dict[str, Any]:
    """The config as nested plain values, options beside the keys of their block."""
    tree = dataclasses.asdict(config)
    for block in OPEN_BLOCKS:
        tree[block].update(tree[block].pop("options"))
    plain: dict[str, Any] = _listed(tree)
    return plain


def read_yaml(path: Path) -> DictConfig:
    """A YAML file holding one mapping; nothing in it is executed.

    Raises:
        ConfigError: Not readable, no valid YAML, or no mapping.
    """
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: is no valid YAML ({reason}); mend the file") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: holds no mapping of keys to values; start with lines like 'strategy: er'")
    return loaded


def _layers(path: Path, seen: tuple[Path, ...] = ()) -> Iterator[tuple[str, DictConfig]]:
    if path in seen:
        chain = " > ".join(p.stem for p in (*seen, path))
        raise ConfigError(f"{path}: defaults form a circle ({chain}); remove one of them")
    layer = read_yaml(path)
    defaults = layer.pop("defaults", None) or []
    if not OmegaConf.is_list(defaults) and not isinstance(defaults, list):
        raise ConfigError(f"{path}: defaults is no list; write defaults: [benchmark/digits, backbone/mlp]")
    for default in defaults:
        if not isinstance(default, str):
            raise ConfigError(f"{path}: defaults names {default!r}; write group/name, such as benchmark/digits")
        try:
            yield from _layers(find_config(default), (*seen, path))
        except UnknownNameError as error:
            raise UnknownNameError(f"{path}: defaults: {error}") from None
    yield str(path), layer


def _merge(base: DictConfig, layer: DictConfig, where: str) -> DictConfig:
    _check_keys(layer, where)
    try:
        merged = OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}; mend the value") from None
    assert isinstance(merged, DictConfig)
    return merged


def _override(merged: DictConfig, text: str) -> DictConfig:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override '{text}': is no key=value; write it like trainer.epochs=3")
    if key == "defaults":
        raise ConfigError("override 'defaults': cannot be overridden; override the keys it brings")
    if key in OPEN_BLOCKS and "{" not in value:
        swapped = _layers(find_config(value.strip(), group=key))
        merged = OmegaConf.masked_copy(merged, [k for k in merged if k != key])
        for where, layer in swapped:
            merged = _merge(merged, layer, where)
        return merged
    try:
        layer = OmegaConf.from_dotlist([text])
    except Exception as error:
        raise ConfigError(f"override '{text}': {' '.join(str(error).split())}; quote the value") from None
    return _merge(merged, layer, f"override '{text}'")


def _check_keys(layer: DictConfig, where: str) -> None:
    known = {f.name for f in dataclasses.fields(Config)}
    for key in layer:
        if key not in known:
            _unknown_key(str(key), known, where)
    hints = get_type_hints(Config)
    for key in layer:
        block = hints[str(key)]
        node = OmegaConf.to_container(layer, resolve=False)[key]  # type: ignore[index,call-overload]
        if not dataclasses.is_dataclass(block):
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"{where}: {key} is {node!r}; give a mapping, or {key}.name={node}")
        if str(key) not in OPEN_BLOCKS:
            names = {f.name for f in dataclasses.fields(block)}
            for name in node:
                if name not in names:
                    _unknown_key(f"{key}.{name}", {f"{key}.{n}" for n in names}, where)


def _unknown_key(key: str, known: set[str], where: str) -> None:
    close = nearest(key, known)
    advice = f"did you mean '{close}'?" if close else f"keys are {', '.join(sorted(known))}"
    raise ConfigError(f"{where}: unknown key '{key}'; {advice}")


def _plain(merged: DictConfig) -> dict[str, Any]:
    for text in _strings(OmegaConf.to_container(merged, resolve=False)):
        inside = text.split("${", 1)[-1] if "${" in text else ""
        if ":" in inside.split("}", 1)[0]:
            raise ConfigError(
                f"config: {text!r} calls a resolver, which could read this machine; refer to keys only: ${{a.b}}"
            )
    try:
        tree = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"config: {' '.join(str(error).split())}; mend the value") from None
    assert isinstance(tree, dict)
    return {str(k): v for k, v in tree.items()}


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value)


def _typed(schema: Any, tree: dict[str, Any], *, where: str) -> Any:
    hints = get_type_hints(schema)
    names = {f.name for f in dataclasses.fields(schema)}
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in tree.items():
        place = f"{where}.{key}" if where else key
        if key not in names or (key == "options" and where in OPEN_BLOCKS):
            if where in OPEN_BLOCKS:
                options[key] = value
                continue
            _unknown_key(place, {f"{where}.{n}" if where else n for n in names}, "config")
        annotation = hints[key]
        if dataclasses.is_dataclass(annotation):
            values[key] = _typed(annotation, value, where=place)
        elif str(annotation).startswith("dict"):
            values[key] = _mapping(value, place, nested=key == "components")
        else:
            values[key] = convert(value, annotation, where=place)
    if where in OPEN_BLOCKS:
        values["options"] = options
    missing = [n for n in ("benchmark", "backbone") if schema is Config and n not in values]
    if missing:
        raise ConfigError(f"config: no {missing[0]} is named; add defaults: [{missing[0]}/...] or {missing[0]}.name")
    return schema(**values)


def _mapping(value: Any, where: str, *, nested: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: found {value!r}; give a mapping")
    result: dict[str, Any] = {}
    for key, inner in value.items():
        if nested and not isinstance(inner, dict):
            raise ConfigError(f"{where}.{key}: found {inner!r}; give a mapping of options")
        result[str(key)] = inner
    return result


def _listed(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _listed(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_listed(value) for value in tree]
    return tree
