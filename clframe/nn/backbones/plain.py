"""Small backbones for quick experiments, and VGG: plain chains of convolutions or linear layers."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.nn.backbones.base import BACKBONES, Backbone, he_initialize
from clframe.nn.backbones.checks import require_at_least, require_depth, require_image


@BACKBONES.register("small_cnn")
def small_cnn(input_shape: tuple[int, int, int], *, width: int = 32, depth: int = 2) -> Backbone:
    """Small plain CNN for images of 8x8 to 32x32 pixels.

    ``depth`` blocks of 3x3 convolution, ReLU and 2x2 max-pooling with ``width``, ``2 width``, ... channels
    (stages ``block1``, ``block2``, ...), then one hidden layer of ``4 width`` features (stage ``hidden``).

    Args:
        input_shape: (channels, height, width) of one image, at least ``2 ** depth`` pixels each side.
        width: Channels of the first block.
        depth: Number of blocks; each halves the image, rounding down.

    Raises:
        ConfigError: An option out of range, or images too small for ``depth`` halvings.

    >>> small_cnn((1, 8, 8), width=16).tap_shapes
    {'block1': (16, 4, 4), 'block2': (32, 2, 2), 'hidden': (64,)}
    """
    require_at_least(width, 1, where="small_cnn.width")
    require_depth(depth, where="small_cnn.depth")
    channels, rows, columns = require_image(input_shape, 2**depth, where="small_cnn")
    stages: list[tuple[str, nn.Module, tuple[int, ...]]] = []
    for block in range(depth):
        wider = width * 2**block
        rows, columns = rows // 2, columns // 2
        layers = nn.Sequential(
            nn.Conv2d(channels, wider, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )
        stages.append((f"block{block + 1}", layers, (wider, rows, columns)))
        channels = wider
    stages.append(("hidden", DenseReLU(channels * rows * columns, 4 * width), (4 * width,)))
    return he_initialize(Backbone(stages, input_shape=input_shape), fan="fan_in")


@BACKBONES.register("mlp")
def mlp(input_shape: tuple[int, int, int], *, width: int = 256, depth: int = 2) -> Backbone:
    """Multi-layer perceptron on flattened images.

    ``depth`` hidden layers of ``width`` ReLU units: stages ``layer1``, ``layer2``, ...

    Args:
        input_shape: Shape of one sample; any shape, it is flattened.
        width: Units of every hidden layer.
        depth: Number of hidden layers.

    Raises:
        ConfigError: An option or a side of the input below 1.

    >>> mlp((1, 28, 28), width=100, depth=1).tap_shapes
    {'layer1': (100,)}
    """
    require_at_least(width, 1, where="mlp.width")
    require_depth(depth, where="mlp.depth")
    require_at_least(min(input_shape, default=0), 1, where="mlp: smallest side of the input")
    stages: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        (f"layer{layer + 1}", DenseReLU(width if layer else prod(input_shape), width), (width,))
        for layer in range(depth)
    ]
    return he_initialize(Backbone(stages, input_shape=input_shape), fan="fan_in")


class DenseReLU(nn.Linear):
    """Flatten, linear layer and ReLU in one module, because module calls dominate the time of small networks."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute relu(W x + b) of x flattened to (B, inputs)."""
        return F.linear(x.flatten(1), self.weight, self.bias).relu_()


_CONVOLUTIONS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
"""Number of convolutions in each of the five groups."""


@BACKBONES.register("vgg11")
def vgg11(
    input_shape: tuple[int, int, int], *, width: int = 64, hidden: int = 4096, dropout: float = 0.5
) -> Backbone:
    """VGG11 with batch normalization, for 32x32 images and up.

    Options as in :func:`vgg19`.
    """
    return _vgg("vgg11", input_shape, width=width, hidden=hidden, dropout=dropout)


@BACKBONES.register("vgg13")
def vgg13(
    input_shape: tuple[int, int, int], *, width: int = 64, hidden: int = 4096, dropout: float = 0.5
) -> Backbone:
    """VGG13 with batch normalization, for 32x32 images and up.

    Options as in :func:`vgg19`.
    """
    return _vgg("vgg13", input_shape, width=width, hidden=hidden, dropout=dropout)


@BACKBONES.register("vgg16")
def vgg16(
    input_shape: tuple[int, int, int], *, width: int = 64, hidden: int = 4096, dropout: float = 0.5
) -> Backbone:
    """VGG16 with batch normalization, for 32x32 images and up.

    Options as in :func:`vgg19`.
    """
    return _vgg("vgg16", input_shape, width=width, hidden=hidden, dropout=dropout)


@BACKBONES.register("vgg19")
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
    return he_initialize(Backbone(stages, input_shape=input_shape), fan="fan_in")
