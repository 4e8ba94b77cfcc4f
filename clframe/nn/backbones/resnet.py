"""Residual networks for CIFAR (He et al., "Deep residual learning for image recognition", 2016, section 4.2).

A 3x3 convolution with 16 channels, three layers of n residual blocks with 16, 32 and 64 channels, the first
block of layers two and three halving the image, then global average pooling: 6n + 2 weighted layers. Every
block is a stage, ``layer1.0`` to ``layer3.{n-1}``, blocks counted from 0; ``stem`` and ``pool`` stand around
them.

Two shortcuts where the shape changes, both from the paper:

- ``conv`` (option B): a strided 1x1 convolution with batch normalization, as most continual-learning code
  has it. ResNet32 with 100 classes: 472,756 parameters and 69,130,496 MACs at 32x32. The 69.90 MMACs also
  quoted for it are these plus two operations for every normalized value and one for every value of a
  residual sum.
- ``pad`` (option A): every second pixel and zeros in the new channels, no parameters, as the paper's CIFAR
  networks have it. With 10 classes: 269,722 parameters for ResNet20 and 464,154 for ResNet32.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone, he_initialized, require_at_least, require_image

Shortcut = Literal["conv", "pad"]


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
    return he_initialized(Backbone(stages, input_shape=input_shape), fan="fan_out")


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
