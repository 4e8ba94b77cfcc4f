"""Backbones by name.

A backbone is a function ``(input_shape, *, options) -> Backbone``; its keyword-only options carry
annotations and defaults, against which configs are checked. Other packages add theirs through the entry
point ``clframe.backbones``: the entry point's name is the backbone's name, its value the function. A model of
your own becomes a backbone with :meth:`Backbone.of`.

Libraries that models come from (torchvision, timm, transformers) are imported when one is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint

from clframe.nn.backbones.base import Backbone
from clframe.nn.backbones.cifar_resnets import resnet20, resnet32, wide_resnet, wrn16_2
from clframe.nn.backbones.from_timm import timm
from clframe.nn.backbones.from_transformers import bert, hf_text, hf_vit
from clframe.nn.backbones.plain import mlp, small_cnn, vgg11, vgg13, vgg16, vgg19
from clframe.nn.backbones.torchvision_nets import (
    convnext_tiny,
    efficientnet_b0,
    efficientnet_v2_s,
    resnet18,
    resnet34,
    resnet50,
    swin_t,
    swin_v2_s,
)
from clframe.nn.backbones.vit import vit_b_16, vit_tiny
from clframe.registry import Registry


def _load(point: EntryPoint) -> Iterator[tuple[str, Callable[..., Backbone]]]:
    yield point.name, point.load()


BACKBONES: Registry[Callable[..., Backbone]] = Registry("backbone", group="clframe.backbones", load=_load)
for _factory in (
    bert, convnext_tiny, efficientnet_b0, efficientnet_v2_s, hf_text, hf_vit, mlp, resnet18, resnet20, resnet32,
    resnet34, resnet50, small_cnn, swin_t, swin_v2_s, timm, vgg11, vgg13, vgg16, vgg19, vit_b_16, vit_tiny,
    wide_resnet, wrn16_2,
):  # fmt: skip
    BACKBONES.add(_factory.__name__, _factory)

__all__ = [
    "BACKBONES", "Backbone", "bert", "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "hf_text", "hf_vit",
    "mlp", "resnet18", "resnet20", "resnet32", "resnet34", "resnet50", "small_cnn", "swin_t", "swin_v2_s", "timm",
    "vgg11", "vgg13", "vgg16", "vgg19", "vit_b_16", "vit_tiny", "wide_resnet", "wrn16_2",
]  # fmt: skip
