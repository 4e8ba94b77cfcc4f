"""Data sets that torchvision downloads and reads: MNIST and its variants, SVHN, CIFAR."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clframe.data.inputs import InputFormat
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.arrays import array_source
from clframe.data.sources.labels import PUBLISHED, measure_normalization
from clframe.data.sources.paths import PublishedFile, ensure_files
from clframe.errors import DataError, reason_of

_DIGITS = tuple("0123456789")


@SOURCES.register("mnist")
def mnist(*, data_dir: str = "data", download: bool = True) -> Source:
    """Handwritten digits, 60,000 + 10,000 gray images of 28x28, 10 classes. LeCun et al. (1998).

    Args:
        data_dir: Folder of ``MNIST/raw``, or of ``mnist.npz`` with the same data as arrays.
        download: Download missing files, 12 MB, by torchvision.
    """
    return _idx_files("mnist", "MNIST", data_dir, download=download, class_names=_DIGITS)


@SOURCES.register("fashion_mnist")
def fashion_mnist(*, data_dir: str = "data", download: bool = True) -> Source:
    """Clothes, 60,000 + 10,000 gray images of 28x28, 10 classes. Xiao et al. (2017).

    Args:
        data_dir: Folder of ``FashionMNIST/raw``, or of ``fashion_mnist.npz`` with the same data as arrays.
        download: Download missing files, 31 MB, by torchvision.
    """
    return _idx_files("fashion_mnist", "FashionMNIST", data_dir, download=download)


@SOURCES.register("kmnist")
def kmnist(*, data_dir: str = "data", download: bool = True) -> Source:
    """Cursive Japanese characters, 60,000 + 10,000 gray images of 28x28, 10 classes. Clanuwat et al. (2018).

    Args:
        data_dir: Folder of ``KMNIST/raw``, or of ``kmnist.npz`` with the same data as arrays.
        download: Download missing files, 21 MB, by torchvision.
    """
    return _idx_files("kmnist", "KMNIST", data_dir, download=download)


@SOURCES.register("emnist")
def emnist(
    *,
    split: Literal["balanced", "byclass", "bymerge", "letters", "digits", "mnist"] = "balanced",
    data_dir: str = "data",
    download: bool = True,
) -> Source:
    """Handwritten letters and digits, 112,800 + 18,800 gray images of 28x28, 47 classes. Cohen et al. (2017).

    The files store every image transposed; here images are upright as in MNIST. Mean and standard deviation are
    measured on the training images of the split.

    Args:
        split: One of the six published selections of classes.
        data_dir: Folder of ``EMNIST/raw``.
        download: Download missing files, by torchvision: one archive of 560 MB for all splits.
    """
    from torchvision.datasets import EMNIST

    root = Path(data_dir).expanduser()
    stem = f"EMNIST/raw/emnist-{split}"
    kinds = ("images-idx3", "labels-idx1")
    wanted = [f"{stem}-{part}-{kind}-ubyte" for part in ("train", "test") for kind in kinds]
    archive = PublishedFile("EMNIST/raw/" + os.path.basename(EMNIST.url), EMNIST.url, EMNIST.md5)
    ensure_files(
        "EMNIST", root, wanted=wanted, published=[archive], download=download,
        fetch=lambda folder: EMNIST(folder, split=split, download=True),
    )  # fmt: skip
    _check_idx(root, wanted)
    parts = [_read(partial(EMNIST, str(root), split=split, train=part), root) for part in (True, False)]
    names = tuple(EMNIST.classes_split_dict[split])
    first = 1 if split == "letters" else 0  # letters count from 1
    x = [part.data.transpose(1, 2).unsqueeze(1).contiguous() for part in parts]
    y = [part.targets - first for part in parts]
    return _source(f"emnist_{split}", x, y, class_names=names[first:], normalization=measure_normalization(x[0]))


@SOURCES.register("svhn")
def svhn(*, data_dir: str = "data", download: bool = True) -> Source:
    """House numbers, 73,257 + 26,032 color images of 32x32, 10 classes of unequal size. Netzer et al. (2011).

    Args:
        data_dir: Folder of ``train_32x32.mat`` and ``test_32x32.mat``, or of ``svhn.npz`` with the same data as
            arrays.
        download: Download missing files, 246 MB, by torchvision.
    """
    from torchvision.datasets import SVHN

    root = Path(data_dir).expanduser()
    listed = [SVHN.split_list[part] for part in ("train", "test")]
    published = [PublishedFile(file, url, md5) for url, file, md5 in listed]
    wanted = [p.file for p in published]
    if (arrays := _from_npz("svhn", root, wanted)) is not None:
        return arrays
    ensure_files(
        "SVHN", root, wanted=wanted, published=published, download=download,
        fetch=lambda folder: [SVHN(folder, split=part, download=True) for part in ("train", "test")],
    )  # fmt: skip
    files = [(p.file, p.md5) for p in published]
    parts = [_read(partial(SVHN, str(root), split=part), root, files) for part in ("train", "test")]
    x = [torch.from_numpy(np.ascontiguousarray(part.data)) for part in parts]
    y = [torch.from_numpy(part.labels) for part in parts]
    return _source("svhn", x, y, class_names=_DIGITS)


@SOURCES.register("cifar10")
def cifar10(*, data_dir: str = "data", download: bool = True) -> Source:
    """Small photographs, 50,000 + 10,000 color images of 32x32, 10 classes. Krizhevsky (2009).

    Args:
        data_dir: Folder of ``cifar-10-batches-py``, or of ``cifar10.npz`` with the same data as arrays.
        download: Download missing files, 170 MB, by torchvision.
    """
    return _cifar("cifar10", "CIFAR10", data_dir, download=download)


@SOURCES.register("cifar100")
def cifar100(*, data_dir: str = "data", download: bool = True) -> Source:
    """Small photographs, 50,000 + 10,000 color images of 32x32, 100 classes. Krizhevsky (2009).

    Args:
        data_dir: Folder of ``cifar-100-python``, or of ``cifar100.npz`` with the same data as arrays.
        download: Download missing files, 169 MB, by torchvision.
    """
    return _cifar("cifar100", "CIFAR100", data_dir, download=download)


def _idx_files(name: str, kind_name: str, data_dir: str, *, download: bool, class_names: Sequence[str] = ()) -> Source:
    from torchvision import datasets

    kind, root = getattr(datasets, kind_name), Path(data_dir).expanduser()
    published = [PublishedFile(f"{kind_name}/raw/{file}", kind.mirrors[0] + file, md5) for file, md5 in kind.resources]
    wanted = [os.path.splitext(p.file)[0] for p in published]
    if (arrays := _from_npz(name, root, wanted)) is not None:
        return arrays
    ensure_files(
        kind_name, root, wanted=wanted, published=published, download=download,
        fetch=lambda folder: kind(folder, download=True),
    )  # fmt: skip
    _check_idx(root, wanted)
    parts = [_read(partial(kind, str(root), train=part), root) for part in (True, False)]
    names = tuple(class_names or kind.classes)
    return _source(name, [p.data.unsqueeze(1) for p in parts], [p.targets for p in parts], class_names=names)


def _cifar(name: str, kind_name: str, data_dir: str, *, download: bool) -> Source:
    from torchvision import datasets

    kind, root = getattr(datasets, kind_name), Path(data_dir).expanduser()
    files = [
        (f"{kind.base_folder}/{file}", md5)
        for file, md5 in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    ]
    wanted = [file for file, _ in files]
    if (arrays := _from_npz(name, root, wanted)) is not None:
        return arrays
    archive = PublishedFile(kind.filename, kind.url, kind.tgz_md5)
    ensure_files(
        kind_name, root, wanted=wanted, published=[archive], download=download,
        fetch=lambda folder: kind(folder, download=True),
    )  # fmt: skip
    parts = [_read(partial(kind, str(root), train=part), root, files) for part in (True, False)]
    x = [torch.from_numpy(np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))) for part in parts]
    y = [torch.tensor(part.targets) for part in parts]
    return _source(name, x, y, class_names=tuple(parts[0].classes))


def _source(
    name: str,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    *,
    class_names: tuple[str, ...],
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Source:
    mean, std = normalization or PUBLISHED[name]
    train, test = (TensorSamples(*part, mean, std) for part in zip(x, y, strict=True))
    return Source(
        name, train, test, classes=len(class_names), class_names=class_names, inputs=InputFormat(kind="image")
    )


def _from_npz(name: str, root: Path, wanted: Sequence[str]) -> Source | None:
    """Read the set from ``<name>.npz`` if the folder has that file and not all published ones."""
    file = root / f"{name}.npz"
    if not file.is_file() or all((root / path).exists() for path in wanted):
        return None
    return array_source(name, file, normalization=PUBLISHED[name], memory_gb=math.inf, duplicates=False)


def _read(read: Callable[[], Any], root: Path, files: Sequence[tuple[str, str]] = ()) -> Any:
    """Read data by torchvision.

    Raises:
        DataError: Torchvision fails; names the damaged file if one of ``files`` has another md5.
    """
    try:
        with warnings.catch_warnings():
            # NumPy 2.4 warns about the dtype flags in the published pickles of 2009.
            warnings.simplefilter("ignore")
            return read()
    except Exception as error:
        from torchvision.datasets.utils import check_integrity

        for file, md5 in files:
            if not check_integrity(str(root / file), md5):
                raise DataError(f"{root / file}: its md5 is not {md5}; delete it and run again") from None
        reason = reason_of(error)
        raise DataError(f"{root}: torchvision cannot read it ({reason}); delete the files and run again") from None


def _check_idx(root: Path, wanted: Sequence[str]) -> None:
    """Compare the size of each idx file with its header, which torchvision does not.

    Raises:
        DataError: An incomplete file, or files of different numbers of images and labels.
    """
    counts = []
    for name in wanted:
        file = root / name
        with open(file, "rb") as stream:
            magic = stream.read(4)
            sides = np.frombuffer(stream.read(4 * magic[3]), ">u4").tolist() if len(magic) == 4 else []
        expected = 4 + 4 * len(sides) + math.prod(sides)
        whole = len(magic) == 4 and magic[:3] == b"\0\0\x08" and len(sides) == magic[3] in (1, 3)
        if not whole or file.stat().st_size != expected:
            declared = f"where its header declares {expected:,}" if whole else "and no idx header"
            raise DataError(f"{file}: {file.stat().st_size:,} bytes {declared}; delete it and run again")
        counts.append(sides[0])
    for images in range(0, len(wanted), 2):
        if counts[images] != counts[images + 1]:
            raise DataError(
                f"{root / wanted[images]}: has {counts[images]} images for {counts[images + 1]} labels; "
                f"delete both files and run again"
            )
