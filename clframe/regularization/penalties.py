"""Quadratic penalties on weights: state, consolidation, and the loss term."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.nn.network import Network
from clframe.regularization.importance import Layout, Quadratic, flat, penalties, relaid, spans_of
from clframe.regularization.sensitivity import (
    Estimate,
    Labels,
    Objective,
    SampleLoss,
    Scope,
    objectives,
    sensitivities,
)

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


@dataclass(frozen=True, kw_only=True)
class Springs:
    """Quadratic penalties by importances measured after each experience, as a field of the component that adds them.

    Args:
        owner: The component, for its name in messages; its penalty's weight is the option ``lamb``.
        scope: Whose loss is measured, and how many penalties there are; see
            :func:`~clframe.regularization.sensitivity.objectives`, as for ``heads``.
        heads: Whether classifiers are held.
        samples: Samples to measure on, drawn at random; 0 takes all of the experience.
        batch_size: Samples at once in that pass.
        ceiling: Largest importance; None leaves them as they are.

    Raises:
        ConfigError: Sizes that mean nothing.
    """

    owner: str
    scope: Scope = "exit"
    heads: Literal["covered", "free"] = "covered"
    samples: int = 0
    batch_size: int = 128
    ceiling: float | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing, in the name of the owner's options."""
        for key, ok, advice in (
            ("samples", self.samples >= 0, "give a number of samples, or 0 for all"),
            ("batch_size", self.batch_size >= 1, "give at least 1"),
            ("ceiling", self.ceiling is None or self.ceiling > 0, "give a number above 0, or none"),
        ):
            if not ok:
                raise ConfigError(f"components.{self.owner}.{key}: found {getattr(self, key)}; {advice}")

    def empty(self) -> State:
        """Nothing is held before the first experience ends."""
        return unconsolidated()

    def prepared(self, network: Network, state: State) -> State:
        """What is held, in the shapes of the grown classifiers."""
        return taken_up(network, state, objectives(network, scope=self.scope, heads=self.heads))

    def penalty(self, state: State, *, lamb: float) -> Mapping[str, Tensor]:
        """``penalty``: ``lamb`` times the quadratics, one for each exit or one in all; {} while nothing is held."""
        if not state["terms"]:
            return {}
        penalty_K = lamb * held(state)
        return {"penalty": penalty_K if self.scope == "exit" else penalty_K.sum()}

    def renewed(
        self,
        network: Network,
        context: StepContext,
        state: State,
        *,
        loss: SampleLoss,
        power: int,
        combine: Combine,
        estimate: Estimate = "samples",
        labels: Labels = "given",
    ) -> State:
        """The state after an experience: importances measured on its samples, the weights held as they are now.

        Args:
            network: As training left it.
            context: The experience, and what draws the samples.
            state: As training left it.
            loss: See :func:`~clframe.regularization.sensitivity.sensitivities`, also for ``power``, ``estimate`` and
                ``labels``.
            power: 2 for a Fisher diagonal, 1 for the size of gradients.
            combine: What to make of the quadratic before, new importances and weights.
            estimate: How squares are averaged.
            labels: Whose labels the loss takes.
        """
        measured = objectives(network, scope=self.scope, heads=self.heads)
        importances = sensitivities(
            network,
            context.experience.samples,
            measured=[(exits, names) for (exits, _), names in zip(measured, state["scopes"], strict=True)],
            loss=loss,
            power=power,
            estimate=estimate,
            labels=labels,
            limit=self.samples,
            batch_size=self.batch_size,
            generator=context.generator,
        )
        where = f"components.{self.owner}.lamb"
        return consolidated(network, state, importances, combine=combine, ceiling=self.ceiling, where=where)
