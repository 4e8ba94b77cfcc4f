"""Augmentation of whole batches by a few tensor operations, with random parameters per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from clframe.errors import ConfigError, DataError
from clframe.registry import Registry


def upload(index: Tensor, device: torch.device) -> Tensor:
    """Copy ``index`` to ``device`` without synchronizing: copies from pinned memory are asynchronous."""
    if device.type == "cuda":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)


def crop(images_BCHW: Tensor, top_B: Tensor, left_B: Tensor, *, padding: int, fill: float = 0) -> Tensor:
    """Pad images by ``padding`` pixels on every side and crop each to its old size.

    Done in one pass: a strided view of the padded batch holds the windows that start at any of its elements
    (overlapping in memory, without a copy), and the B wanted windows are selected by their first element.

    Args:
        images_BCHW: Images of any dtype.
        top_B: First row of each window, 0 to ``2 * padding``.
        left_B: First column of each window, 0 to ``2 * padding``.
        padding: Pixels added on every side.
        fill: Value of these pixels, in units of the images.

    >>> crop(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([2]), torch.tensor([0]), padding=1).tolist()
    [[[[0, 3], [0, 0]]]]
    """
    b, c, h, w = images_BCHW.shape
    padded = pad(images_BCHW, (padding,) * 4, value=fill)
    row = w + 2 * padding
    plane = (h + 2 * padding) * row
    window = (c - 1) * plane + (h - 1) * row + w
    windows = padded.as_strided((b * c * plane - window + 1, c, h, w), (1, plane, row, 1))
    first_B = torch.arange(0, b * c * plane, c * plane).add_(top_B, alpha=row).add_(left_B)
    return windows.index_select(0, upload(first_B, images_BCHW.device))


def mirror(images_BCHW: Tensor, mirrored_B: Tensor) -> Tensor:
    """Flip the images selected by the mask ``mirrored_B`` left to right.

    >>> mirror(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([False, True])).flatten().tolist()
    [1, 2, 4, 3]
    """
    b = images_BCHW.shape[0]
    which_B = torch.arange(b).add_(mirrored_B, alpha=b)
    # Selecting whole images from both versions copies long runs; torch.where is ten times slower on bytes.
    both = torch.cat([images_BCHW, images_BCHW.flip(-1)])
    return both.index_select(0, upload(which_B, images_BCHW.device))


def adjust_brightness(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Scale brightness: ``factor * image``, where 0 gives black and 1 the image itself."""
    return _blend(images_BCHW, None, factor_B)


