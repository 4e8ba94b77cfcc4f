"""Arrays from ``.npz`` files: types and sizes are checked before anything is allocated, and no code is run."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

_LONGEST_HEADER = 10_000
"""Bytes of the description of an array, as in numpy."""
_MOST_RATIO = 1032
"""Deflate cannot compress better than this: a member that claims more is not what it claims."""


def declared_arrays(file: str | Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Return shape and type of every array in a file, without reading any values.

    Raises:
        ValueError: An array that the file cannot hold, or a file that is not a regular one.
        Exception: Anything else that ``zipfile`` and numpy raise for damaged files.
    """
    path = Path(file)
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("is not a regular file")
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if sum(member.compress_size for member in members) > size:
            raise ValueError("its parts are larger than the file")
        return {member.filename.removesuffix(".npy"): _declared(archive, member) for member in members}


def read_arrays(file: str | Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read arrays by name, after the checks of :func:`declared_arrays`.

    Raises:
        ValueError: Arrays of Python objects, or what :func:`declared_arrays` refuses.
        KeyError: No array of this name.
        Exception: Anything else that ``zipfile`` and numpy raise for damaged files.
    """
    declared_arrays(file)
    with open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in names}


def _declared(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[tuple[int, ...], np.dtype[Any]]:
    name = member.filename.removesuffix(".npy")
    with cast(zipfile.ZipExtFile, archive.open(member)) as stream:
        version = np.lib.format.read_magic(stream)
        wide = version != (1, 0)
        length = int.from_bytes(stream.peek(4)[: 4 if wide else 2], "little")
        if length > _LONGEST_HEADER:
            raise ValueError(f"{name} has a header of {length:,} bytes")
        layout = np.lib.format
        shape, _, dtype = (layout.read_array_header_2_0 if wide else layout.read_array_header_1_0)(stream)
        header = stream.tell()
    count = 1
    for side in shape:
        count *= side
    if dtype.hasobject:
        return shape, dtype  # of unknown size; numpy refuses to read it
    if count < 0 or count * dtype.itemsize > member.file_size - header:
        raise ValueError(f"{name} declares shape {shape}, which is more than the file has")
    if member.file_size > _MOST_RATIO * member.compress_size:
        raise ValueError(f"{name} declares {member.file_size:,} bytes, which is more than the file has")
    return shape, dtype
