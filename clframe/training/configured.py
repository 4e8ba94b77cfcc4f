"""Optimizer and schedule of a LightningModule of the user's own, as its ``configure_optimizers`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from clframe.avalanche_bridge.imports import LightningModule
from clframe.errors import UnsupportedError, reason_of

_WHERE = "LightningStrategy: configure_optimizers of"


def configured_optimizer(model: nn.Module) -> tuple[Optimizer, Any] | None:
    """Return the optimizer of a LightningModule and its learning-rate schedule, stepped once an epoch, or None.

    None where the model is not a LightningModule, or does not override ``configure_optimizers``.

    Raises:
        UnsupportedError: Several optimizers, a schedule that is not stepped once an epoch, or a method that fails
            without a Trainer.
    """
    if not isinstance(model, LightningModule):
        return None
    if type(model).configure_optimizers is LightningModule.configure_optimizers:
        return None
    where = f"{_WHERE} {type(model).__name__}"
    try:
        found: Any = model.configure_optimizers()
    except Exception as error:  # methods of users raise anything, as where they ask for self.trainer
        reason = reason_of(error, most=200)
        raise UnsupportedError(f"{where} fails ({reason}); pass optimizer= instead") from error
    schedule: Any = None
    if isinstance(found, Mapping):
        found, schedule = found.get("optimizer"), found.get("lr_scheduler")
    elif isinstance(found, tuple) and len(found) == 2 and all(isinstance(part, (list, tuple)) for part in found):
        found, schedules = found
        if len(schedules) > 1:
            raise UnsupportedError(f"{where} returns {len(schedules)} schedules; return one")
        schedule = schedules[0] if schedules else None
    if isinstance(found, (list, tuple)) and len(found) == 1:
        found = found[0]
    if not isinstance(found, Optimizer):
        raise UnsupportedError(f"{where} returns a {type(found).__name__}; return one optimizer, or pass optimizer=")
    if isinstance(schedule, Mapping):
        if schedule.get("interval", "epoch") != "epoch" or schedule.get("frequency", 1) != 1 or "monitor" in schedule:
            raise UnsupportedError(f"{where} returns a schedule that is not stepped once an epoch; return one that is")
        schedule = schedule["scheduler"]
    return found, schedule
