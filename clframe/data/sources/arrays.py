"""Arrays in an ``.npz`` file."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.image_files import MEMORY_GB, fits
from clframe.data.sources.labels import (
    UNCHANGED,
    Normalization,
    checked_labels,
    measured,
    relabel,
    split_off_test,
    warn_of_duplicates,
)
from clframe.data.sources.paths import given_path
from clframe.errors import ConfigError, DataError

Array = npt.NDArray[Any]
Layout = Literal["auto", "chw", "hwc"]

_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_x", "train_y", "test_x", "test_y"),
    ("x", "y"),
)


@SOURCES.register("npz")
def npz(
    *,
    path: str = "",
    test_fraction: float = 0.2,
    layout: Layout = "auto",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    memory_gb: float = MEMORY_GB,
) -> Source:
    """Your own arrays in an ``.npz`` file: ``x_train, y_train, x_test, y_test``, or ``x, y`` to be split.

    Inputs are images [N, H, W], [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, or vectors [N, D]. Whole
    numbers are normalized by the training part's own mean and deviation; floating-point inputs are taken as
    they are. Labels are whole numbers from 0 or names; an array ``classes`` may name classes 0..C-1.

    Args:
        path: The file.
        test_fraction: Share of each class to test on, where the file has no test arrays.
        layout: Where the channels are, should the shape leave it open.
        mean: In units of the inputs, one value for all or one for each channel; goes with ``std``.
        std: Likewise.
        memory_gb: Limit in GB for the inputs, which arrays must keep: they are read as a whole.

    Raises:
        ConfigError: No path, or an option that cannot be.
        DataError: A file, array or label that cannot be used; the message names it.
    """
    if len(mean) != len(std) or any(s <= 0 for s in std):
        raise ConfigError("benchmark.std: give as many values as benchmark.mean has, each above 0")
    file = given_path(path, option="path", kind="file")
    given = (mean, std) if mean else None
    return array_source(
        file.stem, file, test_fraction=test_fraction, layout=layout, normalization=given, memory_gb=memory_gb
    )


def array_source(
    name: str,
    file: Path,
    *,
    test_fraction: float = 0.2,
    layout: Layout = "auto",
    normalization: Normalization | None = None,
    memory_gb: float = MEMORY_GB,
    duplicates: bool = True,
) -> Source:
    """The source that the arrays of ``file`` make, as :func:`npz`; with ``duplicates`` looked for."""
    arrays = _read(file, memory_gb=memory_gb)
    keys = [key for key in arrays if key != "classes"]
    inputs = {key: _inputs(arrays[key], layout=layout, where=f"{file}: {key}") for key in keys[::2]}
    labels = [checked_labels(arrays[key], where=f"{file}: {key}") for key in keys[1::2]]
    for (key, x), (label_key, y) in zip(inputs.items(), zip(keys[1::2], labels, strict=True), strict=True):
        if len(x) != len(y):
            raise DataError(f"{file}: {key} holds {len(x)} inputs, {label_key} {len(y)} labels; give one for each")
    train_y, test_y, class_names = relabel(labels[0], labels[-1], where=str(file))
    parts = list(inputs.values())
    if parts[0].shape[1:] != parts[-1].shape[1:]:
        shapes = " and ".join(str(tuple(part.shape[1:])) for part in parts)
        raise DataError(f"{file}: {keys[0]} and {keys[2]} hold inputs of shapes {shapes}; make them one")
    if len(parts) == 1:
        train, test = split_off_test(
            train_y, fraction=test_fraction, name="npz", where=str(file), class_names=class_names
        )
        parts, train_y, test_y = [parts[0][train], parts[0][test]], train_y[train], train_y[test]
    if duplicates:
        warn_of_duplicates(parts[0], parts[1], where=str(file))
    measure = arrays[keys[0]].dtype.kind != "f"
    mean, std = normalization or (measured(parts[0]) if measure else UNCHANGED)
    if len(mean) > 1 and (parts[0].ndim < 3 or len(mean) != parts[0].shape[1]):
        raise ConfigError(
            f"benchmark.mean: found {len(mean)} values for inputs of shape {tuple(parts[0].shape[1:])}; "
            f"give one, or one for each channel"
        )
    return Source(
        name,
        TensorSamples(parts[0], train_y, mean, std),
        TensorSamples(parts[1], test_y, mean, std),
        classes=len(class_names),
        class_names=_names(arrays.get("classes"), class_names, where=f"{file}: classes"),
    )


def _read(file: Path, *, memory_gb: float) -> dict[str, Array]:
    """The arrays that matter, in the order of their keys; sizes are checked before any is read."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            declared = {name.removesuffix(".npy"): _declared(archive, name) for name in members}
        keys: tuple[str, ...] = next((keys for keys in _KEYS if set(keys) <= set(declared)), ())
        if not keys:
            found = ", ".join(sorted(declared)) or "no arrays"
            raise DataError(f"{file}: holds {found}; save x_train, y_train, x_test and y_test, or x and y")
        keys += ("classes",) if "classes" in declared else ()
        for key in keys:
            if declared[key][1].hasobject:
                raise DataError(
                    f"{file}: {key} holds Python objects, which could run code when read; save plain arrays"
                )
        nbytes = sum(_kept(*declared[key]) for key in keys[: len(keys) // 2 * 2 : 2])
        if not fits(file.stem, nbytes=nbytes, memory_gb=memory_gb):
            raise DataError(
                f"{file}: its inputs take {nbytes / 1e9:.3g} GB, above benchmark.memory_gb={memory_gb:g}; "
                f"raise it, or save image files and take image_folder"
            )
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises anything from BadZipFile to UnicodeDecodeError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: cannot be read as .npz ({reason}); write it again with numpy.savez") from None


def _declared(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with archive.open(member) as stream:
        version = np.lib.format.read_magic(stream)
        layout = np.lib.format
        read = layout.read_array_header_1_0 if version == (1, 0) else layout.read_array_header_2_0
        shape, _, dtype = read(stream)
    return shape, dtype


def _kept(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count * (1 if dtype.itemsize == 1 else 4)


def _inputs(x: Array, *, layout: Layout, where: str) -> Tensor:
    """Inputs as they are kept: uint8 where they are bytes, float32 otherwise, channels first."""
    if x.dtype.kind not in "buif":
        raise DataError(f"{where} is of type {x.dtype}; give numbers")
    if x.ndim not in (2, 3, 4) or not x.size:
        raise DataError(f"{where} has shape {x.shape}; give images [N, H, W] or [N, C, H, W], or vectors [N, D]")
    if x.dtype.kind == "f":
        bad = ~np.isfinite(x.reshape(len(x), -1)).all(1)
        if bad.any():
            raise DataError(f"{where} has NaN or infinite values, first in sample {int(bad.argmax())}; clean them")
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and _channels_last(x.shape, layout, where):
        x = x.transpose(0, 3, 1, 2)
    is_bytes = x.dtype == np.uint8 or (x.dtype.kind in "bui" and x.min() >= 0 and x.max() <= 255)
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint8 if is_bytes else np.float32))


def _channels_last(shape: Sequence[int], layout: Layout, where: str) -> bool:
    if layout != "auto":
        return layout == "hwc"
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first == last:
        raise DataError(
            f"{where} has shape {tuple(shape)}, where either side or none may be channels; "
            f"set benchmark.layout to chw or hwc"
        )
    return last


def _names(given: Array | None, found: tuple[str, ...], *, where: str) -> tuple[str, ...]:
    """The names of an array ``classes``, where labels count its rows; the labels themselves otherwise."""
    if given is None or not all(name.isdecimal() for name in found):
        return found
    if given.ndim != 1 or given.dtype.kind != "U" or max(map(int, found)) >= len(given):
        raise DataError(f"{where} has shape {given.shape} and type {given.dtype}; give one name for each label")
    return tuple(str(given[int(name)]) for name in found)
