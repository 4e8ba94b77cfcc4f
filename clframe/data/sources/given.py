"""Data that Python code already has: torch data sets and Avalanche benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clframe.data.benchmark import Benchmark
from clframe.data.lazy import DatasetSamples
from clframe.data.reader import seeded
from clframe.data.samples import TensorSamples, concatenate
from clframe.data.source import Data, Source
from clframe.data.sources.image_files import MEMORY_GB, as_pixels, channels_of, fits
from clframe.data.sources.labels import (
    UNCHANGED,
    Labels,
    Normalization,
    checked_labels,
    evenly_spaced,
    measured,
    relabel,
    warn_of_duplicates,
)
from clframe.errors import DataError

logger = logging.getLogger("clframe.data")


class MapDataset(Protocol):
    """What torch calls a map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def from_datasets(
    train: MapDataset,
    test: MapDataset,
    *,
    name: str,
    classes: Sequence[str] | None = None,
    memory_gb: float = MEMORY_GB,
) -> Source:
    """A source of two torch data sets whose items begin with an input and a label.

    Inputs are tensors (channels first), PIL images or numpy arrays (channels last), with their transforms
    applied. They are read once and kept, unless they take too much memory or two readings of a training input
    differ: then its transforms are random, and it is read anew in every epoch. Bytes are normalized by the
    training part's mean and deviation, floating-point inputs are taken as they are. Register a function that
    returns the source to use it in configs::

        @SOURCES.register("mine")
        def mine() -> Source:
            return from_datasets(train, test, name="mine")

    Args:
        train: To learn from.
        test: To be tested on.
        name: Of the source.
        classes: Names of the classes 0, 1, ...; without them the labels found are numbered in ascending
            order.
        memory_gb: Limit in GB up to which all inputs are kept in memory; beyond it they are read batch by
            batch.

    Raises:
        DataError: Items that are no pairs, inputs of different shapes, labels out of range.

    >>> pairs = [(torch.full((1, 2, 2), i, dtype=torch.uint8), 10 * (i % 2)) for i in range(4)]
    >>> from_datasets(pairs, pairs[:2], name="mine").class_names
    ('0', '10')
    """
    first, _ = _item(train, 0, where=f"{name}/train")
    kept = fits(name, nbytes=(len(train) + len(test)) * first.nbytes, memory_gb=memory_gb)
    keep = {"train": kept and not _draws(train, name=name), "test": kept}
    inputs, labels = [], []
    for part, dataset in (("train", train), ("test", test)):
        x, y = _stacked(dataset, like=first, where=f"{name}/{part}", keep=keep[part])
        inputs.append(x)
        labels.append(checked_labels(y, where=f"{name}/{part}"))
    if classes is not None:
        for part, y_N in zip(("train", "test"), labels, strict=True):
            _in_range(y_N, len(classes), where=f"{name}/{part}")
    train_y, test_y, class_names = relabel(labels[0], labels[1], where=name)
    if classes is not None:
        if len(class_names) < len(classes):
            empty = min(set(range(len(classes))) - set(map(int, class_names)))
            raise DataError(
                f"{name}/train: no samples of class {empty} ('{classes[empty]}'); remove or fill that class"
            )
        class_names = tuple(classes)
    if keep["train"]:
        warn_of_duplicates(inputs[0], inputs[1], where=name)
        mean, std = _normalization(inputs[0])
    else:
        index = evenly_spaced(len(train), limit=1024).tolist()
        mean, std = _normalization(torch.stack([_item(train, i, where=name)[0] for i in index]))
    samples: list[Data] = [
        TensorSamples(x, y, mean, std) if keep[part] else DatasetSamples.of(_Inputs(dataset), y, mean=mean, std=std)
        for part, dataset, x, y in zip(keep, (train, test), inputs, (train_y, test_y), strict=True)
    ]
    return Source(name, samples[0], samples[1], classes=len(class_names), class_names=class_names)


def from_avalanche(benchmark: Any, *, name: str = "") -> Benchmark:
    """Any Avalanche benchmark with streams ``train`` and ``test``, its experiences as they are.

    Classes are learnt in the order in which the training stream brings them, those of one experience by
    their ids. Evaluation transforms are applied once and the results kept in memory; training transforms
    are left out, since they would be frozen: give the run augmentations of its own. Where the test stream
    has another number of experiences than the training stream, its samples are dealt to the experiences by
    class; where experiences share classes, each is tested on all of them.

    Raises:
        DataError: A benchmark without these streams, or test classes that are never trained on.
    """
    streams = getattr(benchmark, "streams", {})
    if not {"train", "test"} <= set(streams):
        raise DataError(f"avalanche: streams are {', '.join(streams) or 'none'}; give a benchmark with train and test")
    name = name or type(benchmark).__name__
    train_parts, test_parts = (
        [_experience(e, where=f"{name}/{part} {i}") for i, e in enumerate(streams[part])] for part in ("train", "test")
    )
    if not train_parts or not test_parts:
        raise DataError(f"{name}: an empty stream; give a benchmark with at least one experience")
    learnt = tuple(dict.fromkeys(c for _, y in train_parts for c in sorted(set(y.tolist()))))
    rank = {c: i for i, c in enumerate(learnt)}
    strange = {c for _, y in test_parts for c in y.tolist()} - set(rank)
    if strange:
        raise DataError(f"{name}/test: class {min(strange)} is never trained on; remove it from the test stream")
    mean, std = _normalization(train_parts[0][0] if len(train_parts) == 1 else torch.cat([x for x, _ in train_parts]))
    train, test = (
        tuple(TensorSamples(x, torch.tensor([rank[c] for c in y.tolist()]), mean, std) for x, y in parts)
        for parts in (train_parts, test_parts)
    )
    classes = tuple(tuple(sorted(set(part.y.tolist()))) for part in train)
    if len(test) != len(train):
        test = _dealt(concatenate(test), classes, name=name)
    logger.info("%s: %d experiences; training transforms of the benchmark are left out", name, len(train))
    return Benchmark(
        name=name,
        class_order=learnt,
        classes=classes,
        train=train,
        test=test,
        input_shape=train[0].input_shape,
    )


