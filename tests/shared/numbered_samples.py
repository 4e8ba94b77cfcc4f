"""A toy data set in which every sample is known by its pixels."""

from __future__ import annotations

import torch

from clframe.data.lazy import DatasetSamples
from clframe.data.samples import TensorSamples
from clframe.data.source import Source

SHAPE = (1, 3, 3)


def samples(y, *, first_id, lazy=False):
    """One sample for each label: 3 x 3 pixels that no other sample and no other pixel has, in shuffled order."""
    pixels = 9
    x = (first_id + torch.arange(len(y)).unsqueeze(1)) * pixels + torch.arange(pixels)
    x, y = x.reshape(-1, *SHAPE).int(), torch.as_tensor(y)
    if lazy:
        return DatasetSamples.of(list(x), y, mean=(4.0,), std=(2.0,), num_workers=0)
    return TensorSamples(x, y, mean=(4.0,), std=(2.0,))


def toy(classes, *, lazy=False):
    """Class c has 3 + c training samples and two for testing."""
    train = [c for c in range(classes) for _ in range(3 + c)]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(5))
    y = torch.tensor(train)[order]
    return Source(
        "toy",
        samples(y, first_id=0, lazy=lazy),
        samples(list(range(classes)) * 2, first_id=1000, lazy=lazy),
        classes,
    )


def every(part):
    """All stored inputs, as the part sees them."""
    return part.raw(torch.arange(len(part)))


def ids(part):
    """Which sample each is, wherever its pixels have gone."""
    return (every(part).flatten(1).min(dim=1).values // 9).tolist()


def label_of(source):
    """The data set's own label of every sample."""
    return {i: int(c) for part in (source.train, source.test) for i, c in zip(ids(part), part.y, strict=True)}
