"""Heads of prototypes: one classifier straight on the embedded tap, so that a row is a point among features.

Shape suffixes: B batch, F features.
"""

from __future__ import annotations

from torch import Tensor, nn

from clframe.nn.exits.heads import ExitHead
from clframe.nn.features import embedded


class Embed(nn.Module):
    """A tap as one vector: a map averaged, the first of tokens, a flat tap as it is."""

    def forward(self, tap: Tensor) -> Tensor:
        """features_BF."""
        return embedded(tap)


def embedded_width(tap_shape: tuple[int, ...]) -> int:
    """Width F of an embedded tap: the channels of a map, the width of a token or of a flat tap.

    >>> embedded_width((16, 8, 4)), embedded_width((5, 32)), embedded_width((7,))
    (16, 32, 7)
    """
    return tap_shape[0] if len(tap_shape) == 3 else tap_shape[-1]


def prototype_head(tap_shape: tuple[int, ...]) -> ExitHead:
    """A head whose classifier sees the embedded tap and nothing else; it starts without outputs.

    Args:
        tap_shape: The tap's declared shape, without the batch.

    >>> prototype_head((16, 8, 8)).features
    16
    """
    return ExitHead(Embed(), features=embedded_width(tap_shape))
