"""Arguments that ``LightningStrategy(trainer=...)`` may pass to Lightning Trainers, and what to give instead.

Epochs, batches, devices and precision are those of the strategy: its components count steps and draw by them. A Trainer
with others would train something else, or fail later with a message about something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from clframe.avalanche_bridge.imports import Fabric, Precision, Trainer
from clframe.errors import ConfigError, UnsupportedError, nearest
from clframe.options import format_value

ALLOWED = (
    "callbacks", "logger", "profiler", "precision", "plugins", "default_root_dir", "log_every_n_steps",
    "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams", "model_registry",
    "detect_anomaly", "deterministic", "benchmark", "min_epochs", "max_time",
)  # fmt: skip
"""Arguments that do in a Trainer of a run what Lightning documents."""

_BATCHES = "give limit_batches= to the strategy"
_EPOCHS = "give train_epochs= to the strategy"
_CLIP = "give clip= to the ContinualModule"
_DEVICE = "give device= or fabric= to the strategy"
_EVALUATION = "leave it out, as the Trainer only trains; strategy.eval evaluates, on limit_batches= batches"
_LOADER = "leave it out, as the strategy makes the loader"

_INSTEAD = {
    "max_epochs": _EPOCHS,
    "max_steps": f"{_EPOCHS}, or limit_batches=",
    "min_steps": f"{_EPOCHS}, or min_epochs in trainer=",
    "limit_train_batches": _BATCHES,
    "overfit_batches": _BATCHES,
    "fast_dev_run": "give train_epochs=1 and limit_batches= to the strategy",
    "accumulate_grad_batches": "give accumulate= to the strategy",
    "gradient_clip_val": _CLIP,
    "gradient_clip_algorithm": f"{_CLIP}, which clips the norm",
    "accelerator": _DEVICE,
    "strategy": _DEVICE,
    "devices": _DEVICE,
    "num_nodes": _DEVICE,
    "sync_batchnorm": "leave it out, as one process trains",
    "use_distributed_sampler": _LOADER,
    "reload_dataloaders_every_n_epochs": _LOADER,
    "limit_val_batches": _EVALUATION,
    "limit_test_batches": _EVALUATION,
    "limit_predict_batches": _EVALUATION,
    "num_sanity_val_steps": _EVALUATION,
    "val_check_interval": _EVALUATION,
    "check_val_every_n_epoch": "give eval_every= to the strategy",
    "inference_mode": _EVALUATION,
    "barebones": "leave it out; a strategy without trainer= has the fewest features",
}
"""Advice by argument, for those that contradict the strategy or have no effect in it."""

_SHORT_PRECISIONS = {"None": "32-true", "32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Lightning's short names of precisions."""


def check_arguments(arguments: Mapping[str, Any], *, engine: str, fabric: Fabric) -> None:
    """Refuse arguments for Lightning's Trainer that could not take effect.

    Args:
        arguments: Of :class:`lightning.Trainer`, as given to the strategy.
        engine: ``"fabric"``, which has no Trainer, or ``"trainer"``.
        fabric: Of the strategy; its precision is that of evaluation.

    Raises:
        UnsupportedError: An argument without effect, or one that contradicts the strategy.
        ConfigError: An argument that Lightning's Trainer does not have.
    """
    if engine != "trainer":
        if arguments:
            raise UnsupportedError(
                f"LightningStrategy.trainer: found {next(iter(arguments))} with engine '{engine}', which has no "
                f"Trainer; give engine='trainer', or leave it out"
            )
        return
    known = inspect.signature(Trainer).parameters
    for name, value in arguments.items():
        where = f"LightningStrategy.trainer.{name}"
        if name in _INSTEAD:
            raise UnsupportedError(f"{where}: found {format_value(value)}; {_INSTEAD[name]}")
        if name not in known:
            close = nearest(name, (*ALLOWED, *_INSTEAD))
            advice = f"did you mean '{close}'?" if close else f"arguments are {', '.join(ALLOWED)}"
            raise ConfigError(f"{where}: unknown argument of Lightning's Trainer; {advice}")
    precision = fabric._precision.precision
    found = arguments.get("precision", precision)
    for plugin in precision_plugins(arguments):
        found = plugin.precision
    if _SHORT_PRECISIONS.get(str(found), found) != precision:
        raise UnsupportedError(
            f"LightningStrategy.trainer.precision: found {format_value(found)}, while the strategy evaluates in "
            f"{precision}; give fabric=Fabric(precision=...), launched, and leave it out here"
        )


def precision_plugins(arguments: Mapping[str, Any]) -> list[Precision]:
    """Return the plugins among the arguments that decide the precision, as ``precision`` otherwise does."""
    given = arguments.get("plugins") or ()
    plugins = given if isinstance(given, (list, tuple)) else [given]
    return [plugin for plugin in plugins if isinstance(plugin, Precision)]
