"""Sources: data sets before any protocol deals them out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from clframe.data.augmentation import Augmentation, ColorJitter
from clframe.data.lazy import DatasetSamples
from clframe.data.protocol import hold_out
from clframe.data.reader import Reader
from clframe.data.samples import TensorSamples
from clframe.errors import ConfigError, DataError
from clframe.registry import Registry

Data = TensorSamples | DatasetSamples
"""Samples in memory, or read when they are needed."""


@dataclass(frozen=True)
class Source:
    """A data set before any protocol: all training and all test samples."""

    name: str
    train: Data
    test: Data
    classes: int
    class_names: tuple[str, ...] = ()
    """What each class is called where the data came from, in order of its id; empty where nobody said."""

    def __post_init__(self) -> None:
        """Refuse labels out of range, classes without samples and too few or too many names."""
        if self.class_names and len(self.class_names) != self.classes:
            raise DataError(
                f"{self.name}: {len(self.class_names)} class names for {self.classes} classes; name every class once"
            )
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
        return self.train.input_shape

    def first_classes(self, count: int | None) -> Source:
        """The samples of classes 0 to ``count`` - 1, all where that is None.

        Raises:
            ConfigError: More classes than there are, or none.
        """
        if count is None or count == self.classes:
            return self
        if not 1 <= count < self.classes:
            raise ConfigError(f"benchmark.classes: found {count} for {self.classes} classes; give 1 to {self.classes}")
        train, test = (part.subset((part.y < count).nonzero().flatten().cpu()) for part in (self.train, self.test))
        return replace(self, train=train, test=test, classes=count, class_names=self.class_names[:count])

    def augmented(self, augmentations: tuple[Augmentation, ...]) -> Source:
        """The same data, whose images are augmented so where they are trained on, in place of how they were.

        Raises:
            DataError: Inputs that are no images, or not such as an augmentation asks for.
        """
        shape = self.input_shape
        for augmentation in augmentations:
            if len(shape) != 3:
                raise DataError(
                    f"benchmark.augment: found {type(augmentation).__name__} for {self.name}, whose inputs have shape "
                    f"{list(shape)}; augment images (channels, height, width) only, or set none"
                )
            if isinstance(augmentation, ColorJitter):
                self._check_colors()
        return replace(self, train=replace(self.train, augment=augmentations)) if augmentations else self

    def _check_colors(self) -> None:
        first = self.train.raw(torch.arange(min(len(self.train), 64)))
        if first.shape[1] not in (1, 3):
            raise DataError(
                f"benchmark.augment: found ColorJitter for {self.name}, whose images have {first.shape[1]} "
                f"channels; jitter gray or RGB images"
            )
        if first.is_floating_point() and not (float(first.min()) >= 0 and float(first.max()) <= 1):
            raise DataError(
                f"benchmark.augment: found ColorJitter for {self.name}, whose values run from "
                f"{float(first.min()):g} to {float(first.max()):g}; jitter bytes, or values from 0 to 1"
            )

    def read_by(self, workers: int | None) -> Source:
        """The same data; what is not in memory is read by so many processes. None leaves it as it is."""
        if workers is None:
            return self
        readers: dict[Reader, Reader] = {}  # training and test data go on to share one

        def change(samples: Data) -> Data:
            if isinstance(samples, TensorSamples):
                return samples
            reader = samples.reader
            if reader not in readers:
                readers[reader] = Reader(reader.dataset, num_workers=workers)
            return replace(samples, reader=readers[reader])

        return replace(self, train=change(self.train), test=change(self.test))

    def hold_out(self, share: float, *, seed: int) -> tuple[Data, Data | None]:
        """Training samples, and ``share`` of each class held out for validation, None where that is 0."""
        train, held = hold_out(self.train.y, share, seed=seed)
        if not len(held):
            return self.train, None
        return self.train.subset(train), replace(self.train.subset(held), augment=())


def _load_source(point: Any) -> Any:
    yield point.name, point.load()


SOURCES: Registry[Callable[..., Source]] = Registry("benchmark", group="clframe.benchmarks", load=_load_source)
"""Every data set by name: functions from options to a :class:`Source`."""
