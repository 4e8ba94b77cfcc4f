"""Augmentations of whole batches: every image gets random choices of its own, in a few tensor operations.

Choices are drawn on the CPU from a generator that the caller seeds, one small tensor for a batch, so they do
not depend on the device. On bytes they act before normalization, as torchvision's do on images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

from clframe.errors import ConfigError, DataError
from clframe.functional.images import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    cut,
    mirror,
)
from clframe.registry import Registry


class Augmentation(Protocol):
    """A random change of a batch that keeps its shape, dtype and device, and leaves the argument alone."""

    @property
    def is_identity(self) -> bool:
        """Whether it never changes anything; it is then left out and draws nothing."""

    def __call__(self, images_BCHW: Tensor, generator: Generator) -> Tensor:
        """The batch, changed by choices drawn from ``generator``."""


def augmented(images_BCHW: Tensor, augmentations: tuple[Augmentation, ...], generator: Generator) -> Tensor:
    """The batch after all augmentations, in order; with none of them the argument itself.

    Raises:
        DataError: The inputs are no images.
    """
    for augmentation in augmentations:
        if augmentation.is_identity:
            continue
        if images_BCHW.ndim != 4:
            raise DataError(
                f"augmentation: found inputs of shape {tuple(images_BCHW.shape[1:])}; augment images "
                f"(channels, height, width) only"
            )
        images_BCHW = augmentation(images_BCHW, generator)
    return images_BCHW


@dataclass(frozen=True)
class PadCrop:
    """Pad by ``padding`` pixels on every side and cut a window of the old size, uniformly at random.

    Like ``torchvision.transforms.RandomCrop(size, padding=padding, fill=fill)``.

    Args:
        padding: Pixels added on every side.
        fill: Their value, in units of the stored inputs.

    >>> generator = torch.Generator().manual_seed(0)
    >>> PadCrop(2)(torch.ones(8, 3, 5, 5), generator).shape
    torch.Size([8, 3, 5, 5])
    """

    padding: int = 4
    fill: float = 0

    def __post_init__(self) -> None:
        """Refuse a negative padding."""
        if self.padding < 0:
            raise ConfigError(f"augmentation.padding: found {self.padding}; give at least 0 pixels")

    @property
    def is_identity(self) -> bool:
        """Without padding there is one window only."""
        return self.padding == 0

    def __call__(self, images_BCHW: Tensor, generator: Generator) -> Tensor:
        """Each image cut at a place of its own."""
        places, count = 2 * self.padding + 1, images_BCHW.shape[0]
        top_B, left_B = torch.randint(places, (2, count), generator=generator)
        return cut(images_BCHW, top_B, left_B, padding=self.padding, fill=self.fill)


@dataclass(frozen=True)
class Flip:
    """Mirror left to right with a given probability, like ``torchvision.transforms.RandomHorizontalFlip``.

    Args:
        probability: Share of images mirrored in the mean.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not 0 <= self.probability <= 1:
            raise ConfigError(
                f"augmentation.probability: found {self.probability}; give a number from 0 to 1"
            )

    @property
    def is_identity(self) -> bool:
        """Whether no image is ever mirrored."""
        return self.probability == 0

    def __call__(self, images_BCHW: Tensor, generator: Generator) -> Tensor:
        """Each image mirrored or not."""
        return mirror(images_BCHW, torch.rand(images_BCHW.shape[0], generator=generator) < self.probability)


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue, like ``torchvision.transforms.ColorJitter``.

    Each image draws a factor from [max(0, 1 - v), 1 + v] for the first three, and a shift from [-hue, hue].
    The four follow one another in random order; the order is drawn once for a batch, the amounts for each
    image, so every single image has torchvision's distribution. Floats must lie between 0 and 1.

    Args:
        brightness: v for brightness.
        contrast: v for contrast.
        saturation: v for saturation.
        hue: Largest shift, in turns of the color circle, up to 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        """Refuse negative strengths and hues beyond half a turn."""
        for name in ("brightness", "contrast", "saturation"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"augmentation.{name}: found {getattr(self, name)}; give at least 0")
        if not 0 <= self.hue <= 0.5:
            raise ConfigError(f"augmentation.hue: found {self.hue}; give a number from 0 to 0.5")

    @property
    def is_identity(self) -> bool:
        """Whether all four strengths are zero."""
        return not (self.brightness or self.contrast or self.saturation or self.hue)

    def __call__(self, images_BCHW: Tensor, generator: Generator) -> Tensor:
        """Each image changed by amounts of its own."""
        if images_BCHW.shape[1] not in (1, 3):
            raise DataError(
                f"augmentation: found images of {images_BCHW.shape[1]} channels; jitter gray or RGB images"
            )
        steps: tuple[tuple[Callable[[Tensor, Tensor], Tensor], float, float], ...] = (
            (adjust_brightness, 1, self.brightness),
            (adjust_contrast, 1, self.contrast),
            (adjust_saturation, 1, self.saturation),
            (adjust_hue, 0, self.hue),
        )
        for place in torch.randperm(len(steps), generator=generator).tolist():
            adjust, center, strength = steps[place]
            if strength == 0:
                continue
            low, high = center - strength, center + strength
            low = max(low, 0) if center else low
            unit_B = torch.rand(len(images_BCHW), generator=generator, dtype=torch.float64)
            images_BCHW = adjust(images_BCHW, low + (high - low) * unit_B)
        return images_BCHW


AUGMENTATIONS: Registry[tuple[Augmentation, ...]] = Registry("augmentation")
"""Augmentations by the names that configs use; ``none`` is the identity."""
AUGMENTATIONS.add("none", ())
AUGMENTATIONS.add("crop", (PadCrop(4),))
AUGMENTATIONS.add("flip", (Flip(0.5),))
AUGMENTATIONS.add("cifar", (PadCrop(4), Flip(0.5)))
AUGMENTATIONS.add("jitter", (ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),))
