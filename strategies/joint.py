"""Joint training on the whole stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from clframe.core.component import Component


@dataclass(frozen=True, kw_only=True)
class Joint(Component):
    """Joint: the first experience trains on the data of all experiences; later ones train nothing.

    Use it as the upper bound of every comparison: no class is ever missing. Cost: all data together, and in one
    experience as many steps as fine-tuning takes over the stream. Every row of its accuracy matrix is the accuracy of
    the one model.
    """

    name: ClassVar[str] = "joint"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Return all experiences for the first one, none later."""
        return range(count) if index == 0 else ()
