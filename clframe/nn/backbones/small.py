"""Small backbones for digits and quick experiments: a plain convolutional net and a perceptron.

Neither has batch normalization, so that batches of one sample and tiny memories train.
"""

from __future__ import annotations

from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from clframe.nn.backbones.base import Backbone, he_initialized, require_at_least, require_image


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
    require_at_least(depth, 1, where="small_cnn.depth")
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
    return he_initialized(Backbone(stages, input_shape=input_shape), fan="fan_in")


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
    require_at_least(depth, 1, where="mlp.depth")
    require_at_least(min(input_shape, default=0), 1, where="mlp: smallest side of the input")
    stages: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        (f"layer{layer + 1}", DenseReLU(width if layer else prod(input_shape), width), (width,))
        for layer in range(depth)
    ]
    return he_initialized(Backbone(stages, input_shape=input_shape), fan="fan_in")


class DenseReLU(nn.Linear):
    """Flatten, linear layer, ReLU: one module, since a small net's time goes into calling modules."""

    def forward(self, x: Tensor) -> Tensor:
        """relu(W x + b) of x flattened to (B, inputs)."""
        return F.linear(x.flatten(1), self.weight, self.bias).relu_()
