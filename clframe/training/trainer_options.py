"""Options of the Lightning Trainers of a run: callbacks and loggers by name, and what is refused."""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clframe.avalanche_bridge.imports import (
    Callback,
    MisconfigurationException,
    Trainer,
    lightning_callbacks,
    lightning_loggers,
)
from clframe.errors import ConfigError, UnknownNameError, UnsupportedError, reason_of, unknown_name
from clframe.own_code import is_dotted, load_class
from clframe.training.checkpoint import encode
from clframe.training.epochs import EarlyStopping, metric_names

Named = Sequence[tuple[str, Mapping[str, Any]]]
"""Class names with their options."""

_REFUSED = {
    "StochasticWeightAveraging": "its extra epoch for batch normalization would train, as optimization is manual here",
    "GradientAccumulationScheduler": "it needs automatic optimization; set trainer.accumulate",
    "BatchSizeFinder": "its trial fits would train the model; set trainer.batch_size",
    "LearningRateFinder": "its trial fits would train the model; set optimizer.lr",
    "BaseFinetuning": "it changes the optimizer that the strategy creates; use the component 'freeze'",
    "ModelPruning": "it renames parameters, which checkpoints and components find by name",
    "SpikeDetection": "it reads the loss that a training_step returns, which is none here; set trainer.on_nonfinite",
}
"""Lightning callbacks that spoil a run here, by class name, and why."""

_REFUSED_LOGGERS = {
    "WandBLogger": "Avalanche's logger calls wandb.util.generate_id, which current wandb lacks; use WandbLogger, "
    "Lightning's, with trainer.engine=trainer",
}
"""Loggers of Avalanche that people may name, and why not."""


def make_trainer(options: Mapping[str, Any], **arguments: Any) -> Trainer:
    """Return a Trainer that shows and saves only what its options ask for.

    Raises:
        UnsupportedError: Lightning refuses the options.
    """
    names = {type(callback).__name__ for callback in _callbacks(options)}
    try:
        with without_banners():
            return Trainer(
                **{
                    "devices": 1,
                    "logger": False,
                    "enable_checkpointing": any("Checkpoint" in name for name in names),
                    "enable_model_summary": any(name.endswith("ModelSummary") for name in names),
                    "enable_progress_bar": any(name.endswith("ProgressBar") for name in names),
                    "use_distributed_sampler": False,
                    **arguments,
                    **options,
                }
            )
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise refusal(error) from None


def check_callbacks(options: Mapping[str, Any]) -> None:
    """Refuse callbacks of Lightning that would spoil a run.

    Raises:
        UnsupportedError: One of them; the message gives the reason.
    """
    for callback in _callbacks(options):
        name = type(callback).__name__
        for base in _lightning_bases(callback):
            if base in _REFUSED:
                raise UnsupportedError(
                    f"trainer.callbacks: {name} cannot work with manual optimization, one fit per experience: "
                    f"{_REFUSED[base]}"
                )
        # Its default average subtracts, which torch refuses for the buffers of heads that are true or false.
        averages = "WeightAveraging" in _lightning_bases(callback) and getattr(callback, "_use_buffers", False)
        if averages and not {"avg_fn", "multi_avg_fn"} & set(getattr(callback, "_kwargs", ())):
            raise UnsupportedError(
                f"trainer.callbacks: {name} cannot average the buffers of a network, some of which are true or false; "
                f"set use_buffers: false, or use EMAWeightAveraging or trainer.ema"
            )


def _lightning_bases(callback: Any) -> list[str]:
    """Names of the classes of Lightning from which a callback inherits."""
    return [base.__name__ for base in type(callback).__mro__ if base.__module__.startswith("lightning.")]


def _callbacks(options: Mapping[str, Any]) -> list[Any]:
    found = options.get("callbacks") or ()
    return [found] if isinstance(found, Callback) else list(found)


def refusal(error: Exception) -> UnsupportedError:
    """Return the error of a run whose callbacks, loggers or other arguments Lightning refuses."""
    reason = reason_of(error)
    return UnsupportedError(
        f"trainer: Lightning refuses its callbacks, loggers or other arguments ({reason}); change or remove them"
    )


@contextmanager
def without_banners() -> Iterator[None]:
    """Silence what Lightning logs for each new Fabric and each new Trainer, one per experience."""
    names = ("lightning.fabric", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero")
    notices = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in notices]
    for logger in notices:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(notices, levels, strict=True):
            logger.setLevel(level)


