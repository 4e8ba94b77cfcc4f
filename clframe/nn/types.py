"""Values that networks take and return.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Generator, Tensor

if TYPE_CHECKING:
    pass


class Output(NamedTuple):
    """What a model returns: the logits of every exit, in order of depth, the model's own last.

    A plain network is a network with one exit: ``len(output.logits) == 1``.
    """

    logits: tuple[Tensor, ...]
    """K tensors logits_BC. Classes not learnt yet have no column, or ``-inf`` where columns have gaps."""
    taps: Mapping[str, Tensor] = MappingProxyType({})
    """Stage outputs by name, as many as were asked for."""

    @property
    def last(self) -> Tensor:
        """logits_BC of the model's own classifier."""
        return self.logits[-1]


class Samples(Protocol):
    """Training data of one experience, as a component may see it."""

    @property
    def y(self) -> Tensor:
        """targets_N, in learning order."""

    def __len__(self) -> int: ...

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``, before augmentation and normalization."""

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stored inputs as the model wants them: float, normalized, on the device.

        Where a batch is trained, pass a ``generator``: the experience's augmentations then come first.
        """


Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a model is called with: one tensor, positional arguments, or named ones."""
