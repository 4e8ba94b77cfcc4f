"""Classifiers whose outputs grow with the classes met.

Shape suffixes: B batch, C classes, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import DataError


def ordered(classes: Iterable[int]) -> list[int]:
    """The classes in ascending order, each once; raises :class:`DataError` for a negative one.

    >>> ordered([4, 2, 4])
    [2, 4]
    """
    wanted = sorted(set(classes))
    if wanted and wanted[0] < 0:
        raise DataError(f"classes: found class {wanted[0]}; number the classes from 0")
    return wanted


class Head(nn.Module, ABC):
    """A classifier on a tap. It starts without outputs and grows before each experience.

    Attributes:
        cascades: Whether ``forward`` also takes the logits of the exit before, without their gradient.
    """

    cascades: bool = False

    @abstractmethod
    def grow(self, classes: Iterable[int]) -> bool:
        """Make room for ``classes``; True if parameters were replaced. A second call changes nothing."""

    @abstractmethod
    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """logits_BC of a tap's output; ``previous_BC`` only where the head cascades and an exit precedes it."""


class GrowingLinear(Head):
    """Linear classifier with one row for each class up to the highest one met.

    Growing keeps the old rows bit for bit and draws the new ones as ``nn.Linear`` does, from
    U(-1/sqrt(F), 1/sqrt(F)), on the CPU from torch's global generator: the same seed gives the same weights
    on every device. Parameters are replaced by growing and by loading a state of another size, so an
    optimizer must be told of them afterwards.

    Where class numbers have gaps, a class not met has a row and a column, and the column is ``-inf``: it
    never receives probability, and its row never a gradient.

    Args:
        features: Width F of the features.

    Attributes:
        seen: seen_C, true for the classes met.

    >>> head = GrowingLinear(8)
    >>> head.grow([0, 1]), head.grow([0, 1]), head.classes
    (True, False, 2)
    """

    weight: nn.Parameter
    bias: nn.Parameter
    seen: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.empty(0, features))
        self.bias = nn.Parameter(torch.empty(0))
        self.register_buffer("seen", torch.zeros(0, dtype=torch.bool))
        self._gaps = False  # a plain bool, so that forward need not ask the device

    @property
    def classes(self) -> int:
        """Number of outputs C: the highest class met, plus one."""
        return self.weight.shape[0]

    def grow(self, classes: Iterable[int]) -> bool:
        """Make room for ``classes`` and mark them as met.

        Returns:
            Whether ``weight`` and ``bias`` are new parameters now. Meeting a class that fills a gap only
            lifts its mask.

        Raises:
            DataError: A negative class.
        """
        wanted = ordered(classes)
        if not wanted:
            return False
        outputs = max(self.classes, wanted[-1] + 1)
        replaced = outputs != self.classes
        if replaced:
            bound, added = 1 / sqrt(self.features), outputs - self.classes
            rows = torch.empty(added, self.features, dtype=self.weight.dtype, device="cpu")
            self._resize(outputs, rows.uniform_(-bound, bound), rows.new_empty(added).uniform_(-bound, bound))
        self.seen[wanted] = True
        self._gaps = not bool(self.seen.all())
        return replaced

    def forward(self, features: Tensor, previous_BC: Tensor | None = None) -> Tensor:
        """logits_BC of features_BF, ``-inf`` for classes not met."""
        logits = F.linear(features, self.weight, self.bias)
        return logits.masked_fill(~self.seen, -inf) if self._gaps else logits

    def extra_repr(self) -> str:
        """Sizes, as ``print(head)`` shows them."""
        return f"features={self.features}, classes={self.classes}"

    @torch.no_grad()
    def _resize(self, outputs: int, new_rows: Tensor, new_bias: Tensor) -> None:
        """Keep the first rows, as many as fit, and put the new ones behind them."""
        weight, bias, seen = self.weight, self.bias, self.seen
        rows = torch.cat([weight[:outputs], new_rows.to(weight)])
        self.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
        self.bias = nn.Parameter(
            torch.cat([bias[:outputs], new_bias.to(bias)]), requires_grad=bias.requires_grad
        )
        self.seen = torch.cat([seen[:outputs], seen.new_zeros(len(new_bias))])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take the size of the saved state first, then load it as any module does."""
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.shape[0] != self.classes:
            added = max(saved.shape[0] - self.classes, 0)
            self._resize(saved.shape[0], torch.zeros(added, self.features), torch.zeros(added))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._gaps = not bool(self.seen.all())
