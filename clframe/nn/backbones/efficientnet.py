"""EfficientNet-B0 and EfficientNetV2-S of torchvision (Tan and Le, 2019 and 2021).

Stages: ``stem``, every block from ``stage1.0`` on, blocks counted from 0, and ``pool``: the last 1x1
convolution and the global average. Taps are (channels, height, width). The classifier's dropout is left out
with it; the stochastic depth inside the blocks stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from clframe.nn.backbones.base import Backbone, require_image
from clframe.nn.backbones.pretrained import for_channels, torchvision_model
from clframe.nn.backbones.taps import shaped


def efficientnet_b0(input_shape: tuple[int, int, int], *, weights: str | None = None) -> Backbone:
    """EfficientNet-B0 of torchvision, 16 blocks in 7 stages.

    Args:
        input_shape: (channels, height, width) of one image, at least 8 pixels each side.
        weights: Published weights, such as ``IMAGENET1K_V1``; None for random ones.

    Raises:
        ConfigError: Images too small, or weights for other than three channels.
        UnknownNameError: Weights that do not exist.
        DataError: Weights that could not be downloaded.
    """
    return _efficientnet("efficientnet_b0", input_shape, weights=weights)


def efficientnet_v2_s(input_shape: tuple[int, int, int], *, weights: str | None = None) -> Backbone:
    """EfficientNetV2-S of torchvision, 40 blocks in 6 stages.

    Options as in :func:`efficientnet_b0`.
    """
    return _efficientnet("efficientnet_v2_s", input_shape, weights=weights)


def efficientnet_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.EfficientNet``, which lends its parts; ``classifier`` is left out."""
    stem, *groups, last = model.features
    stages = [("stem", stem)]
    for number, group in enumerate(groups, start=1):
        stages += [(f"stage{number}.{index}", block) for index, block in enumerate(group)]
    return [*stages, ("pool", nn.Sequential(last, model.avgpool, nn.Flatten()))]


def _efficientnet(name: str, input_shape: tuple[int, int, int], *, weights: str | None) -> Backbone:
    channels, _, _ = require_image(input_shape, 8, where=name)
    model = torchvision_model(name, weights=weights, channels=channels)
    draw = partial(nn.init.kaiming_normal_, mode="fan_out")
    model.features[0][0] = for_channels(model.features[0][0], channels, draw=draw)
    return Backbone(shaped(efficientnet_stages(model), input_shape, where=name), input_shape=input_shape)
