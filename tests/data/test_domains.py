"""Domain-incremental streams: pixels in other orders, and rotated images."""

from __future__ import annotations

import itertools

import pytest
import torch
from numbered_samples import SHAPE, every, toy
from torchvision.transforms.functional import InterpolationMode, rotate

from clframe.data.benchmark import class_incremental
from clframe.data.samples import TensorSamples, concatenate
from clframe.data.source import Source
from clframe.data.streams import (
    PixelOrder,
    Rotation,
    domain_incremental,
    permuted_stream,
    rotated_stream,
    rotations,
)
from clframe.errors import ConfigError, DataError


@pytest.mark.parametrize("lazy", [False, True])
def test_permuted_pixels(lazy):
    source = toy(3, lazy=lazy)
    benchmark = permuted_stream(source, experiences=4, seed=2, validation=0.3)
    assert benchmark.classes == ((0, 1, 2),) * 4 and benchmark.class_order == (0, 1, 2)
    assert benchmark.domains == ("as stored", *("permuted pixels",) * 3)
    orders = [None, *(part.view.order_P for part in benchmark.train[1:])]
    assert len({tuple(order.tolist()) for order in orders[1:]}) == 3
    train, held = source.hold_out(0.3, seed=2)
    for i, order in enumerate(orders):
        for plain, parts in ((train, benchmark.train), (held, benchmark.validation), (source.test, benchmark.test)):
            expected = every(plain) if i == 0 else every(plain).flatten(1)[:, order].reshape(-1, *SHAPE)
            assert torch.equal(every(parts[i]), expected)
            assert torch.equal(parts[i].y, plain.y)
            for (x, y), at in zip(parts[i].batches(None, 4), torch.arange(len(plain)).split(4), strict=True):
                assert torch.equal(x, (expected[at] - 4.0) / 2.0) and torch.equal(y, plain.y[at])
        if i:
            assert sorted(order.tolist()) == list(range(9))
            assert torch.equal(every(benchmark.test[i]).flatten(1)[:, order.argsort()], every(source.test).flatten(1))
    other = permuted_stream(source, experiences=4, seed=3)
    assert not torch.equal(other.train[1].view.order_P, orders[1])
    longer = permuted_stream(source, experiences=9, seed=2)
    assert torch.equal(longer.train[3].view.order_P, orders[3])


def test_domains_that_are_read_batch_by_batch_are_concatenated_as_those_in_memory():
    kept, read = (permuted_stream(toy(3, lazy=lazy), experiences=3, seed=2, validation=0.3) for lazy in (False, True))
    whole, lazily = concatenate(kept.train), concatenate(read.train)
    order = torch.randperm(len(whole))
    for expected, found in ((whole, lazily), (whole.subset(order), lazily.subset(order))):
        assert torch.equal(every(found), every(expected)) and torch.equal(found.y, expected.y)
    stored, y = every(kept.test[1])[:2], kept.test[1].y[:2]
    whole, lazily = whole.with_stored(stored, y), lazily.with_stored(stored, y)
    whole, lazily = whole.concat([kept.train[1]]), lazily.concat([read.train[1]])
    assert torch.equal(every(lazily), every(whole))
    order = torch.randperm(len(whole))
    for (x, y), (expected, labels) in zip(lazily.batches(order, 4), whole.batches(order, 4), strict=True):
        assert torch.equal(x, expected) and torch.equal(y, labels)
    assert torch.equal(every(concatenate(read.train[1:])), every(concatenate(kept.train[1:])))


def test_pixels_of_all_channels_move_alike_and_features_move_too():
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    x = torch.arange(2 * 3 * 6, dtype=torch.uint8).reshape(2, 3, 2, 3)
    moved = PixelOrder(order)(x)
    for n, c, p in itertools.product(range(2), range(3), range(6)):
        assert moved[n, c, p // 3, p % 3] == x[n, c, order[p] // 3, order[p] % 3]
    features = torch.rand(1, 6)
    assert torch.equal(PixelOrder(order)(features), features[:, order])
    flat = Source("f", *[TensorSamples(torch.rand(4, 6), torch.zeros(4).long())] * 2, classes=1)
    assert sorted(permuted_stream(flat, experiences=2).train[1].view.order_P.tolist()) == list(range(6))


def test_domains_share_one_copy_wherever_they_are():
    source = toy(3)
    for benchmark in (permuted_stream(source, experiences=3), rotated_stream(source, experiences=3)):
        assert all(part.x is source.train.x for part in benchmark.train)
        moved = benchmark.to("meta")
        for before, after in ((benchmark.train, moved.train), (benchmark.test, moved.test)):
            assert len({id(part.x) for part in after}) == 1 and after[0].x.device.type == "meta"
            assert [part.view for part in after] == [part.view for part in before]
    parts = class_incremental(source, experiences=3).to("meta").train
    assert len({id(part.x) for part in parts}) == 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32, torch.float64])
