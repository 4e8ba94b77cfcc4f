"""Images in class folders, images listed in a CSV file, and ImageNet."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clframe.data.source import SOURCES, Source
from clframe.data.sources.image_files import (
    IMAGE_ENDINGS,
    MEMORY_GB,
    ImageFiles,
    consecutive_indices,
    image_source,
)
from clframe.data.sources.labels import PUBLISHED, relabel, split_off_test
from clframe.data.sources.paths import class_folders, read_text, require_path, shorten_path, subfolders
from clframe.errors import ConfigError, DataError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing")
VALIDATION_NAMES = ("val", "valid", "validation")


@SOURCES.register("image_folder")
def image_folder(
    *,
    path: str = "",
    test_fraction: float = 0.2,
    size: int | None = None,
    channels: int | None = None,
    memory_gb: float = MEMORY_GB,
    cache: Path | None = None,
) -> Source:
    """User images in one folder per class: ``path/train/CLASS`` and ``path/test/CLASS``, or ``path/CLASS``.

    Classes are numbered in the order of their folder names, numerically if all are numbers. Mean and standard
    deviation are those of the training images (of 8192 at equal distances, if there are more).

    Args:
        path: The folder. ``training/``, ``testing/`` and, without test images, ``val/`` or ``validation/`` work too, in
            upper or lower case.
        test_fraction: Fraction of each class to test on without ``test/``; the same images for every seed.
        size: Side in pixels to resize to (shorter side, then center crop); null: all images have one size.
        channels: 1 or 3 converts all images; null leaves them unchanged.
        memory_gb: Limit in GB up to which all images are stored in memory.
        cache: Folder for the decoded images, so that later starts do not decode them again unless a file has changed
            (another size or modification time); null decodes at every start.

    Raises:
        ConfigError: No path, or an invalid fraction, size or number of channels.
        DataError: A folder or image that cannot be used; the message names it.
    """
    root = require_path(path, option="path", kind="folder")
    names = subfolders(root)
    train = split_folder(root, names, TRAIN_NAMES)
    test = split_folder(root, names, TEST_NAMES) or split_folder(root, names, VALIDATION_NAMES)
    if train is None:
        refuse_ambiguous(root, names)
        images = class_folders(root)
        labels, _, class_names = _number_classes(images, images, where=str(root))
        files = ImageFiles(_flatten(images), labels, size=size, channels=channels)
        parts = split_off_test(
            labels, fraction=test_fraction, name="image_folder", where=str(root), class_names=class_names
        )
    elif test is None:
        raise DataError(
            f"{root}: has {train}/ but no test/; add it, give the path {root / train} to split that, or rename it if "
            f"it is a class"
        )
    else:
        files, parts, class_names = _train_and_test(root / train, root / test, size=size, channels=channels)
    return image_source(
        root.resolve().name, files, parts, class_names=class_names, memory_gb=memory_gb, check_duplicates=True,
        cache=cache,
    )  # fmt: skip


def split_folder(root: Path, names: Iterable[str], meaning: Sequence[str]) -> str | None:
    """The folder of a split, whose name is one of ``meaning`` in any case; None if there is none.

    Raises:
        DataError: Two folders of the same meaning, such as ``train`` and ``Training``.
    """
    found = [name for name in names if name.lower() in meaning]
    if len(found) > 1:
        raise DataError(f"{root}: has both {found[0]}/ and {found[1]}/; merge them, or rename one")
    return found[0] if found else None


def refuse_ambiguous(root: Path, names: Sequence[str]) -> None:
    """Raise DataError if every folder holds the same two or more folders, which may be the classes as well.

    One common subfolder, such as ``CLASS/images``, leaves only one way to read the folders.
    """
    contents = [frozenset(subfolders(root / name)) for name in names]
    if len(contents) < 2 or len(contents[0]) < 2 or len(set(contents)) > 1:
        return
    if any(entry.lower().endswith(IMAGE_ENDINGS) for name in names for entry in os.listdir(root / name)):
        return  # images next to the subfolders belong to the folder itself: it is a class
    inner = ", ".join(sorted(contents[0])[:3])
    raise DataError(
        f"{root}: {names[0]}/ and all other folders hold the same folders ({inner}), so either level may be the "
        f"classes; use train/CLASS and test/CLASS, the path of one folder, or a CSV file"
    )


@SOURCES.register("imagenet")
def imagenet(
    *, data_dir: str = "data/imagenet", size: int = 224, memory_gb: float = MEMORY_GB, cache: Path | None = None
) -> Source:
    """ImageNet (ILSVRC 2012), 1,000 classes, from folders ``train/CLASS`` and ``val/CLASS`` in ``data_dir``.

    Its license forbids redistribution: get it from image-net.org, and sort the validation images into folders. Mean
    and standard deviation are torchvision's. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge"
    (2015).

    Args:
        data_dir: The folder.
        size: Side in pixels to resize to: shorter side, then center crop.
        memory_gb: Limit in GB up to which all images are stored in memory.
        cache: Folder for the decoded images, so that later starts do not decode them again unless a file has changed
            (another size or modification time); null decodes at every start.
    """
    return _imagenet("imagenet", Path(data_dir).expanduser(), None, size=size, memory_gb=memory_gb, cache=cache)


@SOURCES.register("imagenet_subset")
def imagenet_subset(
    *,
    data_dir: str = "data/imagenet",
    n_classes: int = 100,
    class_seed: int = 1993,
    class_names: tuple[str, ...] = (),
    size: int = 224,
    memory_gb: float = MEMORY_GB,
    cache: Path | None = None,
) -> Source:
    """Subset of the classes of ImageNet: by default the 100 that Hou et al. (2019) drew with numpy's seed 1993.

    They are ``numpy.random.RandomState(1993).choice(names, 100, replace=False)`` of the sorted folder names. A folder
    with exactly that many classes is used as a whole. Hou et al., "Learning a Unified Classifier Incrementally via
    Rebalancing" (CVPR 2019).

    Args:
        data_dir: As for ``imagenet``.
        n_classes: Number of classes.
        class_seed: Seed of the draw.
        class_names: Folder names of the classes; overrides the draw.
        size: Side in pixels to resize to: shorter side, then center crop.
        memory_gb: Limit in GB up to which all images are stored in memory.
        cache: Folder for the decoded images, so that later starts do not decode them again unless a file has changed
            (another size or modification time); null decodes at every start.

    Raises:
        ConfigError: More classes than there are, or a name without a folder.
    """
    root = Path(data_dir).expanduser()
    known = subfolders(_imagenet_split(root, "train"))
    unknown = set(class_names) - set(known)
    if unknown:
        raise ConfigError(f"benchmark.class_names: no folder {root / 'train' / min(unknown)}; use names of its folders")
    if not class_names:
        if not 1 <= n_classes <= len(known):
            raise ConfigError(
                f"benchmark.n_classes: found {n_classes} for {len(known)} folders in {root / 'train'}; "
                f"give 1 to {len(known)}"
            )
        draw = np.random.RandomState(class_seed).choice(len(known), n_classes, replace=False)
        class_names = tuple(known[i] for i in draw)
    return _imagenet("imagenet_subset", root, set(class_names), size=size, memory_gb=memory_gb, cache=cache)


def _imagenet(
    name: str, root: Path, keep: set[str] | None, *, size: int, memory_gb: float, cache: Path | None
) -> Source:
    train, test = (_imagenet_split(root, name) for name in ("train", "val"))
    files, parts, class_names = _train_and_test(train, test, size=size, channels=3, keep=keep)
    return image_source(
        name, files, parts, class_names=class_names, memory_gb=memory_gb, normalization=PUBLISHED["imagenet"],
        cache=cache,
    )  # fmt: skip


def _imagenet_split(root: Path, split: str) -> Path:
    if not os.path.isdir(root / split):
        raise DataError(
            f"{root}: holds no ImageNet ({split}/ is missing); get it from image-net.org and put the images "
            f"of each class into {root / split / 'CLASS'}, or set benchmark.data_dir"
        )
    return root / split


def _train_and_test(
    train: Path, test: Path, *, size: int | None, channels: int | None, keep: set[str] | None = None
) -> tuple[ImageFiles, tuple[torch.Tensor, torch.Tensor], tuple[str, ...]]:
    train_images, test_images = class_folders(train), class_folders(test)
    if keep is not None:
        train_images, test_images = (
            {name: paths for name, paths in images.items() if name in keep} for images in (train_images, test_images)
        )
    train_y, test_y, class_names = _number_classes(train_images, test_images, where=str(train.parent))
    paths = _flatten(train_images) + _flatten(test_images)
    files = ImageFiles(paths, torch.cat([train_y, test_y]), size=size, channels=channels)
    return files, consecutive_indices(len(train_y), len(test_y)), class_names


def _number_classes(
    train: Mapping[str, Sequence[str]], test: Mapping[str, Sequence[str]], *, where: str
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    labels = (np.repeat(list(images), [len(paths) for paths in images.values()]) for images in (train, test))
    return relabel(*labels, where=where)


def _flatten(images: Mapping[str, Sequence[str]]) -> list[str]:
    return [path for paths in images.values() for path in paths]


@SOURCES.register("csv")
def csv_table(
    *,
    path: str = "",
    test_fraction: float = 0.2,
    size: int | None = None,
    channels: int | None = None,
    memory_gb: float = MEMORY_GB,
    cache: Path | None = None,
) -> Source:
    """User images listed in a CSV file with columns ``path``, ``label`` and, optionally, ``split``.

    Paths are relative to the folder of the file. Labels are names or integers. ``split`` is ``train`` or ``test``.
    Mean and standard deviation are measured as for ``image_folder``.

    Args:
        path: The CSV file.
        test_fraction: Fraction of each class to test on without a column ``split``.
        size: Side in pixels to resize to (shorter side, then center crop); null: all images have one size.
        channels: 1 or 3 converts all images; null leaves them unchanged.
        memory_gb: Limit in GB up to which all images are stored in memory.
        cache: Folder for the decoded images, so that later starts do not decode them again unless a file has changed
            (another size or modification time); null decodes at every start.

    Raises:
        ConfigError: No path, or an invalid fraction, size or number of channels.
        DataError: A row or image that cannot be used; the message names it.
    """
    file = require_path(path, option="path", kind="file")
    rows = read_rows(file)
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
    return image_source(
        file.stem, files, parts, class_names=class_names, memory_gb=memory_gb, check_duplicates=True, cache=cache
    )


class _Row(NamedTuple):
    path: str
    label: str
    split: str


def read_rows(file: Path) -> list[_Row]:
    """Rows of a CSV file of images.

    Raises:
        DataError: A file or row that cannot be used; the message names it.
    """
    try:
        reader = csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True, skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        if not {"path", "label"} <= set(header):
            raise DataError(
                f"{file}: its first line is {','.join(header)[:80]!r}; "
                f"start with the header path,label or path,label,split"
            )
        twice = next((name for name in ("path", "label", "split") if header.count(name) > 1), None)
        if twice:
            raise DataError(f"{file}: its header has the column {twice} more than once; remove or rename one")
        reader.fieldnames = header
        rows = [_row(file, reader.line_num, values, "split" in header) for values in reader]
    except csv.Error as error:
        raise DataError(f"{file}: is not valid CSV ({error}); save it again as comma-separated values") from None
    if not rows:
        raise DataError(f"{file}: lists no images; add rows below the header")
    return rows


def _row(file: Path, line: int, values: dict[str, str | None], has_split: bool) -> _Row:
    path, label, split = ((values.get(key) or "").strip() for key in ("path", "label", "split"))
    if not path or not label:
        raise DataError(f"{file}: line {line} has no {'label' if path else 'path'}; fill it in or remove the line")
    if has_split and split not in ("train", "test"):
        raise DataError(f"{file}: line {line} has the split {split!r}; use train or test")
    image = file.parent / path
    if not os.path.isfile(image):  # unlike Path.is_file, False for names longer than the file system allows
        raise DataError(
            f"{file}: line {line} names {shorten_path(image)}, which is not a file; give paths relative to the folder "
            f"of the CSV file"
        )
    return _Row(str(image), label, split)
