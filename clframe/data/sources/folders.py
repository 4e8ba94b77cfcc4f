"""Images in class folders, images listed in a CSV file, and ImageNet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clframe.data.source import SOURCES, Source
from clframe.data.sources.image_files import MEMORY_GB, ImageFiles, image_source, joined_parts
from clframe.data.sources.labels import PUBLISHED, relabel, split_off_test
from clframe.data.sources.paths import class_folders, given_path, subfolders, text_of
from clframe.errors import ConfigError, DataError

_TEST_NAMES = ("test", "val", "valid", "validation")


@SOURCES.register("image_folder")
def image_folder(
    *,
    path: str = "",
    test_fraction: float = 0.2,
    size: int | None = None,
    channels: int | None = None,
    memory_gb: float = MEMORY_GB,
) -> Source:
    """Your own images, a folder for each class: ``path/train/CLASS``, ``path/test/CLASS``, or ``path/CLASS``.

    Classes are numbered in the order of their folders' names, as numbers where they all are. Mean and
    deviation are those of the training images (of 8192 at even distances, where there are more).

    Args:
        path: The folder. ``val/`` does for ``test/``.
        test_fraction: Share of each class to test on, where there is no ``test/``; the same for every seed.
        size: Side in pixels to resize to (shorter side, then center crop); null for images of one size.
        channels: 1 or 3 converts all images; null takes them as they are.
        memory_gb: Limit in GB up to which all images are kept in memory.

    Raises:
        ConfigError: No path, or a fraction, size or number of channels that cannot be.
        DataError: A folder or image that cannot be used; the message names it.
    """
    root = given_path(path, option="path", kind="folder")
    names = set(subfolders(root))
    test = next((name for name in _TEST_NAMES if name in names), None)
    if "train" not in names:
        images = class_folders(root)
        labels, _, class_names = _numbered(images, images, where=str(root))
        files = ImageFiles(_flat(images), labels, size=size, channels=channels)
        parts = split_off_test(
            labels, fraction=test_fraction, name="image_folder", where=str(root), class_names=class_names
        )
    elif test is None:
        raise DataError(f"{root}: has train/ but no test/; add it, or give the path {root / 'train'} to split that")
    else:
        files, parts, class_names = _train_and_test(root, test, size=size, channels=channels)
    return image_source(
        root.resolve().name, files, parts, class_names=class_names, memory_gb=memory_gb, check_duplicates=True
    )


@SOURCES.register("imagenet")
def imagenet(*, data_dir: str = "data/imagenet", size: int = 224, memory_gb: float = MEMORY_GB) -> Source:
    """ImageNet (ILSVRC 2012), 1,000 classes, from folders ``train/CLASS`` and ``val/CLASS`` in ``data_dir``.

    Nobody may hand it out: get it from image-net.org, and sort the validation images into folders. Mean and
    deviation are torchvision's. Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge"
    (2015).

    Args:
        data_dir: The folder.
        size: Side in pixels to resize to: shorter side, then center crop.
        memory_gb: Limit in GB up to which all images are kept in memory.
    """
    return _imagenet("imagenet", Path(data_dir).expanduser(), None, size=size, memory_gb=memory_gb)


@SOURCES.register("imagenet_subset")
def imagenet_subset(
    *,
    data_dir: str = "data/imagenet",
    classes: int = 100,
    class_seed: int = 1993,
    class_names: tuple[str, ...] = (),
    size: int = 224,
    memory_gb: float = MEMORY_GB,
) -> Source:
    """Some classes of ImageNet: by default the 100 that Hou et al. (2019) drew with numpy's seed 1993.

    They are ``numpy.random.RandomState(1993).choice(names, 100, replace=False)`` of the sorted folder
    names. A folder that holds just so many classes is taken whole. Hou et al., "Learning a Unified
    Classifier Incrementally via Rebalancing" (CVPR 2019).

    Args:
        data_dir: As for ``imagenet``.
        classes: How many.
        class_seed: Of the draw.
        class_names: Folder names of the classes; takes the place of the draw.
        size: Side in pixels to resize to: shorter side, then center crop.
        memory_gb: Limit in GB up to which all images are kept in memory.

    Raises:
        ConfigError: More classes than there are, or a name that no folder has.
    """
    root = Path(data_dir).expanduser()
    known = subfolders(_imagenet_part(root, "train"))
    strange = set(class_names) - set(known)
    if strange:
        raise ConfigError(f"benchmark.class_names: no folder {root / 'train' / min(strange)}; name folders of it")
    if not class_names:
        if not 1 <= classes <= len(known):
            raise ConfigError(
                f"benchmark.classes: found {classes}, but {root / 'train'} has {len(known)}; give 1 to {len(known)}"
            )
        draw = np.random.RandomState(class_seed).choice(len(known), classes, replace=False)
        class_names = tuple(known[i] for i in draw)
    return _imagenet("imagenet_subset", root, set(class_names), size=size, memory_gb=memory_gb)


def _imagenet(name: str, root: Path, keep: set[str] | None, *, size: int, memory_gb: float) -> Source:
    for part in ("train", "val"):
        _imagenet_part(root, part)
    files, parts, class_names = _train_and_test(root, "val", size=size, channels=3, keep=keep)
    return image_source(
        name, files, parts, class_names=class_names, memory_gb=memory_gb, normalization=PUBLISHED["imagenet"]
    )


def _imagenet_part(root: Path, part: str) -> Path:
    if not (root / part).is_dir():
        raise DataError(
            f"{root}: holds no ImageNet ({part}/ is missing); get it from image-net.org and put the images "
            f"of each class into {root / part / 'CLASS'}, or set benchmark.data_dir"
        )
    return root / part


def _train_and_test(
    root: Path, test: str, *, size: int | None, channels: int | None, keep: set[str] | None = None
) -> tuple[ImageFiles, tuple[torch.Tensor, torch.Tensor], tuple[str, ...]]:
    train_images, test_images = class_folders(root / "train"), class_folders(root / test)
    if keep is not None:
        train_images, test_images = (
            {name: paths for name, paths in images.items() if name in keep} for images in (train_images, test_images)
        )
    train_y, test_y, class_names = _numbered(train_images, test_images, where=str(root))
    paths = _flat(train_images) + _flat(test_images)
    files = ImageFiles(paths, torch.cat([train_y, test_y]), size=size, channels=channels)
    return files, joined_parts(len(train_y), len(test_y)), class_names


def _numbered(
    train: Mapping[str, Sequence[str]], test: Mapping[str, Sequence[str]], *, where: str
) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
    labels = (np.repeat(list(images), [len(paths) for paths in images.values()]) for images in (train, test))
    return relabel(*labels, where=where)


def _flat(images: Mapping[str, Sequence[str]]) -> list[str]:
    return [path for paths in images.values() for path in paths]


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
