"""The published sets themselves, where ``CLFRAME_DATA`` or ``../shared/data`` has copies and ``unpack.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clframe.data import SOURCES, class_incremental
from clframe.data.sources.labels import PUBLISHED, measure_normalization

REPOSITORY = Path(__file__).resolve().parents[2]
COPIES = Path(os.environ.get("CLFRAME_DATA") or REPOSITORY.parent / "shared" / "data")

needs_copies = pytest.mark.skipif(
    not (COPIES / "unpack.py").is_file(),
    reason=f"no copies of real data in {COPIES}; name their folder in CLFRAME_DATA",
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Unpacks a set by name when a test first asks for it; the folder of all of them."""
    folder = tmp_path_factory.mktemp("data")

    def unpack(name):
        subprocess.run([sys.executable, str(COPIES / "unpack.py"), str(folder), name], check=True, timeout=120)
        return str(folder)

    yield unpack
    for big in folder.glob("*.npz"):
        big.unlink()  # pytest keeps the folders of three runs


@needs_copies
def test_mnist(unpacked):
    source = SOURCES.get("mnist")(data_dir=unpacked("mnist"), download=False)
    assert len(source.train) == 60_000 and len(source.test) == 10_000 and source.input_shape == (1, 28, 28)
    assert torch.bincount(source.train.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert source.train.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert_own_normalization(source, "mnist")


@needs_copies
def test_cifar100(unpacked):
    source = SOURCES.get("cifar100")(data_dir=unpacked("cifar100"), download=False)
    assert source.train.x.shape == (50_000, 3, 32, 32) and source.train.x.dtype == torch.uint8
    assert torch.bincount(source.train.y).tolist() == [500] * 100
    assert torch.bincount(source.test.y).tolist() == [100] * 100
    assert source.class_names[:3] == ("apple", "aquarium_fish", "baby") and source.class_names[99] == "worm"
    assert_own_normalization(source, "cifar100")
    # As Krizhevsky's set is commonly quoted.
    assert source.train.mean == pytest.approx((129.3, 124.1, 112.4), abs=0.06)
    assert source.train.std == pytest.approx((68.2, 65.4, 70.4), abs=0.06)
    benchmark = class_incremental(source, experiences=10, order="sorted")
    assert [len(part) for part in benchmark.train] == [5_000] * 10


@needs_copies
def test_omniglot(unpacked):
    source = SOURCES.get("omniglot")(data_dir=unpacked("omniglot"), download=False)
    assert source.classes == 1623 and source.input_shape == (1, 28, 28)
    assert torch.bincount(source.train.y).tolist() == [15] * 1623
    assert torch.bincount(source.test.y).tolist() == [5] * 1623
    assert (source.train.mean, source.train.std) == measure_normalization(source.train.x)
    assert source.train.mean[0] < 40  # ink on black


@needs_copies
@pytest.mark.parametrize(
    "name, train, test, classes", [("clinc150", 15_000, 4_500, 150), ("banking77", 10_003, 3_080, 77)]
)
def test_texts_can_be_told_apart(unpacked, name, train, test, classes):
    source = SOURCES.get(name)(data_dir=unpacked("text"), download=False)
    assert (len(source.train), len(source.test), source.classes) == (train, test, classes)
    if name == "clinc150":
        assert source.class_names[0] == "freeze_account" and source.class_names[135] == "change_speed"
        assert torch.bincount(source.train.y).tolist() == [100] * 150
    x, y = source.train.x, source.train.y
    assert x.norm(dim=1).numpy() == pytest.approx(np.ones(train), abs=1e-5)
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    nearest = (source.test.x @ torch.nn.functional.normalize(means).T).argmax(1)
    assert float((nearest == source.test.y).float().mean()) > 0.65  # one in 77 or 150 by chance


def assert_own_normalization(source, name):
    assert (source.train.mean, source.train.std) == PUBLISHED[name] == (source.test.mean, source.test.std)
    mean, std = measure_normalization(source.train.x)
    assert source.train.mean == pytest.approx(mean, abs=1e-4) and source.train.std == pytest.approx(std, abs=1e-4)
    prepared = source.train.prepare(source.train.x[:1000])
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        expected = (source.train.x[:1000, channel].double() - m) / s
        assert torch.allclose(prepared[:, channel].double(), expected, atol=1e-5)
