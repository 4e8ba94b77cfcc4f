"""Arrays in an ``.npz`` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clframe.data.inputs import InputFormat
from clframe.data.npz import declared_arrays, read_arrays
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.image_files import MEMORY_GB, fits_in_memory
from clframe.data.sources.labels import (
    IDENTITY,
    Normalization,
    check_labels,
    measure_normalization,
    relabel,
    split_off_test,
    warn_of_duplicates,
)
from clframe.data.sources.paths import require_path
from clframe.errors import ConfigError, DataError, reason_of

Array = npt.NDArray[Any]
Layout = Literal["auto", "chw", "hwc"]
Kind = Literal["values", "tokens"]

_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_x", "train_y", "test_x", "test_y"),
    ("train_images", "train_labels", "test_images", "test_labels"),  # MedMNIST, which also has val_images
    ("x", "y"),
)


@SOURCES.register("npz")
def npz(
    *,
    path: str = "",
    kind: Kind = "values",
    test_fraction: float = 0.2,
    layout: Layout = "auto",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    memory_gb: float = MEMORY_GB,
) -> Source:
    """User arrays in an ``.npz`` file: ``x_train, y_train, x_test, y_test``, or ``x, y`` to be split.

    Inputs are images [N, H, W], [N, C, H, W] or [N, H, W, C] with 1 or 3 channels, vectors [N, D], or token ids
    [N, T]. Integers are normalized by mean and standard deviation of the training inputs, unless they are token ids;
    floating-point inputs are unchanged. Labels are integers from 0 or names; an array ``classes`` may name classes
    0..C-1. The array names of MedMNIST (``train_images``, ``train_labels``, ``test_images``, ``test_labels``) work
    too; its validation arrays are not used.

    Args:
        path: The file.
        kind: ``values``: images or vectors; ``tokens``: integer token ids from 0 for the backbones bert and hf_text,
            padded with 0.
        test_fraction: Fraction of each class to test on if the file has no test arrays.
        layout: Position of the channels, for shapes that leave it open.
        mean: In units of the inputs, one value for all channels or one per channel; requires ``std``.
        std: As ``mean``.
        memory_gb: Limit in GB for the inputs, which are read as a whole.

    Raises:
        ConfigError: No path, or an invalid option.
        DataError: A file, array or label that cannot be used; the message names it.
    """
    if len(mean) != len(std) or any(s <= 0 for s in std):
        raise ConfigError("benchmark.std: expected one value above 0 for each value of benchmark.mean; set both")
    if kind == "tokens" and mean:
        raise ConfigError("benchmark.mean: found values for token ids, which are not normalized; leave it out")
    file = require_path(path, option="path", kind="file")
    normalization = ((), ()) if kind == "tokens" else (mean, std) if mean else None
    return array_source(
        file.stem, file, test_fraction=test_fraction, layout=layout, normalization=normalization, memory_gb=memory_gb
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
    """Make the source of :func:`npz`.

    Args:
        name: Name of the source.
        file: The file.
        test_fraction: See :func:`npz`, as for ``layout`` and ``memory_gb``.
        layout: Position of the channels.
        normalization: Mean and standard deviation, both empty for token ids; None: measured if inputs are integers.
        memory_gb: Limit for the inputs.
        duplicates: Whether to look for test samples among the training samples.
    """
    arrays = _read(file, memory_gb=memory_gb)
    keys = [key for key in arrays if key != "classes"]
    tokens = normalization == ((), ())
    inputs = {
        key: _token_ids(arrays[key], where=f"{file}: {key}")
        if tokens
        else _inputs(arrays[key], layout=layout, where=f"{file}: {key}")
        for key in keys[::2]
    }
    labels = [check_labels(arrays[key], where=f"{file}: {key}") for key in keys[1::2]]
    for (key, x), (label_key, y) in zip(inputs.items(), zip(keys[1::2], labels, strict=True), strict=True):
        if len(x) != len(y):
            raise DataError(f"{file}: {key} has {len(x)} inputs, {label_key} {len(y)} labels; give one label per input")
    train_y, test_y, class_names = relabel(labels[0], labels[-1], where=str(file))
    parts = list(inputs.values())
    if len({arrays[key].dtype.kind == "f" for key in inputs}) > 1:
        types = " and ".join(f"{key} has type {arrays[key].dtype}" for key in inputs)
        raise DataError(f"{file}: {types}; give both as whole numbers or both as fractions, in the same scale")
    if len({part.dtype for part in parts}) > 1:  # whole numbers, of which only those of one fit into bytes
        parts = [part.float() for part in parts]
    if parts[0].shape[1:] != parts[-1].shape[1:]:
        shapes = " and ".join(str(tuple(part.shape[1:])) for part in parts)
        raise DataError(f"{file}: {keys[0]} and {keys[2]} have inputs of shapes {shapes}; give all the same shape")
    if len(parts) == 1:
        train, test = split_off_test(
            train_y, fraction=test_fraction, name="npz", where=str(file), class_names=class_names
        )
        parts, train_y, test_y = [parts[0][train], parts[0][test]], train_y[train], train_y[test]
    if duplicates:
        warn_of_duplicates(parts[0], parts[1], where=str(file))
    measure = arrays[keys[0]].dtype.kind != "f"
    mean, std = normalization or (measure_normalization(parts[0]) if measure else IDENTITY)
    if len(mean) > 1 and (parts[0].ndim < 3 or len(mean) != parts[0].shape[1]):
        raise ConfigError(
            f"benchmark.mean: found {len(mean)} values for inputs of shape {tuple(parts[0].shape[1:])}; "
            f"give one, or one per channel"
        )
    return Source(
        name,
        TensorSamples(parts[0], train_y, mean, std),
        TensorSamples(parts[1], test_y, mean, std),
        classes=len(class_names),
        class_names=_name_classes(arrays.get("classes"), class_names, where=f"{file}: classes"),
        inputs=InputFormat(kind="image" if _are_images(parts[0]) else "array"),
    )


def read_labeled_arrays(
    file: Path, *, layout: Layout = "auto", kind: Kind = "values"
) -> tuple[Tensor, list[str]]:
    """Read the test arrays of an ``.npz`` file, or its only ones, to evaluate a model on.

    Args:
        file: The file.
        layout: Position of the channels.
        kind: ``values`` or ``tokens``.

    Returns:
        Stored inputs, and the name of the class of each: its label where classes have no names.

    Raises:
        DataError: As for :func:`npz`.
    """
    arrays = _read(file, memory_gb=float("inf"))
    keys = [key for key in arrays if key != "classes"]
    x_key, y_key = keys[-2:]
    where = f"{file}: {x_key}"
    tokens = kind == "tokens"
    x = _token_ids(arrays[x_key], where=where) if tokens else _inputs(arrays[x_key], layout=layout, where=where)
    y = check_labels(arrays[y_key], where=f"{file}: {y_key}")
    if len(x) != len(y) or not len(y):
        raise DataError(f"{file}: {x_key} has {len(x)} inputs, {y_key} {len(y)} labels; give one label per input")
    labels = [str(label) for label in y.tolist()]
    found = tuple(dict.fromkeys(labels))
    names = dict(zip(found, _name_classes(arrays.get("classes"), found, where=f"{file}: classes"), strict=True))
    return x, [names[label] for label in labels]


def _are_images(x: Tensor) -> bool:
    """Whether inputs are images of bytes, which image files can supply as well."""
    return x.dtype == torch.uint8 and x.ndim == 4 and x.shape[1] in (1, 3)


def _read(file: Path, *, memory_gb: float) -> dict[str, Array]:
    """Read inputs, labels and class names, in the order of :data:`_KEYS`, after checking types and sizes."""
    try:
        declared = declared_arrays(file)
        keys: tuple[str, ...] = next((keys for keys in _KEYS if set(keys) <= set(declared)), ())
        if not keys:
            found = ", ".join(sorted(declared)) or "no arrays"
            raise DataError(f"{file}: found {found}; save x_train, y_train, x_test and y_test, or x and y")
        keys += ("classes",) if "classes" in declared else ()
        for key in keys:
            if declared[key][1].hasobject:
                raise DataError(
                    f"{file}: {key} has Python objects, which could run code when read; save plain arrays"
                )
        nbytes = sum(_stored_bytes(*declared[key]) for key in keys[: len(keys) // 2 * 2 : 2])
        if not fits_in_memory(file.stem, nbytes=nbytes, memory_gb=memory_gb):
            raise DataError(
                f"{file}: its inputs take {nbytes / 1e9:.3g} GB, above benchmark.memory_gb={memory_gb:g}; "
                f"raise it, or save image files and use image_folder"
            )
        return read_arrays(file, keys)
    except DataError:
        raise
    except Exception as error:  # damaged archives raise anything from BadZipFile to UnicodeDecodeError
        reason = reason_of(error)
        raise DataError(f"{file}: cannot be read as .npz ({reason}); write it again with numpy.savez") from None


def _stored_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count * (1 if dtype.itemsize == 1 else 4)


def _token_ids(x: Array, *, where: str) -> Tensor:
    """Token ids as int32 [N, T]."""
    if x.dtype.kind not in "ui" or x.ndim != 2 or not x.size:
        raise DataError(f"{where} is {x.dtype} of shape {x.shape}; give integer token ids [N, T]")
    if x.min() < 0 or x.max() > np.iinfo(np.int32).max:
        raise DataError(f"{where} has values from {x.min()} to {x.max()}; give token ids from 0, padded with 0")
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.int32))


def _inputs(x: Array, *, layout: Layout, where: str) -> Tensor:
    """Inputs as they are stored: uint8 if all values fit into bytes, float32 otherwise, channels first."""
    if x.dtype.kind not in "buif":
        raise DataError(f"{where} has type {x.dtype}; give numbers")
    if x.ndim not in (2, 3, 4) or not x.size:
        raise DataError(f"{where} has shape {x.shape}; give images [N, H, W] or [N, C, H, W], or vectors [N, D]")
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):  # numbers beyond float32 become infinite
            x = x.astype(np.float32, copy=False)
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
            f"{where} has shape {tuple(shape)}, which does not show where the channels are; "
            f"set benchmark.layout to chw or hwc"
        )
    return last


def _name_classes(given: Array | None, found: tuple[str, ...], *, where: str) -> tuple[str, ...]:
    """Class names: entries of the array ``classes`` if labels are indices into it, otherwise the labels."""
    if given is None or not all(name.isdecimal() for name in found):
        return found
    if given.ndim != 1 or given.dtype.kind != "U" or max(map(int, found)) >= len(given):
        raise DataError(f"{where} has shape {given.shape} and type {given.dtype}; give one name per label")
    return tuple(str(given[int(name)]) for name in found)
