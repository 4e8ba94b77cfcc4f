"""Backbones by name.

A backbone is a function ``(input_shape, *, options) -> Backbone``; configs are checked against the annotations and
defaults of its keyword-only options. Adding one takes one file: a module of this package with
``@BACKBONES.register("name")`` above the function. Other packages use the entry point group ``clframe.backbones``,
whose names are names of backbones and whose values are such functions. :meth:`Backbone.of` turns any model into a
backbone.

Libraries that models come from (torchvision, timm, transformers) are imported when one is built.
"""

from __future__ import annotations

import importlib
import pkgutil

from clframe.nn.backbones.base import BACKBONES, Backbone
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

# Importing a module registers its backbones, so a new module needs no line here; the imports above are for readers of
# ``clframe.nn.backbones.NAME``.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BACKBONES", "Backbone", "bert", "convnext_tiny", "efficientnet_b0", "efficientnet_v2_s", "hf_text", "hf_vit",
    "mlp", "resnet18", "resnet20", "resnet32", "resnet34", "resnet50", "small_cnn", "swin_t", "swin_v2_s", "timm",
    "vgg11", "vgg13", "vgg16", "vgg19", "vit_b_16", "vit_tiny", "wide_resnet", "wrn16_2",
]  # fmt: skip
