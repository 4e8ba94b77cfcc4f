"""Vision transformers of torchvision (Dosovitskiy et al., "An image is worth 16x16 words", 2021).

Stages: ``embed``, patches and the class token with their positions; every encoder layer from ``encoder.0`` on; and
``cls``, the class token after the last normalization. Taps are (tokens, width), the class token first.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError
from clframe.nn.backbones.base import BACKBONES, Backbone
from clframe.nn.backbones.checks import require_at_least, require_depth, require_image
from clframe.nn.backbones.pretrained import adapt_channels, load_published_state
from clframe.nn.backbones.stages import infer_shapes


@BACKBONES.register("vit_tiny")
def vit_tiny(
    input_shape: tuple[int, int, int],
    *,
    patch: int = 4,
    width: int = 64,
    depth: int = 6,
    heads: int = 4,
    dropout: float = 0.0,
) -> Backbone:
    """Small vision transformer for images of 28x28 or 32x32 pixels; 0.3 M parameters by default.

    Args:
        input_shape: (channels, height, width) of one square image.
        patch: Side of a patch in pixels; it must divide the image's.
        width: Width of a token; the hidden layer of a block has four times as many units.
        depth: Encoder layers.
        heads: Attention heads; they must divide the width.
        dropout: Probability of dropout after embedding, attention and each linear layer.

    Raises:
        ConfigError: An option out of range or images that do not fit the patches.

    >>> net = vit_tiny((1, 28, 28), depth=2)
    >>> net.names, net.tap_shapes["encoder.0"]
    (('embed', 'encoder.0', 'encoder.1', 'cls'), (50, 64))
    """
    for option, value in (("patch", patch), ("width", width), ("heads", heads)):
        require_at_least(value, 1, where=f"vit_tiny.{option}")
    require_depth(depth, where="vit_tiny.depth")
    if width % heads:
        raise ConfigError(f"vit_tiny.heads: found {heads} with width {width}; give a number that divides it")
    if not 0 <= dropout < 1:
        raise ConfigError(f"vit_tiny.dropout: found {dropout}; give 0 or more and less than 1")
    model = _vision_transformer(
        input_shape, patch=patch, width=width, depth=depth, heads=heads, dropout=dropout, where="vit_tiny"
    )
    return Backbone(infer_shapes(vit_stages(model), input_shape, where="vit_tiny"), input_shape=input_shape)


@BACKBONES.register("vit_b_16")
def vit_b_16(
    input_shape: tuple[int, int, int], *, weights: str | None = None, dropout: float = 0.0
) -> Backbone:
    """ViT-B/16 of torchvision: patches of 16x16 pixels, 12 layers of width 768.

    Args:
        input_shape: (channels, height, width) of one square image, its side a multiple of 16. Published
            positions are interpolated where it is not the one they were trained for.
        weights: Published weights, such as ``IMAGENET1K_V1``; None for random ones.
        dropout: Probability of dropout after embedding, attention and each linear layer.

    Raises:
        ConfigError: An option out of range, images that do not fit the patches, or weights for other than
            three channels.
        UnknownNameError: Weights that do not exist.
        DataError: Weights that could not be downloaded.
    """
    if not 0 <= dropout < 1:
        raise ConfigError(f"vit_b_16.dropout: found {dropout}; give 0 or more and less than 1")
    model = _vision_transformer(
        input_shape, patch=16, width=768, depth=12, heads=12, dropout=dropout, where="vit_b_16"
    )
    if weights is not None:
        state, side = load_published_state("vit_b_16", weights, channels=input_shape[0])
        model.load_state_dict(_at_size(state, input_shape[1], trained=side))
    return Backbone(infer_shapes(vit_stages(model), input_shape, where="vit_b_16"), input_shape=input_shape)


def vit_stages(model: Any) -> list[tuple[str, nn.Module]]:
    """Stages of a ``torchvision.models.VisionTransformer``, built from its modules; ``heads`` is left out."""
    encoder = model.encoder
    embed = PatchTokens(
        model.conv_proj, class_token=model.class_token, positions=encoder.pos_embedding, dropout=encoder.dropout
    )
    layers = [(f"encoder.{index}", layer) for index, layer in enumerate(encoder.layers)]
    return [("embed", embed), *layers, ("cls", ClassToken(encoder.ln))]


class PatchTokens(nn.Module):
    """Embeds patches as tokens after a class token and adds positions.

    Args:
        patches: Strided convolution from an image to one vector per patch.
        class_token: (1, 1, width).
        positions: (1, tokens, width).
        dropout: Dropout after the sum.
    """

    def __init__(
        self, patches: nn.Module, *, class_token: nn.Parameter, positions: nn.Parameter, dropout: nn.Module
    ) -> None:
        super().__init__()
        self.patches = patches
        self.class_token = class_token
        self.positions = positions
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """Compute tokens_BTD of images_BCHW."""
        patches_BTD = self.patches(x).flatten(2).transpose(1, 2)
        tokens_BTD = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches_BTD], dim=1)
        out: Tensor = self.dropout(tokens_BTD + self.positions)
        return out


class ClassToken(nn.Module):
    """Normalizes the first token.

    Args:
        norm: Per-token normalization, which is why the other tokens need not be computed.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Compute features_BD of tokens_BTD."""
        out: Tensor = self.norm(x[:, 0])
        return out


def square_side(input_shape: tuple[int, ...], patch: int, *, where: str) -> int:
    """Side of a square image that is cut into patches.

    Raises:
        ConfigError: Not a square image, or patches that do not cut it evenly.
    """
    _, height, width = require_image(input_shape, patch, where=where)
    if height != width or height % patch:
        raise ConfigError(
            f"{where}: found images of {height}x{width}; use squares with a side that {patch} divides"
        )
    return height


def _vision_transformer(
    input_shape: tuple[int, int, int],
    *,
    patch: int,
    width: int,
    depth: int,
    heads: int,
    dropout: float,
    where: str,
) -> Any:
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=square_side(input_shape, patch, where=where),
        patch_size=patch,
        num_layers=depth,
        num_heads=heads,
        hidden_dim=width,
        mlp_dim=4 * width,
        dropout=dropout,
    )
    channels = input_shape[0]

    def draw(weight: Tensor) -> Tensor:
        return nn.init.trunc_normal_(weight, std=sqrt(1 / (channels * patch * patch)))

    model.conv_proj = adapt_channels(model.conv_proj, channels, draw=draw)
    return model


def _at_size(state: dict[str, Tensor], side: int, *, trained: int) -> dict[str, Tensor]:
    """Interpolate the positions of published weights from images of ``trained`` pixels to ``side``."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    if side == trained:
        return state
    return dict(interpolate_embeddings(side, 16, state))
