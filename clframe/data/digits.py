"""The handwritten digits bundled with scikit-learn: real data, nothing to download."""

from __future__ import annotations

import torch

from clframe.data.benchmark import SOURCES, Source
from clframe.data.samples import TensorSamples
from clframe.errors import ConfigError
from clframe.functional.seeding import generator_for


@SOURCES.register("digits")
def digits(*, test_fraction: float = 0.25) -> Source:
    """1,797 grey 8x8 digits of scikit-learn, 10 classes; a fixed, class-balanced test split.

    Values 0..16 are kept as bytes; mean 4.88 and deviation 6.02 are those of the whole set. The split is
    the same for every seed. Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (1998).

    Args:
        test_fraction: Share of each class kept for testing.
    """
    from sklearn.datasets import load_digits

    if not 0 < test_fraction < 1:
        raise ConfigError(f"benchmark.test_fraction: found {test_fraction}; give a number between 0 and 1")
    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    train, test = [], []
    for c in range(10):
        members = (y == c).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator_for(0, "digits", c))]
        held_out = max(1, round(test_fraction * len(members)))
        test.append(members[:held_out])
        train.append(members[held_out:])
    samples = TensorSamples(x, y, mean=(4.884,), std=(6.017,))
    return Source(
        "digits",
        samples.subset(torch.cat(train).sort().values),
        samples.subset(torch.cat(test).sort().values),
        classes=10,
    )
