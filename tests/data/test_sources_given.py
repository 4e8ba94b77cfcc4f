"""Torch data sets and Avalanche benchmarks from Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from clframe.data import TensorSamples, class_incremental, digits, from_avalanche, from_datasets
from clframe.data.avalanche import import_avalanche
from clframe.data.lazy import DatasetSamples
from clframe.data.sources import given
from clframe.errors import DataError


class Pairs:
    """A map-style data set of given items."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if not 0 <= index < len(self.items):
            raise IndexError
        return self.items[index]


def pixels(n, shape=(3, 4, 5), seed=0):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def as_image(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        as_image,
        lambda x: x.permute(1, 2, 0).numpy(),  # arrays as torchvision's ToTensor takes them
        lambda x: x.numpy(),
    ],
    ids=["tensor", "pil", "array_hwc", "array_chw"],
)
def test_bytes_of_any_kind_are_the_same_source(make):
    x, y = pixels(6), [0, 1, 2] * 2
    source = from_datasets(
        Pairs([(make(image), label) for image, label in zip(x, y, strict=True)]),
        Pairs([(make(image), label) for image, label in zip(255 - x[:3], y, strict=False)]),
        name="mine",
    )
    assert torch.equal(source.train.x, x) and torch.equal(source.test.x, 255 - x[:3])
    assert source.train.y.tolist() == y and source.name == "mine" and source.classes == 3
    assert source.train.mean == source.test.mean == pytest.approx(x.double().mean((0, 2, 3)).tolist())


def test_floats_are_taken_as_they_are():
    x = torch.randn(4, 7, dtype=torch.float64)
    dataset = TensorDataset(x, torch.tensor([0, 1, 0, 1]))
    source = from_datasets(dataset, dataset, name="mine")
    assert source.train.x.dtype == torch.float32 and source.input_shape == (7,)
    assert torch.equal(source.train.prepare(source.train.x), x.float())


@pytest.mark.parametrize("label", [lambda c: c, lambda c: torch.tensor(c), lambda c: np.int64(c), lambda c: float(c)])
def test_labels_of_any_kind_are_numbered(label):
    items = [(torch.zeros(1, 2, 2), label(c)) for c in (30, 10, 30)]
    source = from_datasets(Pairs(items), Pairs(items[:2]), name="mine")
    assert source.train.y.tolist() == [1, 0, 1] and source.class_names == ("10", "30")


def test_items_may_carry_more_than_a_pair():
    items = [(torch.zeros(1, 2, 2), c, "task") for c in (0, 1)]
    assert from_datasets(Pairs(items), Pairs(items), name="mine").classes == 2


def test_names_of_classes_set_the_range_of_labels():
    items = [(torch.zeros(1, 2, 2), c) for c in (0, 1, 2)]
    assert from_datasets(Pairs(items), Pairs(items), name="m", classes=["a", "b", "c"]).class_names == ("a", "b", "c")
    with pytest.raises(DataError, match="m/train: label 2 of sample 2 is out of range; give 0 to 1"):
        from_datasets(Pairs(items), Pairs(items[:2]), name="m", classes=["a", "b"])
    with pytest.raises(DataError, match=r"m/train: found no samples of class 3 \('d'\); add some or remove the class"):
        from_datasets(Pairs(items), Pairs(items), name="m", classes=["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "items, message",
    [
        ([], "m/train: found no samples"),
        ([torch.zeros(1, 2, 2)], "m/train: sample 0 is a Tensor; give pairs of input and label"),
        ([("text", 0)], "m/train: sample 0 is a str; give a tensor, an array or a PIL image"),
        ([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 3), 0)], r"m/train: sample 1 is .* of shape \(1, 2, 3\)"),
        ([(torch.zeros(2), 0), (torch.zeros(2, dtype=torch.uint8), 0)], "m/train: sample 1 is torch.uint8"),
        ([(torch.zeros(2), 0), (torch.full((2,), float("nan")), 0)], "m/train: sample 1 has NaN or infinite"),
        ([(torch.zeros(2), 0.5)], "m/train: label 0.5 of sample 0 is not an integer"),
        ([(torch.zeros(2), -1)], "m/train: label -1 of sample 0 is out of range"),
        ([(torch.zeros(2), torch.tensor([0, 1]))], "m/train: found labels of shape"),
        ([(torch.zeros(2, dtype=torch.complex64), 0)], "m/train: sample 0 has type torch.complex64"),
        ([(Image.new("F", (2, 2)), 0)], "m/train: sample 0: has pixels of mode F"),
    ],
)  # fmt: skip
def test_bad_items_are_named(items, message):
    good = Pairs([(torch.zeros(2), 0)])
    with pytest.raises(DataError, match=message):
        from_datasets(Pairs(items), good, name="m")


