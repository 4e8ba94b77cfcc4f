"""Cumulative training on all data seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from clframe.core.component import Component


@dataclass(frozen=True, kw_only=True)
class Cumulative(Component):
    """Cumulative: train the same model in each experience on the data of all experiences so far.

    Use it as an upper bound for replay. Cost: storage of all data, and epochs that grow with the stream: ten equal
    experiences take 5.5 times the steps of fine-tuning. It owns the slot ``batch``: with all data at hand a replay
    buffer would add nothing.
    """

    name: ClassVar[str] = "cumulative"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Return this experience and all before it."""
        return range(index + 1)
