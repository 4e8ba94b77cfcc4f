"""Wide residual networks for CIFAR (Zagoruyko and Komodakis, "Wide residual networks", 2016).

A 3x3 convolution with 16 channels, three groups of n pre-activation blocks with 16k, 32k and 64k channels, the
first block of groups two and three halving the image, then batch normalization, ReLU and global average
pooling: 6n + 4 weighted layers and a widening factor k. Every block is a stage, ``block1.0`` to ``block3.{n-1}``,
blocks counted from 0; ``stem`` and ``pool`` stand around them. A tap is a residual sum, not yet normalized.

Where a block changes the shape, its shortcut is a 1x1 convolution of the normalized input, as in the authors'
code. With 10 classes WRN-16-2 has 691,674 parameters (0.7 M in the paper).
"""

from __future__ import annotations

from torch import Tensor, nn

from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone, he_initialized, require_at_least, require_image


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
    return he_initialized(Backbone(stages, input_shape=input_shape), fan="fan_out")


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
