"""MACs (one multiply-add counts 1) for any Avalanche ``EvaluationPlugin``, with all layers, groups and attention.

Avalanche's own ``MAC_metrics`` leaves out input channels of convolutions, and every layer but two kinds.
"""

from __future__ import annotations

from typing import Any

from avalanche.evaluation import GenericPluginMetric, Metric
from avalanche.models import MultiTaskModule
from torch import nn

from clframe.accounting import measure


class Macs(Metric[int]):
    """MACs of one call of a model: those of the last :meth:`update`.

    >>> import torch
    >>> metric = Macs()
    >>> metric.update(nn.Linear(10, 5), torch.zeros(1, 10))
    >>> metric.result()
    50
    """

    def __init__(self) -> None:
        self._macs: int | None = None

    def update(self, model: nn.Module, example: Any) -> None:
        """Count one call of ``model``; see :func:`clframe.accounting.measure`."""
        self._macs = measure(model, example).macs

    def result(self) -> int | None:
        """MACs, or None before the first update."""
        return self._macs

    def reset(self) -> None:
        """Forget them."""
        self._macs = None


class MacsPluginMetric(GenericPluginMetric[int, Macs]):
    """MACs of one sample, counted once for each value that is logged.

    Args:
        every: ``"experience"`` logs after each evaluated experience, ``"epoch"`` after each training epoch.
    """

    def __init__(self, every: str = "experience") -> None:
        super().__init__(
            Macs(), reset_at=every, emit_at=every, mode="eval" if every == "experience" else "train"
        )
        self._name = "MACs_Exp" if every == "experience" else "MACs_Epoch"

    def update(self, strategy: Any) -> None:
        """Count the first sample of a batch, if nothing has been counted since the last reset."""
        if self._metric.result() is not None:
            return
        x = strategy.mb_x[:1]
        takes_labels = isinstance(strategy.model, MultiTaskModule)
        self._metric.update(strategy.model, (x, strategy.mb_task_id[:1]) if takes_labels else x)

    def __str__(self) -> str:
        return self._name


def cost_metrics(*, epoch: bool = False, experience: bool = True) -> list[MacsPluginMetric]:
    """Metrics for ``EvaluationPlugin(*cost_metrics(), ...)``.

    Args:
        epoch: Whether to log after every training epoch.
        experience: Whether to log after every evaluated experience.
    """
    return [MacsPluginMetric(every) for every, on in (("epoch", epoch), ("experience", experience)) if on]
