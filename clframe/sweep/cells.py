"""Cells of a sweep: runs with a folder that is named by their config and seed.

::

    SWEEP/
      er+exits-lr0.1-3fa94c12ab-seed0/     an ordinary run folder
      selection/                           runs of a selection, on validation data; reports leave them out
      .sweep/cells/<digest>-seed<n>.json   what a cell is: its config, written once
      .sweep/state/<digest>-seed<n>.json   how its last attempt ended, and the time it took
      .sweep/locks/                        see clframe.sweep.locks

The digest is that of the resolved config without its seed, its folder, values that are the schema's defaults, and keys
that do not affect results. So another spelling of a strategy, or a new key of a later version, is the same cell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from clframe.config.named import BLOCK
from clframe.config.schema import BackboneConfig, BenchmarkConfig, Config, OptimizerConfig
from clframe.config.trainer import TrainerConfig
from clframe.config.typed import as_tree, from_mapping
from clframe.core import Component, parse
from clframe.errors import ClframeError, RunFolderError
from clframe.files import read_json, write_atomically
from clframe.report.loading import NO_MATTER, flatten
from clframe.run_folder import LONGEST_LABEL, SELECTION, SWEEP_RECORDS, strategy_label

Stage = Literal["test", "selection"]
_DIGITS: Final = 10


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    sweep: Path
    key: str
    """Digest of its config, and its seed."""
    name: str
    """Name of its run folder."""
    seed: int
    stage: Stage
    config: Config
    label: str = ""
    """Values that tell it from other cells, without its seed; see :func:`label_cells`."""

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return (self.sweep / SELECTION if self.stage == "selection" else self.sweep) / self.name

    @property
    def results(self) -> Path:
        """The file that a finished cell has."""
        return self.folder / "results.json"

    def finished(self) -> bool:
        """Whether the cell has been trained to its end."""
        return self.results.is_file()


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """The attempts to train a cell."""

    count: int = 0
    seconds: float = 0.0
    """Wall time of all of them."""
    failed: str = ""
    """One line that says why the last one failed; empty if it did not."""
    diverged: bool = False
    """Whether it failed because losses or weights were not finite."""


def digest(config: Config) -> str:
    """Return a digest of everything of a config that affects its results, except the seed."""
    kept = sorted(f"{key}={value}" for key, value in _settings(config).items())
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:_DIGITS]


def _settings(config: Config) -> dict[str, str]:
    """Flat settings that differ from the defaults, with the components of the strategy in use."""
    tree = {key: value for key, value in as_tree(config).items() if key not in ("strategy", "components")}
    defaults = {"benchmark": asdict(BenchmarkConfig(name="-")), "backbone": asdict(BackboneConfig(name="-")),
                "optimizer": asdict(OptimizerConfig()), "trainer": asdict(TrainerConfig())}  # fmt: skip
    given = {name: options for name, options in config.components.items() if name != BLOCK}
    composition = parse(config.strategy, given)
    flat, base = flatten(tree), flatten(defaults)
    found = {key: value for key, value in flat.items() if base.get(key) != value and key not in NO_MATTER}
    components: dict[str, Any] = {component.name: _options(component) for component in composition}
    if BLOCK in config.components:
        components[BLOCK] = config.components[BLOCK]
    return {**found, "strategy": str(composition), **flatten({"components": components})}


def _options(component: Component) -> dict[str, Any]:
    options = asdict(component)
    for field in dataclasses.fields(component):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if options.get(field.name) == default:
            del options[field.name]
    return options


def make_cell(sweep: Path, config: Config, *, values: Sequence[str] = (), stage: Stage = "test") -> Cell:
    """Return the cell of a config in a sweep, and record it if it is new.

    Args:
        sweep: Folder of the sweep.
        config: Its config, with its seed.
        values: Short texts for the name of its folder, after the strategy.
        stage: ``selection`` for a run that is compared on validation data.

    Raises:
        RunFolderError: The folder cannot be written, or its record is damaged.
    """
    key = f"{digest(config)}-seed{config.seed}"
    words = [strategy_label(config.strategy), *(re.sub(r"[^\w.+-]+", "_", value) for value in values)]
    record = {
        "name": f"{'-'.join(filter(None, words))[:LONGEST_LABEL]}-{key}", "stage": stage,
        "seed": config.seed, "config": as_tree(replace(config, output=str(sweep))),
    }  # fmt: skip
    path = _record_path(sweep, key)
    if not path.exists():
        write_new(path, json.dumps(record, indent=1))
    cell = read_cell(sweep, key)
    if digest(cell.config) == digest(config) and cell.config.trainer != config.trainer and not cell.folder.exists():
        # Keys that change no result, such as trainer.figures, are those of the last call until the run begins.
        write_atomically(path, json.dumps({**record, "name": cell.name}, indent=1), sync=False)
        cell = read_cell(sweep, key)
    if cell.stage != stage or digest(cell.config) != digest(config):
        raise RunFolderError(f"{path}: was recorded by a version of clframe with other defaults; give another --folder")
    return cell


def write_new(path: Path, text: str) -> None:
    """Write a file whose first version is kept: of two processes that write it, one does."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
        write_atomically(temporary, text, sync=False)
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path.parent}: cannot be written ({error.strerror}); give another --folder") from None


