"""Memory aware synapses: penalize changes of the weights to which the outputs are sensitive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.nn.network import Network
from clframe.regularization.importance import Quadratic, quadratic, squared_norm
from clframe.regularization.penalties import QuadraticPenalty
from clframe.regularization.sensitivity import Scope


@dataclass(frozen=True, kw_only=True)
class MAS(Component):
    """Memory aware synapses (MAS): penalize changes of each weight by the sensitivity of the outputs; needs no labels.

    Adds ``lamb * sum_p O_p (w_p - w*_p)^2`` at every exit, ``w*`` the weights after the last experience and O the mean
    over its samples of ``|d ||logits||^2 / d w_p|``, merged with the previous importances: ``O <- alpha O + (1 - alpha)
    new``. An exit's penalty covers the backbone up to its tap and its own head; new rows of a classifier are free.

    Use it in the same settings as EWC; importances can be estimated on any inputs, here those of the experience. Cost:
    two numbers per weight and exit, and a pass over the data after each experience with one gradient per sample; a step
    costs a few operations over the flat weights. Aljundi et al., "Memory Aware Synapses: Learning what (not) to forget"
    (2018).

    Args:
        lamb: Weight of the penalty; 1 in the paper.
        merge: ``average`` by ``alpha``, starting from zero; ``sum`` over all experiences, as in the paper.
        alpha: Share of the old importances in ``average``.
        scope: ``exit``: a separate penalty for each exit, scaled by the exit weights; ``block``: the same, but an exit
            before the last covers only the stage it is attached to; ``last``: one penalty, from the outputs of the last
            exit; ``total``: one, from the outputs of all exits, over all heads.
        heads: Whether classifiers are ``covered`` by the penalty or ``free``.
        samples: Samples for the estimate, drawn at random; 0 uses all of the experience.
        batch_size: Batch size of that pass; it changes no numbers.
        ceiling: Largest importance; none leaves them unbounded. Training by SGD diverges if learning rate * 2 lamb *
            importance exceeds 2.
    """

    name: ClassVar[str] = "mas"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    remembers_weights: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("penalty",)
    weight: ClassVar[str] = "lamb"

    lamb: float = 1.0
    merge: Literal["average", "sum"] = "average"
    alpha: float = 0.5
    scope: Scope = "exit"
    heads: Literal["covered", "free"] = "covered"
    samples: int = 0
    batch_size: int = 128
    ceiling: float | None = None

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("lamb", self.lamb >= 0, "give a number of at least 0"),
            ("alpha", 0 <= self.alpha <= 1, "give a number from 0 to 1"),
        ):
            if not ok:
                raise ConfigError(f"components.mas.{key}: found {getattr(self, key)}; {advice}")
        _ = self._penalty  # built here so that invalid sizes are refused at construction

    @cached_property
    def _penalty(self) -> QuadraticPenalty:
        return QuadraticPenalty.of(self)

    def init_state(self, network: Network) -> State:
        """Return a state without penalty."""
        return self._penalty.empty()

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Resize the penalty to the grown classifiers."""
        return self._penalty.resize(network, state)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the penalty, from the second experience on."""
        return self._penalty.losses(state, scale=self.lamb)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Estimate the sensitivity of the outputs and store the current weights."""
        return self._penalty.estimate(network, context, state, loss=squared_norm, power=1, combine=self._combine)

    def _combine(self, old: Quadratic | None, importance_P: Tensor, weight_P: Tensor) -> Mapping[str, Tensor]:
        kept = self.alpha if self.merge == "average" else 1.0
        fresh_P = (1 - self.alpha) * importance_P if self.merge == "average" else importance_P
        return quadratic(fresh_P if old is None else kept * old["importance"] + fresh_P, weight_P)
