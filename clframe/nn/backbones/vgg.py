"""VGG networks with batch normalization (Simonyan and Zisserman, 2015, tables 1 A, B, D and E), for 32x32 and up.

Five groups of 3x3 convolutions, each with normalization and ReLU, and 2x2 max-pooling after each group. Every
convolution is a stage, ``block1.0``, ``block1.1``, ...; the last one of a group holds the pooling too. Two
fully connected layers with ReLU follow, stages ``fc1`` and ``fc2``, their dropout in front of the next layer; the
last stage, ``dropout``, is the one before the classifier.

In terms of torchvision's ``vgg19_bn``, the 16 convolutional taps are the outputs of ``features`` 2, 6, 9, 13, 16,
19, 22, 26, 29, 32, 35, 39, 42, 45, 48 and 52: a ReLU, or at 6, 13, 26, 39 and 52 the pooling behind it. On 32x32
images the first fully connected layer sees 512 features, as CIFAR versions have it.
"""

from __future__ import annotations

from torch import nn

from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone, he_initialized, require_at_least, require_image

_CONVOLUTIONS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Convolutions in each of the five groups."""


def vgg11(
    input_shape: tuple[int, int, int], *, width: int = 64, hidden: int = 4096, dropout: float = 0.5
) -> Backbone:
    """VGG11 with batch normalization, for 32x32 images and up.

    Options as in :func:`vgg19`.
    """
    return _vgg("vgg11", input_shape, width=width, hidden=hidden, dropout=dropout)


def vgg13(
    input_shape: tuple[int, int, int], *, width: int = 64, hidden: int = 4096, dropout: float = 0.5
) -> Backbone:
    """VGG13 with batch normalization, for 32x32 images and up.

    Options as in :func:`vgg19`.
    """
    return _vgg("vgg13", input_shape, width=width, hidden=hidden, dropout=dropout)


def vgg16(
    input_shape: tuple[int, int, int], *, width: int = 64, hidden: int = 4096, dropout: float = 0.5
) -> Backbone:
    """VGG16 with batch normalization, for 32x32 images and up.

    Options as in :func:`vgg19`.
    """
    return _vgg("vgg16", input_shape, width=width, hidden=hidden, dropout=dropout)


def vgg19(
    input_shape: tuple[int, int, int], *, width: int = 64, hidden: int = 4096, dropout: float = 0.5
) -> Backbone:
    """VGG19 with batch normalization, for 32x32 images and up.

    Args:
        input_shape: (channels, height, width) of one image, at least 32 pixels each side.
        width: Channels of the first group; the next ones have 2, 4, 8 and 8 times as many.
        hidden: Units of each of the two fully connected layers.
        dropout: Probability of dropout after each of them.

    Raises:
        ConfigError: An option out of range or images too small.

    >>> net = vgg19((3, 32, 32), width=8, hidden=16)
    >>> net.tap_shapes["block1.1"], net.tap_shapes["block5.3"], net.features
    ((8, 16, 16), (64, 1, 1), 16)
    """
    return _vgg("vgg19", input_shape, width=width, hidden=hidden, dropout=dropout)


def _vgg(
    name: str, input_shape: tuple[int, int, int], *, width: int, hidden: int, dropout: float
) -> Backbone:
    require_at_least(width, 1, where=f"{name}.width")
    require_at_least(hidden, 1, where=f"{name}.hidden")
    if not 0 <= dropout < 1:
        raise ConfigError(f"{name}.dropout: found {dropout}; give 0 or more and less than 1")
    channels, rows, columns = require_image(input_shape, 32, where=name)
    stages: list[tuple[str, nn.Module, tuple[int, ...]]] = []
    for group, convolutions in enumerate(_CONVOLUTIONS[name]):
        wider = width * min(2**group, 8)
        for index in range(convolutions):
            layers = [nn.Conv2d(channels, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU(inplace=True)]
            if index == convolutions - 1:
                layers.append(nn.MaxPool2d(2))
                rows, columns = rows // 2, columns // 2
            stages.append((f"block{group + 1}.{index}", nn.Sequential(*layers), (wider, rows, columns)))
            channels = wider
    flat = channels * rows * columns
    fc1 = nn.Sequential(nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(inplace=True))
    fc2 = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(inplace=True))
    stages += [("fc1", fc1, (hidden,)), ("fc2", fc2, (hidden,)), ("dropout", nn.Dropout(dropout), (hidden,))]
    return he_initialized(Backbone(stages, input_shape=input_shape), fan="fan_in")
