"""Labeled data to evaluate a trained model on: all samples, or the test part of data that are already divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clframe.data.inputs import InputFormat
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Data
from clframe.data.sources.arrays import read_labeled_arrays
from clframe.data.sources.folders import (
    TEST_NAMES,
    TRAIN_NAMES,
    VALIDATION_NAMES,
    read_rows,
    refuse_ambiguous,
    split_folder,
)
from clframe.data.sources.paths import class_folders, require_path, subfolders
from clframe.errors import ConfigError, DataError
from clframe.options import check_options


@dataclass(frozen=True, kw_only=True)
class LabeledData:
    """Samples with the names of their classes.

    Attributes:
        title: Where they are from.
        y_N: Index into ``class_names``.
        class_names: Names of the classes that occur; empty where the data set has none and ``y_N`` are its ids.
        paths: Image files; empty for stored inputs.
        samples: Stored inputs; None for image files.
        inputs: Format of stored inputs.
        is_array: Whether the samples are arrays of the user, in the units in which the model's data set stores inputs.
    """

    title: str
    y_N: Tensor
    class_names: tuple[str, ...]
    paths: tuple[str, ...] = ()
    samples: Data | None = None
    inputs: InputFormat = field(default_factory=InputFormat)
    is_array: bool = False


_FILE_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "image_folder": ("path",), "csv": ("path",), "npz": ("path", "layout", "kind"),
}  # fmt: skip
"""Options of user data that have an effect: sizes, channels and normalization are those of the model."""


def labeled_data(name: str, options: Mapping[str, Any]) -> LabeledData:
    """Find the samples of a data set to evaluate on.

    Of ``image_folder``, ``csv`` and ``npz`` these are the test part where the data has one, otherwise all samples: the
    option ``test_fraction`` divides data for training and has no effect here. Of other data sets it is the test part.

    Args:
        name: Name of the data set in :data:`~clframe.data.source.SOURCES`.
        options: Its options.

    Raises:
        ConfigError: An unknown option, or one without effect.
        DataError: Data that is missing or cannot be used.
    """
    make = SOURCES.get(name, where="benchmark.name")
    checked = check_options(make, options, where="benchmark")
    effective = _FILE_OPTIONS.get(name)
    if effective is None:
        source = make(**checked)
        return LabeledData(
            title=f"{source.name}, test part", y_N=source.test.y, class_names=source.class_names, samples=source.test,
            inputs=source.inputs,
        )  # fmt: skip
    ignored = next((option for option in checked if option not in effective), None)
    if ignored is not None:
        raise ConfigError(f"benchmark.{ignored}: has no effect, inputs are read as in training; leave it out")
    path = checked.get("path", "")
    if name == "image_folder":
        return _labeled_folders(path)
    if name == "csv":
        return _labeled_rows(path)
    file = require_path(path, option="path", kind="file")
    how = {option: checked[option] for option in ("layout", "kind") if option in checked}
    x, labels = read_labeled_arrays(file, **how)
    y_N, names = _number(labels)
    return LabeledData(title=str(file), y_N=y_N, class_names=names, samples=TensorSamples(x, y_N), is_array=True)


def _labeled_folders(path: str) -> LabeledData:
    root = require_path(path, option="path", kind="folder")
    names = subfolders(root)
    train = split_folder(root, names, TRAIN_NAMES)
    test = split_folder(root, names, TEST_NAMES) or split_folder(root, names, VALIDATION_NAMES)
    if test is not None and (train is not None or len(names) == 1):
        root = root / test
    elif train is not None:
        raise DataError(f"{root}: has {train}/ but no test/; add it, or give the path of one folder to evaluate on")
    else:
        refuse_ambiguous(root, names)
    images = class_folders(root)
    y_N, class_names = _number([name for name, paths in images.items() for _ in paths])
    paths = tuple(path for found in images.values() for path in found)
    return LabeledData(title=str(root), y_N=y_N, class_names=class_names, paths=paths)


def _labeled_rows(path: str) -> LabeledData:
    file = require_path(path, option="path", kind="file")
    rows = read_rows(file)
    divided = bool(rows[0].split)
    rows = [row for row in rows if row.split in ("", "test")]
    if not rows:
        raise DataError(f"{file}: has no rows with the split test; add some, or remove the column split")
    y_N, class_names = _number([row.label for row in rows])
    title = f"{file}, rows of the split test" if divided else str(file)
    return LabeledData(title=title, y_N=y_N, class_names=class_names, paths=tuple(row.path for row in rows))


def _number(labels: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Indices of labels into their distinct values, in order of appearance."""
    names = tuple(dict.fromkeys(labels))
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[label] for label in labels], dtype=torch.long), names
