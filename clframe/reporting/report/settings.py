"""The config of a run as a report compares it: flat, without what changes no number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from clframe.config.files import read_yaml
from clframe.config.typed import as_tree, from_mapping
from clframe.core import parse
from clframe.errors import ClframeError

NO_MATTER = ("seed", "output", "trainer.progress", "trainer.loggers", "trainer.log_every", "benchmark.workers")
"""Keys of a config that change no number of a run, and the seed."""


def config_of(path: Path) -> dict[str, Any]:
    """A resolved config file as nested plain values, with the defaults of options it does not have."""
    tree = OmegaConf.to_container(read_yaml(path), resolve=False)
    assert isinstance(tree, dict)
    try:
        return as_tree(from_mapping({str(key): value for key, value in tree.items()}))
    except ClframeError as error:
        raise type(error)(f"{path}: {error}") from None


def settings_of(config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """The flat config and the strategy's name, both the same for two ways of writing one strategy."""
    tree = {key: value for key, value in config.items() if key not in ("strategy", "components")}
    strategy = str(config["strategy"])
    try:
        composition = parse(strategy, config["components"])
        strategy, components = str(composition), {component.name: asdict(component) for component in composition}
    except ClframeError:  # a component of a package that is not installed here
        components = dict(config["components"])
    flat = {"strategy": strategy, **flatten(tree), **flatten(components)}
    return {key: value for key, value in flat.items() if key not in NO_MATTER}, strategy


def flatten(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Nested mappings as one of dotted keys, values as JSON.

    >>> flatten({"trainer": {"epochs": 2, "devices": [0]}})
    {'trainer.epochs': '2', 'trainer.devices': '[0]'}
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, prefix=f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat
