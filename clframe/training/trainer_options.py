"""Callbacks and loggers for a Lightning Trainer, by class name, from Lightning's public lists only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.training.trainer import make_trainer


def trainer_options(
    callbacks: Mapping[str, Any], loggers: Sequence[str], *, precision: str, folder: Path
) -> dict[str, Any]:
    """Keyword arguments of ``lightning.Trainer``.

    Args:
        callbacks: Options by class name of ``lightning.pytorch.callbacks``.
        loggers: Class names of ``lightning.pytorch.loggers``; each writes below ``folder``.
        precision: As Lightning names it.
        folder: The run folder.

    Raises:
        UnknownNameError: No such class; the message has the nearest name.
        ConfigError: Options that the class does not take.
    """
    options = {
        "callbacks": [
            _make(lightning_callbacks, name, options or {}, "trainer.callbacks")
            for name, options in callbacks.items()
        ],
        "logger": [
            _make(lightning_loggers, name, {"save_dir": str(folder / name)}, "trainer.loggers")
            for name in loggers
        ]
        or False,
        "precision": precision,
        "default_root_dir": str(folder),
    }
    make_trainer(options, accelerator="auto", max_epochs=1)  # refuse now what could not train later
    return options


def _make(module: Any, name: str, options: Any, where: str) -> Any:
    if name not in module.__all__:
        raise UnknownNameError(unknown_name("Lightning class", name, module.__all__, where=where))
    maker = getattr(module, name)
    accepted = inspect.signature(maker).parameters
    if not isinstance(options, dict):
        raise ConfigError(f"{where}.{name}: found {options!r}; give a mapping of options")
    for option in options:
        if option not in accepted:
            raise ConfigError(f"{where}.{name}.{option}: unknown option; options are {', '.join(accepted)}")
    try:
        return maker(**options)
    except Exception as error:  # whatever a class of Lightning's thinks of its options
        raise ConfigError(f"{where}.{name}: {' '.join(str(error).split())}; mend its options") from None
