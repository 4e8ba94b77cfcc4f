"""Numbers that change between the steps of an epoch, as an eager step and as a CUDA graph reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

StepValues = Mapping[str, Mapping[str, "float | Tensor"]]
"""Values that components return from ``step_values``, by component."""


@dataclass(frozen=True)
class StepInputs:
    """Values that change between the steps of an epoch, apart from the batch.

    Attributes:
        weight_K: Weight of each exit's losses; None where all are 1.
        values: Values that components return from ``step_values``.
    """

    weight_K: Tensor | None
    values: StepValues

    def on(self, device: torch.device) -> StepInputs:
        """Return a copy whose numbers are tensors on ``device``, in which :meth:`fill` writes those of later steps."""
        values = {
            name: {key: torch.tensor(value, dtype=torch.float32, device=device) for key, value in found.items()}
            for name, found in self.values.items()
        }
        return StepInputs(None if self.weight_K is None else self.weight_K.clone(), values)

    def fill(self, other: StepInputs) -> None:
        """Write the values of ``other`` into these tensors, without waiting for the device."""
        if self.weight_K is not None and other.weight_K is not None:
            self.weight_K.copy_(other.weight_K)
        for name, found in self.values.items():
            for key, tensor in found.items():
                assert isinstance(tensor, Tensor)
                tensor.fill_(float(other.values[name][key]))