def test_quarter_turns_are_exact(dtype):
    x = torch.randint(0, 256, (3, 2, 5, 5)).to(dtype)
    assert torch.equal(Rotation(0.0)(x), x) and torch.equal(Rotation(360.0)(x), x)
    assert torch.equal(Rotation(90.0)(x)[:, :, 0], x[..., 4])  # the right column becomes the top row
    turned = x
    for quarter in range(1, 5):
        turned = Rotation(90.0)(turned)
        assert turned.dtype == dtype and turned.is_contiguous()
        assert torch.equal(turned, Rotation(90.0 * quarter)(x))
        assert torch.equal(turned, Rotation(90.0 * quarter - 360)(x))
    assert torch.equal(turned, x)


def test_half_a_turn_of_an_oblong_picture_is_exact_and_a_quarter_keeps_its_size():
    x = torch.randint(0, 256, (2, 1, 4, 7), dtype=torch.uint8)
    assert torch.equal(Rotation(180.0)(x), x.flip(-1, -2))
    quarter = Rotation(90.0)(x)
    assert quarter.shape == x.shape
    # A quarter turn takes the middle 4 x 4 pixels onto half-pixel places: bilinear means of four.
    assert not torch.equal(quarter, x) and int(quarter[..., 0].sum()) == 0


@pytest.mark.parametrize("degrees", [1.0, 33.0, 45.0, -20.0, 135.5, 400.0])
@pytest.mark.parametrize("shape", [(1, 1, 28, 28), (5, 3, 12, 7)])
def test_other_angles_are_torchvisions(degrees, shape):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    ours, theirs = Rotation(degrees)(x), rotate(x, degrees, InterpolationMode.BILINEAR)
    assert ours.dtype == torch.uint8 and int((ours.int() - theirs.int()).abs().max()) <= 1
    assert float((ours != theirs).float().mean()) < 0.01  # ties that round the other way
    one_by_one = torch.cat([Rotation(degrees)(one) for one in x.split(1)])
    assert torch.equal(ours, one_by_one)
    floats = Rotation(degrees)(x.double())
    assert floats.dtype == torch.float64 and float((floats - ours).abs().max()) <= 0.51


def test_angles():
    assert [r and r.degrees for r in rotations(5)] == [None, 45.0, 90.0, 135.0, 180.0]
    assert rotations(1) == (None,)
    benchmark = rotated_stream(toy(3), experiences=9, angles=(10.0, 360.0, -90.0))
    assert benchmark.domains == ("rotated by 10 degrees", "as stored", "rotated by -90 degrees")
    assert torch.equal(every(benchmark.test[2]), every(benchmark.test[1]).rot90(-1, (-2, -1)))
    with pytest.raises(ConfigError, match=r"benchmark.angles: found \[nan\]"):
        rotated_stream(toy(3), experiences=1, angles=(float("nan"),))
    flat = Source("flat", *[TensorSamples(torch.rand(4, 6), torch.zeros(4).long())] * 2, classes=1)
    with pytest.raises(DataError, match=r"flat: found inputs of shape \[6\], which cannot be rotated"):
        rotated_stream(flat, experiences=2)
    for make in (permuted_stream, rotated_stream):
        with pytest.raises(ConfigError, match="benchmark.experiences: found 0"):
            make(toy(3), experiences=0)


def test_functions_are_named_without_their_address():
    class Dimmed:
        def __call__(self, x):
            return x // 2

    def night(x):
        return x // 4

    assert domain_incremental(toy(2), [night, None, Dimmed(), lambda x: x]).domains == ("night", "as stored", "Dimmed", "<lambda>")


def test_all_domains_at_once():
    benchmark = rotated_stream(toy(3), experiences=3)
    joint = concatenate(benchmark.train)
    assert torch.equal(every(joint), torch.cat([every(part) for part in benchmark.train]))
    assert torch.equal(joint.y, benchmark.train[0].y.repeat(3)) and joint.view is None


def test_domains_of_ones_own():
    class Negative:
        def __call__(self, raw):
            return -raw

        def __str__(self):
            return "negative"

    benchmark = domain_incremental(toy(2), [Negative(), None], task_labels=True)
    assert benchmark.domains == ("negative", "as stored")
    assert torch.equal(every(benchmark.train[0]), -every(benchmark.train[1]))
    assert [e.task_label for e in benchmark.avalanche.streams["test"]] == [0, 1]
