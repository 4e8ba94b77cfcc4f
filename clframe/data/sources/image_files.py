"""Image files as a data set: checked, resized, and read one by one or all into memory.

For the conversion of pixels see :mod:`clframe.data.images`.
"""

from __future__ import annotations

import logging
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from clframe.data.images import count_channels, to_pixels, upright
from clframe.data.inputs import InputFormat
from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.data.source import Data, Source
from clframe.data.sources.image_cache import CachedImages, Pixels, open_cache
from clframe.data.sources.labels import Normalization, evenly_spaced, measure_normalization, warn_of_duplicates
from clframe.errors import ConfigError, DataError
from clframe.progress import progress_bar

IMAGE_ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".webp",
)  # fmt: skip
"""Endings of image files in a folder, in upper or lower case."""

# Pillow also decodes rare formats, some by external programs (EPS by Ghostscript). Untrusted files must not reach these
# decoders, whatever their ending.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")

_KIND = {1: "gray", 3: "color"}
_CHUNK = 128  # images that one thread reads between two updates of the progress bar


class ImageFiles(Dataset[Tensor]):
    """Image files as a map-style torch data set: ``files[i]`` is uint8 (channels, height, width).

    Args:
        paths: One file per image.
        labels: labels_N.
        size: Side in pixels to resize to: the shorter side, then a center crop, as torchvision's ``Resize`` and
            ``CenterCrop``. None: no resizing; all images must have the size of the first.
        channels: 1 or 3 converts all images; None: all images must have the channels of the first.

    Raises:
        ConfigError: An invalid size or number of channels.
        DataError: No images, or a first one that cannot be read; on access, an image that cannot be read, is too
            large to be read safely, or differs from the first.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, *, size: int | None = None, channels: int | None = None
    ) -> None:
        if size is not None and size < 1:
            raise ConfigError(f"benchmark.size: found {size}; give at least 1 pixel")
        if channels not in (None, 1, 3):
            raise ConfigError(f"benchmark.channels: found {channels}; give 1 (gray) or 3 (color)")
        if not paths:
            raise DataError("images: found no files; give at least one")
        if len(paths) != len(labels):
            raise DataError(f"images: found {len(paths)} files and {len(labels)} labels; give one label per file")
        self.paths, self.labels, self.size, self._convert = tuple(paths), labels, size, channels is not None
        self._first = self.paths[0]
        with open_image(self._first) as image:
            kind = count_channels(image, self._first)
            width, height = (size, size) if size is not None else upright(image).size
        self.shape = (channels or kind, height, width)
        """Channels, height and width of every image."""

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        path = self.paths[index]
        with open_image(path) as image:
            kind = count_channels(image, path)
            if kind != self.shape[0] and not self._convert:
                raise DataError(
                    f"{path}: is {_KIND[kind]}, but {self._first} is {_KIND[self.shape[0]]}; "
                    f"set benchmark.channels to 1 or 3 to convert all"
                )
            pixels = to_pixels(image, channels=self.shape[0], size=self.size)
        if pixels.shape != self.shape:
            found, first = (f"{s[2]}x{s[1]}" for s in (pixels.shape, self.shape))
            raise DataError(
                f"{path}: has {found} pixels, but {self._first} has {first}; set benchmark.size to resize all"
            )
        return pixels

    def subset(self, index: Tensor) -> ImageFiles:
        """Return the images at ``index``, in that order, with the shape of the same first image."""
        part = object.__new__(ImageFiles)  # __init__ would open the first image again
        part.__dict__.update(self.__dict__)
        part.paths, part.labels = tuple(self.paths[i] for i in index.tolist()), self.labels[index]
        return part

    @property
    def nbytes(self) -> int:
        """Bytes of all images in memory; computed from the shape of the first."""
        return len(self) * int(np.prod(self.shape))

    def read_all(self, *, title: str) -> Tensor:
        """Read all images into one uint8 tensor [N, C, H, W], by several threads, with a progress bar."""
        images = torch.empty((len(self), *self.shape), dtype=torch.uint8)
        start = 0
        for part in self._decode(title=title):
            images[start : start + len(part)] = torch.from_numpy(part)
            start += len(part)
        return images

    def cached(self, folder: str | Path, *, title: str) -> CachedImages:
        """Return the same images decoded, from the cache in a folder; see :mod:`clframe.data.sources.image_cache`.

        Raises:
            ConfigError: The folder cannot be written.
        """
        return open_cache(
            folder, self.paths, shape=self.shape, options=(self.size, self._convert),
            decode=lambda: self._decode(title=title), title=title,
        )  # fmt: skip

    def _decode(self, *, title: str) -> Iterator[Pixels]:
        """Pixels of all images, chunk by chunk, decoded by several threads, with a progress bar."""
        count = min(8, os.cpu_count() or 1)

        def read(start: int) -> Pixels:
            stop = min(start + _CHUNK, len(self))
            pixels = np.empty((stop - start, *self.shape), dtype=np.uint8)
            for i in range(start, stop):
                pixels[i - start] = self[i].numpy()
            return pixels

        bar = progress_bar(f"reading {title}", total=len(self), unit="image")
        with warnings.catch_warnings(), bar, ThreadPoolExecutor(count) as threads:
            # Pillow warns about large images before open_image raises for them: raise instead of warning twice.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            starts = range(0, len(self), _CHUNK)
            # A few chunks per thread at a time: what has been decoded and not been taken needs memory.
            for first in range(0, len(starts), 4 * count):
                for pixels in threads.map(read, starts[first : first + 4 * count]):
                    bar.update(len(pixels))
                    yield pixels


@contextmanager
def open_image(path: str) -> Iterator[Image.Image]:
    """Open an image for decoding inside the block; errors of the decoder become one line.

    Raises:
        DataError: The file is missing, not a regular file, unreadable, damaged, not an image of a supported format, or
            has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would block forever
            raise DataError(f"{path}: is not a regular file; replace or remove it")
        # From a path, Pillow (13.0) maps uncompressed TIFF files into memory and then rotates them twice.
        with open(path, "rb") as stream, Image.open(stream, formats=_FORMATS) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError
            yield image
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(
            f"{path}: declares more than {Image.MAX_IMAGE_PIXELS:,} pixels, too many to be read safely; resize it"
        ) from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; restore it or remove it from the data") from None
    except PermissionError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except Exception as error:  # decoders raise nearly anything for damaged files
        reason = " ".join(str(error).replace(f"<_io.BufferedReader name={path!r}>", "").split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read as an image ({reason}); replace or remove the file") from None


def read_image(path: str, *, shape: Sequence[int]) -> tuple[Tensor, bool]:
    """Read one image file as the input of a trained model.

    Args:
        path: The file.
        shape: Channels, height and width of the model's input. An image of these sizes is not resampled, so it equals
            the one that :class:`ImageFiles` reads in training.

    Returns:
        The uint8 tensor, and whether the image had another size.

    Raises:
        DataError: As :func:`open_image`.
    """
    channels, height, width = shape
    with open_image(path) as image:
        count_channels(image, path)  # refuses modes whose range is not known
        found = upright(image).size
        return to_pixels(image, channels=channels, size=(height, width)), found != (width, height)


MEMORY_GB = 4.0
"""Images of more than this many GB (10^9 bytes) are read batch by batch."""

logger = logging.getLogger("clframe.data")


def fits_in_memory(title: str, *, nbytes: int, memory_gb: float) -> bool:
    """Whether ``nbytes`` are within the limit; logs both.

    Raises:
        ConfigError: A negative limit.
    """
    if memory_gb < 0:
        raise ConfigError(f"benchmark.memory_gb: found {memory_gb}; give at least 0, which stores nothing in memory")
    within = nbytes <= memory_gb * 1e9
    limit = "" if math.isinf(memory_gb) else f", limit {memory_gb:g} GB"
    decision = "stored in memory" if within else "read batch by batch"
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
    cache: str | Path | None = None,
) -> Source:
    """Make a source of image files: in memory if they fit, read batch by batch otherwise.

    Args:
        name: Name of the source.
        files: All images with labels 0..C-1.
        parts: Indices of the training and of the test images.
        class_names: Name of each class.
        memory_gb: Limit for all images together.
        normalization: Mean and standard deviation; None: measured on up to 8192 equally spaced training images.
        check_duplicates: Warn of test images that are also training images, if the images are in memory.
        cache: Folder for the decoded images; None decodes at every start.

    Raises:
        ConfigError: A cache that cannot be written.
    """
    train, test = (files.subset(index) for index in parts)
    samples: list[Data]
    in_memory = fits_in_memory(name, nbytes=files.nbytes, memory_gb=memory_gb)
    decoded = None if cache is None else files.cached(cache, title=name)
    if in_memory:
        if decoded is None:
            train_x, test_x = train.read_all(title=name), test.read_all(title=name)
        else:
            train_x, test_x = (decoded.take(index) for index in parts)
        mean, std = normalization or measure_normalization(train_x[evenly_spaced(len(train_x))])
        samples = [
            TensorSamples(train_x, train.labels, mean, std),
            TensorSamples(test_x, test.labels, mean, std),
        ]
        if check_duplicates:
            warn_of_duplicates(train_x, test_x, where=name)
    else:
        if normalization is None:
            index = evenly_spaced(len(train))
            if decoded is None:
                sample = train.subset(index).read_all(title=f"{name}, a sample")
            else:
                sample = decoded.take(parts[0][index])
            normalization = measure_normalization(sample)
        mean, std = normalization
        dataset = files if decoded is None else decoded
        everything = DatasetSamples.of(dataset, files.labels, mean=mean, std=std, paths=files.paths)
        samples = [everything.subset(index) for index in parts]
    inputs = InputFormat(kind="image", size=files.size)
    return Source(name, samples[0], samples[1], classes=len(class_names), class_names=class_names, inputs=inputs)


def consecutive_indices(train: int, test: int) -> tuple[Tensor, Tensor]:
    """Indices of the first ``train`` samples and of the ``test`` samples after them."""
    return torch.arange(train), torch.arange(train, train + test)
