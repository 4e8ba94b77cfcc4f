"""Sources: data sets before they are split into experiences, and the registry of data sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from clframe.data.augmentation import Augmentation, ColorJitter
from clframe.data.inputs import InputFormat
from clframe.data.lazy import DatasetSamples
from clframe.data.protocol import hold_out
from clframe.data.reader import Reader
from clframe.data.samples import TensorSamples
from clframe.errors import ConfigError, DataError
from clframe.options import convert_argument, option_types, require_count
from clframe.registry import Registry, call_problem

Data = TensorSamples | DatasetSamples
"""Samples in memory, or read batch by batch."""


@dataclass(frozen=True)
class Source:
    """A data set before it is split: all training and all test samples."""

    name: str
    train: Data
    test: Data
    classes: int
    class_names: tuple[str, ...] = ()
    """Name of each class in the data set, by id; empty if unknown."""
    inputs: InputFormat = field(default_factory=InputFormat)
    """Conversion of files to inputs."""
    vocabulary: int = 0
    """Token ids of text for a language model, whose samples are windows of ids and whose classes are the domains; 0 for
    other data."""
    tokenizer: str = ""
    """Content of the ``tokenizer.json`` that encoded the text."""

    def __post_init__(self) -> None:
        """Raise DataError for labels out of range, classes without samples and names that are not one per class.

        Also if training and test samples are normalized differently, or if only one of them are whole numbers.
        """
        kinds = {"name": str, "class_names": tuple[str, ...], "vocabulary": int, "tokenizer": str}
        for key, kind in kinds.items():
            object.__setattr__(self, key, convert_argument(getattr(self, key), kind, where=f"{self.name}: {key}"))
        require_count(self.classes, least=1, where=f"{self.name}: classes")
        for split, samples in (("train", self.train), ("test", self.test)):
            if not isinstance(samples, (TensorSamples, DatasetSamples)):
                raise DataError(
                    f"{self.name}/{split}: found a {type(samples).__name__}; give TensorSamples, or DatasetSamples.of()"
                )
        for value in ("mean", "std"):
            train, test = getattr(self.train, value), getattr(self.test, value)
            if tuple(train) != tuple(test):
                raise DataError(
                    f"{self.name}: found {value} {tuple(train)} of the training samples and {tuple(test)} of the test "
                    f"samples; normalize both by the same numbers"
                )
        types = [part.x.dtype for part in (self.train, self.test) if isinstance(part, TensorSamples)]
        if len({dtype.is_floating_point for dtype in types}) > 1:
            raise DataError(
                f"{self.name}: found training inputs of type {types[0]} and test inputs of type {types[1]}; give both "
                f"the same type and scale"
            )
        if self.class_names and len(self.class_names) != self.classes:
            raise DataError(
                f"{self.name}: found {len(self.class_names)} class names for {self.classes} classes; give one per class"
            )
        twice = next((name for i, name in enumerate(self.class_names) if name in self.class_names[:i]), None)
        if twice is not None:
            raise DataError(f"{self.name}: found the class name '{twice}' twice; give each class its own name")
        for name in self.class_names:
            try:
                name.encode()
            except UnicodeEncodeError:  # the name of a folder; neither configs nor results can hold it
                raise DataError(f"{self.name}: the class name '{name}' is not UTF-8 text; rename it") from None
        for split, samples in (("train", self.train), ("test", self.test)):
            y = samples.y
            if len(y) and (int(y.min()) < 0 or int(y.max()) >= self.classes):
                raise DataError(
                    f"{self.name}/{split}: found labels from {int(y.min())} to {int(y.max())} for {self.classes} "
                    f"classes; relabel them 0..{self.classes - 1}"
                )
            empty = (torch.bincount(y, minlength=self.classes) == 0).nonzero().flatten().tolist()
            if empty:
                raise DataError(
                    f"{self.name}/{split}: found no samples of class {empty[0]}; add some or remove the class"
                )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.train.input_shape

    def check_test(self) -> None:
        """Raise DataError if test inputs have another shape than training inputs."""
        train, test = self.train.input_shape, self.test.input_shape
        if train != test and not self.vocabulary:
            raise DataError(
                f"{self.name}: found training inputs of shape {list(train)} and test inputs of shape {list(test)}; "
                f"give both the same shape"
            )

    def are_token_ids(self) -> bool:
        """Whether inputs can be token ids: whole numbers from 0, as the model receives them (the first are checked)."""
        x = self.train.prepare(self.train.raw(torch.arange(min(len(self.train), 64))))
        return bool((x >= 0).all()) and torch.equal(x, x.long().to(x.dtype))

    def first_classes(self, count: int | None) -> Source:
        """Return the source with classes 0 to ``count`` - 1 only; None: all classes.

        Raises:
            ConfigError: ``count`` below 1 or above the number of classes.
        """
        if count is None or count == self.classes:
            return self
        if not 1 <= count < self.classes:
            raise ConfigError(f"benchmark.classes: found {count} for {self.classes} classes; give 1 to {self.classes}")
        train, test = (part.subset((part.y < count).nonzero().flatten().cpu()) for part in (self.train, self.test))
        return replace(self, train=train, test=test, classes=count, class_names=self.class_names[:count])

    def with_augmentations(self, augmentations: tuple[Augmentation, ...]) -> Source:
        """Return the source with other augmentations of the training data; without any, the source itself.

        Raises:
            DataError: Inputs that are not images, or images that an augmentation does not support.
        """
        shape = self.input_shape
        for augmentation in augmentations:
            if len(shape) != 3:
                raise DataError(
                    f"benchmark.augment: found {type(augmentation).__name__} for {self.name} with inputs of shape "
                    f"{list(shape)}; augment only images (channels, height, width), or set none"
                )
            if isinstance(augmentation, ColorJitter):
                self._check_colors()
        return replace(self, train=replace(self.train, augment=augmentations)) if augmentations else self

    def _check_colors(self) -> None:
        first = self.train.raw(torch.arange(min(len(self.train), 64)))
        if first.shape[1] not in (1, 3):
            raise DataError(
                f"benchmark.augment: found ColorJitter for {self.name} with images of {first.shape[1]} "
                f"channels; use it on gray or RGB images"
            )
        if first.is_floating_point() and not (float(first.min()) >= 0 and float(first.max()) <= 1):
            raise DataError(
                f"benchmark.augment: found ColorJitter for {self.name} with values from "
                f"{float(first.min()):g} to {float(first.max()):g}; use it on bytes, or values from 0 to 1"
            )

    def with_workers(self, workers: int | None) -> Source:
        """Return the source with ``workers`` processes reading data that is not in memory; None: unchanged."""
        if workers is None:
            return self
        readers: dict[Reader, Reader] = {}  # training and test data of one dataset share a reader

        def change(samples: Data) -> Data:
            if isinstance(samples, TensorSamples):
                return samples
            reader = samples.reader
            if reader not in readers:
                readers[reader] = Reader(reader.dataset, num_workers=workers)
            return replace(samples, reader=readers[reader])

        return replace(self, train=change(self.train), test=change(self.test))

    def hold_out(self, share: float, *, seed: int) -> tuple[Data, Data | None]:
        """Split the training samples: those to train on, and ``share`` of each class for validation (None if 0)."""
        train, held_out = hold_out(self.train.y, share, seed=seed)
        if not len(held_out):
            return self.train, None
        return self.train.subset(train), replace(self.train.subset(held_out), augment=())


def _load_source(point: Any) -> Any:
    yield point.name, point.load()


RESERVED = frozenset({
    "angles", "augment", "blurry", "boundaries", "class_order", "classes", "counts", "evaluate", "experiences", "first",
    "name", "online", "options", "protocol", "validation", "workers",
})  # fmt: skip
"""Keys of the config block ``benchmark``: a data set never receives a value of these names."""


def _problem(entry: Callable[..., Source]) -> str:
    wrong = call_problem(entry, (), expected="a function (*, options) -> Source")
    shadowed = [] if wrong else sorted(RESERVED & set(option_types(entry)))
    if shadowed:
        wrong = f"option '{shadowed[0]}' is a key of the config block benchmark, which takes its value; rename it"
    return wrong


SOURCES: Registry[Callable[..., Source]] = Registry(
    "benchmark", group="clframe.benchmarks", load=_load_source, problem=_problem, own=True
)
"""Data sets by name: functions from options, given as keywords, to a :class:`Source`.

A package registers one as an entry point of the group ``clframe.benchmarks``, a script by :meth:`Registry.register`.
``benchmark=NAME`` then selects it, and its keyword arguments are options of the block ``benchmark``.
"""
