"""From the values of a sweep to its cells: every config is checked before the first cell trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from clframe.build import check_config
from clframe.config.load import load_config
from clframe.config.schema import Config
from clframe.core import COMPONENTS
from clframe.errors import ConfigError, Problems
from clframe.sweep.cells import Cell, Stage, digest, label_cells, make_cell
from clframe.sweep.space import Setting, Space, overrides_of


class Checked(NamedTuple):
    """A combination of values with its config, which has been checked."""

    setting: Setting
    config: Config
    digest: str
    components: frozenset[str]
    """Names of the components of its strategy."""


def check_settings(config: str, settings: Sequence[Setting]) -> list[Checked]:
    """Load and check the config of each combination.

    Raises:
        ClframeError: What runs would be refused for, one line for each problem.
    """
    problems, found = Problems(), list[Checked]()
    with _unused_options_unnamed():
        for setting in settings:
            with problems.attempt():
                if "output" in setting:
                    raise ConfigError(
                        f"output: found {setting['output']}, but cells are in the folder of the sweep; leave it out"
                    )
                loaded = load_config(config, overrides_of(setting))
                if loaded.trainer.fast_dev_run:
                    raise ConfigError(
                        "trainer.fast_dev_run: found a development run, whose results are not those of its config; "
                        "leave it out"
                    )
                names = frozenset(component.name for component in check_config(loaded))
                found.append(Checked(setting, loaded, digest(loaded), names))
    problems.raise_found()
    return found


@contextmanager
def _unused_options_unnamed() -> Iterator[None]:
    """Drop the log lines about options of components that a strategy does not use.

    In a sweep over strategies this is common; :func:`check_axes` refuses values that no cell uses.
    """
    logger = logging.getLogger("clframe.config.load")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def check_axes(checked: Sequence[Checked]) -> None:
    """Refuse a key that makes no difference to any cell, by all of its values or since no strategy uses it.

    Raises:
        ConfigError: Such a key.
    """
    used = frozenset[str]().union(*(one.components for one in checked))
    for key in dict.fromkeys(key for one in checked for key in one.setting):
        block, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if block == "components" and name in COMPONENTS and name not in used:
            raise ConfigError(f"{key}: found options of {name}, which no cell's strategy has; add it or leave them out")
    for key in dict.fromkeys(key for one in checked for key in one.setting):
        digests: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
        for one in checked:
            others = tuple((k, v) for k, v in one.setting.items() if k != key)
            digests.setdefault(others, {})[one.setting.get(key, "")] = one.digest
        compared = [found for found in digests.values() if len(found) > 1]
        if compared and all(len(set(found.values())) == 1 for found in compared):
            raise ConfigError(
                f"{key}: found {len(compared[0])} values that make no difference to any cell; give one, or leave it out"
            )


def plan_cells(sweep: Path, space: Space) -> list[Cell]:
    """Return the cells of a sweep without a selection, in order, and record new ones.

    Raises:
        ClframeError: A config that runs would be refused for; nothing has been written.
    """
    checked = check_settings(space.config, space.settings())
    check_axes(checked)
    return record_cells(sweep, checked, seeds=space.seeds, keys=space.varied())


def record_cells(
    sweep: Path, checked: Sequence[Checked], *, seeds: Sequence[int], keys: Sequence[str], stage: Stage = "test"
) -> list[Cell]:
    """Return a cell for each config and seed, and record new ones.

    Combinations that are one config, such as two sizes of a buffer that the strategy lacks, are one cell.

    Args:
        sweep: Folder of the sweep.
        checked: The combinations.
        seeds: Of each of them.
        keys: The keys that tell cells apart, for their names.
        stage: Of all cells.
    """
    cells = []
    distinct = {one.digest: one for one in reversed(checked)}  # the first combination of each config
    for one in reversed(distinct.values()):
        values = [f"{key.rpartition('.')[2]}{value}" for key, value in one.setting.items()
                  if key in keys and key != "strategy"]  # fmt: skip
        cells += [make_cell(sweep, replace(one.config, seed=seed), values=values, stage=stage) for seed in seeds]
    return label_cells(cells)
