"""The samples of a memory, to be read like those of an experience."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from clframe.core.types import Samples, State


@dataclass(frozen=True, eq=False)
class Kept:
    """What a memory holds as :class:`~clframe.core.types.Samples`.

    Args:
        memory: ``x``, inputs as stored, and ``y``; not empty.
        like: Samples of an experience; those of the memory are prepared like them.
    """

    memory: State
    like: Samples

    @property
    def y(self) -> Tensor:
        """targets_N."""
        y_N: Tensor = self.memory["y"]
        return y_N

    def __len__(self) -> int:
        return len(self.y)

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``."""
        x: Tensor = self.memory["x"]
        return x.index_select(0, index.to(x.device))

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """As the experience prepares its own."""
        return self.like.prepare(raw, generator=generator)
