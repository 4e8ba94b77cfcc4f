"""Convolutional networks and Swin transformers of torchvision, cut into stages."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any, Literal

from torch import nn

from clframe.errors import ConfigError
from clframe.nn.backbones.base import BACKBONES, Backbone
from clframe.nn.backbones.checks import require_image
from clframe.nn.backbones.pretrained import ChannelsFirst, adapt_channels, torchvision_model
from clframe.nn.backbones.stages import infer_shapes

Stem = Literal["imagenet", "cifar"]


@BACKBONES.register("resnet18")
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
            convolution that does not, as is usual in continual learning on small images.

    Raises:
        ConfigError: An option out of range, images too small, or weights for another stem or other channels.
        UnknownNameError: Weights that do not exist.
        DataError: Weights that could not be downloaded.

    >>> resnet18((3, 224, 224)).tap_shapes["layer4.0"]
    (512, 7, 7)
    """
    return _resnet("resnet18", input_shape, weights=weights, stem=stem)


@BACKBONES.register("resnet34")
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


@BACKBONES.register("resnet50")
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
    """Stages of a ``torchvision.models.ResNet``, built from its modules; only ``fc`` is left out."""
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
        model.conv1 = adapt_channels(model.conv1, channels, draw=draw)
    return Backbone(infer_shapes(resnet_stages(model), input_shape, where=name), input_shape=input_shape)


@BACKBONES.register("convnext_tiny")
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
    model.features[0][0] = adapt_channels(model.features[0][0], channels, draw=draw)
    stages = infer_shapes(convnext_stages(model), input_shape, where="convnext_tiny")
    return Backbone(stages, input_shape=input_shape)


def convnext_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.ConvNeXt``, built from its modules; the last linear layer is left out."""
    stem, *parts = model.features
    stages = [("stem", stem)]
    for number, blocks in enumerate(parts[::2], start=1):
        first, *others = blocks
        if number > 1:
            first = nn.Sequential(parts[2 * number - 3], first)  # the downsampling layer between the stages
        stages += [(f"stage{number}.{index}", block) for index, block in enumerate((first, *others))]
    norm, flatten, _ = model.classifier
    return [*stages, ("pool", nn.Sequential(model.avgpool, norm, flatten))]


@BACKBONES.register("efficientnet_b0")
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


@BACKBONES.register("efficientnet_v2_s")
def efficientnet_v2_s(input_shape: tuple[int, int, int], *, weights: str | None = None) -> Backbone:
    """EfficientNetV2-S of torchvision, 40 blocks in 6 stages.

    Options as in :func:`efficientnet_b0`.
    """
    return _efficientnet("efficientnet_v2_s", input_shape, weights=weights)


def efficientnet_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.EfficientNet``, built from its modules; ``classifier`` is left out."""
    stem, *groups, last = model.features
    stages = [("stem", stem)]
    for number, group in enumerate(groups, start=1):
        stages += [(f"stage{number}.{index}", block) for index, block in enumerate(group)]
    return [*stages, ("pool", nn.Sequential(last, model.avgpool, nn.Flatten()))]


def _efficientnet(name: str, input_shape: tuple[int, int, int], *, weights: str | None) -> Backbone:
    channels, _, _ = require_image(input_shape, 8, where=name)
    model = torchvision_model(name, weights=weights, channels=channels)
    draw = partial(nn.init.kaiming_normal_, mode="fan_out")
    model.features[0][0] = adapt_channels(model.features[0][0], channels, draw=draw)
    return Backbone(infer_shapes(efficientnet_stages(model), input_shape, where=name), input_shape=input_shape)


@BACKBONES.register("swin_t")
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


@BACKBONES.register("swin_v2_s")
def swin_v2_s(input_shape: tuple[int, int, int], *, weights: str | None = None) -> Backbone:
    """SwinV2-S of torchvision, 2, 2, 18 and 2 blocks, windows of 8x8 patches.

    Options as in :func:`swin_t`.
    """
    return _swin("swin_v2_s", input_shape, weights=weights)


def swin_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.SwinTransformer``, built from its modules; only ``head`` is left out."""
    stem, *parts = model.features
    stages: list[tuple[str, nn.Module]] = [("stem", ChannelsFirst(stem, from_image=True))]
    for number, blocks in enumerate(parts[::2], start=1):
        first, *others = blocks
        if number > 1:
            first = nn.Sequential(parts[2 * number - 3], first)  # the patch merging between the stages
        bodies = (first, *others)
        stages += [(f"stage{number}.{index}", ChannelsFirst(body)) for index, body in enumerate(bodies)]
    norm = ChannelsFirst(model.norm)
    return [*stages, ("pool", nn.Sequential(norm, model.avgpool, model.flatten))]


def _swin(name: str, input_shape: tuple[int, int, int], *, weights: str | None) -> Backbone:
    channels, _, _ = require_image(input_shape, 4, where=name)
    model = torchvision_model(name, weights=weights, channels=channels)
    draw = partial(nn.init.kaiming_uniform_, a=sqrt(5))  # torch's default, which torchvision does not change here
    model.features[0][0] = adapt_channels(model.features[0][0], channels, draw=draw)
    return Backbone(infer_shapes(swin_stages(model), input_shape, where=name), input_shape=input_shape)