def test_what_does_not_fit_is_read_later():
    x, y = pixels(6), [5, 7] * 3
    train = Pairs([(as_image(image), label) for image, label in zip(x, y, strict=True)])
    test = Pairs(train.items[:2])
    kept, read = (from_datasets(train, test, name="mine", memory_gb=limit) for limit in (1.0, 0.0))
    assert isinstance(read.train, DatasetSamples) and read.train.y.tolist() == kept.train.y.tolist()
    assert read.train.mean == pytest.approx(kept.train.mean)
    index = torch.tensor([5, 1])
    assert torch.equal(read.train.raw(index), kept.train.raw(index))


class Flipped(Pairs):
    """Mirrors half of the images, as torchvision's RandomHorizontalFlip does."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x.flip(-1) if torch.rand(()) < 0.5 else x), y


def test_random_transforms_are_not_frozen(caplog):
    caplog.set_level("INFO", "clframe.data")
    x = pixels(40)
    items = [(image, i % 2) for i, image in enumerate(x)]
    source = from_datasets(Flipped(items), Pairs(items[:4]), name="mine")
    assert "mine: training inputs have random transforms and are read again in every epoch" in caplog.messages
    assert isinstance(source.train, DatasetSamples) and isinstance(source.test, TensorSamples)
    assert source.train.mean == source.test.mean
    seen = [
        torch.cat([batch for batch, _ in source.train.batches(None, 8, generator=None, seed=seed)])
        for seed in (0, 1, 0)
    ]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    plain = source.test.prepare(x)
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(-1)) for a, b in zip(seen[1], plain, strict=True))


def test_duplicates_are_warned_of(caplog):
    x = pixels(4)
    train = Pairs([(image, i % 2) for i, image in enumerate(x)])
    from_datasets(train, Pairs([(x[2], 0), (255 - x[1], 1)]), name="mine")
    assert [m for m in caplog.messages if "mine: 1 of 2 test samples" in m]


# --- Avalanche ---


@pytest.fixture(scope="module")
def avalanche():
    import_avalanche()
    import avalanche.benchmarks as module

    return module


def colored(labels, seed=0):
    data = TensorDataset(pixels(len(labels), seed=seed).float(), torch.tensor(labels))
    data.targets = labels
    return data


def wrapped(labels, seed=0):
    from avalanche.benchmarks.utils import as_classification_dataset

    return as_classification_dataset(colored(labels, seed))


def test_our_own_benchmark_comes_back_from_avalanche():
    ours = class_incremental(digits(), experiences=3, seed=4)
    back = from_avalanche(ours.avalanche, name="digits")
    assert back.class_order == tuple(range(10))  # Avalanche sees classes in learning order
    assert back.classes == ours.classes and back.input_shape == ours.input_shape
    for one, other in zip((*ours.train, *ours.test), (*back.train, *back.test), strict=True):
        assert torch.equal(one.y, other.y) and torch.equal(one.prepare(one.x), other.prepare(other.x))


def test_classes_are_learnt_in_the_order_of_the_stream(avalanche):
    parts = [[8, 3, 8], [1, 5, 1, 5], [40, 40]]
    made = avalanche.benchmark_from_datasets(
        train=[wrapped(y, i) for i, y in enumerate(parts)],
        test=[wrapped(sorted(set(y)), i + 9) for i, y in enumerate(parts)],
    )
    benchmark = from_avalanche(made, name="mine")
    assert benchmark.class_order == (3, 8, 1, 5, 40) and benchmark.name == "mine"
    assert benchmark.classes == ((0, 1), (2, 3), (4,))
    assert [part.y.tolist() for part in benchmark.train] == [[1, 0, 1], [2, 3, 2, 3], [4, 4]]
    assert torch.equal(benchmark.train[1].x, pixels(4, seed=1).float())
    assert [part.y.tolist() for part in benchmark.test] == [[0, 1], [2, 3], [4]]
    assert torch.equal(benchmark.train[1].prepare(benchmark.train[1].x), pixels(4, seed=1).float())


def test_one_test_experience_is_dealt_by_class(avalanche):
    made = avalanche.benchmark_from_datasets(train=[wrapped([4, 2]), wrapped([7])], test=[wrapped([7, 2, 4, 7])])
    benchmark = from_avalanche(made)
    assert benchmark.class_order == (2, 4, 7)
    assert [part.y.tolist() for part in benchmark.test] == [[0, 1], [2, 2]]
    assert torch.equal(benchmark.test[1].x, pixels(4).float()[[0, 3]])


def test_experiences_that_share_classes_are_each_tested_on_all(avalanche):
    made = avalanche.benchmark_from_datasets(train=[wrapped([0, 1]), wrapped([1, 0], 1)], test=[wrapped([0, 1, 1])])
    benchmark = from_avalanche(made)
    assert benchmark.classes == ((0, 1), (0, 1)) and [len(part) for part in benchmark.test] == [3, 3]


def test_evaluation_transforms_are_applied_and_training_transforms_are_not(avalanche):
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.benchmarks.utils.transform_groups import TransformGroups

    groups = TransformGroups({"train": (lambda x: x * 0, None), "eval": (lambda x: x / 2, None)})
    data = colored([0, 1])
    made = avalanche.benchmark_from_datasets(
        train=[as_classification_dataset(data, transform_groups=groups)],
        test=[as_classification_dataset(data, transform_groups=groups)],
    )
    assert torch.equal(from_avalanche(made).train[0].x, data.tensors[0] / 2)


def test_a_classic_benchmark_of_images(avalanche):
    from avalanche.benchmarks.classic.ccifar100 import nc_benchmark

    train, test = ([(as_image(x), c % 4) for c, x in enumerate(pixels(8, seed=s))] for s in (1, 2))
    sets = [Pairs(items) for items in (train, test)]
    for dataset in sets:
        dataset.targets = [c for _, c in dataset.items]
    made = nc_benchmark(
        sets[0], sets[1], n_experiences=2, task_labels=False, shuffle=False, fixed_class_order=[2, 0, 3, 1]
    )
    benchmark = from_avalanche(made)
    assert benchmark.class_order == (0, 2, 1, 3) and benchmark.classes == ((0, 1), (2, 3))
    x = torch.cat([part.x for part in benchmark.train])
    assert x.dtype == torch.uint8 and len(x) == 8
    assert benchmark.train[0].mean == pytest.approx(pixels(8, seed=1).double().mean((0, 2, 3)).tolist())
    assert benchmark.test[1].mean == benchmark.train[0].mean


def test_benchmarks_that_cannot_be_used(avalanche):
    with pytest.raises(DataError, match="avalanche: found streams none; give a benchmark with train and test"):
        from_avalanche(object())
    made = avalanche.benchmark_from_datasets(train=[wrapped([0, 1])], test=[wrapped([0, 2])])
    with pytest.raises(DataError, match="mine/test: class 2 has no training samples"):
        from_avalanche(made, name="mine")


# --- arrays whose layout is not clear, and labels of tasks ---


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_arrays_of_four_channels_are_images_with_alpha(kind, caplog):
    given._log_alpha.cache_clear()
    rgba = np.random.default_rng(0).integers(0, 256, (4, 7, 5, 4)).astype(kind)
    items = [(x, i % 2) for i, x in enumerate(rgba)]
    source = from_datasets(Pairs(items), Pairs(items[:2]), name="mine")
    assert source.input_shape == (3, 7, 5)
    assert torch.equal(source.train.x, torch.from_numpy(rgba[..., :3].transpose(0, 3, 1, 2).copy()))
    assert sum("arrays of 4 channels are read as RGBA" in message for message in caplog.messages) == 1


def test_arrays_whose_channels_may_be_anywhere_are_refused():
    items = [(np.zeros((8, 6, 5), np.uint8), 0)]
    with pytest.raises(DataError, match=r"^m/train: sample 0 is an array of shape \(8, 6, 5\), .* give arrays \[H, W, C\]"):
        from_datasets(Pairs(items), Pairs(items), name="m")
    tensors = [(torch.zeros(8, 6, 5), c) for c in (0, 1)]
    assert from_datasets(Pairs(tensors), Pairs(tensors), name="m").input_shape == (8, 6, 5)


@pytest.mark.parametrize("number", [torch.tensor(3.0), np.array(3.0)])
def test_single_numbers_are_no_inputs(number):
    items = [(number, 0)]
    with pytest.raises(DataError, match=r"^m/train: sample 0 is a single number; give a vector \[D\] or an image"):
        from_datasets(Pairs(items), Pairs(items), name="m")


def test_photographs_given_from_python_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        items = [(image.convert("RGB"), 0)]
    assert from_datasets(Pairs(items), Pairs(items), name="m").input_shape == (3, 20, 10)
    lazy = DatasetSamples.of(Pairs(items), torch.tensor([0]), num_workers=0)
    assert lazy.input_shape == (3, 20, 10)


def tasks(avalanche, *, task_labels, restart, experiences=3):
    """Six classes, four samples of each, which differ in their first value."""
    data = TensorDataset(torch.arange(24.0).reshape(24, 1, 1, 1) % 6, torch.arange(24) % 6)
    data.targets = [c % 6 for c in range(24)]
    return avalanche.nc_benchmark(
        data, data, n_experiences=experiences, task_labels=task_labels, shuffle=False,
        class_ids_from_zero_in_each_exp=restart,
    )  # fmt: skip


@pytest.mark.parametrize("restart", [False, True])
def test_task_labels_are_read_and_ids_that_restart_are_other_classes(avalanche, restart):
    benchmark = from_avalanche(tasks(avalanche, task_labels=True, restart=restart))
    assert benchmark.task_labels and benchmark.classes == ((0, 1), (2, 3), (4, 5))
    assert benchmark.class_order == tuple(range(6))
    for part in (*benchmark.train, *benchmark.test):  # a class has the samples of one class of the data, and all
        assert torch.equal(part.x.flatten().long(), part.y)
    assert [e.task_label for e in benchmark.avalanche.train_stream] == [0, 1, 2]


def test_ids_that_restart_without_task_labels_are_refused(avalanche):
    made = tasks(avalanche, task_labels=False, restart=True)
    with pytest.raises(DataError, match="^mine: class ids start at 0 in every experience.* task_labels=True"):
        from_avalanche(made, name="mine")
    assert not from_avalanche(tasks(avalanche, task_labels=False, restart=False)).task_labels
    assert not from_avalanche(tasks(avalanche, task_labels=False, restart=True, experiences=1)).task_labels


def test_task_labels_that_only_some_experiences_share_are_refused(avalanche):
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset

    parts = [
        _make_taskaware_classification_dataset(colored([0, 1], i), task_labels=label) for i, label in enumerate([0, 0, 1])
    ]
    made = avalanche.with_task_labels(avalanche.benchmark_from_datasets(train=parts, test=parts))
    with pytest.raises(DataError, match=r"^mine/train: found task labels \[\[0\], \[0\], \[1\]\]; give every experience"):
        from_avalanche(made, name="mine")
