"""In-memory samples: batches against longhand, and stored data that stays as it was stored."""

from __future__ import annotations

import pytest
import torch

from clframe.data import samples as module
from clframe.data.augmentation import Flip
from clframe.data.epoch_loader import EpochLoader
from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.errors import ConfigError
from clframe.seeding import epoch_order, generator_for

MEAN, STD = (3.0, -1.0), (2.0, 0.5)


def samples(dtype: torch.dtype, *, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> TensorSamples:
    x = torch.randint(20, (7, 2, 3, 3)).to(dtype)
    return TensorSamples(x, torch.arange(7) % 3, mean=mean, std=std)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_normalized_and_stored_data_stays(dtype: torch.dtype, shuffle: bool) -> None:
    data = samples(dtype)
    stored = data.x.clone()
    scale, shift = torch.tensor(STD).view(1, 2, 1, 1), torch.tensor(MEAN).view(1, 2, 1, 1)
    expected = (stored.float() - shift) / scale
    order = epoch_order(7, seed=5, experience=1, epoch=0) if shuffle else torch.arange(7)
    for _ in range(2):  # the first pass must not change the data of the second
        loader = EpochLoader(data, 3, shuffle=shuffle, seed=5, experience=1)
        batches = list(loader)
        assert [len(y) for _, y in batches] == [3, 3, 1] and len(loader) == 3
        torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected[order])
        assert torch.equal(torch.cat([y for _, y in batches]), data.y[order])
        assert torch.equal(data.x, stored)


@pytest.mark.parametrize("shuffle", [False, True])
def test_writing_into_a_batch_never_reaches_the_stored_data(shuffle: bool) -> None:
    """Samples without normalization are returned unchanged, but never as views."""
    data = samples(torch.float32, mean=(0.0,), std=(1.0,))
    stored = data.x.clone()
    for x, _ in EpochLoader(data, 4, shuffle=shuffle):
        x.zero_()
    data.prepare(data.x[:2]).zero_()
    assert torch.equal(data.x, stored)


def test_without_normalization_values_are_exact() -> None:
    data = samples(torch.float32, mean=(0.0,), std=(1.0,))
    x, y = data.batch(torch.tensor([6, 0]))
    assert torch.equal(x, data.x[[6, 0]]) and y.tolist() == [0, 0]
    assert torch.equal(data.prepare(data.x), data.x)


def test_one_and_many_channels_normalize_alike() -> None:
    one, two = samples(torch.uint8, mean=(4.0,), std=(3.0,)), None
    two = TensorSamples(one.x, one.y, mean=(4.0, 4.0), std=(3.0, 3.0))
    assert torch.equal(one.prepare(one.x), two.prepare(two.x))


@pytest.mark.parametrize(
    "size, width, together",
    [(1, 16, 16), (4, 16, 4), (5, 16, 3), (16, 16, 1), (21, 16, 1), (4, 7, 1), (16, 7, 2), (1, 1, 1)],
)  # batches of 1024 bytes together; a single one if its bytes are not a multiple of 64
def test_batches_of_a_chunk_equal_those_read_one_by_one(size, width, together, monkeypatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1024)
    x = torch.randint(256, (37, width), dtype=torch.uint8)
    data = TensorSamples(x, torch.arange(37), mean=(9.0,), std=(4.0,))
    order = epoch_order(37, seed=1, experience=0, epoch=0)
    served = list(data.batches(order, size))
    for batch, index in zip(served, order.split(size), strict=True):
        for part, expected in zip(batch, data.batch(index), strict=True):
            assert torch.equal(part, expected) and part.is_contiguous()
    assert len({x.untyped_storage().data_ptr() for x, _ in served}) == -(-len(served) // together)


def test_batches_of_a_chunk_are_independent() -> None:
    data = TensorSamples(torch.rand(32, 16), torch.zeros(32).long())
    weight = torch.ones(16, requires_grad=True)
    (first, _), (second, _) = data.batches(torch.arange(32), 16)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    kept = first.clone()
    loss = (first * weight).sum()
    second.zero_()
    loss.backward()  # a common version counter would refuse: "modified by an inplace operation"
    assert torch.equal(weight.grad, kept.sum(dim=0)) and torch.equal(first, kept)


def test_choices_are_drawn_for_each_batch() -> None:
    x = torch.arange(96).reshape(12, 1, 2, 4).to(torch.uint8)
    data = TensorSamples(x, torch.arange(12), augment=(Flip(0.5),))
    order, generator = torch.arange(12), generator_for(3)
    for x, y in data.batches(order, 4, generator=generator_for(3)):
        assert torch.equal(x, data.batch(y, generator=generator)[0])


def lazy_and_in_memory(count: int) -> list[TensorSamples | DatasetSamples]:
    x, y = torch.arange(count, dtype=torch.uint8).reshape(count, 1, 1, 1), torch.arange(count)
    return [TensorSamples(x, y), DatasetSamples.of(x, y, num_workers=0)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_last_batch_of_one_is_joined_to_the_one_before_it(shuffle) -> None:
    for data in lazy_and_in_memory(9):
        plain, joined, dropped = (
            list(EpochLoader(data, 4, shuffle=shuffle, seed=3, **options))
            for options in ({}, {"join_single": True}, {"drop_last": True})
        )
        assert [[len(y) for _, y in batches] for batches in (plain, joined, dropped)] == [[4, 4, 1], [4, 5], [4, 4]]
        for part in (0, 1):  # the same samples in the same order
            order = torch.cat([batch[part] for batch in plain])
            assert torch.equal(torch.cat([batch[part] for batch in joined]), order)
            assert torch.equal(torch.cat([batch[part] for batch in dropped]), order[:8])


@pytest.mark.parametrize("count, expected", [(8, [4, 4]), (10, [4, 4, 2]), (3, [3]), (1, [1]), (5, [5])])
def test_other_last_batches_stay(count, expected) -> None:
    for data in lazy_and_in_memory(count):
        loader = EpochLoader(data, 4, shuffle=True, join_single=True)
        assert [len(y) for _, y in loader] == expected and len(loader) == len(expected)


def test_dropping_must_leave_a_batch() -> None:
    data = lazy_and_in_memory(3)[0]
    with pytest.raises(ConfigError, match="^trainer.drop_last: found 3 training samples in experience 2, fewer than a"):
        EpochLoader(data, 4, experience=2, drop_last=True)
    assert len(EpochLoader(data, 3, drop_last=True)) == 1
