"""Benchmarks: data split into experiences, for clframe's own loader and for Avalanche alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clframe.data.protocol import class_order, deal
from clframe.data.samples import TensorSamples
from clframe.errors import DataError
from clframe.registry import Registry


@dataclass(frozen=True)
class Source:
    """A data set before any protocol: all training and all test samples."""

    name: str
    train: TensorSamples
    test: TensorSamples
    classes: int

    def __post_init__(self) -> None:
        """Refuse labels out of range and classes without samples."""
        for part, samples in (("train", self.train), ("test", self.test)):
            y = samples.y
            if len(y) and (int(y.min()) < 0 or int(y.max()) >= self.classes):
                raise DataError(
                    f"{self.name}/{part}: labels run from {int(y.min())} to {int(y.max())} for {self.classes} "
                    f"classes; relabel them 0..{self.classes - 1}"
                )
            empty = (torch.bincount(y, minlength=self.classes) == 0).nonzero().flatten().tolist()
            if empty:
                raise DataError(f"{self.name}/{part}: no samples of class {empty[0]}; remove or fill that class")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.train.x.shape[1:])


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A class-incremental benchmark: experiences over one source, labels in learning order.

    Inside, class 0 is the class learnt first; ``class_order[c]`` is its id in the data set.
    """

    name: str
    class_order: tuple[int, ...]
    classes: tuple[tuple[int, ...], ...]
    """Classes of each experience, in learning order."""
    train: tuple[TensorSamples, ...]
    test: tuple[TensorSamples, ...]
    input_shape: tuple[int, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def avalanche(self) -> Any:
        """The same experiences as an Avalanche benchmark with class timelines and streams train and test."""
        from clframe.data.avalanche import as_avalanche

        return as_avalanche(self)

    def to(self, device: torch.device | str) -> Benchmark:
        """The benchmark with all samples on ``device``."""
        return replace(
            self,
            train=tuple(s.to(device) for s in self.train),
            test=tuple(s.to(device) for s in self.test),
        )


def class_incremental(
    source: Source,
    *,
    experiences: int,
    order: str | Sequence[int] = "seeded",
    seed: int = 0,
) -> Benchmark:
    """Split a source by class: equal experiences, leftover classes to the first ones, none dropped."""
    learnt = class_order(source.classes, order=order, seed=seed)
    rank = torch.empty(source.classes, dtype=torch.long)
    rank[torch.tensor(learnt)] = torch.arange(source.classes)
    counts = deal(source.classes, experiences)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    classes = tuple(tuple(range(end - n, end)) for end, n in zip(ends, counts, strict=True))
    train, test = replace(source.train, y=rank[source.train.y]), replace(source.test, y=rank[source.test.y])
    return Benchmark(
        name=source.name,
        class_order=learnt,
        classes=classes,
        train=tuple(train.subset(_members(train.y, c)) for c in classes),
        test=tuple(test.subset(_members(test.y, c)) for c in classes),
        input_shape=source.input_shape,
    )


def _members(y_N: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(y_N, torch.tensor(classes)).nonzero().flatten()


def _load_source(point: Any) -> Any:
    yield point.name, point.load()


SOURCES: Registry[Callable[..., Source]] = Registry(
    "benchmark", group="clframe.benchmarks", load=_load_source
)
"""Every data set by name: functions from options to a :class:`Source`."""
