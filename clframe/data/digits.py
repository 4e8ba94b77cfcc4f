"""The handwritten digits bundled with scikit-learn: real data, nothing to download."""

from __future__ import annotations

import torch

from clframe.data.samples import TensorSamples
from clframe.data.source import SOURCES, Source
from clframe.data.sources.labels import split_off_test


@SOURCES.register("digits")
def digits(*, test_fraction: float = 0.25) -> Source:
    """1,797 grey 8x8 digits of scikit-learn, 10 classes; a fixed, class-balanced test split.

    Values 0..16 are kept as bytes; mean 4.88 and deviation 6.02 are those of the whole set. The split is
    the same for every seed. Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (1998).

    Args:
        test_fraction: Share of each class kept for testing.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(bunch.target).long()
    train, test = split_off_test(y, fraction=test_fraction, name="digits")
    samples = TensorSamples(x, y, mean=(4.884,), std=(6.017,))
    return Source(
        "digits",
        samples.subset(train),
        samples.subset(test),
        classes=10,
    )
