"""Images that a CSV file lists with their labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clframe.data.source import SOURCES, Source
from clframe.data.sources.image_files import ImageFiles
from clframe.data.sources.in_memory import MEMORY_GB, image_source
from clframe.data.sources.labels import relabel, split_off_test
from clframe.data.sources.paths import given_path, text_of
from clframe.errors import DataError


@SOURCES.register("csv")
def csv_table(
    *,
    path: str = "",
    test_fraction: float = 0.2,
    size: int | None = None,
    channels: int | None = None,
    memory_gb: float = MEMORY_GB,
) -> Source:
    """Your own images, listed in a CSV file with columns ``path``, ``label`` and, if you like, ``split``.

    Paths count from the file's folder. Labels are names or whole numbers. ``split`` is ``train`` or ``test``.
    Mean and deviation are measured as for ``image_folder``.

    Args:
        path: The CSV file.
        test_fraction: Share of each class to test on, where there is no column ``split``.
        size: Side in pixels to resize to (shorter side, then center crop); null for images of one size.
        channels: 1 or 3 converts all images; null takes them as they are.
        memory_gb: Limit in GB up to which all images are kept in memory.

    Raises:
        ConfigError: No path, or a fraction, size or number of channels that cannot be.
        DataError: A row or image that cannot be used; the message names it.
    """
    file = given_path(path, option="path", kind="file")
    rows = _rows(file)
    names = np.array([row.label for row in rows])
    if rows[0].split:
        is_test = np.array([row.split == "test" for row in rows])
        train_y, test_y, class_names = relabel(names[~is_test], names[is_test], where=str(file))
        labels = torch.empty(len(rows), dtype=torch.long)
        parts = (torch.from_numpy((~is_test).nonzero()[0]), torch.from_numpy(is_test.nonzero()[0]))
        labels[parts[0]], labels[parts[1]] = train_y, test_y
    else:
        labels, _, class_names = relabel(names, names, where=str(file))
        parts = split_off_test(labels, fraction=test_fraction, name="csv", where=str(file), class_names=class_names)
    files = ImageFiles([row.path for row in rows], labels, size=size, channels=channels)
    return image_source(file.stem, files, parts, class_names=class_names, memory_gb=memory_gb, check_duplicates=True)


class _Row(NamedTuple):
    path: str
    label: str
    split: str


def _rows(file: Path) -> list[_Row]:
    try:
        reader = csv.DictReader(io.StringIO(text_of(file), newline=""), strict=True, skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        if not {"path", "label"} <= set(header):
            raise DataError(
                f"{file}: its first line is {','.join(header)[:80]!r}; "
                f"begin with a header: path,label or path,label,split"
            )
        reader.fieldnames = header
        rows = [_row(file, reader.line_num, values, "split" in header) for values in reader]
    except csv.Error as error:
        raise DataError(f"{file}: no proper CSV ({error}); save it again as comma-separated values") from None
    if not rows:
        raise DataError(f"{file}: lists no images; add rows below the header")
    return rows


def _row(file: Path, line: int, values: dict[str, str | None], has_split: bool) -> _Row:
    path, label, split = ((values.get(key) or "").strip() for key in ("path", "label", "split"))
    if not path or not label:
        raise DataError(f"{file}: line {line} has no {'label' if path else 'path'}; fill it in or remove the line")
    if has_split and split not in ("train", "test"):
        raise DataError(f"{file}: line {line} has the split {split!r}; give train or test")
    image = file.parent / path
    if not image.is_file():
        raise DataError(f"{file}: line {line} names {image}, which is no file; paths count from the CSV's folder")
    return _Row(str(image), label, split)