def _record_path(sweep: Path, key: str) -> Path:
    return sweep / SWEEP_RECORDS / "cells" / f"{key}.json"


def read_cell(sweep: Path, key: str) -> Cell:
    """Read the record of a cell.

    Raises:
        RunFolderError: There is none, or it is damaged.
    """
    path = _record_path(sweep, key)
    try:
        found = read_json(path)
        name, stage = str(found["name"]), str(found["stage"])
        if Path(name).name != name or stage not in ("test", "selection"):
            raise ValueError("a name with folders")
        config = from_mapping(found["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, ClframeError) else type(error).__name__
        raise RunFolderError(f"{path}: is not the record of a cell ({reason}); delete it and start again") from None
    return Cell(sweep=sweep, key=key, name=name, seed=config.seed, stage=stage, config=config)  # type: ignore[arg-type]  # checked


def label_cells(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells, labeled with their strategy and with the settings in which some of them differ."""
    flats = [_shown(cell.config) for cell in cells]
    values: dict[str, set[str]] = {}
    for flat in flats:
        for key, value in flat.items():
            values.setdefault(key, set()).add(value)
    differ = [key for key, found in values.items() if len(found) > 1]
    labels = (
        ", ".join([_names(cell.config), *(f"{key.rpartition('.')[2]} {flat[key]}" for key in differ if key in flat)])
        for cell, flat in zip(cells, flats, strict=True)
    )
    return [replace(cell, label=label) for cell, label in zip(cells, labels, strict=True)]


def _shown(config: Config) -> dict[str, str]:
    """Flat settings that a label may show, with all options of the components in use."""
    hidden = ("strategy", "components", "output", "name")
    flat = flatten({key: value for key, value in as_tree(config).items() if key not in hidden})
    given = {name: options for name, options in config.components.items() if name != BLOCK}
    options = {component.name: asdict(component) for component in parse(config.strategy, given)}
    flat |= flatten({"components": {**options, BLOCK: config.components.get(BLOCK, {})}})
    return {key: value for key, value in flat.items() if key not in (*NO_MATTER, "benchmark.evaluate")}


def _names(config: Config) -> str:
    return strategy_label(config.strategy).replace("+", " + ")


def cell_keys(sweep: Path) -> list[str]:
    """Return the keys of all cells that a sweep has recorded, sorted.

    Raises:
        RunFolderError: The folder is not that of a sweep.
    """
    folder = sweep / SWEEP_RECORDS / "cells"
    if not folder.is_dir():
        found = "has no sweep" if sweep.is_dir() else "no such folder"
        raise RunFolderError(f"{sweep}: {found}; give the folder of clframe sweep --folder")
    return sorted(path.stem for path in folder.glob("*.json"))


def read_attempts(sweep: Path, key: str) -> Attempts:
    """Read how the attempts to train a cell ended; a damaged file counts as none."""
    try:
        found: Mapping[str, Any] = read_json(sweep / SWEEP_RECORDS / "state" / f"{key}.json")
        return Attempts(
            count=int(found["count"]), seconds=float(found["seconds"]), failed=str(found["failed"]),
            diverged=bool(found["diverged"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return Attempts()


def record_attempt(sweep: Path, key: str, *, seconds: float, failed: str = "", diverged: bool = False) -> None:
    """Add an attempt to those of a cell."""
    before = read_attempts(sweep, key)
    content = Attempts(count=before.count + 1, seconds=before.seconds + seconds, failed=failed, diverged=diverged)
    folder = sweep / SWEEP_RECORDS / "state"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{key}.json", json.dumps(asdict(content)), sync=False)
