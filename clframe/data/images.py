"""Images of any mode as uint8 tensors: the one conversion that training, evaluation and prediction share.

- EXIF orientation is applied: phones store photographs as the sensor was held.
- Transparency is dropped, as torchvision and timm do; palettes are resolved; CMYK, YCbCr and HSV become RGB.
- 16 bits per channel are reduced to the upper 8, as Pillow and OpenCV do for color images.
- Animated and multi-page files give their first image.
- Resizing scales the image with bilinear interpolation until it covers the target, then crops the center: for a
  square target these are torchvision's ``Resize(side)`` and ``CenterCrop(side)``.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from clframe.errors import DataError

_GRAY = ("1", "L", "LA", "La")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_COLOR = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")
_STRAIGHT = {"La": "LA", "RGBa": "RGBA"}
"""Modes with premultiplied alpha, and those with the original colors."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Inverse of each value of the EXIF tag Orientation; 1 is upright."""


def count_channels(image: Image.Image, where: str) -> int:
    """Number of channels without transparency: 1 for gray images, 3 for color.

    Raises:
        DataError: Pixels of more than 16 bits per channel, whose range is not known.
    """
    if image.mode in _GRAY or _has_sixteen_bits(image):
        return 1
    if image.mode in _COLOR:
        return 3
    raise DataError(f"{where}: has pixels of mode {image.mode}; convert the images to 8 or 16 bits per channel")


def to_pixels(image: Image.Image, *, channels: int, size: int | tuple[int, int] | None = None) -> Tensor:
    """Convert an image to a uint8 tensor (channels, height, width).

    Args:
        image: Of any mode that :func:`count_channels` accepts.
        channels: 1 (gray) or 3 (color).
        size: Side of a square, or height and width, to resize and center-crop to; None: unchanged.
    """
    sixteen = _has_sixteen_bits(image)  # before the rotation, after which Pillow no longer knows the file format
    image = upright(image)
    if sixteen:
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    elif image.mode in _STRAIGHT:
        image = image.convert(_STRAIGHT[image.mode])
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting to RGB in one step makes Pillow warn
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        image = _resize(image, height, width)
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of an image."""
    image.load()  # TIFF images are rotated by their decoder, which then removes the tag
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata raises nearly anything; the pixels are fine
        orientation = 1
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _has_sixteen_bits(image: Image.Image) -> bool:
    # Depending on its version, Pillow reads gray PNG and PGM files of 16 bits as mode I, whose values have no limit in
    # other formats.
    return image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _resize(image: Image.Image, target_height: int, target_width: int) -> Image.Image:
    width, height = image.size
    if width * target_height <= height * target_width:  # narrower than the target: the widths are made equal
        scaled = target_width, int(target_width * height / width)
    else:
        scaled = int(target_height * width / height), target_height
    if scaled != (width, height):
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((scaled[0] - target_width) / 2), round((scaled[1] - target_height) / 2)
    if scaled == (target_width, target_height):
        return image
    return image.crop((left, top, left + target_width, top + target_height))