def adjust_contrast(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Scale contrast: ``factor * image + (1 - factor) * m``, with m the mean of the gray image."""
    gray = _gray(images_BCHW).to(_compute_dtype(images_BCHW))
    return _blend(images_BCHW, gray.mean(dim=(1, 2, 3), keepdim=True), factor_B)


def adjust_saturation(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """Scale saturation: ``factor * image + (1 - factor) * gray``, where 0 gives gray and 1 the image itself."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    return _blend(images_BCHW, _gray(images_BCHW), factor_B)


def adjust_hue(images_BCHW: Tensor, shift_B: Tensor) -> Tensor:
    """Shift the hue by ``shift`` turns of the color circle (-0.5 to 0.5); gray images are unchanged."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    is_byte = images_BCHW.dtype == torch.uint8
    rgb = _copy(images_BCHW)
    rgb = rgb.div_(255) if is_byte else rgb
    r, g, b = rgb.split(1, dim=1)
    value = rgb.amax(dim=1, keepdim=True)
    chroma = value - rgb.amin(dim=1, keepdim=True)
    # In sixths of the circle: the largest channel selects the third, the difference of the other two the position in
    # it. If two channels are equally large both choices agree, and if all three are, the hue has no effect.
    numerator = torch.where(r == value, g - b, torch.where(g == value, b - r, r - g))
    third = torch.where(r == value, 0, torch.where(g == value, 2, 4))
    hue = numerator.div_(chroma + (chroma == 0)).add_(third).add_(6 * _per_image(shift_B, rgb))
    # Each channel peaks at one hue and decreases with the distance d from it around the circle:
    # channel = value - chroma * min(max(d - 1, 0), 1).
    d = rgb.copy_(hue).sub_(2 * torch.arange(3, device=rgb.device).reshape(1, 3, 1, 1))
    d -= (d / 6).round_().mul_(6)
    turned = d.abs_().sub_(1).clamp_(0, 1).mul_(chroma.neg_()).add_(value)
    return turned.mul_(255.999).to(torch.uint8) if is_byte else turned


def _blend(images_BCHW: Tensor, other: Tensor | None, factor_B: Tensor) -> Tensor:
    """``factor * images + (1 - factor) * other``, clipped to the range of images and cast to their dtype."""
    mixed = _copy(images_BCHW).mul_(_per_image(factor_B, images_BCHW))
    if other is not None:
        mixed += _per_image(1 - factor_B, images_BCHW) * other
    return mixed.clamp_(0, 255 if images_BCHW.dtype == torch.uint8 else 1).to(images_BCHW.dtype)


def _gray(images_BCHW: Tensor) -> Tensor:
    """Luma of the images, 0.2989 R + 0.587 G + 0.114 B (ITU-R 601), in their dtype."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    dtype = _compute_dtype(images_BCHW)
    r, g, b = (channel.to(dtype) for channel in images_BCHW.split(1, dim=1))
    luma: Tensor = (0.2989 * r).add_(0.587 * g).add_(0.114 * b)
    return luma.to(images_BCHW.dtype)


def _copy(images: Tensor) -> Tensor:
    """Copy of the images as floats, which later steps change in place instead of allocating."""
    return images.to(_compute_dtype(images), copy=True)


def _compute_dtype(images: Tensor) -> torch.dtype:
    return images.dtype if images.is_floating_point() else torch.float32


def _per_image(amount_B: Tensor, images: Tensor) -> Tensor:
    """Shape one number per image for broadcasting, on the device of the images."""
    return upload(amount_B.to(_compute_dtype(images)), images.device).reshape(-1, 1, 1, 1)


class Augmentation(Protocol):
    """Random transform of a batch that preserves shape, dtype and device and does not modify its argument."""

    @property
    def is_identity(self) -> bool:
        """Whether it never changes anything; it is then skipped and draws nothing."""

    def __call__(self, images_BCHW: Tensor, generator: Generator) -> Tensor:
        """Transform a batch, with draws from ``generator``."""


def apply_augmentations(images_BCHW: Tensor, augmentations: tuple[Augmentation, ...], generator: Generator) -> Tensor:
    """Apply augmentations in order; without any, return the argument itself.

    Raises:
        DataError: The inputs are not images.
    """
    for augmentation in augmentations:
        if augmentation.is_identity:
            continue
        if images_BCHW.ndim != 4:
            raise DataError(
                f"augmentation: found inputs of shape {tuple(images_BCHW.shape[1:])}; augment only images "
                f"(channels, height, width)"
            )
        images_BCHW = augmentation(images_BCHW, generator)
    return images_BCHW


@dataclass(frozen=True)
class PadCrop:
    """Pad by ``padding`` pixels on every side and crop a window of the old size, uniformly at random.

    Like ``torchvision.transforms.RandomCrop(size, padding=padding, fill=fill)``.

    Args:
        padding: Pixels added on every side.
        fill: Value of these pixels, in units of the stored inputs.

    >>> generator = torch.Generator().manual_seed(0)
    >>> PadCrop(2)(torch.ones(8, 3, 5, 5), generator).shape
    torch.Size([8, 3, 5, 5])
    """

    padding: int = 4
    fill: float = 0

    def __post_init__(self) -> None:
        """Raise ConfigError for a negative padding."""
        if self.padding < 0:
            raise ConfigError(f"augmentation.padding: found {self.padding}; give at least 0 pixels")

    @property
    def is_identity(self) -> bool:
        """Whether padding is 0: there is only one window."""
        return self.padding == 0

    def __call__(self, images_BCHW: Tensor, generator: Generator) -> Tensor:
        """Crop each image at a random position."""
        positions, count = 2 * self.padding + 1, images_BCHW.shape[0]
        top_B, left_B = torch.randint(positions, (2, count), generator=generator)
        return crop(images_BCHW, top_B, left_B, padding=self.padding, fill=self.fill)


@dataclass(frozen=True)
class Flip:
    """Flip left to right with a given probability, like ``torchvision.transforms.RandomHorizontalFlip``.

    Args:
        probability: Probability that an image is flipped.
    """

    probability: float = 0.5

    def __post_init__(self) -> None:
        """Raise ConfigError for a number outside [0, 1]."""
        if not 0 <= self.probability <= 1:
            raise ConfigError(
                f"augmentation.probability: found {self.probability}; give a number from 0 to 1"
            )

    @property
    def is_identity(self) -> bool:
        """Whether no image is ever flipped."""
        return self.probability == 0

    def __call__(self, images_BCHW: Tensor, generator: Generator) -> Tensor:
        """Flip a random subset of the images."""
        return mirror(images_BCHW, torch.rand(images_BCHW.shape[0], generator=generator) < self.probability)


@dataclass(frozen=True)
class ColorJitter:
    """Change brightness, contrast, saturation and hue, like ``torchvision.transforms.ColorJitter``.

    Each image draws a factor from [max(0, 1 - v), 1 + v] for the first three and a shift from [-hue, hue]. The order
    of the four is drawn per batch, the amounts per image, so every single image has torchvision's distribution.
    Floating-point images must be in [0, 1].

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
        """Raise ConfigError for negative strengths and for hues beyond half a turn."""
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
        """Change each image by random amounts.

        Raises:
            DataError: Images that are neither gray nor RGB.
        """
        if images_BCHW.shape[1] not in (1, 3):
            raise DataError(
                f"augmentation: found images of {images_BCHW.shape[1]} channels; use ColorJitter on gray or RGB images"
            )
        steps: tuple[tuple[Callable[[Tensor, Tensor], Tensor], float, float], ...] = (
            (adjust_brightness, 1, self.brightness),
            (adjust_contrast, 1, self.contrast),
            (adjust_saturation, 1, self.saturation),
            (adjust_hue, 0, self.hue),
        )
        for step in torch.randperm(len(steps), generator=generator).tolist():
            adjust, center, strength = steps[step]
            if strength == 0:
                continue
            low, high = center - strength, center + strength
            low = max(low, 0) if center else low
            unit_B = torch.rand(len(images_BCHW), generator=generator, dtype=torch.float64)
            images_BCHW = adjust(images_BCHW, low + (high - low) * unit_B)
        return images_BCHW


AUGMENTATIONS: Registry[tuple[Augmentation, ...]] = Registry("augmentation")
"""Augmentations by their names in configs; ``none`` is the identity."""
AUGMENTATIONS.add("none", ())
AUGMENTATIONS.add("crop", (PadCrop(4),))
AUGMENTATIONS.add("flip", (Flip(0.5),))
AUGMENTATIONS.add("cifar", (PadCrop(4), Flip(0.5)))
AUGMENTATIONS.add("jitter", (ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),))
