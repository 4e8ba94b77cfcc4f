"""Confusion matrix of one evaluation: test samples by true and predicted class.

Shape suffixes: B batch, C classes in learning order.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_CLASSES = 2000
"""Classes up to which predictions are counted: the square of more would need gigabytes of a device's memory."""


MOST_SHOWN = 200
"""Classes up to which ``results.json`` has the matrix and TensorBoard a picture of it."""


class ConfusionCounter:
    """Counts on the device, batch by batch, without synchronization; :meth:`result` transfers the counts once.

    Args:
        classes: Number of classes of the whole benchmark, C, learned or not.
        device: Device of logits and labels.

    >>> counter = ConfusionCounter(3, device="cpu")
    >>> counter.update(torch.tensor([[0.2, 0.9], [0.8, 0.1]]), torch.tensor([1, 2]))
    >>> counter.result().tolist()
    [[0, 0, 0], [0, 1, 0], [1, 0, 0]]
    """

    def __init__(self, classes: int, *, device: torch.device | str) -> None:
        self.counts_CC = torch.zeros(classes, classes, dtype=torch.int32, device=device)
        """Samples by true class (rows) and predicted class (columns)."""

    def update(self, logits_BC: Tensor, y_B: Tensor) -> None:
        """Count one batch: the prediction is the class with the highest logit, ties go to the lowest class.

        As in :class:`~clframe.metrics.tally.TallyCounter`, a sample whose logits contain NaN or ``+inf``, or are all
        ``-inf``, has no prediction. It is not counted, so the counts of a row may be fewer than the samples of the
        class.
        """
        if logits_BC.shape[1] == 0:
            return
        highest_B, winner_B = logits_BC.max(dim=1)
        # index_add_ of integers is exact in any order, and unlike bincount needs no size from the device.
        cell_B = y_B.long() * len(self.counts_CC) + winner_B
        self.counts_CC.view(-1).index_add_(0, cell_B, highest_B.isfinite().int())

    def result(self) -> Tensor:
        """Return counts_CC on the CPU."""
        return self.counts_CC.cpu()
