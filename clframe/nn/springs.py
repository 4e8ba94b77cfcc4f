"""Weights held by how much something depends on them: what strategies with measured importances share.

Shape suffixes: P weights, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from clframe.core.types import Moment, State
from clframe.errors import ConfigError
from clframe.nn.consolidation import Combine, consolidated, held, taken_up, unconsolidated
from clframe.nn.network import Network
from clframe.nn.sensitivity import Estimate, Labels, SampleLoss, Scope, objectives, sensitivities


@dataclass(frozen=True, kw_only=True)
class Springs:
    """Quadratic penalties by importances measured after each experience, as a field of the component that adds them.

    Args:
        owner: The component, for its name in messages; its penalty's weight is the option ``lamb``.
        scope: Whose loss is measured, and how many penalties there are; see
            :func:`~clframe.nn.sensitivity.objectives`, as for ``heads``.
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
        moment: Moment,
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
            moment: The experience, and what draws the samples.
            state: As training left it.
            loss: See :func:`~clframe.nn.sensitivity.sensitivities`, as for ``power``, ``estimate`` and ``labels``.
            power: 2 for a Fisher diagonal, 1 for the size of gradients.
            combine: What to make of the quadratic before, new importances and weights.
            estimate: How squares are averaged.
            labels: Whose labels the loss takes.
        """
        measured = objectives(network, scope=self.scope, heads=self.heads)
        importances = sensitivities(
            network,
            moment.experience.samples,
            measured=[(exits, names) for (exits, _), names in zip(measured, state["scopes"], strict=True)],
            loss=loss,
            power=power,
            estimate=estimate,
            labels=labels,
            limit=self.samples,
            batch_size=self.batch_size,
            generator=moment.generator,
        )
        where = f"components.{self.owner}.lamb"
        return consolidated(network, state, importances, combine=combine, ceiling=self.ceiling, where=where)
