"""Published placements of exits, as data.

From Szatkowski et al., "Improving Continual Learning Performance and Efficiency with Auxiliary Classifiers" (2025).
An architecture is known by the names of its blocks, so that any backbone of the same blocks has its placements,
whatever its class or width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Taps for the exits before the last, in order of depth.

    Attributes:
        taps: Stage names.
        weights: What the loss of each weighs at the end of a ramp; the last exit's weighs 1.
    """

    taps: tuple[str, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Published:
    """Placements for one architecture, known by the names of its blocks; the first is the default."""

    blocks: tuple[str, ...]
    placements: tuple[Placement, ...]


def _blocks(kind: str, counts: Sequence[int]) -> tuple[str, ...]:
    """``kind1.0``, ``kind1.1``, ...: groups counted from 1, blocks from 0."""
    return tuple(f"{kind}{group}.{block}" for group, count in enumerate(counts, 1) for block in range(count))


def _steps(step: float, count: int) -> tuple[float, ...]:
    return tuple(round(step * (i + 1), 2) for i in range(count))


_RESNET32 = _blocks("layer", (5, 5, 5))
_VIT = tuple(f"encoder.{layer}" for layer in range(12))

PUBLISHED = {
    "resnet32": Published(
        _RESNET32,
        (
            Placement(
                ("layer1.2", "layer1.4", "layer2.1", "layer2.3", "layer3.0", "layer3.2"),
                (0.15, 0.30, 0.45, 0.60, 0.75, 0.90),
            ),
            Placement(("layer1.2", "layer2.1", "layer3.0"), (0.15, 0.45, 0.75)),
            # Of the twelve weights the paper gives the ends, .15 and .95; between them they are even.
            Placement(_RESNET32[2:-1], tuple(round(0.15 + 0.8 * i / 11, 3) for i in range(12))),
        ),
    ),
    "resnet18": Published(
        _blocks("layer", (2, 2, 2, 2)),
        (
            Placement(
                ("layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1", "layer4.0"),
                (0.30, 0.40, 0.55, 0.65, 0.80, 0.90),
            ),
        ),
    ),
    # Outputs 6, 13, 19, 26, 32, 39, 45 and 52 of torchvision's `features`, and the two hidden layers.
    "vgg19": Published(
        _blocks("block", (2, 2, 4, 4, 4)),
        (
            Placement(
                ("block1.1", "block2.1", "block3.1", "block3.3", "block4.1", "block4.3", "block5.1", "block5.3",
                 "fc1", "fc2"),
                _steps(0.09, 10),
            ),
        ),
    ),
    "wrn16_2": Published(
        _blocks("block", (2, 2, 2)),
        (
            Placement(
                ("block1.0", "block1.1", "block2.0", "block2.1", "block3.0"), (0.15, 0.35, 0.50, 0.65, 0.80)
            ),
        ),
    ),
    "vit_b_16": Published(_VIT, (Placement(_VIT[:-1], _steps(0.08, 11)),)),
}  # fmt: skip
"""By the name of the backbone that the paper uses."""


def family_of(names: Sequence[str]) -> str | None:
    """The published architecture whose blocks are all numbered stages, and the taps of all placements exist."""
    blocks = tuple(name for name in names if name.rpartition(".")[2].isdigit())
    for family, published in PUBLISHED.items():
        taps = {tap for placement in published.placements for tap in placement.taps}
        if blocks == published.blocks and taps <= set(names):
            return family
    return None
