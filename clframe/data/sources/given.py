"""Sources from Python objects: torch data sets and Avalanche benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clframe.data.benchmark import Benchmark
from clframe.data.images import count_channels, to_pixels
from clframe.data.lazy import DatasetSamples
from clframe.data.reader import temporary_seed
from clframe.data.samples import TensorSamples, concatenate
from clframe.data.source import Data, Source
from clframe.data.sources.image_files import MEMORY_GB, fits_in_memory
from clframe.data.sources.labels import (
    IDENTITY,
    Labels,
    Normalization,
    check_labels,
    evenly_spaced,
    measure_normalization,
    relabel,
    warn_of_duplicates,
)
from clframe.errors import DataError

logger = logging.getLogger("clframe.data")


class MapDataset(Protocol):
    """A map-style torch data set."""

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
    """Make a source of two torch data sets whose items start with an input and a label.

    Inputs are tensors (channels first), PIL images or numpy arrays (channels last, an alpha channel is dropped), with
    their transforms applied. They are read once and stored, unless they take too much memory or two readings of a
    training input differ: its transforms are then random, and it is read again in every epoch. Bytes are normalized by
    mean and standard deviation of the training inputs, floating-point inputs are unchanged. To use the source in
    configs, register a function that returns it::

        @SOURCES.register("mine")
        def mine() -> Source:
            return from_datasets(train, test, name="mine")

    Args:
        train: Training data.
        test: Test data.
        name: Name of the source.
        classes: Names of the classes 0, 1, ...; without them, labels are numbered in ascending order.
        memory_gb: Limit in GB up to which all inputs are stored in memory; above it they are read batch by batch.

    Raises:
        DataError: Items that are not pairs, inputs of different shapes or without a clear layout, labels out of range.

    >>> pairs = [(torch.full((1, 2, 2), i, dtype=torch.uint8), 10 * (i % 2)) for i in range(4)]
    >>> from_datasets(pairs, pairs[:2], name="mine").class_names
    ('0', '10')
    """
    first, _ = _item(train, 0, where=f"{name}/train")
    kept = fits_in_memory(name, nbytes=(len(train) + len(test)) * first.nbytes, memory_gb=memory_gb)
    keep = {"train": kept and not _has_random_transforms(train, name=name), "test": kept}
    inputs, labels = [], []
    for part, dataset in (("train", train), ("test", test)):
        x, y = _read_all(dataset, like=first, where=f"{name}/{part}", keep=keep[part])
        inputs.append(x)
        labels.append(check_labels(y, where=f"{name}/{part}"))
    if classes is not None:
        for part, y_N in zip(("train", "test"), labels, strict=True):
            _check_range(y_N, len(classes), where=f"{name}/{part}")
    train_y, test_y, class_names = relabel(labels[0], labels[1], where=name)
    if classes is not None:
        if len(class_names) < len(classes):
            empty = min(set(range(len(classes))) - set(map(int, class_names)))
            raise DataError(
                f"{name}/train: found no samples of class {empty} ('{classes[empty]}'); add some or remove the class"
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
    """Convert an Avalanche benchmark with streams ``train`` and ``test``; its experiences are unchanged.

    Classes are learned in the order of the training stream, those of one experience in the order of their ids.
    Evaluation transforms are applied once and the results stored in memory. Training transforms are left out, since
    storing them would freeze them: use augmentations of the run. If the test stream has another number of experiences
    than the training stream, test samples are assigned to experiences by class; if experiences share classes, each is
    tested on all samples.

    If every experience has its own task label, the benchmark has task labels, and the same class id in two tasks means
    two classes.

    Raises:
        DataError: A benchmark without these streams; test classes without training samples; task labels that some but
            not all experiences share; class ids that start at 0 in every experience without task labels.
    """
    streams = getattr(benchmark, "streams", {})
    if not {"train", "test"} <= set(streams):
        raise DataError(
            f"avalanche: found streams {', '.join(streams) or 'none'}; give a benchmark with train and test"
        )
    name = name or type(benchmark).__name__
    inputs, labels = {}, {}
    tasks = {split: [_task_labels(e) for e in streams[split]] for split in ("train", "test")}
    has_tasks = _has_tasks(tasks["train"], benchmark, name=name)
    for split in ("train", "test"):
        found = [_experience(e, where=f"{name}/{split} {i}") for i, e in enumerate(streams[split])]
        if not found:
            raise DataError(f"{name}: the {split} stream is empty; give a benchmark with at least one experience")
        inputs[split] = [x for x, _ in found]
        labels[split] = [
            [(_only(task, where=f"{name}/{split} {i}") if has_tasks else 0, c) for c in y.tolist()]
            for i, ((_, y), task) in enumerate(zip(found, tasks[split], strict=True))
        ]
    order = tuple(dict.fromkeys(c for y in labels["train"] for c in sorted(set(y))))
    rank = {c: i for i, c in enumerate(order)}
    untrained = {c for y in labels["test"] for c in y} - set(rank)
    if untrained:
        task, c = min(untrained)
        of = f" of task {task}" if has_tasks else ""
        raise DataError(f"{name}/test: class {c}{of} has no training samples; remove it from the test stream")
    x = inputs["train"]
    mean, std = _normalization(x[0] if len(x) == 1 else torch.cat(x))
    train, test = (
        tuple(
            TensorSamples(x, torch.tensor([rank[c] for c in y]), mean, std)
            for x, y in zip(inputs[split], labels[split], strict=True)
        )
        for split in ("train", "test")
    )
    classes = tuple(tuple(sorted(set(samples.y.tolist()))) for samples in train)
    if len(test) != len(train):
        test = _split_by_class(concatenate(test), classes, name=name)
    logger.info("%s: %d experiences; training transforms of the benchmark are left out", name, len(train))
    ids = tuple(c for _, c in order)
    return Benchmark(
        name=name,
        class_order=ids if len(set(ids)) == len(ids) else tuple(range(len(ids))),  # ids that restart name nothing
        classes=classes,
        train=train,
        test=test,
        input_shape=train[0].input_shape,
        task_labels=has_tasks,
    )


def _task_labels(experience: Any) -> set[int]:
    """Task labels of an Avalanche experience; empty if its benchmark has none."""
    return {int(label) for label in getattr(experience, "task_labels", ())}


def _has_tasks(tasks: Sequence[set[int]], benchmark: Any, *, name: str) -> bool:
    """Whether every training experience has its own task label.

    Raises:
        DataError: Labels that some but not all experiences share, which clframe's task labels (the index of the
            experience) cannot express; class ids that restart without task labels, whose classes would be merged.
    """
    if len(set().union(*tasks)) > 1:
        if any(len(labels) != 1 for labels in tasks) or len(set().union(*tasks)) < len(tasks):
            shown = [sorted(labels) for labels in tasks]
            raise DataError(
                f"{name}/train: found task labels {shown}; give every experience its own task label, or all the same"
            )
        return True
    if len(tasks) > 1 and getattr(benchmark, "class_ids_from_zero_in_each_exp", False):
        raise DataError(
            f"{name}: class ids start at 0 in every experience, so that different classes have the same id; make the "
            f"benchmark with task_labels=True or without class_ids_from_zero_in_each_exp"
        )
    return False


def _only(labels: set[int], *, where: str) -> int:
    if len(labels) != 1:
        raise DataError(f"{where}: found task labels {sorted(labels)}; give every test experience one task label")
    return next(iter(labels))


def _has_random_transforms(dataset: MapDataset, *, name: str, trials: int = 16) -> bool:
    """Whether transforms are random: the first inputs, read twice with different seeds, differ."""
    for i in range(min(trials, len(dataset))):
        readings = []
        for seed in (2 * i, 2 * i + 1):
            with temporary_seed(seed):
                readings.append(_item(dataset, i, where=name)[0])
        one, other = (x.nan_to_num() for x in readings)
        if not torch.equal(one, other):
            logger.info("%s: training inputs have random transforms and are read again in every epoch", name)
            return True
    return False


class _Inputs:
    """The inputs of a data set as tensors, without labels."""

    def __init__(self, dataset: MapDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Tensor:
        return _item(self._dataset, index, where="data")[0]


def _split_by_class(test: TensorSamples, classes: Sequence[tuple[int, ...]], *, name: str) -> tuple[TensorSamples, ...]:
    """Assign test samples to experiences by class; to all experiences if these share classes."""
    if sum(map(len, classes)) > len(set().union(*classes)):
        logger.info("%s: experiences share classes; each is tested on all %d test samples", name, len(test))
        return (test,) * len(classes)
    logger.info("%s: test samples are assigned to the %d experiences by class", name, len(classes))
    return tuple(test.subset(torch.isin(test.y, torch.tensor(c)).nonzero().flatten()) for c in classes)


def _experience(experience: Any, *, where: str) -> tuple[Tensor, Labels]:
    dataset = experience.dataset.eval()
    first, _ = _item(dataset, 0, where=where)
    x, y = _read_all(dataset, like=first, where=where, keep=True)
    return x, check_labels(y, where=where)


def _read_all(dataset: MapDataset, *, like: Tensor, where: str, keep: bool) -> tuple[Tensor, list[Any]]:
    """All inputs in one tensor (empty if not ``keep``) and all labels."""
    x = torch.empty((len(dataset) if keep else 0, *like.shape), dtype=like.dtype)
    labels = []
    for i in range(len(dataset)):
        item, label = _item(dataset, i, where=where)
        if item.shape != like.shape or item.dtype != like.dtype:
            raise DataError(
                f"{where}: sample {i} is {item.dtype} of shape {tuple(item.shape)}, "
                f"the first {like.dtype} of {tuple(like.shape)}; give all the same type and shape"
            )
        if keep:
            x[i] = item
        labels.append(label)
    if x.is_floating_point():
        _check_finite(x, where=where)
    return x, labels


def _item(dataset: MapDataset, index: int, *, where: str) -> tuple[Tensor, Any]:
    if not len(dataset):
        raise DataError(f"{where}: found no samples; add some")
    item = dataset[index]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise DataError(f"{where}: sample {index} is a {type(item).__name__}; give pairs of input and label")
    label = item[1].item() if isinstance(item[1], (Tensor, np.generic)) and _is_single(item[1]) else item[1]
    return _tensor(item[0], where=f"{where}: sample {index}"), label


def _is_single(label: Any) -> bool:
    return bool(np.ndim(label) == 0 or np.size(label) == 1)


def _tensor(value: Any, *, where: str) -> Tensor:
    """Convert an input to uint8 or float32, channels first."""
    if isinstance(value, Image.Image):
        return to_pixels(value, channels=count_channels(value, where))
    if isinstance(value, np.ndarray) and value.ndim:
        if value.ndim == 2:
            value = value[None]
        elif value.ndim == 3:
            value = _channels_first(value, where=where)
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        raise DataError(f"{where} is a single number; give a vector [D] or an image [C, H, W]")
    if not isinstance(value, Tensor):
        raise DataError(f"{where} is a {type(value).__name__}; give a tensor, an array or a PIL image")
    if value.is_complex():
        raise DataError(f"{where} has type {value.dtype}; give bytes or floating-point numbers")
    return value if value.dtype == torch.uint8 else value.float()


def _channels_first(array: np.ndarray[Any, Any], *, where: str) -> np.ndarray[Any, Any]:
    """An image with channels first and without alpha; channels are last unless only the first side can be channels."""
    if array.shape[2] in (1, 3, 4):
        if array.shape[2] == 4:
            _log_alpha()
        return array[..., :3].transpose(2, 0, 1)
    if array.shape[0] not in (1, 3):
        raise DataError(
            f"{where} is an array of shape {array.shape}, which does not show where the channels are; give arrays "
            f"[H, W, C] of 1, 3 or 4 channels, or tensors [C, H, W] of any number"
        )
    return array


@cache  # once per process, not per sample
def _log_alpha() -> None:
    logger.warning("arrays of 4 channels are read as RGBA and alpha is dropped; give tensors [4, H, W] to use all four")


def _check_finite(x: Tensor, *, where: str) -> None:
    bad = ~torch.isfinite(x.flatten(1)).all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise DataError(f"{where}: sample {first} has NaN or infinite values; clean the inputs before training")


def _check_range(y: Labels, classes: int, *, where: str) -> None:
    numbers: Iterable[Any] = y.tolist()
    for i, label in enumerate(numbers):
        if not isinstance(label, int) or label >= classes:
            raise DataError(f"{where}: label {label} of sample {i} is out of range; give 0 to {classes - 1}")


def _normalization(x: Tensor) -> Normalization:
    return measure_normalization(x) if x.dtype == torch.uint8 else IDENTITY
