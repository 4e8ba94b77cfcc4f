"""Taps for exits: those on which a head sees the input and, by default, those that cost less than the last exit."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from clframe.accounting.macs import stage_macs
from clframe.errors import ConfigError
from clframe.exits.head_kinds import HeadKind
from clframe.nn.backbones.base import Backbone
from clframe.nn.backbones.stages import match_parameters, preserving_state, tap_of
from clframe.nn.network import Network

_FULL = 0.99
"""Share of the backbone's MACs from which on a tap of tokens costs as much as the last exit, which sees the same."""


def blind_taps(backbone: Backbone, head: HeadKind = "auto") -> tuple[str, ...]:
    """Find the taps on which a head cannot see the input.

    Heads of kind ``token`` and ``token_raw`` use the first token. Before the first attention it is a class token, equal
    for all inputs. The stages are run on two inputs, up to the first tap at which this token differs. Sequences of ids
    differ in all but the first position, at which a tokenizer puts the same id for every text.

    Args:
        backbone: The backbone. Exits of a language model use every token: it has no such tap.
        head: Kind of the head; the other kinds use the whole tap.

    >>> from clframe.nn.backbones import vit_tiny
    >>> blind_taps(vit_tiny((1, 8, 8), patch=4)), blind_taps(vit_tiny((1, 8, 8), patch=4), "hidden")
    (('embed',), ())
    """
    tokens = _token_taps(backbone)
    if not tokens or backbone.vocabulary or head not in ("auto", "token", "token_raw"):
        return ()
    found: list[str] = []
    with preserving_state([backbone]):
        one, other = _two_inputs(backbone)
        for name, stage in zip(backbone.names, backbone.stages, strict=True):
            one, other = stage(one), stage(other)
            if name not in tokens:
                continue
            if not torch.equal(tap_of(one)[:, 0], tap_of(other)[:, 0]):
                return tuple(found)
            found.append(name)
    # No tap depends on the input before training, as with residual branches that are zero at first.
    return ()


def require_sight(backbone: Backbone, taps: Sequence[str], head: HeadKind = "auto") -> None:
    """Raise :class:`ConfigError` for a tap on which the head cannot see the input."""
    blind = blind_taps(backbone, head)
    for tap in taps:
        if tap in blind:
            later = next(name for name in _token_taps(backbone) if name not in blind)
            raise ConfigError(
                f"exits: found tap '{tap}', whose first token is the same for every input; use '{later}' or a later "
                f"tap, or a head of kind hidden"
            )


def default_taps(network: Network, head: HeadKind = "auto") -> tuple[str, ...]:
    """All taps but the last, those on which the head cannot see the input, and token taps at the full cost.

    Between the last layer of a transformer and its classifier only the tokens are reduced to one vector: an exit there
    would cost as much as the last exit and see the same.

    Raises:
        ConfigError: No tap remains.
    """
    backbone, blind = network.backbone, blind_taps(network.backbone, head)
    full = _full_cost_taps(network)
    taps = tuple(name for name in backbone.names[:-1] if name not in blind and name not in full)
    if not taps:
        raise ConfigError(
            f"exits: found no tap before the last that depends on the input and costs less than the backbone, among "
            f"{', '.join(backbone.names)}; use a deeper backbone, or name taps"
        )
    return taps


def _full_cost_taps(network: Network) -> tuple[str, ...]:
    tokens = _token_taps(network.backbone)
    if not tokens:
        return ()
    macs = {name: count for name, count in stage_macs(network).items() if not name.startswith("exit/")}
    most = _FULL * sum(macs.values())
    reached = zip(macs, accumulate(macs.values()), strict=True)
    return tuple(name for name, spent in reached if name in tokens and spent >= most)


def _token_taps(backbone: Backbone) -> tuple[str, ...]:
    return tuple(name for name, shape in backbone.tap_shapes.items() if len(shape) == 2)


def _two_inputs(backbone: Backbone) -> tuple[Any, Any]:
    """Two batches of one sample: noise, or sequences of zeros and ones that begin with a zero."""
    if len(backbone.input_shape) > 1:
        noise = torch.rand(2, *backbone.input_shape, generator=torch.Generator().manual_seed(0))
        pair: Tensor = match_parameters(noise, [backbone])
    else:
        pair = match_parameters(torch.zeros(2, *backbone.input_shape), [backbone])
        pair[1, 1:] = 1
    return pair[:1], pair[1:]
