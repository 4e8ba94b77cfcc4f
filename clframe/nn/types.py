"""Types that networks take and return.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

from torch import Generator, Tensor


class Output(NamedTuple):
    """Output of a model: the logits of every exit in order of depth; the last exit is the model's own classifier.

    A plain network is a network with one exit: ``len(output.logits) == 1``.
    """

    logits: tuple[Tensor, ...]
    """K tensors logits_BC. Unseen classes have no column, or ``-inf`` where class ids have gaps."""
    taps: Mapping[str, Tensor] = MappingProxyType({})
    """The requested stage outputs by name."""

    @property
    def last(self) -> Tensor:
        """logits_BC of the model's own classifier."""
        return self.logits[-1]


class Samples(Protocol):
    """Training data of one experience, as components use it."""

    @property
    def y(self) -> Tensor:
        """targets_N, in learning order."""

    def __len__(self) -> int: ...

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``, before augmentation and normalization."""

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Convert stored inputs to model inputs: float, normalized, on the device.

        Pass a ``generator`` for training batches: augmentations are then applied first.
        """


Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""Inputs of a model: one tensor, positional arguments, or named arguments."""
