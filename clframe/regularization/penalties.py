"""Quadratic penalties on changes of weights: state, loss term, and consolidation after an experience."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clframe.core.types import State, StepContext
from clframe.errors import ConfigError
from clframe.functional.prototypes import to_single
from clframe.nn.network import Network
from clframe.regularization.importance import (
    Layout,
    Quadratic,
    find_spans,
    flatten,
    move_to_layout,
    penalty_values,
)
from clframe.regularization.sensitivity import (
    Estimate,
    Labels,
    SampleLoss,
    Scope,
    objectives,
    sensitivities,
)

Combine = Callable[[Quadratic | None, Tensor, Tensor], Mapping[str, Tensor]]
"""Maps the previous quadratic, new importances and the present weights to the quadratic to store."""


@dataclass(frozen=True, kw_only=True)
class QuadraticPenalty:
    """Quadratic penalties on changes of weights, as a helper of the component that adds them.

    Args:
        owner: Name of the component, for messages.
        weight: Its option that scales the penalty, for messages.
        scope: Losses that importances are of, and number of penalties; see
            :func:`~clframe.regularization.sensitivity.objectives`, also for ``heads``.
        heads: Whether classifiers are covered.
        samples: Samples for the estimate, drawn at random; 0 uses all of the experience.
        batch_size: Batch size of that pass.
        ceiling: Largest importance; None leaves them unbounded.

    Raises:
        ConfigError: A size or ceiling out of range.
    """

    owner: str
    weight: str = "lamb"
    scope: Scope = "exit"
    heads: Literal["covered", "free"] = "covered"
    samples: int = 0
    batch_size: int = 128
    ceiling: float | None = None

    def __post_init__(self) -> None:
        """Validate the owner's options."""
        for key, ok, advice in (
            ("samples", self.samples >= 0, "give a number of samples, or 0 for all"),
            ("batch_size", self.batch_size >= 1, "give at least 1"),
            ("ceiling", self.ceiling is None or self.ceiling > 0, "give a number above 0, or none"),
        ):
            if not ok:
                raise ConfigError(f"components.{self.owner}.{key}: found {getattr(self, key)}; {advice}")

    @classmethod
    def of(cls, component: Any) -> QuadraticPenalty:
        """Build the penalty from a component with the options ``scope`` to ``ceiling``."""
        options = ("scope", "heads", "samples", "batch_size", "ceiling")
        return cls(
            owner=component.name, weight=component.weight, **{option: getattr(component, option) for option in options}
        )

    def empty(self) -> State:
        """Return the state before the first experience, without a penalty."""
        return {"scopes": (), "terms": ()}

    def resize(self, network: Network, state: State) -> dict[str, Any]:
        """Return the state for an experience about to be trained, in the shapes of the grown parameters.

        New weights, among them the rows of a grown classifier, have importance zero.
        """
        found = objectives(network, scope=self.scope, heads=self.heads)
        wanted = {name for _, names in found for name in names}
        layout = tuple((name, tuple(p.shape)) for name, p in network.named_parameters() if name in wanted)
        scopes = tuple(names for _, names in found)
        shapes = dict(layout)
        terms = []
        for names, old in zip(scopes, state["terms"], strict=False):  # no terms before the first consolidation
            new = tuple((name, shapes[name]) for name in names)
            moved = {key: move_to_layout(old[key], old["layout"], new) for key in ("importance", "center")}
            terms.append({**moved, "constant": old["constant"], "layout": new})
        live = [network.get_parameter(name) for name, _ in layout]
        spans = tuple(find_spans(layout, names) for names in scopes)
        return {"scopes": scopes, "terms": tuple(terms), "live": live, "spans": spans}

    def losses(self, state: State, *, scale: float) -> Mapping[str, Tensor]:
        """Return ``penalty``, the quadratics times ``scale``: one value per exit, or one in all; {} without any."""
        if not state["terms"]:
            return {}
        penalty_K = scale * penalty_values(state["live"], state["terms"], state["spans"])
        return {"penalty": penalty_K if self.scope in ("exit", "block") else penalty_K.sum()}

    def estimate(
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
        """Estimate importances on the samples of an experience, then :meth:`consolidate`.

        Args:
            network: The trained network.
            context: The experience, and the generator that draws samples.
            state: State after training.
            loss: See :func:`~clframe.regularization.sensitivity.sensitivities`, also for ``power``, ``estimate`` and
                ``labels``.
            power: 2 for a Fisher diagonal, 1 for absolute gradients.
            combine: Combines the previous quadratic with new importances and weights.
            estimate: Average of the squares.
            labels: Labels of the loss.
        """
        found = objectives(network, scope=self.scope, heads=self.heads)
        importances = sensitivities(
            network,
            context.experience.samples,
            measured=[(exits, names) for (exits, _), names in zip(found, state["scopes"], strict=True)],
            loss=loss,
            power=power,
            estimate=estimate,
            labels=labels,
            limit=self.samples,
            batch_size=self.batch_size,
            generator=context.generator,
        )
        return self.consolidate(network, state, importances, combine=combine)

    def consolidate(
        self, network: Network, state: State, importances: Sequence[Mapping[str, Tensor]], *, combine: Combine
    ) -> State:
        """Return the state after an experience: each objective's quadratic, combined with new importances.

        Args:
            network: The trained network.
            state: State after training.
            importances: For each objective, by weight.
            combine: Combines the previous quadratic with new importances and weights, both flat.

        Raises:
            ConfigError: Training has diverged, as it does if a penalty is too stiff for the learning rate.
        """
        terms = []
        for number, names in enumerate(state["scopes"]):
            layout: Layout = tuple((name, tuple(network.get_parameter(name).shape)) for name in names)
            importance_P = flatten([importances[number][name] for name in names])
            center_P = to_single(flatten([network.get_parameter(name) for name in names]))
            old = state["terms"][number] if state["terms"] else None
            if not bool(torch.isfinite(importance_P).all() & torch.isfinite(center_P).all()):
                raise ConfigError(
                    f"components.{self.owner}.{self.weight}: found a value with which training diverged (learning rate "
                    f"* weight * largest importance must be below about 1); lower it or optimizer.lr, or set a ceiling"
                )
            term = dict(combine(old, importance_P, center_P))
            term["importance"] = term["importance"].clamp_max(math.inf if self.ceiling is None else self.ceiling)
            terms.append({**term, "layout": layout})
        return {"scopes": state["scopes"], "terms": tuple(terms)}
