"""Swin-T and SwinV2-S of torchvision (Liu et al., 2021 and 2022).

Stages: ``stem``, every block from ``stage1.0`` on, blocks counted from 0, and ``pool``: normalization and the
global average. The first block of stages 2 to 4 begins with the patch merging. torchvision's maps are
channels-last; every tap here is turned to (channels, height, width), a view without a copy, so that heads find
the layout of the other image backbones.
"""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any

from torch import nn

from clframe.nn.backbones.base import Backbone, require_image
from clframe.nn.backbones.pretrained import ChannelsFirst, for_channels, torchvision_model
from clframe.nn.backbones.taps import shaped


def swin_t(input_shape: tuple[int, int, int], *, weights: str | None = None) -> Backbone:
    """Swin-T of torchvision, 2, 2, 6 and 2 blocks in its stages, windows of 7x7 patches.

    Args:
        input_shape: (channels, height, width) of one image, at least 4 pixels each side.
        weights: Published weights, such as ``IMAGENET1K_V1``; None for random ones.

    Raises:
        ConfigError: Images too small, or weights for other than three channels.
        UnknownNameError: Weights that do not exist.
        DataError: Weights that could not be downloaded.
    """
    return _swin("swin_t", input_shape, weights=weights)


def swin_v2_s(input_shape: tuple[int, int, int], *, weights: str | None = None) -> Backbone:
    """SwinV2-S of torchvision, 2, 2, 18 and 2 blocks, windows of 8x8 patches.

    Options as in :func:`swin_t`.
    """
    return _swin("swin_v2_s", input_shape, weights=weights)


def swin_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.SwinTransformer``, which lends its parts; only ``head`` is left out."""
    stem, *parts = model.features
    stages: list[tuple[str, nn.Module]] = [("stem", ChannelsFirst(stem, from_image=True))]
    for number, blocks in enumerate(parts[::2], start=1):
        first, *others = blocks
        if number > 1:
            first = nn.Sequential(parts[2 * number - 3], first)  # the patch merging stands between the stages
        bodies = (first, *others)
        stages += [(f"stage{number}.{index}", ChannelsFirst(body)) for index, body in enumerate(bodies)]
    norm = ChannelsFirst(model.norm)
    return [*stages, ("pool", nn.Sequential(norm, model.avgpool, model.flatten))]


def _swin(name: str, input_shape: tuple[int, int, int], *, weights: str | None) -> Backbone:
    channels, _, _ = require_image(input_shape, 4, where=name)
    model = torchvision_model(name, weights=weights, channels=channels)
    draw = partial(nn.init.kaiming_uniform_, a=sqrt(5))  # torch's default, which torchvision leaves here
    model.features[0][0] = for_channels(model.features[0][0], channels, draw=draw)
    return Backbone(shaped(swin_stages(model), input_shape, where=name), input_shape=input_shape)
