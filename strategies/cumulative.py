"""Train on everything seen so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from clframe.core.component import Component


@dataclass(frozen=True, kw_only=True)
class Cumulative(Component):
    """Cumulative: each experience goes on training the same model on the data of all experiences so far.

    Use it as an upper bound for rehearsal. Costs all data kept, and epochs that grow with the stream: ten equal
    experiences take 5.5 times the steps of fine-tuning. It owns the slot ``batch``: a memory beside all the data
    would have no part to play.
    """

    name: ClassVar[str] = "cumulative"
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """This experience and all before it."""
        return range(index + 1)
