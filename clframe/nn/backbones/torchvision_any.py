"""Any classification model of torchvision, divided after named layers."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any

from torch import nn

from clframe.errors import ConfigError, UnknownNameError, nearest
from clframe.nn.backbones.base import BACKBONES, Backbone
from clframe.nn.backbones.checks import require_image
from clframe.nn.backbones.pretrained import adapt_channels, load_published_state, with_channels_first
from clframe.nn.backbones.stages import infer_shapes
from clframe.nn.backbones.traced import DEPTH, default_layers, drop_classifier


@BACKBONES.register("torchvision")
def torchvision(
    input_shape: tuple[int, int, int], *, model: str, weights: str | None = None, taps: tuple[str, ...] = ()
) -> Backbone:
    """Any classification model of torchvision, as torchvision builds it, such as densenet121 or mobilenet_v2.

    torch.fx traces the model, which is divided after layers by name. The last linear layer is left out.

    Args:
        input_shape: (channels, height, width) of one image. The first convolution is replaced for other channels.
        model: Name in torchvision, such as ``densenet121``.
        weights: Published weights, such as ``IMAGENET1K_V1``; None for random ones.
        taps: Layers after which the model is divided, such as ``features.pool0``, next to all blocks through
            which every path leads. Layers that ``exits.at`` names are added.

    Raises:
        UnknownNameError: No such model, weights or layer; the nearest is named.
        ConfigError: Images that the model does not accept, or a layer that is not on every path.
        DataError: Weights that could not be downloaded.
    """
    channels, height, _ = require_image(input_shape, 1, where="torchvision")
    whole = _whole(model, weights=weights, channels=channels, side=height)
    infer_shapes([(model, whole)], input_shape, where="torchvision")  # raises for images that it does not accept
    drop_classifier(whole)
    backbone = Backbone.traced(
        whole, input_shape=input_shape, taps=taps, defaults=default_layers(whole, depth=DEPTH), where="torchvision"
    )
    return with_channels_first(backbone) if model.startswith("swin") else backbone


def _whole(name: str, *, weights: str | None, channels: int, side: int) -> nn.Module:
    """The model with its classifier."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = nearest(name, known)
        advice = f"did you mean '{close}'?" if close else "see torchvision.models.list_models()"
        raise UnknownNameError(f"torchvision.model: unknown model '{name}'; {advice}")
    state = None if weights is None else load_published_state(name, weights, channels=channels)[0]
    options: dict[str, Any] = {"image_size": side} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):  # their auxiliary classifiers make training return a tuple
        options = {"aux_logits": False, "init_weights": state is None, "transform_input": state is not None}
        state = state and {key: value for key, value in state.items() if not key.lower().startswith("aux")}
    try:
        model: nn.Module = models.get_model(name, **options)
        if state is not None:
            model.load_state_dict(state)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"torchvision: {name} cannot be built for this input ({reason}); use another model") from None
    return _adapt(model, channels)


def _adapt(model: nn.Module, channels: int) -> nn.Module:
    """The model with a first convolution for these channels, initialized as torch initializes convolutions."""
    name, first = next((name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    outer, _, last = name.rpartition(".")
    draw = partial(nn.init.kaiming_uniform_, a=sqrt(5))
    setattr(model.get_submodule(outer), last, adapt_channels(first, channels, draw=draw))
    return model
