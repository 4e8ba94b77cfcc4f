"""Image files as a data set: checked, resized, and read one by one or all into memory."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.data.source import Data, Source
from clframe.data.sources.labels import Normalization, evenly_spaced, measured, warn_of_duplicates
from clframe.errors import ConfigError, DataError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp")
"""What counts as an image in a folder, in either case."""

_GREY = ("1", "L", "LA", "La")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
_KIND = {1: "grey", 3: "color"}
_CHUNK = 128  # images that one thread reads before it reports


class ImageFiles(Dataset[Tensor]):
    """Images by path, as a map-style torch data set: ``files[i]`` is uint8 (channels, height, width).

    Args:
        paths: One file for each image.
        labels: labels_N.
        size: Side in pixels to resize to: the shorter side, then a center crop, as torchvision's ``Resize``
            and ``CenterCrop`` do; None takes images as they are, which must all be of the size of the
            first.
        channels: 1 or 3, converting whatever differs; None takes them as the first image has them.

    Raises:
        ConfigError: A size or number of channels that no image can have.
        DataError: No images, or a first one that cannot be read; later, an image that cannot be read, is too
            large to be read safely or differs from the first.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, *, size: int | None = None, channels: int | None = None
    ) -> None:
        if size is not None and size < 1:
            raise ConfigError(f"benchmark.size: found {size}; give at least 1 pixel")
        if channels not in (None, 1, 3):
            raise ConfigError(f"benchmark.channels: found {channels}; give 1 (grey) or 3 (color)")
        if not paths:
            raise DataError("images: there are none; give at least one file")
        if len(paths) != len(labels):
            raise DataError(f"images: {len(paths)} files but {len(labels)} labels; give one label for each file")
        self.paths, self.labels, self.size, self._convert = tuple(paths), labels, size, channels is not None
        self._first = self.paths[0]
        with opened(self._first) as image:
            kind = channels_of(image, self._first)
            width, height = image.size
        self.shape = (channels or kind, *((height, width) if size is None else (size, size)))
        """Of every image: channels, height, width."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        with opened(path) as image:
            kind = channels_of(image, path)
            if kind != self.shape[0] and not self._convert:
                raise DataError(
                    f"{path}: {_KIND[kind]}, but {self._first} is {_KIND[self.shape[0]]}; "
                    f"set benchmark.channels to 1 or 3 and all are converted"
                )
            pixels = as_pixels(image, channels=self.shape[0], size=self.size)
        if pixels.shape != self.shape:
            found, first = (f"{s[2]}x{s[1]}" for s in (pixels.shape, self.shape))
            raise DataError(
                f"{path}: {found} pixels, but {self._first} has {first}; set benchmark.size and all are resized"
            )
        return pixels

    def subset(self, index: Tensor) -> ImageFiles:
        """The images at ``index``, in that order, held to the same first image."""
        part = object.__new__(ImageFiles)
        part.__dict__.update(self.__dict__)
        part.paths, part.labels = tuple(self.paths[i] for i in index.tolist()), self.labels[index]
        return part

    @property
    def nbytes(self) -> int:
        """Bytes that all images take in memory, known before any but the first is opened."""
        return len(self) * int(np.prod(self.shape))

    def stacked(self, *, title: str) -> Tensor:
        """All images in one uint8 tensor [N, C, H, W], read by several threads, with a bar on a terminal."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8)

        def read(start: int) -> int:
            stop = min(start + _CHUNK, len(self))
            for i in range(start, stop):
                images[i] = self[i]
            return stop - start

        bar = tqdm(total=len(self), desc=f"reading {title}", unit="image", disable=None, leave=False)
        with warnings.catch_warnings(), bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            # Pillow warns about sizes that become an error here; one line is enough.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for count in threads.map(read, range(0, len(self), _CHUNK)):
                bar.update(count)
        return images


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """An image to be decoded inside the block; whatever its decoder says becomes one line.

    Raises:
        DataError: The file is missing, unreadable, damaged, no image, or of more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with Image.open(path) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError
            yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{path}: declares more than {Image.MAX_IMAGE_PIXELS:,} pixels, too many to be read safely; shrink it"
        ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; restore it or remove it from the data") from None
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    except Exception as error:  # decoders of damaged files raise nearly anything
        reason = " ".join(str(error).replace(repr(path), "").split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace or remove the file") from None


def channels_of(image: Image.Image, path: str) -> int:
    """1 for grey images, 3 for color; transparency is dropped.

    Raises:
        DataError: Samples of more than 8 bits, which would be cut off.
    """
    if image.mode in _GREY:
        return 1
    if image.mode in _COLOR:
        return 3
    raise DataError(f"{path}: pixels of mode {image.mode}, not of 8 bits; convert the images to 8 bits a channel")


def as_pixels(image: Image.Image, *, channels: int, size: int | None = None) -> Tensor:
    """An opened image as a uint8 tensor (channels, height, width), resized and center-cropped where asked."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns where it is dropped in one step
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        image = _resized(image, size)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _resized(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    if min(width, height) != size:
        if width <= height:
            width, height = size, int(size * height / width)
        else:
            width, height = int(size * width / height), size
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size)) if (width, height) != (size, size) else image


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