def _draws(dataset: MapDataset, *, name: str, trials: int = 16) -> bool:
    """Whether transforms draw random numbers: the first inputs, read twice, are not the same."""
    for i in range(min(trials, len(dataset))):
        readings = []
        for seed in (2 * i, 2 * i + 1):
            with seeded(seed):
                readings.append(_item(dataset, i, where=name)[0])
        one, other = (x.nan_to_num() for x in readings)
        if not torch.equal(one, other):
            logger.info("%s: training inputs have random transforms and are read anew in every epoch", name)
            return True
    return False


class _Inputs:
    """The inputs of a data set alone, as tensors."""

    def __init__(self, dataset: MapDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Tensor:
        return _item(self._dataset, index, where="data")[0]


def _dealt(test: TensorSamples, classes: Sequence[tuple[int, ...]], *, name: str) -> tuple[TensorSamples, ...]:
    if sum(map(len, classes)) > len(set().union(*classes)):
        logger.info("%s: experiences share classes; each is tested on all %d test samples", name, len(test))
        return (test,) * len(classes)
    logger.info("%s: test samples are dealt to the %d experiences by class", name, len(classes))
    return tuple(test.subset(torch.isin(test.y, torch.tensor(c)).nonzero().flatten()) for c in classes)


def _experience(experience: Any, *, where: str) -> tuple[Tensor, Labels]:
    dataset = experience.dataset.eval()
    first, _ = _item(dataset, 0, where=where)
    x, y = _stacked(dataset, like=first, where=where, keep=True)
    return x, checked_labels(y, where=where)


def _stacked(dataset: MapDataset, *, like: Tensor, where: str, keep: bool) -> tuple[Tensor, list[Any]]:
    """All inputs in one tensor (none of them where they are not kept) and all labels."""
    x = torch.empty((len(dataset) if keep else 0, *like.shape), dtype=like.dtype)
    labels = []
    for i in range(len(dataset)):
        item, label = _item(dataset, i, where=where)
        if item.shape != like.shape or item.dtype != like.dtype:
            raise DataError(
                f"{where}: sample {i} is {item.dtype} of shape {tuple(item.shape)}, "
                f"the first {like.dtype} of {tuple(like.shape)}; make all alike"
            )
        if keep:
            x[i] = item
        labels.append(label)
    if x.is_floating_point():
        _finite(x, where=where)
    return x, labels


def _item(dataset: MapDataset, index: int, *, where: str) -> tuple[Tensor, Any]:
    if not len(dataset):
        raise DataError(f"{where}: holds no samples; add some")
    item = dataset[index]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(f"{where}: sample {index} is a {type(item).__name__}; give pairs of input and label")
    label = item[1].item() if isinstance(item[1], (Tensor, np.generic)) and _is_single(item[1]) else item[1]
    return _tensor(item[0], where=f"{where}: sample {index}"), label


def _is_single(label: Any) -> bool:
    return bool(np.ndim(label) == 0 or np.size(label) == 1)


def _tensor(value: Any, *, where: str) -> Tensor:
    """An input as uint8 or float32, channels first."""
    if isinstance(value, Image.Image):
        return as_pixels(value, channels=channels_of(value, where))
    if isinstance(value, np.ndarray):
        last = value.ndim == 3 and value.shape[2] in (1, 3)
        value = value[None] if value.ndim == 2 else value.transpose(2, 0, 1) if last else value
        value = torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise DataError(f"{where} is a {type(value).__name__}; give a tensor, an array or a PIL image")
    if value.is_complex():
        raise DataError(f"{where} is of type {value.dtype}; give bytes or floating-point numbers")
    return value if value.dtype == torch.uint8 else value.float()


def _finite(x: Tensor, *, where: str) -> None:
    bad = ~torch.isfinite(x.flatten(1)).all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise DataError(f"{where}: sample {first} has NaN or infinite values; clean the inputs")


def _in_range(y: Labels, classes: int, *, where: str) -> None:
    numbers: Iterable[Any] = y.tolist()
    for i, label in enumerate(numbers):
        if not isinstance(label, int) or label >= classes:
            raise DataError(f"{where}: label {label} of sample {i} is out of range; give 0 to {classes - 1}")


def _normalization(x: Tensor) -> Normalization:
    return measured(x) if x.dtype == torch.uint8 else UNCHANGED
