"""Fine-tuning: train on each experience in turn without protection against forgetting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clframe.core.component import Component


@dataclass(frozen=True, kw_only=True)
class Naive(Component):
    """Fine-tuning (FT): cross-entropy on each experience in turn; the identity of composition.

    Use it as the lower bound of every comparison: it forgets almost everything. Cost: none beyond training.
    """

    name: ClassVar[str] = "naive"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True

    @property
    def is_identity(self) -> bool:
        """Always true: ``x + naive`` is ``x``."""
        return True
