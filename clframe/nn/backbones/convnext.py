"""ConvNeXt-T of torchvision (Liu et al., "A ConvNet for the 2020s", 2022).

Stages: ``stem``, every block from ``stage1.0`` on, blocks counted from 0, and ``pool``: the global average and
its normalization. The first block of stages 2 to 4 begins with the downsampling. Taps are
(channels, height, width).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from clframe.nn.backbones.base import Backbone, require_image
from clframe.nn.backbones.pretrained import for_channels, torchvision_model
from clframe.nn.backbones.taps import shaped


def convnext_tiny(input_shape: tuple[int, int, int], *, weights: str | None = None) -> Backbone:
    """ConvNeXt-T of torchvision, 3, 3, 9 and 3 blocks in its stages.

    Args:
        input_shape: (channels, height, width) of one image, at least 32 pixels each side.
        weights: Published weights, such as ``IMAGENET1K_V1``; None for random ones.

    Raises:
        ConfigError: Images too small, or weights for other than three channels.
        UnknownNameError: Weights that do not exist.
        DataError: Weights that could not be downloaded.
    """
    channels, _, _ = require_image(input_shape, 32, where="convnext_tiny")
    model = torchvision_model("convnext_tiny", weights=weights, channels=channels)
    draw = partial(nn.init.trunc_normal_, std=0.02)
    model.features[0][0] = for_channels(model.features[0][0], channels, draw=draw)
    stages = shaped(convnext_stages(model), input_shape, where="convnext_tiny")
    return Backbone(stages, input_shape=input_shape)


def convnext_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.ConvNeXt``, which lends its parts; the last linear layer is left out."""
    stem, *parts = model.features
    stages = [("stem", stem)]
    for number, blocks in enumerate(parts[::2], start=1):
        first, *others = blocks
        if number > 1:
            first = nn.Sequential(parts[2 * number - 3], first)  # the downsampling stands between the stages
        stages += [(f"stage{number}.{index}", block) for index, block in enumerate((first, *others))]
    norm, flatten, _ = model.classifier
    return [*stages, ("pool", nn.Sequential(model.avgpool, norm, flatten))]
