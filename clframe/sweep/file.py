"""Sweep files: YAML that describes a sweep.

::

    config: quickstart
    grid:                                  # all combinations; a value or a list of values for each key
      strategy: [er, er + exits]
      trainer.epochs: 3
    list:                                  # each entry with every combination of the grid
      - {components.er.memory: 100}
    strategies:                            # values for one strategy only, which replace others
      er: {components.er.memory: [100, 200]}
    seeds: 0..4
    select:                                # chosen on validation data, for each combination of the other values
      over: {optimizer.lr: [0.01, 0.03], benchmark.augment: [null, cifar]}
      seeds: [100, 101]                    # none of the test seeds
      metric: final_average_accuracy
    expected: ...                          # numbers that clframe reproduce compares with
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from clframe.config.files import YAML, find_config, known_configs, read_yaml
from clframe.errors import ConfigError, nearest
from clframe.metrics.registry import METRICS
from clframe.sweep.space import Axes, Range, Selection, Space
from clframe.sweep.values import as_text, distinct, parse_seeds

GROUP: Final = "sweep"
"""Config group of sweep files: ``configs/sweep/NAME.yaml``."""
_KEYS = ("config", "grid", "list", "strategies", "seeds", "select", "expected")
_SELECT_KEYS = ("over", "seeds", "metric", "sampler", "trials")
_RANGE_KEYS = ("low", "high", "log", "step")


class SweepFile(NamedTuple):
    """A sweep file."""

    path: Path
    space: Space
    expected: Mapping[str, Any]
    """As in the file; empty if it has none."""


def find_sweep(name: str) -> SweepFile | None:
    """Read the sweep file called ``name``; None if it is a config.

    Args:
        name: A file with the key ``config``, ``sweep/NAME``, or a name in ``configs/sweep`` that no config has.

    Raises:
        ConfigError: A file that cannot be read or has unknown keys.
    """
    path = Path(name)
    if not name.endswith(YAML):
        known = known_configs(GROUP)
        key = name if name in known else f"{GROUP}/{name}"
        if key not in known or f"experiment/{name}" in known_configs("experiment"):
            return None
        found = known[key]
        assert isinstance(found, Path)  # no registry has this group
        path = found
    elif not path.is_file():
        find_config(name)  # which names the nearest file
    tree = read_yaml(path)
    return read_sweep({str(key): value for key, value in tree.items()}, path) if "config" in tree else None


def read_sweep(tree: Mapping[str, Any], path: Path) -> SweepFile:
    """Read the contents of a sweep file.

    Raises:
        ConfigError: Unknown keys, or values that do not fit them.
    """
    _check_keys(tree, _KEYS, where=str(path))
    config = tree["config"]
    if not isinstance(config, str) or not config:
        raise ConfigError(f"{path}: config is {config!r}; give a config's name or file")
    if config.endswith(YAML) and not Path(config).is_file():
        config = str(path.parent / config)
    rows = tree.get("list") or ()
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ConfigError(f"{path}: list is {rows!r}; give a list of mappings such as [{{strategy: er}}]")
    grid = _axes(tree.get("grid"), where=f"{path}: grid")
    listed = tuple(_axes(row, where=f"{path}: list[{i}]") for i, row in enumerate(rows))
    for key in grid:
        if any(key in row for row in listed):
            raise ConfigError(f"{path}: {key} is in grid and in list; leave it out of one of them")
    by_strategy = _mapping(tree.get("strategies"), where=f"{path}: strategies")
    space = Space(
        config=config, grid=grid, rows=listed, seeds=_seeds(tree.get("seeds", 0), where=f"{path}: seeds"),
        strategies={name: _axes(axes, where=f"{path}: strategies.{name}") for name, axes in by_strategy.items()},
        select=None if tree.get("select") is None else _selection(tree["select"], where=f"{path}: select"),
    )  # fmt: skip
    check_selection(space)
    return SweepFile(path, space, _mapping(tree.get("expected"), where=f"{path}: expected"))


def check_selection(space: Space) -> None:
    """Refuse a selection that would use test data, or keys that both parts of a sweep set.

    Raises:
        ConfigError: Such a sweep.
    """
    select = space.select
    if select is None:
        return
    both = sorted(set(select.seeds) & set(space.seeds))
    if both:
        raise ConfigError(
            f"select.seeds: found {both[0]}, which is a test seed as well; give seeds that are not in seeds"
        )
    places = [("grid", space.grid), *(("list", row) for row in space.rows),
              *((f"strategies.{name}", axes) for name, axes in space.strategies.items())]  # fmt: skip
    for where, axes in places:
        for key in axes:
            if key in select.over:
                raise ConfigError(f"{where}: found {key}, which select.over chooses; leave it out of one of them")
            if key == "benchmark.evaluate":
                raise ConfigError(f"{where}: found {key}, which the selection sets; leave it out")


def _selection(tree: Any, *, where: str) -> Selection:
    tree = _mapping(tree, where=where)
    _check_keys(tree, _SELECT_KEYS, where=where)
    if not tree.get("over") or "seeds" not in tree:
        missing = "seeds" if tree.get("over") else "over"
        example = "seeds: [100, 101]" if missing == "seeds" else "over: {optimizer.lr: [0.01, 0.1]}"
        raise ConfigError(f"{where}: has no {missing}; give one, such as {example}")
    sampler, trials = tree.get("sampler", "grid"), tree.get("trials")
    metric = tree.get("metric", "final_average_accuracy")
    METRICS.get(metric, where=f"{where}.metric")
    if sampler not in ("grid", "optuna"):
        raise ConfigError(f"{where}.sampler: found {sampler!r}; give grid or optuna")
    if sampler == "grid" and trials is not None:
        raise ConfigError(f"{where}.trials: found {trials!r} with the sampler grid; leave it out, or use optuna")
    if sampler == "optuna" and (type(trials) is not int or trials < 1):
        raise ConfigError(f"{where}.trials: found {trials!r}; give optuna a number of trials such as 30")
    over: dict[str, tuple[str, ...] | Range] = {}
    for key, value in _mapping(tree["over"], where=f"{where}.over").items():
        place = f"{where}.over.{key}"
        if isinstance(value, Mapping):
            if sampler == "grid":
                raise ConfigError(f"{place}: found a range with the sampler grid; give a list, or set sampler: optuna")
            over[key] = _range(value, where=place)
        else:
            over[key] = _values(value, where=place)
    seeds = _seeds(tree["seeds"], where=f"{where}.seeds")
    return Selection(over=over, seeds=seeds, metric=metric, sampler=sampler, trials=trials)


def _range(tree: Mapping[Any, Any], *, where: str) -> Range:
    _check_keys(tree, _RANGE_KEYS, where=where)
    numbers: dict[str, Any] = {key: tree[key] for key in ("low", "high", "step") if key in tree}
    if not {"low", "high"} <= set(numbers) or any(type(value) not in (int, float) for value in numbers.values()):
        raise ConfigError(f"{where}: found {dict(tree)}; give numbers, such as {{low: 0.001, high: 0.1, log: true}}")
    found = Range(low=numbers["low"], high=numbers["high"], log=bool(tree.get("log", False)), step=numbers.get("step"))
    if not found.low < found.high or (found.log and (found.low <= 0 or found.step is not None)):
        raise ConfigError(f"{where}: found {dict(tree)}; give low below high, and with log no step and low above 0")
    return found


def _axes(tree: Any, *, where: str) -> Axes:
    axes: dict[str, tuple[str, ...]] = {}
    for key, value in _mapping(tree, where=where).items():
        if key == "seed":
            raise ConfigError(f"{where}.seed: found seeds among the values; give them as seeds: 0..4")
        axes[key] = _values(value, where=f"{where}.{key}")
    return axes


def _values(value: Any, *, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ConfigError(f"{where}: found an empty list; give a value")
    return distinct([as_text(each, where=where) for each in values], where=where)


def _seeds(value: Any, *, where: str) -> tuple[int, ...]:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return tuple(parse_seeds(text, where=where))


def _mapping(tree: Any, *, where: str) -> Mapping[str, Any]:
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where}: found {tree!r}; give a mapping of keys to values")
    return {str(key): value for key, value in tree.items()}


def _check_keys(tree: Mapping[Any, Any], known: Sequence[str], *, where: str) -> None:
    for key in tree:
        if key not in known:
            close = nearest(str(key), known)
            advice = f"did you mean '{close}'?" if close else f"keys are {', '.join(known)}"
            raise ConfigError(f"{where}: unknown key '{key}'; {advice}")
