"""In-memory samples: batches against longhand, and stored data that stays as it was stored."""

from __future__ import annotations

import pytest
import torch

from clframe.data.samples import EpochLoader, TensorSamples
from clframe.functional.seeding import epoch_order

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
