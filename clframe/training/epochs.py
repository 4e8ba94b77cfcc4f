"""Metrics of an epoch, and what depends on them: plateau schedules and early stopping.

==========================  =======================================================================
``train/loss``              mean loss of the epoch's steps
``validation/loss``         cross-entropy of the last exit on held-out samples of the experience
``validation/accuracy``     its accuracy on them
==========================  =======================================================================

The last two exist if data is held out (``benchmark.validation``). They are those of the network itself, before
components adjust its logits: what they adjust them with is fitted only after the last epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from clframe.data.epoch_loader import EpochLoader
from clframe.errors import UnsupportedError
from clframe.functional.language import next_token_targets
from clframe.nn.backbones.stages import preserving_state
from clframe.nn.types import Output

TRAIN_LOSS, VALIDATION_LOSS, VALIDATION_ACCURACY = "train/loss", "validation/loss", "validation/accuracy"


def metric_names(*, validation: bool) -> tuple[str, ...]:
    """Names of the metrics of an epoch.

    Args:
        validation: Whether data is held out.
    """
    return (TRAIN_LOSS, VALIDATION_LOSS, VALIDATION_ACCURACY) if validation else (TRAIN_LOSS,)


class MeanLoss:
    """Mean of losses that stay on the device until it is asked for."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor) -> None:
        """Add the loss of one step."""
        value = loss.detach().float().sum()
        self._sum = value if self._sum is None else self._sum + value
        self._count += 1

    def compute(self) -> float:
        """Return the mean and start over; NaN without steps. Synchronizes with the device."""
        mean = float("nan") if self._sum is None else float(self._sum / self._count)
        self._sum, self._count = None, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return the sum and the number of losses so far."""
        return {"sum": None if self._sum is None else self._sum.clone(), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._sum, self._count = state["sum"], state["count"]


class EpochMetrics:
    """Computes the metrics of every epoch of an experience.

    Args:
        network: The trained network.
        call: Returns its output for a batch.
        held_out: Held-out samples of the experience; empty if there are none.
        batch_size: Samples per batch of these.
        limit_batches: Batches after which the rest is left out.
        by_token: Whether the samples are windows of ids, of which every token is predicted.
    """

    def __init__(
        self,
        network: nn.Module,
        call: Callable[[Tensor], Output],
        held_out: Sequence[Any],
        *,
        batch_size: int,
        limit_batches: int | None = None,
        by_token: bool = False,
    ) -> None:
        self._network, self._call, self._held_out = network, call, [part for part in held_out if len(part)]
        self._batch_size, self._limit_batches = batch_size, limit_batches
        self._by_token = by_token
        self._loss = MeanLoss()

    def add_loss(self, loss: Tensor) -> None:
        """Add the loss of one training step."""
        self._loss.add(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the losses of the epoch so far."""
        return self._loss.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._loss.load_state_dict(state)

    def compute(self) -> dict[str, float]:
        """Return the metrics by name; the network's modes and the random states are left as they were."""
        metrics = {TRAIN_LOSS: self._loss.compute()}
        for samples in self._held_out:
            loss, right, count = torch.zeros(()), torch.zeros(()), 0
            with preserving_state([self._network]):
                batches = EpochLoader(samples, self._batch_size)
                for x, y in itertools.islice(batches, self._limit_batches):
                    logits = self._call(x).last.float()
                    y = next_token_targets(x) if self._by_token else y
                    loss = loss.to(y.device) + nn.functional.cross_entropy(logits, y, reduction="sum")
                    right = right.to(y.device) + (logits.argmax(1) == y).sum()
                    count += len(y)
            metrics |= {VALIDATION_LOSS: float(loss / count), VALIDATION_ACCURACY: float(right / count)}
        return metrics


def needs_metric(scheduler: Any) -> bool:
    """Whether a scheduler follows a loss.

    Raises:
        UnsupportedError: It waits for a metric to rise; the metric here is a loss.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return False
    if scheduler.mode != "min":
        raise UnsupportedError(
            f"ReduceLROnPlateau: found mode '{scheduler.mode}', but it is given the loss of each epoch; set mode='min'"
        )
    return True


def step_schedule(scheduler: Any, metrics: Mapping[str, float]) -> None:
    """Step a learning rate after an epoch: a plateau schedule by the validation loss, else by the training loss."""
    if needs_metric(scheduler):
        scheduler.step(metrics.get(VALIDATION_LOSS, metrics[TRAIN_LOSS]))
    else:
        scheduler.step()


@dataclass
class EarlyStopping:
    """Ends an experience when a metric of its epochs has stopped improving; options as of Lightning's callback.

    Args:
        monitor: Name of the metric.
        min_delta: Smallest change that counts as an improvement.
        patience: Epochs without improvement after which to stop.
        mode: Whether the metric is to fall or to rise.
    """

    monitor: str
    min_delta: float = 0.0
    patience: int = 3
    mode: Literal["min", "max"] = "min"
    _best: float | None = field(default=None, init=False, repr=False)
    _waited: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check what the type does not."""
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode '{self.mode}' is neither min nor max")

    def reset(self) -> None:
        """Forget earlier experiences."""
        self._best, self._waited = None, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the best value and the number of epochs without improvement."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self._best, self._waited = state["best"], state["waited"]

    def should_stop(self, metrics: Mapping[str, float]) -> bool:
        """Return whether to stop after an epoch with these metrics."""
        if self.monitor not in metrics:
            raise UnsupportedError(
                f"EarlyStopping.monitor: found '{self.monitor}'; metrics of an epoch are {', '.join(metrics)}"
            )
        value, sign = metrics[self.monitor], 1 if self.mode == "max" else -1
        if not math.isfinite(value):
            return True
        if self._best is None or sign * (value - self._best) > abs(self.min_delta):
            self._best, self._waited = value, 0
            return False
        self._waited += 1
        return self._waited >= self.patience
