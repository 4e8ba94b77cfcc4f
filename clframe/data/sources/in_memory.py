"""Whether a set of images is kept in memory, decided from what it declares before it is read."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.data.source import Data, Source
from clframe.data.sources.image_files import ImageFiles
from clframe.data.sources.labels import warn_of_duplicates
from clframe.data.sources.normalization import Normalization, evenly_spaced, measured
from clframe.errors import ConfigError

MEMORY_GB = 4.0
"""Images that take more than this many GB (10^9 bytes) are read batch by batch."""

logger = logging.getLogger("clframe.data")


def fits(title: str, *, nbytes: int, memory_gb: float) -> bool:
    """Whether ``nbytes`` stay within the limit; both are said in the log.

    Raises:
        ConfigError: A negative limit.
    """
    if memory_gb < 0:
        raise ConfigError(f"benchmark.memory_gb: found {memory_gb}; give at least 0, which keeps nothing in memory")
    within = nbytes <= memory_gb * 1e9
    limit = "" if math.isinf(memory_gb) else f", limit {memory_gb:g} GB"
    decision = "kept in memory" if within else "read batch by batch"
    logger.info("%s: %.3f GB of inputs%s: %s", title, nbytes / 1e9, limit, decision)
    return within


def image_source(
    name: str,
    files: ImageFiles,
    parts: tuple[Tensor, Tensor],
    *,
    class_names: tuple[str, ...],
    memory_gb: float,
    normalization: Normalization | None = None,
    check_duplicates: bool = False,
) -> Source:
    """A source of image files: in memory where they fit, read batch by batch otherwise.

    Args:
        name: Of the source.
        files: All images with labels 0..C-1.
        parts: Indices of the training and of the test images.
        class_names: What each class is called.
        memory_gb: Limit for all images together.
        normalization: Of published sets; None measures up to 8192 evenly spaced training images.
        check_duplicates: Warn of test images that are also trained on, where the images are in memory.
    """
    train, test = (files.subset(index) for index in parts)
    samples: list[Data]
    if fits(name, nbytes=files.nbytes, memory_gb=memory_gb):
        train_x, test_x = train.stacked(title=name), test.stacked(title=name)
        mean, std = normalization or measured(train_x[evenly_spaced(len(train_x))])
        samples = [
            TensorSamples(train_x, train.labels, mean, std),
            TensorSamples(test_x, test.labels, mean, std),
        ]
        if check_duplicates:
            warn_of_duplicates(train_x, test_x, where=name)
    else:
        if normalization is None:
            sample = train.subset(evenly_spaced(len(train)))
            normalization = measured(sample.stacked(title=f"{name}, a sample"))
        mean, std = normalization
        everything = DatasetSamples.of(files, files.labels, mean=mean, std=std)
        samples = [everything.subset(index) for index in parts]
    return Source(name, samples[0], samples[1], classes=len(class_names), class_names=class_names)


def joined_parts(train: int, test: int) -> tuple[Tensor, Tensor]:
    """Indices of ``train`` first samples and ``test`` that follow them."""
    return torch.arange(train), torch.arange(train, train + test)
