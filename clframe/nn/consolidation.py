"""Weights held near where they were: the state behind quadratic penalties, through growing heads.

Between experiences the state is plain: ``scopes``, the weights of each objective, and ``terms``, one quadratic for
each with its layout. During an experience it also holds ``live``, the parameters themselves, and ``spans``, where
each objective's weights lie among them, so that a step looks nothing up.

Shape suffixes: P weights, K exits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clframe.core.types import State
from clframe.errors import ConfigError
from clframe.functional.importance import Layout, Quadratic, flat, penalties, relaid, spans_of
from clframe.nn.network import Network
from clframe.nn.sensitivity import Objective

Combine = Callable[[Quadratic | None, Tensor, Tensor], Mapping[str, Tensor]]
"""The quadratic to hold on to, from the one before, new importances and the weights as they are."""


def unconsolidated() -> State:
    """The state before the first experience: nothing is held."""
    return {"scopes": (), "terms": ()}


def taken_up(network: Network, state: State, objectives: Sequence[Objective]) -> dict[str, Any]:
    """The state for an experience about to be trained: in the order and the shapes of the grown parameters.

    Weights that are new, rows of a grown classifier included, have importance zero.
    """
    wanted = {name for _, names in objectives for name in names}
    layout = tuple((name, tuple(p.shape)) for name, p in network.named_parameters() if name in wanted)
    scopes = tuple(names for _, names in objectives)
    shapes = dict(layout)
    terms = []
    for names, old in zip(scopes, state["terms"], strict=False):
        new = tuple((name, shapes[name]) for name in names)
        moved = {key: relaid(old[key], old["layout"], new) for key in ("importance", "center")}
        terms.append({**moved, "constant": old["constant"], "layout": new})
    live = [network.get_parameter(name) for name, _ in layout]
    spans = tuple(spans_of(layout, names) for names in scopes)
    return {"scopes": scopes, "terms": tuple(terms), "live": live, "spans": spans}


def held(state: State) -> Tensor:
    """penalty_K of each objective's quadratic at the weights as they are."""
    return penalties(state["live"], state["terms"], state["spans"])


def consolidated(
    network: Network,
    state: State,
    importances: Sequence[Mapping[str, Tensor]],
    *,
    combine: Combine,
    ceiling: float | None = None,
    where: str,
) -> State:
    """The state after an experience: each objective's quadratic combined with new importances, by weight.

    Args:
        network: Holds the weights as they are now.
        state: As training left it.
        importances: For each objective, by weight.
        combine: What to make of the quadratic before, flat importances and weights.
        ceiling: Largest importance to keep; None keeps all.
        where: The component and its weight, such as ``components.ewc.lamb``, for the error.

    Raises:
        ConfigError: Training has diverged, as it does where a penalty is too stiff for the learning rate.
    """
    terms = []
    for number, names in enumerate(state["scopes"]):
        layout: Layout = tuple((name, tuple(network.get_parameter(name).shape)) for name in names)
        importance_P = flat([importances[number][name] for name in names])
        center_P = flat([network.get_parameter(name) for name in names])
        old = state["terms"][number] if state["terms"] else None
        if not bool(torch.isfinite(importance_P).all() & torch.isfinite(center_P).all()):
            raise ConfigError(
                f"{where}: found a value with which training diverged (learning rate * weight * largest importance "
                f"must stay below about 1); lower it or optimizer.lr, or give a ceiling"
            )
        term = dict(combine(old, importance_P, center_P))
        term["importance"] = term["importance"].clamp_max(math.inf if ceiling is None else ceiling)
        terms.append({**term, "layout": layout})
    return {"scopes": state["scopes"], "terms": tuple(terms)}
