"""Any timm model that can be cut into stages (extra ``timm``).

Convolutional and hierarchical models are cut at the modules of timm's ``feature_info``, and stages have their
names (``layer1``, ``blocks.2``, ``stages.0``); vision transformers are cut into ``embed`` and their blocks
(``blocks.0``, ...). What follows, up to the classifier, is the last stage, ``head``. Whether the stages compute
what the whole model does is checked on random images when the backbone is built: a model whose forward does more
than run its parts in order is traced by torch.fx and divided after its blocks, never approximated.

Taps are (channels, height, width), also where timm's maps are channels-last, or (tokens, width).
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from clframe.errors import ConfigError, DataError, UnknownNameError, nearest
from clframe.nn.backbones.base import BACKBONES, Backbone
from clframe.nn.backbones.checks import require_image
from clframe.nn.backbones.pretrained import ChannelsFirst, require_package, with_channels_first
from clframe.nn.backbones.stages import ShapedStage, infer_shapes, is_equivalent
from clframe.nn.backbones.traced import DEPTH, default_layers


@BACKBONES.register("timm")
def timm(
    input_shape: tuple[int, int, int], *, model: str, pretrained: bool = False, taps: tuple[str, ...] = ()
) -> Backbone:
    """Any timm model that can be cut into stages or traced by torch.fx (needs the extra timm).

    Args:
        input_shape: (channels, height, width) of one image. timm adapts the first layer to the channels, and
            models of a fixed size to the image's.
        model: Name in timm, such as ``resnet10t`` or ``vit_tiny_patch16_224``.
        pretrained: Whether to download timm's weights; otherwise they are random. Files are read as tensors
            only.
        taps: Layers after which the model is divided, such as ``layer2.1``, next to its stages. Layers that
            ``exits.at`` names are added. The model is traced if one of them is not the end of a stage.

    Raises:
        UnsupportedError: timm is not installed.
        UnknownNameError: timm has no model of this name, or the model has no such layer.
        DataError: Weights that could not be downloaded.
        ConfigError: Images that the model does not accept, or a model that can neither be cut nor traced.
    """
    channels, _, _ = require_image(input_shape, 1, where="timm")
    whole = _created(model, pretrained=pretrained, input_shape=input_shape, channels=channels)
    infer_shapes([(model, whole)], input_shape, where="timm")  # raises for unsupported images
    stages: list[ShapedStage] = []
    for cut in (_by_feature_info, _by_blocks):
        try:
            found = infer_shapes(cut(whole), input_shape, where="timm")
        except ConfigError:  # the modules do not accept each other's outputs
            continue
        if found and is_equivalent(whole, [stage for _, stage, _ in found], input_shape):
            stages = found
            break
    names = [name for name, _, _ in stages]
    if stages and set(taps) <= set(names):
        return Backbone(stages, input_shape=input_shape)
    layers = dict(whole.named_modules())
    defaults = [name for name in names if name in layers] or default_layers(whole, depth=DEPTH)
    traced = Backbone.traced(whole, input_shape=input_shape, taps=taps, defaults=defaults, where="timm")
    return with_channels_first(traced) if getattr(whole, "output_fmt", "NCHW") == "NHWC" else traced


def _created(name: str, *, pretrained: bool, input_shape: tuple[int, ...], channels: int) -> Any:
    library = require_package("timm", where="timm")
    if "/" not in name and not library.is_model(name):
        close = nearest(name, library.list_models())
        advice = f"did you mean '{close}'?" if close else "see timm.list_models()"
        raise UnknownNameError(f"timm.model: unknown model '{name}'; {advice}")
    published = library.get_pretrained_cfg(name) if "/" not in name else None
    size = {"img_size": input_shape[1:]} if published is not None and published.fixed_input_size else {}
    try:
        return library.create_model(name, pretrained=pretrained, in_chans=channels, num_classes=0, **size)
    except (OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"timm: {name} could not be loaded ({reason}); connect, or set pretrained=false") from error


def _by_feature_info(model: Any) -> list[tuple[str, nn.Module]]:
    """Children in order, ``nn.Sequential`` ones expanded once, cut after the modules named by timm."""
    info = getattr(model, "feature_info", None)
    if not info:
        return []
    ends = {entry["module"] for entry in getattr(info, "info", info)}
    parts: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential) and name not in ends:
            parts += [(f"{name}.{inner}", part) for inner, part in child.named_children()]
        else:
            parts.append((name, child))
    if not ends <= {name for name, _ in parts}:
        return []
    stages: list[tuple[str, list[nn.Module]]] = [("head", [])]
    for name, part in parts:
        stages[-1][1].append(part)
        if name in ends:
            stages[-1] = (name, stages[-1][1])
            stages.append(("head", []))
    joined = [(name, nn.Sequential(*modules)) for name, modules in stages]
    if getattr(model, "output_fmt", "NCHW") != "NHWC":
        return list(joined)
    return [(name, ChannelsFirst(body, from_image=not i)) for i, (name, body) in enumerate(joined)]


def _by_blocks(model: Any) -> list[tuple[str, nn.Module]]:
    """``embed``, the blocks and ``head`` of a timm ``VisionTransformer``."""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(model, VisionTransformer):
        return []
    blocks = [(f"blocks.{name}", block) for name, block in model.blocks.named_children()]
    return [("embed", TimmEmbed(model)), *blocks, ("head", TimmHead(model))]


class TimmEmbed(nn.Module):
    """The part of a timm vision transformer before its blocks.

    Args:
        model: The model whose modules are used; it is not changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = _shell(model, without=("blocks", "norm", "fc_norm", "head_drop", "head", "attn_pool"))

    def forward(self, x: Tensor) -> Tensor:
        """tokens_BTD of images_BCHW."""
        tokens_BTD = self.model._pos_embed(self.model.patch_embed(x))
        out: Tensor = self.model.norm_pre(self.model.patch_drop(tokens_BTD))
        return out


class TimmHead(nn.Module):
    """The part of a timm vision transformer between its blocks and its classifier.

    Args:
        model: The model whose modules are used; it is not changed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = _shell(model, without=("patch_embed", "pos_drop", "patch_drop", "norm_pre", "blocks"))
        self.model._parameters = {}  # class token and positions belong to TimmEmbed

    def forward(self, x: Tensor) -> Tensor:
        """features_BD of tokens_BTD."""
        out: Tensor = self.model.forward_head(self.model.norm(x), pre_logits=True)
        return out


def _shell(model: nn.Module, *, without: tuple[str, ...]) -> Any:
    """A shallow copy of the model without the named modules, so that no weight is registered in two stages."""
    shell = copy.copy(model)
    shell._modules = {name: part for name, part in model._modules.items() if name not in without}
    shell._parameters = dict(model._parameters)
    shell._buffers = dict(model._buffers)
    return shell
