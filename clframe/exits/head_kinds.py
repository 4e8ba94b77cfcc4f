"""Heads of exits by name, for taps of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.exits.heads import ExitHead, PerExperience
from clframe.exits.layers import Blend, Cascade, FlattenTo, MaxAverage, Pair, SDNPool, blend_all
from clframe.nn.backbones.base import require_at_least
from clframe.nn.features import embedded


class Embed(nn.Module):
    """A tap as one vector: a map averaged, the first of tokens, a flat tap as it is."""

    def forward(self, tap: Tensor) -> Tensor:
        """features_BF."""
        return embedded(tap)


def embedded_width(tap_shape: tuple[int, ...]) -> int:
    """Width F of an embedded tap: the channels of a map, the width of a token or of a flat tap.

    >>> embedded_width((16, 8, 4)), embedded_width((5, 32)), embedded_width((7,))
    (16, 32, 7)
    """
    return tap_shape[0] if len(tap_shape) == 3 else tap_shape[-1]


def prototype_head(tap_shape: tuple[int, ...]) -> ExitHead:
    """A head whose classifier sees the embedded tap and nothing else; it starts without outputs.

    Args:
        tap_shape: The tap's declared shape, without the batch.

    >>> prototype_head((16, 8, 8)).features
    16
    """
    return ExitHead(Embed(), features=embedded_width(tap_shape))


HeadKind = Literal["auto", "pool", "conv", "conv_large", "token", "hidden", "linear"]
Token = Literal["first", "mean"]

_FITTING: dict[int, tuple[HeadKind, ...]] = {
    3: ("pool", "conv", "conv_large", "hidden"),
    2: ("token", "hidden"),
    1: ("linear", "hidden"),
}
"""Kinds for taps of 3, 2 and 1 dimensions; the first is what ``auto`` picks."""


def make_head(
    kind: HeadKind,
    tap_shape: tuple[int, ...],
    *,
    per_experience: bool = False,
    cascade: bool = False,
    cascade_norm: bool = False,
    hidden: int = 256,
    token: Token = "first",
    token_norm: bool = True,
) -> ExitHead | PerExperience:
    """A head for a tap; it starts without outputs and finds the width of its features by a dry run.

    Args:
        kind: One of the module's table.
        tap_shape: The tap's declared shape, without the batch.
        per_experience: One fresh head for each experience's new classes, instead of one that grows.
        cascade: Whether the logits of the exit before join in. The first exit has none before it: leave it out
            there, for its columns would never learn.
        cascade_norm: Whether those logits go through a LayerNorm first.
        hidden: Units of the hidden layer of ``hidden``.
        token: What ``token`` takes of the tokens: the first one, or the mean of all, padding included.
        token_norm: Whether ``token`` normalizes it.

    Raises:
        UnknownNameError: A kind that does not exist.
        ConfigError: A kind that does not fit the tap, or an option out of range.

    >>> make_head("auto", (16, 32, 32)).features, make_head("conv", (16, 32, 32)).features
    (4096, 256)
    >>> make_head("pool", (64,))
    Traceback (most recent call last):
    clframe.errors.ConfigError: exits.head: found 'pool' for a tap of shape (64,); use linear, hidden or auto
    """
    kind = _fitting(kind, tap_shape)
    require_at_least(hidden, 1, where="exits.hidden")
    if token not in get_args(Token):
        raise ConfigError(f"exits.token: found {token!r}; give 'first' or 'mean'")
    if cascade_norm and not cascade:
        raise ConfigError("exits.cascade_norm: found true without a cascade; set exits.cascade too or leave it out")
    recipe = _Recipe(kind, tap_shape, hidden, token, token_norm, cascade, cascade_norm)
    recipe = replace(recipe, features=recipe.width())
    if not per_experience:
        return recipe.whole_head()
    common = nn.Sequential(*recipe.common())
    pools = any(isinstance(layer, MaxAverage) for layer in common)
    return PerExperience(
        common,
        recipe.own_head,
        features=recipe.features,
        cascades=cascade,
        layers=_blended if pools else None,
    )


def matched_head(
    tap_shape: tuple[int, ...], *, features: int, per_experience: bool = False
) -> ExitHead | PerExperience:
    """A control for exits: a head on the last tap with as many parameters as the one it stands for.

    The tap is flattened and brought to exactly ``features`` values by :class:`FlattenTo`, without parameters;
    the linear layer after it has the size of the other head's, whatever tap that one is on. (What the other has
    before its linear layer, the scalar of a pooling or a convolution, is not matched.) If exits gain by where
    they sit rather than by their parameters, heads like this must not gain.

    Args:
        tap_shape: Shape of the tap to stand on, the backbone's last.
        features: The other head's ``features``.
        per_experience: As for the other head.

    Raises:
        ConfigError: No features.

    >>> other = make_head("pool", (16, 32, 32))
    >>> matched_head((64,), features=other.features).features
    4096
    """
    require_at_least(features, 1, where="exits.matched")
    common = FlattenTo(features, inputs=prod(tap_shape))
    if per_experience:
        return PerExperience(common, partial(_bare, features), features=features)
    return ExitHead(common, features=features)


def _blended(layers: Sequence[nn.Module], pooled: Pair) -> Tensor:
    """features_TBF of the heads of ``pool``, their blends in one operation."""
    blends = [layer[0] for layer in layers if isinstance(layer, nn.Sequential)]
    return blend_all([blend for blend in blends if isinstance(blend, Blend)], pooled).flatten(2)


def _bare(features: int) -> ExitHead:
    return ExitHead(nn.Sequential(), features=features)


def _fitting(kind: HeadKind, tap_shape: tuple[int, ...]) -> HeadKind:
    """The kind, ``auto`` resolved, if it fits the tap."""
    if kind not in get_args(HeadKind):
        raise UnknownNameError(unknown_name("head", kind, get_args(HeadKind), where="exits"))
    fitting = _FITTING.get(len(tap_shape))
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
    """How to make a head, as often as wanted."""

    kind: HeadKind
    tap_shape: tuple[int, ...]
    hidden: int
    token: Token
    token_norm: bool
    cascade: bool
    cascade_norm: bool
    features: int = 0

    def common(self) -> list[nn.Module]:
        """The first layers, without parameters: heads of several experiences share them."""
        if self.kind == "pool" and self.tap_shape[1:] != (1, 1):
            return [MaxAverage()]
        if self.kind == "conv":
            return []
        if self.kind == "conv_large":
            return [nn.ReLU()]
        return [_TakeToken(self.token) if self.kind == "token" else nn.Flatten()]

    def own(self) -> list[nn.Module]:
        """The layers after them, up to flat features, freshly drawn."""
        channels = self.tap_shape[0]
        if self.kind == "pool" and self.tap_shape[1:] != (1, 1):
            return [Blend(), nn.Flatten()]
        if self.kind == "conv":
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            return [conv, nn.ReLU(inplace=True), SDNPool(size=4), nn.Flatten()]
        if self.kind == "conv_large":
            half = nn.Conv2d(channels, max(1, channels // 2), 3, stride=2, padding=1)
            return [half, SDNPool(size=4), nn.Flatten()]
        if self.kind == "token":
            return [nn.LayerNorm(self.tap_shape[1])] if self.token_norm else []
        if self.kind == "hidden":
            return [nn.Linear(prod(self.tap_shape), self.hidden), nn.ReLU(inplace=True)]
        return []

    def width(self) -> int:
        """Width of the flat features, found by running shapes alone: no memory, no time, no random draws."""
        with torch.device("meta"), torch.no_grad():
            layers = nn.Sequential(*self.common(), *self.own())
            features_BF: Tensor = layers(torch.empty(1, *self.tap_shape))
        return features_BF.shape[1]

    def whole_head(self) -> ExitHead:
        """A head from the tap to the logits."""
        return self._head(*self.common(), *self.own())

    def own_head(self) -> ExitHead:
        """One experience's head, without what it shares."""
        return self._head(*self.own())

    def _head(self, *layers: nn.Module) -> ExitHead:
        cascade = Cascade(norm=self.cascade_norm) if self.cascade else None
        return ExitHead(nn.Sequential(*layers), features=self.features, cascade=cascade)
