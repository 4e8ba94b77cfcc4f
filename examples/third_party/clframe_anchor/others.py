"""A backbone, a data set, a metric and an exit policy, registered by entry points in pyproject.toml.

Shape suffixes: B batch, C classes, H height, N samples, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clframe.data import Source, TensorSamples
from clframe.exits import Carried
from clframe.metrics import Evaluations, Metric
from clframe.nn import Backbone


def lenet(input_shape: tuple[int, int, int], *, width: int = 6) -> Backbone:
    """LeNet-5 with ReLU for small images (LeCun et al., 1998).

    Args:
        input_shape: (channels, height, width) of one image, at least 8 pixels each side.
        width: Channels of the first convolution.
    """
    layers = [
        ("conv1", nn.Sequential(nn.Conv2d(input_shape[0], width, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))),
        ("conv2", nn.Sequential(nn.Conv2d(width, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2))),
        ("hidden", nn.Sequential(nn.Flatten(), nn.LazyLinear(84), nn.ReLU())),
    ]
    with torch.no_grad():  # one forward pass sets the size of the lazy layer
        nn.Sequential(*(layer for _, layer in layers))(torch.zeros(1, *input_shape))
    return Backbone.of(layers, input_shape=input_shape)


def stripes(*, lines: int = 4, noise: float = 0.3) -> Source:
    """Gray 8x8 images with one noisy bright row or column per class, 64 + 16 samples per class, at most 16 classes.

    Args:
        lines: Number of classes.
        noise: Standard deviation of the pixel noise.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> TensorSamples:
        y_N = torch.arange(lines).repeat(count)
        x_N1HW = noise * torch.randn(len(y_N), 1, 8, 8, generator=generator)
        for image_1HW, label in zip(x_N1HW, y_N.tolist(), strict=True):
            line = image_1HW[0, label] if label < 8 else image_1HW[0, :, label - 8]
            line += 1
        return TensorSamples(x_N1HW, y_N)

    return Source("stripes", draw(64), draw(16), classes=lines)


def _worst(found: Evaluations) -> float:
    return min(found.accuracy_TE[-1])


WORST_ACCURACY = Metric(label="accuracy on the worst experience", score=_worst)


def top_two_ratio(exit: int, scores_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
    """Confidence ``1 - p_2 / p_1`` of the two largest probabilities; 1 with a single class."""
    if scores_BC.shape[1] == 1:
        return torch.ones_like(scores_BC[:, 0]), ()
    first_B, second_B = scores_BC.softmax(1).topk(2, dim=1).values.unbind(1)
    return 1 - second_B / first_B, ()
