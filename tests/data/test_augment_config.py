"""``benchmark.augment`` and ``benchmark.workers``: from a name in a config to the batches of any source."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from clframe.build import build
from clframe.config.load import load_config
from clframe.config.schema import MOST_WORKERS
from clframe.data import EpochLoader
from clframe.data.augmentation import ColorJitter, Flip, PadCrop
from clframe.data.lazy import DatasetSamples
from clframe.errors import ConfigError, DataError, UnknownNameError
from clframe.seeding import epoch_order, generator_for


@pytest.fixture
def npz(tmp_path):
    """Save arrays; the overrides that take them."""

    def save(**arrays):
        np.savez(tmp_path / "mine.npz", **arrays)
        return ["benchmark=npz", f"benchmark.path={tmp_path / 'mine.npz'}", "benchmark.experiences=2"]

    return save


@pytest.fixture
def images(npz):
    rng = np.random.default_rng(0)
    return npz(x=rng.integers(0, 256, (40, 3, 8, 8), dtype=np.uint8), y=np.arange(40) % 4)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(32):
        file = tmp_path / "files" / "abcd"[i % 4] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(file)
    return ["benchmark=image_folder", f"benchmark.path={tmp_path / 'files'}", "benchmark.experiences=2"]


def built(*overrides):
    return build(load_config("quickstart", ["backbone=mlp", "backbone.width=4", *overrides])).benchmark


def batches(samples, *, epoch=0):
    loader = EpochLoader(samples, 5, shuffle=True, seed=3, experience=1)
    loader.epoch = epoch
    return list(loader)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("null", ()),
        ("none", ()),
        ("[]", ()),
        ("flip", (Flip(0.5),)),
        ("cifar", (PadCrop(4), Flip(0.5))),
        ("[crop,flip]", (PadCrop(4), Flip(0.5))),
        ("[flip,none,crop]", (Flip(0.5), PadCrop(4))),
        ("[jitter]", (ColorJitter(0.4, 0.4, 0.4, 0.1),)),
    ],
)
def test_a_name_or_a_list_says_what_training_does_in_order(images, given, expected):
    benchmark = built(*images, f"benchmark.augment={given}")
    assert [part.augment for part in benchmark.train] == [expected] * 2
    assert [part.augment for part in benchmark.test] == [()] * 2


def test_batches_are_augmented_before_they_are_normalized(images):
    samples = built(*images, "benchmark.augment=cifar").train[1]
    order = epoch_order(len(samples), seed=3, experience=1, epoch=2)
    generator = generator_for(3, "augment", 1, 2)
    mean, std = (torch.tensor(v).reshape(-1, 1, 1) for v in (samples.mean, samples.std))
    for (x, y), index in zip(batches(samples, epoch=2), order.split(5), strict=True):
        expected = Flip(0.5)(PadCrop(4)(samples.x[index], generator), generator)
        torch.testing.assert_close(x, (expected.float() - mean) / std)
        assert torch.equal(y, samples.y[index])


@pytest.mark.parametrize("workers", ["0", "2"])
def test_files_read_batch_by_batch_are_augmented_alike(folder, workers):
    kept = built(*folder, "benchmark.augment=[crop,jitter]").train[0]
    read = built(
        *folder, "benchmark.augment=[crop,jitter]", "benchmark.memory_gb=0", f"benchmark.workers={workers}"
    ).train[0]
    assert isinstance(read, DatasetSamples) and read.reader.num_workers == int(workers)
    kept = replace(kept, mean=read.mean, std=read.std)
    for (x, y), (other_x, other_y) in zip(batches(kept), batches(read), strict=True):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)
    read.reader.close()


def test_training_and_test_data_go_on_to_share_one_reader(folder):
    benchmark = built(*folder, "benchmark.memory_gb=0", "benchmark.workers=3")
    readers = {part.reader for part in (*benchmark.train, *benchmark.test)}
    assert [reader.num_workers for reader in readers] == [3]


def test_validation_data_is_not_augmented(images):
    benchmark = built(*images, "benchmark.augment=flip", "benchmark.validation=0.25")
    assert [part.augment for part in benchmark.validation] == [()] * 2


@pytest.mark.parametrize("protocol", ["task_incremental", "rotated", "permuted", "class_incremental"])
@pytest.mark.parametrize("online", ["null", "6"])
def test_every_protocol_keeps_it(images, protocol, online):
    benchmark = built(*images, "benchmark.augment=flip", f"benchmark.protocol={protocol}", f"benchmark.online={online}")
    assert {part.augment for part in benchmark.train} == {(Flip(0.5),)}


def test_avalanches_own_loaders_augment_too(images):
    benchmark = built(*images, "benchmark.augment=cifar", "benchmark.protocol=task_incremental")
    samples, dataset = benchmark.train[0], benchmark.avalanche.train_stream[0].dataset
    assert len(dataset) == len(samples) == 16 and list(dataset.targets) == samples.y.tolist()
    for index in (0, 15):
        plain = samples.batch(torch.tensor([index]))[0][0]
        x, y, task = dataset.eval()[index]
        assert torch.equal(x, plain) and (y, task) == (int(samples.y[index]), 0)
        generator = torch.Generator().manual_seed(index)
        torch.manual_seed(index)
        expected = samples.prepare(samples.raw(torch.tensor([index])), generator=generator)[0]
        assert torch.equal(dataset.train()[index][0], expected) and not torch.equal(expected, plain)
    test = benchmark.avalanche.test_stream[0].dataset
    assert torch.equal(test.train()[0][0], benchmark.test[0].batch(torch.tensor([0]))[0][0])


@pytest.mark.parametrize(
    "given, said",
    [
        ("cifr", r"^benchmark\.augment: unknown augmentation 'cifr'; did you mean 'cifar'\?"),
        ("[crop,flp]", r"^benchmark\.augment: unknown augmentation 'flp'; did you mean 'flip'\?"),
    ],
)
def test_an_unknown_name_is_found_before_anything_loads(given, said):
    with pytest.raises(UnknownNameError, match=said):
        built("benchmark=npz", "benchmark.path=nowhere.npz", f"benchmark.augment={given}")


@pytest.mark.parametrize(
    "override, said",
    [
        ("augment=3", r"^benchmark\.augment: found 3; give text or a list or null$"),
        ("augment=[3]", r"^benchmark\.augment\[0\]: found 3; give text, in quotes$"),
        ("workers=-1", r"^benchmark\.workers: found -1; give a number from 0 to 256 or null$"),
        (f"workers={MOST_WORKERS + 1}", r"^benchmark\.workers: found 257; give a number from 0 to 256 or null$"),
        ("workers=1.5", r"^benchmark\.workers: found 1\.5; give a whole number or null$"),
        ("augmnt=flip", r"^benchmark\.augmnt: unknown option; did you mean 'augment'\?"),
    ],
)
def test_what_is_no_such_setting(override, said):
    with pytest.raises(ConfigError, match=said):
        built(f"benchmark.{override}")


def test_vectors_are_no_images(npz):
    overrides = npz(x=np.random.default_rng(0).normal(size=(24, 5)), y=np.arange(24) % 4)
    assert built(*overrides, "benchmark.augment=none").train[0].augment == ()
    with pytest.raises(
        DataError,
        match=r"^benchmark\.augment: found PadCrop for mine with inputs of shape \[5\]; augment only images .* set none$",
    ):
        built(*overrides, "benchmark.augment=cifar")


def test_colors_of_what_has_none(npz):
    rng, y = np.random.default_rng(0), np.arange(24) % 4
    overrides = npz(x=rng.normal(size=(24, 3, 4, 4)), y=y)
    with pytest.raises(DataError, match=r"^benchmark\.augment: found ColorJitter for mine with values from -"):
        built(*overrides, "benchmark.augment=jitter")
    assert built(*npz(x=rng.random((24, 3, 4, 4)), y=y), "benchmark.augment=jitter").train[0].augment
    overrides = [*npz(x=rng.integers(0, 9, (24, 2, 5, 5)), y=y), "benchmark.layout=chw"]
    with pytest.raises(DataError, match=r"^benchmark\.augment: found ColorJitter for mine with images of 2 channels"):
        built(*overrides, "benchmark.augment=[crop,jitter]")
