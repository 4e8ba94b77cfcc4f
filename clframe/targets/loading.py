"""Trained models read from run folders, without their data."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from clframe.build import build_backbone, build_strategy, register_imports
from clframe.config.files import read_yaml
from clframe.config.schema import Config
from clframe.config.typed import from_mapping
from clframe.device_names import usable_device
from clframe.errors import ConfigError, RunFolderError, UnsupportedError, reason_of, reword
from clframe.exits.curves import BudgetPoints
from clframe.files import to_path
from clframe.metrics import Tally
from clframe.moe.pipeline import Recipe
from clframe.nn import Network
from clframe.process_state import own_process
from clframe.run_folder import RunFolder
from clframe.targets.portable import is_portable, read_portable
from clframe.training.recorded_data import check_data
from clframe.training.trained import (
    CONVERTED,
    TrainedModel,
    load_newest,
    predicting_components,
    read_recipe,
    restore_model,
)

_log = logging.getLogger(__name__)

_UNFIT = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError)
"""Errors that a changed checkpoint may raise where it is used."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RunModel(TrainedModel):
    """A trained model with the folder and config of its run."""

    folder: Path
    """The run folder, or that of a converted or exported model."""
    config: Config
    """The resolved config of the run."""


RunModelT = TypeVar("RunModelT", bound=RunModel)


@own_process("clframe.load", trains=False)
def load_model(run: str | Path, *, device: str | torch.device = "cpu", where: str = "load") -> TrainedModel:
    """Load the trained model of a run, see :func:`clframe.load`.

    Args:
        run: A run folder, finished or not, or the folder of a model converted by ``clframe moefy``.
        device: Device of the model, see :func:`~clframe.device_names.usable_device`.
        where: Verb in the message about a folder that is not one of a run.

    Raises:
        RunFolderError: No run folder, or no readable checkpoint in it.
        UnsupportedError: A device that is not available.
    """
    folder = RunFolder.open(to_path(run, where=where), where=where)
    place = usable_device(device, where=f"{where}: device")
    config = read_config(folder)
    content: Mapping[str, Any]
    budgets: BudgetPoints | None = None
    if is_portable(folder.path):
        content, recipe, budgets = read_portable(folder.path)
    else:
        recipe = read_recipe(folder.path) if (folder.path / CONVERTED).is_file() else None
        content = load_newest(folder.path, device=place)
    trained, finished, count = fit_model(config, content, folder=folder.path, recipe=recipe, device=place)
    if finished < count:
        _log.warning(
            "%s: has learned %d of %d experiences; finish it with clframe run --resume %s",
            folder.path, finished, count, shlex.quote(str(folder.path)),
        )  # fmt: skip
    return trained if budgets is None else replace(trained, budgets=budgets)


def fit_model(
    config: Config, content: Mapping[str, Any], *, folder: Path, recipe: Recipe | None = None,
    device: str | torch.device = "cpu",
) -> tuple[TrainedModel, int, int]:
    """Restore the model of a checkpoint, and check that it predicts.

    Args:
        config: The config of its run.
        content: The checkpoint.
        folder: The run folder, for messages.
        recipe: Options of a conversion to experts after training.
        device: Device of the model.

    Returns:
        The model, its number of finished experiences, and that of all experiences; both 0 for a copy of a model.

    Raises:
        RunFolderError: The checkpoint does not fit the config.
        ClframeError: A config of which no model can be built.
    """
    with _explain_misfit(folder):
        check_data(content["data"])
    register_imports(config.imports)
    strategy = build_strategy(config.strategy, config.components)
    make_backbone = build_backbone(config.backbone, strategy)
    network = Network(make_backbone(tuple(content["data"]["input_shape"])))
    with _explain_misfit(folder):
        trained = restore_model(network, strategy, content, recipe=recipe)
        network.to(device)
        _try_prediction(trained)
        tallies = content.get("tallies", ())  # a copy of a model has none
        return trained, len(tallies), len(Tally(**tallies[-1]).total_EC) if tallies else 0


@contextmanager
def _explain_misfit(folder: Path) -> Iterator[None]:
    try:
        yield
    except UnsupportedError:  # of this machine, not of the checkpoint
        raise
    except _UNFIT as error:
        reason = reason_of(error, most=200)
        raise RunFolderError(
            f"{folder}: the newest checkpoint does not fit its config ({reason}); restore both, or train again"
        ) from error


def _try_prediction(model: TrainedModel) -> None:
    """Predict one input of zeros where a component acts on predictions, whose state only the component can check."""
    acting = predicting_components(model.learner.composition)
    if acting and model.learner.past and not model.network.vocabulary:
        model.classify(torch.zeros(model.network.input_shape))


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
    return read_config(RunFolder.open(to_path(run, where=where), where=where))


def read_config(folder: RunFolder) -> Config:
    """Read the resolved config of an opened run folder.

    Raises:
        ConfigError: A config that cannot be read.
    """
    tree = read_yaml(folder.config_path)
    try:
        return from_mapping({str(key): value for key, value in tree.items()})
    except ConfigError as error:
        raise reword(error, lambda message: f"{folder.config_path}: {message}") from None


def load_run(
    run: str | Path, *, kind: type[RunModelT], device: str | torch.device = "cpu", where: str = "load"
) -> RunModelT:
    """Load the trained model of a run, with its folder and config, as a ``kind``; see :func:`load_model`.

    Raises:
        RunFolderError: No run folder, or no readable checkpoint in it.
    """
    trained = load_model(run, device=device, where=where)
    values: dict[str, Any] = {field.name: getattr(trained, field.name) for field in fields(TrainedModel)}
    return kind(**values, folder=Path(run), config=run_config(run, where=where))
