"""Residual networks for 32x32 images: ResNet20 and 32, and wide residual networks."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.nn.backbones.base import BACKBONES, Backbone, he_initialize
from clframe.nn.backbones.checks import require_at_least, require_depth, require_image

Shortcut = Literal["conv", "pad"]


@BACKBONES.register("resnet20")
def resnet20(
    input_shape: tuple[int, int, int], *, width: int = 16, shortcut: Literal["conv", "pad"] = "conv"
) -> Backbone:
    """ResNet20 for CIFAR, three blocks a layer.

    Args:
        input_shape: (channels, height, width) of one image, at least 4 pixels each side.
        width: Channels of the first layer; the next two have twice and four times as many.
        shortcut: What joins blocks of different shape: ``conv`` or ``pad``.

    Raises:
        ConfigError: An option out of range or images too small.

    >>> resnet20((3, 32, 32)).tap_shapes["layer2.0"]
    (32, 16, 16)
    """
    return _cifar_resnet(input_shape, blocks=3, width=width, shortcut=shortcut, where="resnet20")


@BACKBONES.register("resnet32")
def resnet32(
    input_shape: tuple[int, int, int], *, width: int = 16, shortcut: Literal["conv", "pad"] = "conv"
) -> Backbone:
    """ResNet32 for CIFAR, five blocks a layer.

    Args:
        input_shape: (channels, height, width) of one image, at least 4 pixels each side.
        width: Channels of the first layer; the next two have twice and four times as many.
        shortcut: What joins blocks of different shape: ``conv`` or ``pad``.

    Raises:
        ConfigError: An option out of range or images too small.

    >>> resnet32((3, 32, 32)).features
    64
    """
    return _cifar_resnet(input_shape, blocks=5, width=width, shortcut=shortcut, where="resnet32")


def _cifar_resnet(
    input_shape: tuple[int, int, int], *, blocks: int, width: int, shortcut: Shortcut, where: str
) -> Backbone:
    require_at_least(width, 1, where=f"{where}.width")
    if shortcut not in ("conv", "pad"):
        raise ConfigError(f"{where}.shortcut: found {shortcut!r}; give 'conv' or 'pad'")
    channels, rows, columns = require_image(input_shape, 4, where=where)
    stem = nn.Sequential(_conv3x3(channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    stages: list[tuple[str, nn.Module, tuple[int, ...]]] = [("stem", stem, (width, rows, columns))]
    channels = width
    for layer in range(3):
        wider, stride = width * 2**layer, 2 if layer else 1
        for block in range(blocks):
            module = BasicBlock(channels, wider, stride=stride, shortcut=shortcut)
            rows, columns = -(-rows // stride), -(-columns // stride)  # a 3x3 kernel padded by 1 rounds up
            stages.append((f"layer{layer + 1}.{block}", module, (wider, rows, columns)))
            channels, stride = wider, 1
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    stages.append(("pool", pool, (channels,)))
    return he_initialize(Backbone(stages, input_shape=input_shape), fan="fan_out")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``.

    Args:
        channels: Channels of the input.
        wider: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        shortcut: What joins input and output where their shapes differ.
    """

    def __init__(self, channels: int, wider: int, *, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, wider, stride=stride)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = _conv3x3(wider, wider)
        self.bn2 = nn.BatchNorm2d(wider)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != wider:
            if shortcut == "conv":
                self.shortcut = nn.Sequential(
                    nn.Conv2d(channels, wider, 1, stride=stride, bias=False), nn.BatchNorm2d(wider)
                )
            else:
                self.shortcut = PadShortcut(stride=stride, extra=wider - channels)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; ``x`` itself is not written to, it may be a tap."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class PadShortcut(nn.Module):
    """Every ``stride``-th pixel, with ``extra`` channels of zeros behind the old ones.

    >>> import torch
    >>> PadShortcut(stride=2, extra=3)(torch.ones(1, 2, 5, 4)).shape
    torch.Size([1, 5, 3, 2])
    """

    def __init__(self, *, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        """x_BCHW with more channels and fewer pixels."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def _conv3x3(channels: int, wider: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False)


@BACKBONES.register("wrn16_2")
def wrn16_2(input_shape: tuple[int, int, int], *, dropout: float = 0.0) -> Backbone:
    """WideResNet-16-2 for CIFAR, two blocks a group.

    Args:
        input_shape: (channels, height, width) of one image, at least 4 pixels each side.
        dropout: Probability of dropout between the two convolutions of a block.

    Raises:
        ConfigError: An option out of range or images too small.

    >>> wrn16_2((3, 32, 32)).tap_shapes["block2.0"]
    (64, 16, 16)
    """
    return _wide_resnet(input_shape, depth=16, widen=2, dropout=dropout, where="wrn16_2")


@BACKBONES.register("wide_resnet")
def wide_resnet(
    input_shape: tuple[int, int, int], *, depth: int = 28, widen: int = 10, dropout: float = 0.0
) -> Backbone:
    """WideResNet for CIFAR of any depth and widening factor.

    Args:
        input_shape: (channels, height, width) of one image, at least 4 pixels each side.
        depth: Weighted layers, 6n + 4 for n blocks a group: 10, 16, 22, 28, 40, ...
        widen: Factor on the channels of the three groups.
        dropout: Probability of dropout between the two convolutions of a block.

    Raises:
        ConfigError: An option out of range or images too small.

    >>> wide_resnet((1, 8, 8), depth=10, widen=1).names
    ('stem', 'block1.0', 'block2.0', 'block3.0', 'pool')
    """
    return _wide_resnet(input_shape, depth=depth, widen=widen, dropout=dropout, where="wide_resnet")


def _wide_resnet(
    input_shape: tuple[int, int, int], *, depth: int, widen: int, dropout: float, where: str
) -> Backbone:
    require_depth(depth, where=f"{where}.depth")
    if depth < 10 or (depth - 4) % 6:
        raise ConfigError(f"{where}.depth: found {depth}; give 6n + 4 for n blocks a group, such as 16 or 28")
    require_at_least(widen, 1, where=f"{where}.widen")
    if not 0 <= dropout < 1:
        raise ConfigError(f"{where}.dropout: found {dropout}; give 0 or more and less than 1")
    channels, rows, columns = require_image(input_shape, 4, where=where)
    stages: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("stem", nn.Conv2d(channels, 16, 3, padding=1, bias=False), (16, rows, columns))
    ]
    channels = 16
    for group in range(3):
        wider, stride = 16 * widen * 2**group, 2 if group else 1
        for block in range((depth - 4) // 6):
            module = PreactivationBlock(channels, wider, stride=stride, dropout=dropout)
            rows, columns = -(-rows // stride), -(-columns // stride)  # a 3x3 kernel padded by 1 rounds up
            stages.append((f"block{group + 1}.{block}", module, (wider, rows, columns)))
            channels, stride = wider, 1
    pool = nn.Sequential(
        nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    stages.append(("pool", pool, (channels,)))
    return he_initialize(Backbone(stages, input_shape=input_shape), fan="fan_out")


class PreactivationBlock(nn.Module):
    """Normalization and ReLU before each of two 3x3 convolutions, and a shortcut.

    With ``a = relu(bn(x))`` the block is ``x + f(a)`` where input and output have the same channels, else
    ``conv1x1(a) + f(a)``; ``f`` is convolution, normalization, ReLU, dropout and convolution.

    Args:
        channels: Channels of the input.
        wider: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        dropout: Probability of dropout before the second convolution.
    """

    def __init__(self, channels: int, wider: int, *, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, wider, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None if channels == wider else nn.Conv2d(channels, wider, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; ``x`` itself is not written to, it may be a tap."""
        a = self.relu(self.bn1(x))
        y = self.relu(self.bn2(self.conv1(a)))
        y = self.conv2(self.dropout(y))
        y += x if self.shortcut is None else self.shortcut(a)
        out: Tensor = y
        return out
