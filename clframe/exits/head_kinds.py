"""Heads of exits by name, for taps of any shape.

==============  ==========  ==============================================================================
kind            taps        layers before the linear layer
==============  ==========  ==============================================================================
``pool``        maps        SDN pooling of 2x2 windows
``conv``        maps        3x3 convolution, ReLU, SDN pooling to 4x4 (ZTW on CIFAR)
``conv_large``  maps        ReLU, 3x3 convolution of stride 2 to C/2 channels, SDN pooling to 4x4 (ZTW on ImageNet)
``token``       tokens      first token, LayerNorm
``token_raw``   tokens      first token
``hidden``      all         linear layer and ReLU
``linear``      flat taps   none
==============  ==========  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.exits.fused_pool import BlendedPool
from clframe.exits.heads import ExitHead, PerExperienceHead
from clframe.exits.layers import Blend, Cascade, FlattenTo, MaxAveragePool, Pair, SDNPool, blend_all
from clframe.nn.backbones.checks import require_at_least
from clframe.nn.features import embed_tap


class Embed(nn.Module):
    """A tap as one vector: the mean of a map, the first token, or the flat tap itself."""

    def forward(self, tap: Tensor) -> Tensor:
        """features_BF."""
        return embed_tap(tap)


def embedded_width(tap_shape: tuple[int, ...]) -> int:
    """Width F of an embedded tap: the channels of a map, the width of a token or of a flat tap.

    >>> embedded_width((16, 8, 4)), embedded_width((5, 32)), embedded_width((7,))
    (16, 32, 7)
    """
    return tap_shape[0] if len(tap_shape) == 3 else tap_shape[-1]


def prototype_head(tap_shape: tuple[int, ...]) -> ExitHead:
    """A head whose classifier uses the embedded tap; it starts without outputs.

    Args:
        tap_shape: Shape of the tap without the batch.

    >>> prototype_head((16, 8, 8)).features
    16
    """
    return ExitHead(Embed(), features=embedded_width(tap_shape))


HeadKind = Literal["auto", "pool", "conv", "conv_large", "token", "token_raw", "hidden", "linear"]
Pooling = Literal["2x2", "2x2_ceil", "4x4"]
"""Windows of the SDN pooling of heads of kind ``pool``."""
Token = Literal["first", "mean"]

_KINDS_BY_DIMENSIONS: dict[int, tuple[HeadKind, ...]] = {
    3: ("pool", "conv", "conv_large", "hidden"),
    2: ("token", "token_raw", "hidden"),
    1: ("linear", "hidden"),
}
"""Kinds for taps of 3, 2 and 1 dimensions; ``auto`` is the first."""


def make_head(
    kind: HeadKind,
    tap_shape: tuple[int, ...],
    *,
    per_experience: bool = False,
    cascade: bool = False,
    cascade_norm: bool = False,
    hidden: int = 256,
    token: Token = "first",
    pooling: Pooling = "2x2",
    as_published: bool = False,
    per_token: bool = False,
) -> ExitHead | PerExperienceHead:
    """Make a head for a tap; it starts without outputs.

    Args:
        kind: A kind of the table above, or ``auto``.
        tap_shape: Shape of the tap without the batch.
        per_experience: One head for each experience's new classes, instead of one that grows.
        cascade: Whether the logits of the previous exit are an input. Not for the first exit, whose cascade would
            never receive an input.
        cascade_norm: Whether those logits pass a LayerNorm first.
        hidden: Units of the hidden layer of ``hidden``.
        token: Input of ``token``: the first token, or the mean of all, padding included.
        pooling: Windows of ``pool``: ``2x2`` drops the last row or column of an odd side, ``2x2_ceil`` rounds its
            length up by adaptive pooling, ``4x4``.
        as_published: Whether ``conv`` and ``conv_large`` follow the authors' code of ZTW: the convolution of
            ``conv_large`` has no padding, and maps smaller than 4x4 are repeated to 4x4.
        per_token: Whether the head classifies every token, as exits of a language model do: ``token`` is then an
            RMSNorm of each, ``hidden`` a hidden layer on each.

    Raises:
        UnknownNameError: An unknown kind.
        ConfigError: A kind that does not fit the tap, or an option out of range.

    >>> make_head("auto", (16, 32, 32)).features, make_head("conv", (16, 32, 32)).features
    (4096, 256)
    >>> make_head("pool", (64,))
    Traceback (most recent call last):
    clframe.errors.ConfigError: exits.head: found 'pool' for a tap of shape (64,); use linear, hidden or auto
    """
    kind = _resolve_kind(kind, tap_shape)
    kind, token_norm = ("token", False) if kind == "token_raw" else (kind, True)
    require_at_least(hidden, 1, where="exits.hidden")
    if token not in get_args(Token):
        raise ConfigError(f"exits.token: found {token!r}; give 'first' or 'mean'")
    if cascade_norm and not cascade:
        raise ConfigError("exits.cascade_norm: found true without a cascade; set exits.cascade too or leave it out")
    if pooling not in get_args(Pooling):
        raise ConfigError(f"exits.pooling: found {pooling!r}; give one of {', '.join(get_args(Pooling))}")
    recipe = _Recipe(
        kind, tap_shape, hidden, token, token_norm, cascade, cascade_norm, pooling, as_published, per_token=per_token
    )
    recipe = replace(recipe, features=recipe.width())
    if not per_experience:
        return recipe.whole_head()
    common = nn.Sequential(*recipe.common())
    pools = any(isinstance(layer, MaxAveragePool) for layer in common)
    return PerExperienceHead(
        common,
        recipe.own_head,
        features=recipe.features,
        cascades=cascade,
        layers=_blended if pools else None,
    )


def make_matched_head(
    tap_shape: tuple[int, ...], *, features: int, per_experience: bool = False
) -> ExitHead | PerExperienceHead:
    """Make a control for exits: a head on the last tap whose linear layer has the size of another head's.

    The tap is flattened and resized to ``features`` values by :class:`FlattenTo`, without parameters. (Parameters
    before the other head's linear layer, the scalar of a pooling or a convolution, are not matched.) If exits improve
    results by their depth rather than by their parameters, these heads must not improve them.

    Args:
        tap_shape: Shape of the backbone's last tap.
        features: ``features`` of the other head.
        per_experience: As for the other head.

    Raises:
        ConfigError: ``features`` below 1.

    >>> other = make_head("pool", (16, 32, 32))
    >>> make_matched_head((64,), features=other.features).features
    4096
    """
    require_at_least(features, 1, where="exits.matched")
    common = FlattenTo(features, inputs=prod(tap_shape))
    if per_experience:
        return PerExperienceHead(common, partial(_bare, features), features=features)
    return ExitHead(common, features=features)


def _blended(layers: Sequence[nn.Module], pooled: Pair) -> Tensor:
    """features_TBF of heads of kind ``pool``, their blends in one operation."""
    blends = [layer[0] for layer in layers if isinstance(layer, nn.Sequential)]
    return blend_all([blend for blend in blends if isinstance(blend, Blend)], pooled).flatten(2)


def _bare(features: int) -> ExitHead:
    return ExitHead(nn.Sequential(), features=features)


def _resolve_kind(kind: HeadKind, tap_shape: tuple[int, ...]) -> HeadKind:
    """The kind with ``auto`` resolved; raises where it does not fit the tap."""
    if kind not in get_args(HeadKind):
        raise UnknownNameError(unknown_name("head", kind, get_args(HeadKind), where="exits"))
    fitting = _KINDS_BY_DIMENSIONS.get(len(tap_shape))
    if fitting is None:
        raise ConfigError(
            f"exits.head: found a tap of shape {tap_shape}; use one of 1 (flat), 2 (tokens) or 3 (a map) dimensions"
        )
    if kind == "auto":
        return fitting[0]
    if kind not in fitting:
        use = ", ".join(fitting)
        raise ConfigError(f"exits.head: found '{kind}' for a tap of shape {tap_shape}; use {use} or auto")
    return kind


class _TakeToken(nn.Module):
    """One vector of width D from tokens_BTD."""

    def __init__(self, token: Token) -> None:
        super().__init__()
        self.token = token

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD[:, 0] if self.token == "first" else tokens_BTD.mean(1)


@dataclass(frozen=True)
class _Recipe:
    """Options of a head, from which any number of equal heads can be made."""

    kind: HeadKind
    tap_shape: tuple[int, ...]
    hidden: int
    token: Token
    token_norm: bool
    cascade: bool
    cascade_norm: bool
    pooling: Pooling
    as_published: bool
    features: int = 0
    per_token: bool = False

    def common(self) -> list[nn.Module]:
        """The first layers, which have no parameters, so that heads per experience share them."""
        if self.per_token:
            return []
        if self.kind == "pool" and self.tap_shape[1:] != (1, 1):
            _, rows, columns = self.tap_shape
            if self.pooling == "2x2_ceil":
                return [MaxAveragePool(size=(-(-rows // 2), -(-columns // 2)))]
            return [MaxAveragePool(window=4 if self.pooling == "4x4" else 2)]
        if self.kind == "conv":
            return []
        if self.kind == "conv_large":
            return [nn.ReLU()]
        return [_TakeToken(self.token) if self.kind == "token" else nn.Flatten()]

    def own(self) -> list[nn.Module]:
        """The layers after them, up to flat features, newly initialized."""
        if self.per_token:
            width = self.tap_shape[-1]
            if self.kind == "hidden":
                return [nn.Linear(width, self.hidden), nn.ReLU(inplace=True)]
            return [nn.RMSNorm(width, eps=1e-6)] if self.token_norm else []
        channels, pool = self.tap_shape[0], partial(SDNPool, size=4, upsample=self.as_published)
        if self.kind == "pool" and self.tap_shape[1:] != (1, 1):
            return [Blend(), nn.Flatten()]
        if self.kind == "conv":
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            return [conv, nn.ReLU(inplace=True), pool(), nn.Flatten()]
        if self.kind == "conv_large":
            # The corrected head pads by 1: without padding, the last row or column of an even map has no effect.
            padding = 0 if self.as_published else 1
            half = nn.Conv2d(channels, max(1, channels // 2), 3, stride=2, padding=padding)
            return [half, pool(), nn.Flatten()]
        if self.kind == "token":
            return [nn.LayerNorm(self.tap_shape[1])] if self.token_norm else []
        if self.kind == "hidden":
            return [nn.Linear(prod(self.tap_shape), self.hidden), nn.ReLU(inplace=True)]
        return []

    def width(self) -> int:
        """Width of the flat features, computed by a forward pass on the meta device: no memory, no random draws."""
        with torch.device("meta"), torch.no_grad():
            layers = nn.Sequential(*self.common(), *self.own())
            features_BF: Tensor = layers(torch.empty(1, *self.tap_shape))
        return features_BF.shape[-1]

    def whole_head(self) -> ExitHead:
        """A head from the tap to the logits."""
        return self._head(*self.common(), *self.own())

    def own_head(self) -> ExitHead:
        """The head of one experience, without the common layers."""
        return self._head(*self.own())

    def _head(self, *layers: nn.Module) -> ExitHead:
        cascade = Cascade(norm=self.cascade_norm) if self.cascade else None
        pools = bool(layers) and isinstance(layers[0], MaxAveragePool)
        made = BlendedPool(*layers) if pools else nn.Sequential(*layers)
        return ExitHead(made, features=self.features, cascade=cascade)
