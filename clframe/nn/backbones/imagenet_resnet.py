"""ResNet18, 34 and 50 of torchvision (He et al., 2016, table 1), for 224x224 images and others.

Stages: ``stem``, every residual block from ``layer1.0`` on, blocks counted from 0, and ``pool``, the global
average. Taps are (channels, height, width).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import nn

from clframe.errors import ConfigError
from clframe.nn.backbones.base import Backbone, require_image
from clframe.nn.backbones.pretrained import for_channels, torchvision_model
from clframe.nn.backbones.taps import shaped

Stem = Literal["imagenet", "cifar"]


def resnet18(
    input_shape: tuple[int, int, int],
    *,
    weights: str | None = None,
    stem: Literal["imagenet", "cifar"] = "imagenet",
) -> Backbone:
    """ResNet18 of torchvision, two blocks a layer.

    Args:
        input_shape: (channels, height, width) of one image, at least 8 pixels each side.
        weights: Published weights, such as ``IMAGENET1K_V1``; None for random ones. They expect colors
            normalized with ImageNet's mean and standard deviation.
        stem: ``imagenet``, a 7x7 convolution and pooling that divide the image by 4, or ``cifar``, a 3x3
            convolution that keeps it, as continual-learning code has it for small images.

    Raises:
        ConfigError: An option out of range, images too small, or weights for another stem or other channels.
        UnknownNameError: Weights that do not exist.
        DataError: Weights that could not be downloaded.

    >>> resnet18((3, 224, 224)).tap_shapes["layer4.0"]
    (512, 7, 7)
    """
    return _resnet("resnet18", input_shape, weights=weights, stem=stem)


def resnet34(
    input_shape: tuple[int, int, int],
    *,
    weights: str | None = None,
    stem: Literal["imagenet", "cifar"] = "imagenet",
) -> Backbone:
    """ResNet34 of torchvision, 3, 4, 6 and 3 blocks in its layers.

    Options as in :func:`resnet18`.
    """
    return _resnet("resnet34", input_shape, weights=weights, stem=stem)


def resnet50(
    input_shape: tuple[int, int, int],
    *,
    weights: str | None = None,
    stem: Literal["imagenet", "cifar"] = "imagenet",
) -> Backbone:
    """ResNet50 of torchvision, 3, 4, 6 and 3 bottleneck blocks.

    Options as in :func:`resnet18`.
    """
    return _resnet("resnet50", input_shape, weights=weights, stem=stem)


def resnet_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.ResNet``, which lends its parts; only ``fc`` is left out."""
    stages = [("stem", nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool))]
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        stages += [(f"{layer}.{index}", block) for index, block in enumerate(getattr(model, layer))]
    return [*stages, ("pool", nn.Sequential(model.avgpool, nn.Flatten()))]


def _resnet(
    name: str, input_shape: tuple[int, int, int], *, weights: str | None, stem: Stem
) -> Backbone:
    channels, _, _ = require_image(input_shape, 8, where=name)
    if stem not in ("imagenet", "cifar"):
        raise ConfigError(f"{name}.stem: found {stem!r}; give 'imagenet' or 'cifar'")
    if stem == "cifar" and weights is not None:
        raise ConfigError(f"{name}.stem: found 'cifar' with weights {weights}; give 'imagenet', or no weights")
    model = torchvision_model(name, weights=weights, channels=channels)
    draw = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    if stem == "cifar":
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, 3, padding=1, bias=False)
        draw(model.conv1.weight)
        model.maxpool = nn.Identity()
    else:
        model.conv1 = for_channels(model.conv1, channels, draw=draw)
    return Backbone(shaped(resnet_stages(model), input_shape, where=name), input_shape=input_shape)
