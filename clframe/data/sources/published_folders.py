"""Published sets of image files that torchvision has no class for: Tiny ImageNet, CUB-200 and CORe50."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from clframe.data.source import SOURCES, Source
from clframe.data.sources.image_files import MEMORY_GB, ImageFiles, consecutive_indices, image_source
from clframe.data.sources.labels import PUBLISHED
from clframe.data.sources.paths import PublishedFile, ensure_files, images_below, read_text, subfolders
from clframe.errors import DataError

TINY_IMAGENET = PublishedFile(
    "tiny-imagenet-200.zip",
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
CUB_200_2011 = PublishedFile(
    "CUB_200_2011.tgz",
    "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
    "97eceeb196236b17998738112f37df78",
)
CORE50 = {
    128: PublishedFile(
        "core50_128x128.zip",
        "http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip",
        "745f3373fed08d69343f1058ee559e13",
    ),
    32: PublishedFile(
        "core50_32x32.zip",
        "http://vps.continualai.org/data/core50_32x32.zip",
        "d89d34cdc0281fa84074430e9a22b728",
    ),
}
"""URLs and checksums as in Avalanche."""

_CORE50_TEST_SESSIONS = ("s3", "s7", "s10")
_CORE50_CATEGORIES = (
    "plug_adapter", "mobile_phone", "scissor", "light_bulb", "can", "glass", "ball", "marker", "cup",
    "remote_control",
)  # fmt: skip


@SOURCES.register("tiny_imagenet")
def tiny_imagenet(
    *,
    size: int = 64,
    data_dir: str = "data",
    download: bool = True,
    memory_gb: float = MEMORY_GB,
    cache: Path | None = None,
) -> Source:
    """Tiny ImageNet, 100,000 + 10,000 color images of 64x64, 200 classes in the order of ``wnids.txt``.

    The published validation images are the test data, since the labels of the test images are not published. Mean and
    standard deviation are those of this data set; Avalanche uses those of CIFAR-10. Le and Yang (2015).

    Args:
        size: Side in pixels to resize to.
        data_dir: Folder of ``tiny-imagenet-200``.
        download: Download missing files, 248 MB.
        memory_gb: Limit in GB up to which all images are stored in memory; they take 1.4.
        cache: Folder for the decoded images, as for ``image_folder``; null decodes at every start.
    """
    root = _download("Tiny ImageNet", data_dir, "tiny-imagenet-200", TINY_IMAGENET, download=download)
    names = read_text(root / "wnids.txt").split()
    number = {name: c for c, name in enumerate(names)}
    paths: list[str] = []
    labels: list[int] = []
    for c, name in enumerate(names):
        found = images_below(root / "train" / name)
        if not found:
            raise DataError(f"{root / 'train' / name}: holds no images; delete {root} and run again")
        paths += found
        labels += [c] * len(found)
    count = len(paths)
    annotations = root / "val" / "val_annotations.txt"
    for line_number, line in enumerate(read_text(annotations).splitlines(), 1):
        fields = line.split("\t")
        if len(fields) < 2 or fields[1] not in number:
            raise DataError(f"{annotations}: line {line_number} has no known class; delete {root} and run again")
        paths.append(str(root / "val" / "images" / fields[0]))
        labels.append(number[fields[1]])
    files = ImageFiles(paths, torch.tensor(labels), size=size, channels=3)
    return image_source(
        "tiny_imagenet", files, consecutive_indices(count, len(paths) - count), class_names=tuple(names),
        memory_gb=memory_gb, normalization=PUBLISHED["tiny_imagenet"], cache=cache,
    )  # fmt: skip


@SOURCES.register("cub200")
def cub200(
    *,
    size: int = 224,
    data_dir: str = "data",
    download: bool = True,
    memory_gb: float = MEMORY_GB,
    cache: Path | None = None,
) -> Source:
    """Birds (CUB-200-2011), 5,994 + 5,794 color images of many sizes, 200 classes. Wah et al. (2011).

    Mean and standard deviation are measured on the resized training images.

    Args:
        size: Side in pixels to resize to: shorter side, then center crop.
        data_dir: Folder of ``CUB_200_2011``.
        download: Download missing files, 1.1 GB.
        memory_gb: Limit in GB up to which all images are stored in memory; at 224 pixels they take 1.8.
        cache: Folder for the decoded images, as for ``image_folder``; null decodes at every start.
    """
    root = _download("CUB-200-2011", data_dir, "CUB_200_2011", CUB_200_2011, download=download)
    image, label, is_train = (
        _table(root / name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
    )
    names = _table(root / "classes.txt")
    for file, table in (("image_class_labels.txt", label), ("train_test_split.txt", is_train)):
        if table.keys() != image.keys():
            raise DataError(
                f"{root / file}: {len(table)} lines do not match those of images.txt; delete {root} and run again"
            )
    numbers = {number: c for c, number in enumerate(names)}
    if not set(label.values()) <= set(numbers):
        unknown = min(set(label.values()) - set(numbers))
        raise DataError(
            f"{root / 'image_class_labels.txt'}: class {unknown} is not in classes.txt; delete {root} and run again"
        )
    files = ImageFiles(
        [str(root / "images" / path) for path in image.values()],
        torch.tensor([numbers[label[key]] for key in image]),
        size=size, channels=3,
    )  # fmt: skip
    train = torch.tensor([is_train[key] == "1" for key in image])
    return image_source(
        "cub200", files, (train.nonzero().flatten(), (~train).nonzero().flatten()),
        class_names=tuple(name.split(".", 1)[-1] for name in names.values()), memory_gb=memory_gb, cache=cache,
    )  # fmt: skip


@SOURCES.register("core50")
def core50(
    *,
    labels: Literal["object", "category"] = "object",
    size: int = 128,
    data_dir: str = "data",
    download: bool = True,
    memory_gb: float = MEMORY_GB,
    cache: Path | None = None,
) -> Source:
    """Hand-held objects (CORe50) in 11 video sessions, 164,866 color images of 128x128, 50 objects in 10 categories.

    Sessions 3, 7 and 10 are the test data, as published. Mean and standard deviation are measured on 8192 training
    images at equal distances. Lomonaco and Maltoni, "CORe50" (CoRL 2017).

    Args:
        labels: 50 objects or 10 categories as classes.
        size: Side in pixels; up to 32, the published small images are used.
        data_dir: Folder of ``core50_128x128`` or ``core50_32x32``.
        download: Download missing files.
        memory_gb: Limit in GB up to which all images are stored in memory; at 128 pixels they take 8.1, at 32 0.5.
        cache: Folder for the decoded images, as for ``image_folder``; null decodes at every start.
    """
    side = 32 if size <= 32 else 128
    root = _download("CORe50", data_dir, f"core50_{side}x{side}", CORE50[side], download=download)
    paths: tuple[list[str], list[str]] = ([], [])
    targets: tuple[list[int], list[int]] = ([], [])
    for session in subfolders(root):
        split = int(session in _CORE50_TEST_SESSIONS)
        for folder in subfolders(root / session):
            if not (folder[0] == "o" and folder[1:].isdecimal() and 1 <= int(folder[1:]) <= 50):
                raise DataError(f"{root / session / folder}: is not one of o1 to o50; remove it")
            found = images_below(root / session / folder)
            paths[split].extend(found)
            target = int(folder[1:]) - 1
            targets[split].extend([target if labels == "object" else target // 5] * len(found))
    for split, title in enumerate(("training", "test")):
        if not paths[split]:
            raise DataError(f"{root}: holds no {title} images; delete it and run again")
    files = ImageFiles(paths[0] + paths[1], torch.tensor(targets[0] + targets[1]), size=size, channels=3)
    objects = tuple(f"{_CORE50_CATEGORIES[o // 5]}_{o % 5 + 1}" for o in range(50))
    return image_source(
        "core50", files, consecutive_indices(len(paths[0]), len(paths[1])),
        class_names=objects if labels == "object" else _CORE50_CATEGORIES, memory_gb=memory_gb,
        cache=cache,
    )  # fmt: skip


def _download(title: str, data_dir: str, folder: str, published: PublishedFile, *, download: bool) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    root = Path(data_dir).expanduser()
    ensure_files(
        title, root, wanted=[folder], published=[published], download=download,
        fetch=lambda staging: download_and_extract_archive(
            published.url, staging, filename=published.file, md5=published.md5, remove_finished=True
        ),
    )  # fmt: skip
    return root / folder


def _table(file: Path) -> dict[str, str]:
    """Read a file of lines ``key value``."""
    pairs = [line.split(maxsplit=1) for line in read_text(file).splitlines() if line.strip()]
    for line, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            raise DataError(f"{file}: line {line} is not a number and a value; delete {file.parent} and run again")
    return {key: value.strip() for key, value in pairs}
