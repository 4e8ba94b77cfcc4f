"""Handwritten characters: the digits bundled with scikit-learn, and Omniglot."""

from __future__ import annotations

import math
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from clframe.data.inputs import InputFormat
from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.arrays import array_source
from clframe.data.sources.image_files import open_image
from clframe.data.sources.labels import measure_normalization, split_off_test
from clframe.data.sources.paths import PublishedFile, class_folders, ensure_files, subfolders
from clframe.errors import ConfigError, DataError


@SOURCES.register("digits")
def digits(*, test_fraction: float = 0.25) -> Source:
    """1,797 gray 8x8 digits of scikit-learn, 10 classes; a fixed, class-balanced test split.

    Values 0..16 are stored as bytes; mean 4.88 and standard deviation 6.02 are those of the whole set. The split is
    the same for every seed. Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (1998).

    Args:
        test_fraction: Fraction of each class to test on.
    """
    x, y = _read_digits()
    train, test = split_off_test(y, fraction=test_fraction, name="digits")
    samples = TensorSamples(x, y, mean=(4.884,), std=(6.017,))
    return Source(
        "digits",
        samples.subset(train),
        samples.subset(test),
        classes=10,
        class_names=tuple("0123456789"),
        inputs=InputFormat(kind="image", largest=16),
    )


def _read_digits() -> tuple[Tensor, Tensor]:
    """Return images x [N, 1, 8, 8] and labels y_N, new ones at every call."""
    rows = _digit_rows()
    return torch.from_numpy(rows[:, :-1]).to(torch.uint8).view(-1, 1, 8, 8), torch.from_numpy(rows[:, -1].copy())


@cache
def _digit_rows() -> npt.NDArray[np.int64]:
    """Read a row of 64 pixels and the label for each image, once.

    The file is read directly where it is found, since importing scikit-learn takes longer than training a first epoch.
    """
    spec = find_spec("sklearn")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.int64)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.concatenate((bunch.data, bunch.target[:, None]), 1).astype(np.int64)


_PARTS = ("images_background", "images_evaluation")


@SOURCES.register("omniglot")
def omniglot(*, test_fraction: float = 0.25, size: int = 28, data_dir: str = "data", download: bool = True) -> Source:
    """Characters of 50 alphabets, white on black, 1,623 classes of 20 gray images. Lake et al. (2015).

    The background and the evaluation set are concatenated, with sorted alphabets. Images of 105x105 are resized by
    box averaging. Mean and standard deviation are measured on the training images.

    Args:
        test_fraction: Fraction of each character to test on, by default 5 of 20; the same for every seed.
        size: Side in pixels.
        data_dir: Folder of ``omniglot-py``, or of ``omniglot.npz`` with arrays ``x`` and ``y``.
        download: Download missing files, by torchvision.
    """
    from torchvision.datasets import Omniglot
    from torchvision.datasets.utils import download_and_extract_archive

    if not 1 <= size <= 105:
        raise ConfigError(f"benchmark.size: found {size}; give 1 to 105 pixels")
    root = Path(data_dir).expanduser()
    wanted = [f"{Omniglot.folder}/{part}" for part in _PARTS]
    if (root / "omniglot.npz").is_file() and not all((root / name).exists() for name in wanted):
        source = array_source(
            "omniglot",
            root / "omniglot.npz",
            test_fraction=test_fraction,
            memory_gb=math.inf,
            duplicates=False,
        )
        if source.input_shape != (1, size, size):
            raise DataError(
                f"{root / 'omniglot.npz'}: has images of {source.input_shape[1]} pixels; "
                f"set benchmark.size={source.input_shape[1]}"
            )
        return source
    published = [
        PublishedFile(f"{name}.zip", f"{Omniglot.download_url_prefix}/{part}.zip", Omniglot.zips_md5[part])
        for name, part in zip(wanted, _PARTS, strict=True)
    ]

    def fetch(folder: str) -> None:
        # torchvision's Omniglot would not unpack archives that are already there.
        for p in published:
            place, name = os.path.split(os.path.join(folder, p.file))
            download_and_extract_archive(p.url, place, filename=name, md5=p.md5)

    ensure_files("Omniglot", root, wanted=wanted, published=published, download=download, fetch=fetch)
    x, y, class_names = _read_drawings([root / name for name in wanted], size)
    train, test = split_off_test(y, fraction=test_fraction, name="npz", where=str(root), class_names=class_names)
    mean, std = measure_normalization(x[train])
    samples = TensorSamples(x, y, mean, std)
    return Source(
        "omniglot",
        samples.subset(train),
        samples.subset(test),
        classes=len(class_names),
        class_names=class_names,
    )


def _read_drawings(parts: list[Path], size: int) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    characters = {
        f"{alphabet}/{character}": paths
        for part in parts
        for alphabet in subfolders(part)
        for character, paths in class_folders(part / alphabet).items()
    }
    paths = [path for drawings in characters.values() for path in drawings]
    y = torch.tensor([c for c, drawings in enumerate(characters.values()) for _ in drawings])
    return torch.stack([_read_drawing(path, size) for path in paths]), y, tuple(characters)


def _read_drawing(path: str, size: int) -> Tensor:
    with open_image(path) as image:
        ink = ImageOps.invert(image.convert("L")).resize((size, size), Image.Resampling.BOX)
        return torch.from_numpy(np.array(ink)).unsqueeze(0)