def fresh_callbacks(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options with deep copies of the callbacks: their state, such as a best score, is of one experience."""
    try:
        return {**options, "callbacks": [copy.deepcopy(callback) for callback in _callbacks(options)]}
    except Exception as error:  # whatever __deepcopy__ and __reduce__ of a foreign class raise
        reason = reason_of(error)
        raise UnsupportedError(
            f"trainer.callbacks: a callback cannot be copied ({reason}), but each experience gets a fresh one; give it "
            f"a __deepcopy__ (returning itself shares it)"
        ) from None


def refuse_to_save(options: Mapping[str, Any]) -> str:
    """Return the names of callbacks whose state cannot be stored inside an experience; empty if all can."""
    found = []
    for callback in _callbacks(options):
        try:
            encode(callback.state_dict())
            plain = type(callback).on_save_checkpoint is Callback.on_save_checkpoint
        except Exception:  # whatever a foreign class raises
            plain = False
        if not plain:
            found.append(type(callback).__name__)
    return ", ".join(found)


def trainer_options(callbacks: Mapping[str, Any], loggers: Named, *, precision: str, folder: Path) -> dict[str, Any]:
    """Return keyword arguments of ``lightning.Trainer``.

    Args:
        callbacks: Options by class name of ``lightning.pytorch.callbacks``.
        loggers: Class names of ``lightning.pytorch.loggers`` with options; each writes below ``folder``.
        precision: As Lightning names it.
        folder: The run folder.

    Raises:
        UnknownNameError: No such class; the message has the nearest name.
        ConfigError: Options that the class does not take.
        UnsupportedError: A class that cannot work here.
    """
    options = {
        "callbacks": [
            _make(lightning_callbacks, name, options or {}, "trainer.callbacks") for name, options in callbacks.items()
        ],
        "logger": [_make_logger(name, options, folder) for name, options in loggers] or False,
        "precision": precision,
        "default_root_dir": str(folder),
    }
    check_callbacks(options)
    make_trainer(options, accelerator="auto", max_epochs=1)  # refuse now what could not train later
    return options


def early_stopping(callbacks: Mapping[str, Any]) -> EarlyStopping | None:
    """Return what ``trainer.callbacks.EarlyStopping`` asks for, where no Trainer runs Lightning's callback.

    Raises:
        ConfigError: Options that it does not take.
    """
    options = callbacks.get("EarlyStopping")
    if options is None:
        return None
    found = _instantiate(EarlyStopping, options, "trainer.callbacks.EarlyStopping")
    assert isinstance(found, EarlyStopping)
    return found


def check_monitors(callbacks: Mapping[str, Any], *, validation: bool) -> None:
    """Refuse callbacks that follow a metric which no epoch has.

    Args:
        callbacks: Options by class name.
        validation: Whether data is held out.

    Raises:
        ConfigError: The metric's name, and those that exist.
    """
    metrics = metric_names(validation=validation)
    for name, options in callbacks.items():
        monitor = options.get("monitor") if isinstance(options, Mapping) else None
        if monitor is not None and monitor not in metrics:
            validated = monitor in metric_names(validation=True)
            advice = "set benchmark.validation=0.1" if validated else f"metrics are {', '.join(metrics)}"
            raise ConfigError(f"trainer.callbacks.{name}.monitor: found '{monitor}'; {advice}")


def _make_logger(name: str, options: Mapping[str, Any], folder: Path) -> Any:
    where = "trainer.loggers"
    if name in _REFUSED_LOGGERS:
        raise UnsupportedError(f"{where}: {name} cannot work: {_REFUSED_LOGGERS[name]}")
    kind = getattr(lightning_loggers, name, object)
    if is_dotted(name):
        kind = load_class(name, (lightning_loggers.Logger,), where=where)
    takes = inspect.signature(kind).parameters
    home = {"save_dir": str(folder / name)} if "save_dir" in takes else {}
    logger = _make(lightning_loggers, name, {**home, **options}, where)
    if name == "WandbLogger":
        _check_wandb_key(options)
    return logger


def _check_wandb_key(options: Mapping[str, Any]) -> None:
    """Refuse before training what wandb would raise on the first value logged."""
    import wandb

    offline = options.get("offline") or options.get("mode", os.environ.get("WANDB_MODE")) in ("offline", "disabled")
    if offline:
        return
    if "prompt" in inspect.signature(wandb.login).parameters:
        found = wandb.login(prompt=False, verify=False)
    else:  # before wandb 0.31
        found = wandb.api.api_key is not None
    if not found:
        raise ConfigError(
            "trainer.loggers.WandbLogger: found no API key of Weights & Biases; run `wandb login`, set WANDB_API_KEY, "
            "or use trainer.loggers=[{WandbLogger: {offline: true}}]"
        )


def _make(module: Any, name: str, options: Any, where: str) -> Any:
    if is_dotted(name):
        base = Callback if module is lightning_callbacks else module.Logger
        return _instantiate(load_class(name, (base,), where=where), options, f"{where}.{name}")
    if name not in module.__all__:
        raise UnknownNameError(unknown_name("Lightning class", name, module.__all__, where=where))
    return _instantiate(getattr(module, name), options, f"{where}.{name}")


def _instantiate(maker: Any, options: Any, where: str) -> Any:
    accepted = inspect.signature(maker).parameters
    if not isinstance(options, Mapping):
        raise ConfigError(f"{where}: found {options!r}; give a mapping of options")
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        for option in options:
            if option not in accepted:
                raise ConfigError(f"{where}.{option}: unknown option; options are {', '.join(accepted)}")
    try:
        return maker(**options)
    except Exception as error:  # whatever a foreign class raises on its options
        raise ConfigError(f"{where}: {' '.join(str(error).split())}; change its options") from None
