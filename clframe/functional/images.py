"""What can be done to a batch of images, each with an amount of its own: cut, mirror, recolor.

Every function takes images_BCHW, bytes (0 to 255) or floats (0 to 1), and one number for each image; it
leaves its argument alone and returns the same dtype. Results are those that torchvision's functions of the
same names give for one image after the other. Amounts are given on the CPU and follow the images to their
device without making the host wait. Shape suffixes: B images, C channels, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from clframe.functional.memory import upload


def cut(images_BCHW: Tensor, top_B: Tensor, left_B: Tensor, *, padding: int, fill: float = 0) -> Tensor:
    """images_BCHW padded by ``padding`` pixels on every side, then cut to their old size.

    One pass: the padded batch is seen as all the windows that begin at any of its elements (they overlap in
    memory, nothing is copied), and the B wanted ones are picked by their first element.

    Args:
        images_BCHW: Of any dtype.
        top_B: First row to keep, 0 to ``2 * padding``.
        left_B: First column to keep, likewise.
        padding: Pixels added on every side.
        fill: Their value, in units of the images.

    >>> cut(torch.tensor([[[[1, 2], [3, 4]]]]), torch.tensor([2]), torch.tensor([0]), padding=1).tolist()
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
    """images_BCHW, those of ``mirrored_B`` flipped left to right.

    >>> mirror(torch.tensor([[[[1, 2]]], [[[3, 4]]]]), torch.tensor([False, True])).flatten().tolist()
    [1, 2, 4, 3]
    """
    b = images_BCHW.shape[0]
    which_B = torch.arange(b).add_(mirrored_B, alpha=b)
    # Picking whole images out of both versions copies long runs; torch.where is ten times slower on bytes.
    both = torch.cat([images_BCHW, images_BCHW.flip(-1)])
    return both.index_select(0, upload(which_B, images_BCHW.device))


def adjust_brightness(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """``factor * image``: 0 is black, 1 changes nothing."""
    return _blend(images_BCHW, None, factor_B)


def adjust_contrast(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """``factor * image + (1 - factor) * m``, with m the mean of the gray image."""
    gray = _gray(images_BCHW).to(_compute_dtype(images_BCHW))
    return _blend(images_BCHW, gray.mean(dim=(1, 2, 3), keepdim=True), factor_B)


def adjust_saturation(images_BCHW: Tensor, factor_B: Tensor) -> Tensor:
    """``factor * image + (1 - factor) * gray``: 0 is gray, 1 changes nothing; gray images stay gray."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    return _blend(images_BCHW, _gray(images_BCHW), factor_B)


def adjust_hue(images_BCHW: Tensor, shift_B: Tensor) -> Tensor:
    """Turn every color by ``shift`` of the color circle (-0.5 to 0.5); gray images stay as they are."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    is_byte = images_BCHW.dtype == torch.uint8
    rgb = _copy(images_BCHW)
    rgb = rgb.div_(255) if is_byte else rgb
    r, g, b = rgb.split(1, dim=1)
    value = rgb.amax(dim=1, keepdim=True)
    chroma = value - rgb.amin(dim=1, keepdim=True)
    # Sixths of the circle: the strongest channel says which third, the other two where in it. Where two are
    # equally strong both say the same, and where all three are the hue has no effect.
    numerator = torch.where(r == value, g - b, torch.where(g == value, b - r, r - g))
    third = torch.where(r == value, 0, torch.where(g == value, 2, 4))
    hue = numerator.div_(chroma + (chroma == 0)).add_(third).add_(6 * _beside(shift_B, rgb))
    # Each channel is strongest at a hue of its own and falls off with the distance d from there, around the
    # circle: channel = value - chroma * min(max(d - 1, 0), 1).
    d = rgb.copy_(hue).sub_(2 * torch.arange(3, device=rgb.device).reshape(1, 3, 1, 1))
    d -= (d / 6).round_().mul_(6)
    turned = d.abs_().sub_(1).clamp_(0, 1).mul_(chroma.neg_()).add_(value)
    return turned.mul_(255.999).to(torch.uint8) if is_byte else turned


def _blend(images_BCHW: Tensor, other: Tensor | None, factor_B: Tensor) -> Tensor:
    """``factor * images + (1 - factor) * other``, clipped to what an image can hold and cut to its dtype."""
    mixed = _copy(images_BCHW).mul_(_beside(factor_B, images_BCHW))
    if other is not None:
        mixed += _beside(1 - factor_B, images_BCHW) * other
    return mixed.clamp_(0, 255 if images_BCHW.dtype == torch.uint8 else 1).to(images_BCHW.dtype)


def _gray(images_BCHW: Tensor) -> Tensor:
    """The images' luma, 0.2989 R + 0.587 G + 0.114 B (ITU-R 601), in their dtype."""
    if images_BCHW.shape[1] == 1:
        return images_BCHW
    dtype = _compute_dtype(images_BCHW)
    r, g, b = (channel.to(dtype) for channel in images_BCHW.split(1, dim=1))
    luma: Tensor = (0.2989 * r).add_(0.587 * g).add_(0.114 * b)
    return luma.to(images_BCHW.dtype)


def _copy(images: Tensor) -> Tensor:
    """The images as floats, in memory of their own: further steps write there rather than into new memory."""
    return images.to(_compute_dtype(images), copy=True)


def _compute_dtype(images: Tensor) -> torch.dtype:
    return images.dtype if images.is_floating_point() else torch.float32


def _beside(amount_B: Tensor, images: Tensor) -> Tensor:
    """One number for each image, shaped to act on whole images and on their device."""
    return upload(amount_B.to(_compute_dtype(images)), images.device).reshape(-1, 1, 1, 1)
