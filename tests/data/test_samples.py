"""In-memory samples: batches against longhand, and stored data that stays as it was stored."""

from __future__ import annotations

import pytest
import torch

from clframe.data import samples as module
from clframe.data.augmentation import Flip
from clframe.data.samples import EpochLoader, TensorSamples
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
    for _ in range(2):  # a second pass meets what the first one left
        loader = EpochLoader(data, 3, shuffle=shuffle, seed=5, experience=1)
        batches = list(loader)
        assert [len(y) for _, y in batches] == [3, 3, 1] and len(loader) == 3
        torch.testing.assert_close(torch.cat([x for x, _ in batches]), expected[order])
        assert torch.equal(torch.cat([y for _, y in batches]), data.y[order])
        assert torch.equal(data.x, stored)


@pytest.mark.parametrize("shuffle", [False, True])
def test_writing_into_a_batch_never_reaches_the_stored_data(shuffle: bool) -> None:
    """Samples that need no normalization are handed out as they are, but never as views."""
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
)  # as many as make 1024 bytes; one where its bytes are no multiple of 64
def test_batches_made_in_one_go_are_those_made_one_by_one(size, width, together, monkeypatch) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 1024)
    x = torch.randint(256, (37, width), dtype=torch.uint8)
    data = TensorSamples(x, torch.arange(37), mean=(9.0,), std=(4.0,))
    order = epoch_order(37, seed=1, experience=0, epoch=0)
    served = list(data.batches(order, size))
    for batch, index in zip(served, order.split(size), strict=True):
        for part, expected in zip(batch, data.batch(index), strict=True):
            assert torch.equal(part, expected) and part.is_contiguous()
    assert len({x.untyped_storage().data_ptr() for x, _ in served}) == -(-len(served) // together)


def test_batches_made_in_one_go_know_nothing_of_one_another() -> None:
    data = TensorSamples(torch.rand(32, 16), torch.zeros(32))
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
