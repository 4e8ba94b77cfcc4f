"""Decoded images on disk, so that files are decoded once and not at every start.

A cache is an ``.npy`` file of uint8 [N, C, H, W]: a header with type and shape, then the pixels, which are mapped into
memory. Its name contains a digest of what the pixels depend on: path, size and modification time of every file, the
size and channels to convert to, the version of Pillow, and :data:`VERSION`. A file that changes has another digest, and
a new cache is written. Nothing in it is executed: it holds numbers only, and is read without pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clframe.errors import ConfigError, DataError
from clframe.files import is_temporary

VERSION = 1
"""Version of :func:`clframe.data.images.to_pixels`: to be raised by every change of the pixels it returns."""

Pixels = npt.NDArray[np.uint8]

_log = logging.getLogger("clframe.data")
_SPARE = 2**26
"""Bytes of the disk that stay free."""
_ABANDONED = 3600.0
"""Seconds after the last write from which on a temporary file is one of a process that was killed."""


class CachedImages(Dataset[Tensor]):
    """Images of a cache: ``images[i]`` is uint8 (channels, height, width), read from the disk or the system's memory.

    Args:
        path: The file, as :func:`open_cache` returns it.
        shape: Channels, height and width.
    """

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self._pixels: Pixels | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self.pixels[index]))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the path only: a mapped array would be pickled with all pixels."""
        return {**self.__dict__, "_pixels": None}

    @property
    def pixels(self) -> Pixels:
        """All images, mapped into memory."""
        if self._pixels is None:
            found = _map(self.path, shape=None)
            if found is None:
                raise DataError(f"{self.path}: is damaged or gone; run again, which decodes the images")
            self._pixels = found
        return self._pixels

    def take(self, index: Tensor) -> Tensor:
        """Read the images at ``index`` into memory."""
        return torch.from_numpy(np.asarray(self.pixels)[index.numpy()])


def open_cache(
    folder: str | Path,
    paths: tuple[str, ...],
    *,
    shape: tuple[int, ...],
    options: tuple[Any, ...],
    decode: Callable[[], Iterator[Pixels]],
    title: str,
) -> CachedImages:
    """Open the cache of images, and write it first if there is none or a file has changed.

    Args:
        folder: Folder of caches, created if missing.
        paths: The files, in order.
        shape: Channels, height and width of each image.
        options: What the pixels depend on besides the files.
        decode: Returns the pixels of all images, chunk by chunk.
        title: Name of the data set, with which the name of the file starts.

    Raises:
        ConfigError: The folder cannot be written or has too little space.
    """
    home = Path(folder).expanduser()
    content = hashlib.blake2b(digest_size=12)
    content.update(json.dumps([VERSION, PIL.__version__, list(shape), list(options)]).encode())
    for name in paths:
        status = _stat(name)
        line = f"{os.path.abspath(name)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        content.update(line.encode(errors="surrogateescape"))
    # Caches of the same files in an earlier state, which are deleted, differ in the second part only.
    root = os.path.commonpath([os.path.dirname(os.path.abspath(name)) for name in paths])
    data = hashlib.blake2b(json.dumps([root, list(shape), list(options)]).encode(), digest_size=6).hexdigest()
    stem = "".join(letter if letter.isalnum() else "_" for letter in title)[:40]
    path = home / f"{stem}-{data}-{content.hexdigest()}.npy"
    full = (len(paths), *shape)
    if _map(path, shape=full) is None:
        _write(path, full, decode)
        for old in home.glob(f"{stem}-{data}-*.npy"):
            if old != path:
                with contextlib.suppress(OSError):
                    old.unlink()
        _log.info("%s: decoded images are cached in %s (%.3f GB)", title, path, path.stat().st_size / 1e9)
    else:
        _log.info("%s: decoded images are read from %s", title, path)
    return CachedImages(path, shape)


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); restore it or remove it from the data") from None


def _map(path: Path, *, shape: tuple[int, ...] | None) -> Pixels | None:
    """The mapped pixels; None if the file is missing or not a complete cache of this shape."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    plain = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    return pixels if plain and pixels.ndim == 4 and shape in (None, pixels.shape) else None


def _remove_abandoned(folder: Path) -> None:
    """Delete temporary files to which nothing writes any more; other processes may be writing caches as well."""
    for path in folder.glob(".*.npy.*.tmp"):
        with contextlib.suppress(OSError):
            if is_temporary(path.name) and time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()


def _write(path: Path, shape: tuple[int, ...], decode: Callable[[], Iterator[Pixels]]) -> None:
    """Write all pixels to a temporary file and rename it.

    They are written, not mapped: on a full disk a write raises, while a page of a mapped file ends the process.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    needed = int(np.prod(shape))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        free = shutil.disk_usage(path.parent).free
        if free < needed + _SPARE:
            raise OSError(errno.ENOSPC, f"{needed / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free")
        with open(temporary, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for pixels in decode():
                file.write(np.ascontiguousarray(pixels).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"benchmark.cache: {path.parent} cannot be written ({error.strerror}); free space, choose another folder, "
            f"or leave it out"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
