from __future__ import annotations

import pytest
import torch

from clframe.data import EpochLoader, Source, TensorSamples, class_incremental, concatenate, digits
from clframe.data.protocol import class_order, classes_per_experience
from clframe.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def source():
    return digits()


def test_digits_are_the_real_ones(source):
    assert len(source.train) + len(source.test) == 1797
    assert source.input_shape == (1, 8, 8) and source.train.x.dtype == torch.uint8
    x = torch.cat([source.train.x, source.test.x]).double()
    assert float(x.mean()) == pytest.approx(4.884, abs=5e-4)
    assert float(x.std(unbiased=False)) == pytest.approx(6.017, abs=5e-4)
    from sklearn.datasets import load_digits

    raw = {bytes(image.astype("uint8")) for image in load_digits().images}
    kept = {bytes(image.numpy().tobytes()) for image in torch.cat([source.train.x, source.test.x])}
    assert kept == raw


def test_train_and_test_share_no_sample(source):
    train = {bytes(image.numpy().tobytes()) for image in source.train.x}
    test = {bytes(image.numpy().tobytes()) for image in source.test.x}
    assert not train & test


def test_preparing_normalizes(source):
    raw = source.train.x[:3]
    expected = (raw.double() - 4.884) / 6.017
    assert torch.allclose(source.train.prepare(raw).double(), expected, atol=1e-6)


def test_channels_normalize_on_their_own():
    samples = TensorSamples(torch.randint(0, 255, (5, 3, 2, 2), dtype=torch.uint8), torch.zeros(5).long(),
                            mean=(1.0, 20.0, 100.0), std=(2.0, 4.0, 8.0))  # fmt: skip
    prepared = samples.prepare(samples.x)
    for channel, (mean, std) in enumerate(((1, 2), (20, 4), (100, 8))):
        assert torch.allclose(prepared[:, channel], (samples.x[:, channel].float() - mean) / std, atol=1e-5)


@pytest.mark.parametrize("experiences", [1, 2, 3, 4, 7, 10])
def test_no_class_is_dropped_and_labels_are_in_learning_order(source, experiences):
    benchmark = class_incremental(source, experiences=experiences, seed=3)
    assert [c for classes in benchmark.classes for c in classes] == list(range(10))
    assert sorted(benchmark.class_order) == list(range(10))
    assert sum(len(part) for part in benchmark.train) == len(source.train)
    for part, classes in zip(benchmark.train, benchmark.classes, strict=True):
        assert set(part.y.tolist()) == set(classes)
    original = torch.tensor(benchmark.class_order)
    together = concatenate(benchmark.test)
    by_image = {bytes(x.numpy().tobytes()): int(y) for x, y in zip(source.test.x, source.test.y, strict=True)}
    assert all(by_image[bytes(x.numpy().tobytes())] == int(original[y])
               for x, y in zip(together.x, together.y, strict=True))  # fmt: skip


def test_deal_and_orders():
    assert (
        classes_per_experience(10, 3) == (4, 3, 3) and classes_per_experience(3, 3) == (1, 1, 1) and classes_per_experience(100, 7) == (15, 15, 14, 14, 14, 14, 14)
    )
    assert class_order(4, order="sorted", seed=0) == (0, 1, 2, 3)
    assert class_order(4, order=[2, 0, 1, 3], seed=0) == (2, 0, 1, 3)
    assert class_order(10, order="seeded", seed=0) == class_order(10, order="seeded", seed=0)
    assert len({class_order(10, order="seeded", seed=s) for s in range(5)}) == 5


@pytest.mark.parametrize("classes, experiences", [(10, 0), (10, -1), (10, 11)])
def test_impossible_deals(classes, experiences):
    with pytest.raises(ConfigError, match=rf"benchmark.experiences: found {experiences}"):
        classes_per_experience(classes, experiences)


@pytest.mark.parametrize("order", ["random", [0, 1], [0, 0, 1, 2], [1, 2, 3, 4]])
def test_impossible_orders(order):
    with pytest.raises(ConfigError, match=r"benchmark\.class_order"):
        class_order(4, order=order, seed=0)


def test_bad_data():
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
    with pytest.raises(DataError, match="4 inputs and 3 labels"):
        TensorSamples(x, y[:3])
    with pytest.raises(DataError, match="NaN"):
        TensorSamples(torch.full((4, 2), float("nan")), y)
    good = TensorSamples(x, y)
    with pytest.raises(DataError, match="found labels from 0 to 1 for 1 classes"):
        Source("s", good, good, classes=1)
    with pytest.raises(DataError, match="found no samples of class 2"):
        Source("s", good, good, classes=3)


@pytest.mark.parametrize("size, batch", [(1, 1), (5, 2), (6, 3), (3, 10)])
def test_loader_serves_every_sample_once(size, batch):
    samples = TensorSamples(torch.arange(size).unsqueeze(1), torch.arange(size))
    loader = EpochLoader(samples, batch, shuffle=True, seed=1, experience=2)
    epochs = []
    for epoch in (0, 1, 0):
        loader.epoch = epoch
        batches = list(loader)
        assert len(batches) == len(loader) == -(-size // batch)
        assert all(len(y) == batch for _, y in batches[:-1])
        assert all(torch.equal(x.flatten().long(), y) for x, y in batches)
        epochs.append(torch.cat([y for _, y in batches]))
    assert sorted(epochs[0].tolist()) == list(range(size))
    assert torch.equal(epochs[0], epochs[2])
    if size > 3:
        assert not torch.equal(epochs[0], epochs[1])


def test_avalanche_sees_the_same_benchmark(source):
    benchmark = class_incremental(source, experiences=3, seed=0)
    streams = benchmark.avalanche
    assert [e.classes_in_this_experience for e in streams.train_stream] == [set(c) for c in benchmark.classes]
    for stream, parts in ((streams.train_stream, benchmark.train), (streams.test_stream, benchmark.test)):
        for experience, part in zip(stream, parts, strict=True):
            assert len(experience.dataset) == len(part)
            x, y = experience.dataset[1][:2]
            assert torch.equal(x, part.prepare(part.x[1:2])[0]) and y == int(part.y[1])
