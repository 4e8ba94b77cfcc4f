"""Memory aware synapses: hold the weights that the outputs react to."""

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
from clframe.regularization.penalties import Springs
from clframe.regularization.sensitivity import Scope


@dataclass(frozen=True, kw_only=True)
class MAS(Component):
    """Memory aware synapses (MAS): hold each weight as hard as the outputs react to it; needs no labels.

    Adds ``lamb * sum_p O_p (w_p - w*_p)^2`` at every exit, ``w*`` the weights after the last experience and O the
    mean over its samples of ``|d ||logits||^2 / d w_p|``, merged with what was there: ``O <- alpha O + (1 - alpha)
    new``. An exit's penalty covers the backbone up to its tap and its own head; new rows of a classifier are free.
    For the same places as EWC; importances can be measured on any inputs, which here are the experience's.
    Aljundi et al., "Memory Aware Synapses: Learning what (not) to forget" (2018).

    Costs two numbers a weight and exit, and a pass over the data after each experience in which every sample has
    its own gradient; a step costs a few operations over the flat weights.

    Args:
        lamb: Weight of the penalty; 1 in the paper.
        merge: ``average`` by ``alpha``, starting from zero; ``sum`` adds up all experiences, as the paper does.
        alpha: What ``average`` keeps of the old importances.
        scope: ``exit``: each exit has its own penalty, which the exits' weights scale; ``last``: one penalty, from
            the last exit's outputs; ``total``: one, from the outputs of all exits, over all heads.
        heads: Whether classifiers are ``covered`` by the penalty or ``free``.
        samples: Samples to measure on, drawn at random; 0 takes all of the experience.
        batch_size: Samples at once in that pass; it changes no numbers.
        ceiling: Largest importance; none leaves them as they are. Training by SGD diverges where learning rate *
            2 lamb * importance passes 2.
    """

    name: ClassVar[str] = "mas"
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
        """Refuse numbers that mean nothing."""
        for key, ok, advice in (
            ("lamb", self.lamb >= 0, "give a number of at least 0"),
            ("alpha", 0 <= self.alpha <= 1, "give a number from 0 to 1"),
        ):
            if not ok:
                raise ConfigError(f"components.mas.{key}: found {getattr(self, key)}; {advice}")
        _ = self._springs  # made now, it refuses sizes now

    @cached_property
    def _springs(self) -> Springs:
        return Springs(
            owner=self.name,
            scope=self.scope,
            heads=self.heads,
            samples=self.samples,
            batch_size=self.batch_size,
            ceiling=self.ceiling,
        )

    def init_state(self, network: Network) -> State:
        """Nothing is held before the first experience ends."""
        return self._springs.empty()

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """What is held, in the shapes of the grown classifiers."""
        return self._springs.prepared(network, state)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The penalty, from the second experience on."""
        return self._springs.penalty(state, lamb=self.lamb)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Measure what the outputs react to and hold the weights as they are now."""
        return self._springs.renewed(network, context, state, loss=squared_norm, power=1, combine=self._combine)

    def _combine(self, old: Quadratic | None, importance_P: Tensor, weight_P: Tensor) -> Mapping[str, Tensor]:
        kept = self.alpha if self.merge == "average" else 1.0
        fresh_P = (1 - self.alpha) * importance_P if self.merge == "average" else importance_P
        return quadratic(fresh_P if old is None else kept * old["importance"] + fresh_P, weight_P)
