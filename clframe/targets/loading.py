"""Trained models read from run folders, without their data."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from clframe.build import build_backbone, build_strategy, register_imports
from clframe.config.files import read_yaml
from clframe.config.schema import Config
from clframe.config.typed import from_mapping
from clframe.errors import ClframeError, ConfigError, RunFolderError, UnsupportedError, reason_of
from clframe.exits.curves import BudgetPoints
from clframe.metrics import Tally
from clframe.nn import Network
from clframe.run_folder import RunFolder
from clframe.targets.portable import is_portable, read_portable
from clframe.training.trained import CONVERTED, TrainedModel, load_newest, read_recipe, restore_model

_log = logging.getLogger(__name__)

_MOST_INPUT = 2**28
"""Values of one input: more than those of an image of 9,000 x 9,000 pixels."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RunModel(TrainedModel):
    """A trained model with the folder and config of its run."""

    folder: Path
    """The run folder, or that of a converted or exported model."""
    config: Config
    """The resolved config of the run."""


RunModelT = TypeVar("RunModelT", bound=RunModel)


def load_model(run: str | Path, *, device: str = "cpu", where: str = "load") -> TrainedModel:
    """Load the trained model of a run, see :func:`clframe.load`.

    Args:
        run: A run folder, finished or not, or the folder of a model converted by ``clframe moefy``.
        device: Device of the model.
        where: Verb in the message about a folder that is not one of a run.

    Raises:
        RunFolderError: No run folder, or no readable checkpoint in it.
    """
    folder = RunFolder.open(Path(run), where=where)
    config = read_config(folder)
    content: Mapping[str, Any]
    budgets: BudgetPoints | None = None
    if is_portable(folder.path):
        content, recipe, budgets = read_portable(folder.path)
    else:
        recipe = read_recipe(folder.path) if (folder.path / CONVERTED).is_file() else None
        content = load_newest(folder.path, device=torch.device(device))
    try:
        register_imports(config.imports)
        strategy = build_strategy(config.strategy, config.components)
        network = Network(build_backbone(config.backbone, strategy)(_input_shape(content)))
        trained = restore_model(network, strategy, content, recipe=recipe)
    except ClframeError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:
        reason = reason_of(error, most=200)
        raise RunFolderError(f"{folder.path}: the newest checkpoint does not fit its config ({reason})") from error
    network.to(device)
    _warn_if_unfinished(folder, content)
    return trained if budgets is None else replace(trained, budgets=budgets)


def _input_shape(content: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the model's inputs.

    Raises:
        ValueError: It is not a shape, or of more values than an input has; a backbone of it would fill the memory.
    """
    shape = tuple(content["data"]["input_shape"])
    if not shape or any(type(side) is not int or side < 1 for side in shape) or math.prod(shape) > _MOST_INPUT:
        raise ValueError(f"inputs of shape {shape}")
    return shape


def _warn_if_unfinished(folder: RunFolder, content: Mapping[str, Any]) -> None:
    tallies = content.get("tallies")  # a copy of a model has none
    if not tallies:
        return
    finished, count = len(tallies), len(Tally(**tallies[-1]).total_EC)
    if finished < count:
        _log.warning(
            "%s: has learned %d of %d experiences; finish it with clframe run --resume %s",
            folder.path, finished, count, shlex.quote(str(folder.path)),
        )  # fmt: skip


def refuse_language_model(
    network: Network, *, where: str, advice: str = "clframe export RUN --format transformers writes a model to analyze"
) -> None:
    """Refuse a verb that predicts classes for a language model (UnsupportedError); ``advice`` ends the message."""
    if network.vocabulary:
        raise UnsupportedError(
            f"{where}: found the run of a language model, which predicts tokens instead of classes; clframe evaluate "
            f"shows its perplexities, {advice}"
        )


def run_config(run: str | Path, *, where: str = "load") -> Config:
    """Read the resolved config of a run folder.

    Raises:
        RunFolderError: No run folder.
        ConfigError: A config that cannot be read.
    """
    return read_config(RunFolder.open(Path(run), where=where))


def read_config(folder: RunFolder) -> Config:
    """Read the resolved config of an opened run folder.

    Raises:
        ConfigError: A config that cannot be read.
    """
    tree = read_yaml(folder.config_path)
    try:
        return from_mapping({str(key): value for key, value in tree.items()})
    except ConfigError as error:
        raise ConfigError(f"{folder.config_path}: {error}") from None


def load_run(
    run: str | Path, *, kind: type[RunModelT], device: str = "cpu", where: str = "load"
) -> RunModelT:
    """Load the trained model of a run, with its folder and config, as a ``kind``; see :func:`load_model`.

    Raises:
        RunFolderError: No run folder, or no readable checkpoint in it.
    """
    trained = load_model(run, device=device, where=where)
    values: dict[str, Any] = {field.name: getattr(trained, field.name) for field in fields(TrainedModel)}
    return kind(**values, folder=Path(run), config=run_config(run, where=where))
