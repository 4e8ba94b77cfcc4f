"""Convert between plain trees and typed configs, with messages about unknown keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NoReturn, get_type_hints

from clframe.config.dumping import dump_yaml
from clframe.config.files import parse_yaml
from clframe.config.named import BLOCK
from clframe.config.optimizers import optimizer_options
from clframe.config.schema import OPEN_BLOCKS, RENAMED, WITH_OPTIONS, BenchmarkConfig, Config, EarlierConfig
from clframe.core import Composition, parse
from clframe.errors import ConfigError, Problems, nearest
from clframe.options import convert, format_value, rename_options
from clframe.own_code import allowed_packages, is_dotted


def from_mapping(tree: Mapping[str, Any]) -> Config:
    """Convert a plain tree, such as a resolved ``config.yaml``, to a typed config.

    Raises:
        ConfigError: An unknown key (with the nearest one), a wrong type or an impossible value.
    """
    config = _read_block(Config, rename_keys(tree), where="")
    assert isinstance(config, Config)
    return config


def check_typed(config: Config) -> Config:
    """Return a config that was built in Python, with its values checked and converted as those of a file are.

    Raises:
        ConfigError: A value of another type, or another word than those that a key takes.
    """
    return from_mapping(as_tree(config))


def read_blocks(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the blocks of a tree that can be converted, and its plain values, by key."""
    found: dict[str, Any] = {}
    for key, value in rename_keys(tree).items():
        kind = _types_of(Config).get(key)
        if dataclasses.is_dataclass(kind):
            with Problems().attempt():
                found[key] = _read_block(kind, value, where=key)
        else:
            found[key] = value
    return found


def rename_keys(tree: Mapping[Any, Any]) -> dict[Any, Any]:
    """Replace former names of keys by their present ones.

    Raises:
        ConfigError: A key given under both names.
    """
    blocks = {block: tree[block] for block in RENAMED if isinstance(tree.get(block), Mapping)}
    return {**tree, **{block: rename_options(given, RENAMED[block], where=block) for block, given in blocks.items()}}


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; :func:`from_mapping` reads it back."""
    return dump_yaml(as_tree(config))


PLACEMENT = ("trainer.devices", "trainer.strategy")
"""Keys that say where a run trains, so that another process may continue it with others."""


def same_config(left: str, right: str) -> bool:
    """Whether two texts of :func:`to_yaml` mean the same.

    A key that an older version lacked has its default, and strategies are compared with all options of their
    components, wherever these are given.
    """
    try:
        one, two = (from_mapping(parse_yaml(text) or {}) for text in (left, right))
    except ValueError:  # a ConfigError, or a text that is not YAML
        return False
    return _with_strategy(one) == _with_strategy(_with_choices_of(one, two))


def _with_choices_of(chosen: Config, config: Config) -> Config:
    """The config with the values of ``chosen`` for keys that either of them leaves to the device of a run."""
    blocks = {}
    for name in ("trainer", "optimizer"):
        mine, other = getattr(config, name), getattr(chosen, name)
        automatic = {
            field.name: getattr(other, field.name)
            for field in dataclasses.fields(mine)
            if ("auto" in (getattr(mine, field.name), getattr(other, field.name)) and field.name != "accelerator")
            or f"{name}.{field.name}" in PLACEMENT
        }
        blocks[name] = dataclasses.replace(mine, **automatic)
    return dataclasses.replace(config, **blocks)


def _with_strategy(config: Config) -> tuple[Config, Composition | None]:
    """The config with strategy and components replaced by the composition that they describe."""
    options = {name: given for name, given in config.components.items() if name != BLOCK}
    try:
        composition = parse(config.strategy, options)
    except ValueError:  # a ClframeError: a component of a package that is not installed
        return config, None
    plugins = {name: given for name, given in config.components.items() if name == BLOCK}
    return dataclasses.replace(config, strategy="", components=plugins), composition


def as_tree(config: Config) -> dict[str, Any]:
    """The config as nested plain values, options next to the keys of their block."""
    tree = dataclasses.asdict(config)
    for block in WITH_OPTIONS:
        tree[block].update(tree[block].pop("options"))
    if not tree["imports"]:
        del tree["imports"]
    for entry in tree["earlier"]:
        entry["benchmark"].update(entry["benchmark"].pop("options"))
    if not tree["earlier"]:
        del tree["earlier"]  # of a run that extends none
    plain: dict[str, Any] = _tuples_to_lists(tree)
    return plain


def check_keys(contents: Mapping[Any, Any], *, where: str) -> None:
    """Refuse keys that the schema does not have; ``where`` is the file or override that contains them.

    Raises:
        ConfigError: An unknown key, or a block that is not a mapping.
    """
    blocks, problems = _blocks(), Problems()
    for key, value in contents.items():
        with problems.attempt():
            if key not in blocks[""]:
                _unknown_key(str(key), "", where)
            if key not in blocks:
                continue
            if not isinstance(value, dict):
                named = isinstance(value, str) and "name" in blocks[key]
                example = f" such as {{name: {value}}}" if named else ""
                raise ConfigError(f"{where}: {key} is {format_value(value)}; give a mapping{example}")
            for name in value:
                if name not in blocks[key] and not _is_option(str(name), str(key)):
                    with problems.attempt():
                        _unknown_key(str(name), str(key), where)
    problems.raise_found()


def _is_option(name: str, block: str) -> bool:
    """Whether a block that has no key of this name may have an option of that name."""
    # Options of an own optimizer are checked against its constructor.
    own = block == "optimizer" and bool(allowed_packages())
    return own or block in OPEN_BLOCKS or (block == "optimizer" and name in optimizer_options())


def expand_shorthands(tree: dict[Any, Any]) -> dict[Any, Any]:
    """Replace the value of a block that can be written as one value by the mapping that it is short for.

    So it merges with other keys of the block, and does not replace them.

    >>> expand_shorthands({"trainer": {"ema": 0.9, "budget": {"relative": 1}}})
    {'trainer': {'ema': {'decay': 0.9}, 'budget': {'relative': 1}}}
    """
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for path, kind in _nested_blocks(Config, ""):
        outer, _, key = path.rpartition(".")
        block = found.get(outer)
        if not hasattr(kind, "shorthand") or not isinstance(block, dict) or key not in block:
            continue
        value = block[key]
        if not isinstance(value, dict) and "${" not in str(value):  # which may refer to a mapping
            block[key] = {kind.shorthand: value}
    return found


def block_keys(block: str) -> tuple[str, ...]:
    """Names of a block's keys in the schema."""
    return _blocks()[block]


@cache
def _blocks() -> dict[str, tuple[str, ...]]:
    """Names of the keys of each block by its path, ``trainer.checkpoint`` say; the top level is the block ``""``."""
    return {
        block: tuple(field.name for field in dataclasses.fields(kind) if field.name != "options")
        for block, kind in _nested_blocks(Config, "")
    }


@cache
def _types_of(kind: Any) -> dict[str, Any]:
    """Types of a dataclass's fields; evaluating them takes a fifth of the time of loading a config."""
    return get_type_hints(kind)


def _nested_blocks(kind: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Path and class of a block and of all blocks in it."""
    yield path, kind
    for key, inner in _types_of(kind).items():
        if dataclasses.is_dataclass(inner):
            yield from _nested_blocks(inner, f"{path}.{key}" if path else key)


def _unknown_key(key: str, block: str, where: str) -> NoReturn:
    """Raise, suggesting the one other block that has this key, else the nearest key of the same or of any block."""
    blocks = _blocks()
    all_keys = [(home, name) for home, names in blocks.items() for name in names]
    exact = [known for known in all_keys if known[1] == key]
    options = optimizer_options() if block == "optimizer" else ()
    near = nearest(key, (*blocks[block], *options)), nearest(key, [name for _, name in all_keys])
    close = exact if len(exact) == 1 else [(block, near[0])] if near[0] else []
    close = close or [known for known in all_keys if known[1] == near[1]][:1]
    settable = set(blocks[block]) - {"earlier"}  # which clframe extend writes
    advice = f"keys are {', '.join(sorted(settable))}"
    if close:
        advice = f"did you mean '{'.'.join(filter(None, close[0]))}'?"
    raise ConfigError(f"{where}: unknown key '{'.'.join(filter(None, (block, key)))}'; {advice}")


def _read_block(schema: Any, tree: Any, *, where: str) -> Any:
    if not isinstance(tree, dict):
        if not hasattr(schema, "shorthand"):
            raise ConfigError(f"{where}: found {format_value(tree)}; give a mapping")
        tree = {schema.shorthand: tree}
    hints, names = _types_of(schema), _blocks()[where]
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    problems = Problems()
    for key, value in tree.items():
        path = f"{where}.{key}" if where else str(key)
        with problems.attempt():
            if key not in names:
                known = str(key) in optimizer_options() or is_dotted(tree.get("name"))
                if not (known if where == "optimizer" else _is_option(str(key), where)):
                    _unknown_key(str(key), where, "config")
                options[str(key)] = value
            elif dataclasses.is_dataclass(hints[key]):
                values[key] = _read_block(hints[key], value, where=path)
            elif key in ("components", "groups"):
                named = _require_mapping(value, path, of="names to options")
                values[key] = {name: _require_mapping(v, f"{path}.{name}", of="options") for name, v in named.items()}
            elif key == "earlier":
                values[key] = _read_earlier(value, path)
            elif key == "callbacks":
                values[key] = _require_mapping(value, path, of="names to options")
            else:
                values[key] = convert(value, hints[key], where=path)
    if where in WITH_OPTIONS:
        values["options"] = options
    for block in OPEN_BLOCKS if schema is Config else ():
        if block not in tree:
            problems.add(ConfigError(
                f"config: has no {block}; set {block}=NAME, or put {block}/NAME into the defaults of its file"
            ))  # fmt: skip
    problems.raise_found()
    return schema(**values)


def _read_earlier(value: Any, where: str) -> tuple[EarlierConfig, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: found {format_value(value)}; give a list, as clframe extend writes it")
    hints, entries = _types_of(EarlierConfig), []
    for i, each in enumerate(value):
        entry, path = _require_mapping(each, f"{where}[{i}]", of="keys to values"), f"{where}[{i}]"
        if unknown := sorted(set(entry) - set(hints)):
            raise ConfigError(f"{path}.{unknown[0]}: unknown key; give the keys that clframe extend writes")
        if "benchmark" not in entry:
            raise ConfigError(f"{path}: has no benchmark; give the keys that clframe extend writes")
        block = _read_block(BenchmarkConfig, entry.pop("benchmark"), where="benchmark")
        values = {key: convert(item, hints[key], where=f"{path}.{key}") for key, item in entry.items()}
        entries.append(EarlierConfig(**values, benchmark=block))
    return tuple(entries)


def _require_mapping(value: Any, where: str, *, of: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: found {format_value(value)}; give a mapping of {of}, or {{}} for none")
    return {str(key): inner for key, inner in value.items()}


def _tuples_to_lists(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _tuples_to_lists(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_tuples_to_lists(value) for value in tree]
    return tree
