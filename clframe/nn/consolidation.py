"""Weights held near where they were: the state behind quadratic penalties, through growing heads.

Between experiences the state is plain: ``scopes``, the weights of each objective, and ``terms``, one quadratic for
each with its layout. During an experience it also holds ``live``, the parameters themselves, and ``spans``, where
each objective's weights lie among them, so that a step looks nothing up.

Shape suffixes: P weights, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from clframe.core.types import State
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
    network: Network, state: State, importances: Sequence[Mapping[str, Tensor]], *, combine: Combine
) -> State:
    """The state after an experience: each objective's quadratic combined with new importances, by weight."""
    terms = []
    for number, names in enumerate(state["scopes"]):
        layout: Layout = tuple((name, tuple(network.get_parameter(name).shape)) for name in names)
        importance_P = flat([importances[number][name] for name in names])
        center_P = flat([network.get_parameter(name) for name in names])
        old = state["terms"][number] if state["terms"] else None
        terms.append({**combine(old, importance_P, center_P), "layout": layout})
    return {"scopes": state["scopes"], "terms": tuple(terms)}
