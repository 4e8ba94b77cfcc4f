"""Auxiliary classifiers (exits) on taps of the backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.component import Component
from clframe.core.declarations import options_without_effect
from clframe.core.types import State, Step, StepContext
from clframe.errors import ClframeError, ConfigError, UnsupportedError, reword
from clframe.exits import (
    Calibrated,
    Calibration,
    EnsembleKind,
    ExitPlacement,
    fit_on_samples,
    make_ensemble,
    make_head,
    make_matched_head,
    place_exits,
)
from clframe.exits.losses import Ramp, exit_weights, self_distillation
from clframe.exits.placement import at_taps
from clframe.nn.backbones import Backbone
from clframe.nn.features import exit_logits
from clframe.nn.heads import Head
from clframe.nn.network import Gradient, Network


@dataclass(frozen=True, kw_only=True)
class Exits(Component):
    """Auxiliary classifiers (exits) on taps of the backbone: every loss of the strategy applies at each exit.

    Intermediate representations forget less than the output of a network; exits trained on them improve accuracy and
    allow inference to stop early. The loss is ``sum_k w_k(e) L(exit k) + L(final)``. Szatkowski et al., "Improving
    Continual Learning Performance and Efficiency with Auxiliary Classifiers" (2025); Wojcik et al., "Zero Time Waste in
    Pre-trained Early Exit Neural Networks" (2023).

    Use it with any strategy to reduce the cost of predictions or to raise accuracy at the same cost. Costs the
    parameters of the heads and their MACs, in each step and in each prediction that reaches them; ``clframe explain``
    counts both.

    Args:
        at: Taps by name, or ``auto``: the published ones for the backbone, otherwise all but the last; in transformers
            without those whose first token no attention has reached, and without the last layer's.
        count: Number of exits among the published placements; ResNet32 has 3, 6 and 12.
        every: Alternative to ``at``: an exit on every n-th tap.
        at_cost: Alternative to ``at``: exits on the taps nearest to these shares of the backbone's MACs.
        at_latency: Alternative to ``at``: exits on the taps nearest to these shares of its run time on this machine.
        control: ``last`` puts heads of the same size on the last tap: equal parameters without different depths.
        head: ``pool``: SDN pooling and a linear layer; ``conv``: a convolution before them; ``conv_large``: a
            convolution that halves the map; ``token``: LayerNorm on the first token, in a language model RMSNorm on
            every token; ``token_raw``: without it; ``hidden``: a hidden layer; ``linear``; ``auto``: ``pool``,
            ``token`` or ``linear`` by the tap's shape.
        hidden: Units of the hidden layer of ``hidden``.
        as_published: Whether heads equal those of the authors' code where it differs: windows of ``pool`` in the
            published placements of ResNet18 (odd maps rounded up) and WRN16-2 (4x4); no padding in ``conv_large``;
            maps smaller than 4x4 repeated to 4x4 in ``conv`` and ``conv_large``.
        heads: ``per_experience`` creates a head for each experience's classes, whose number adds to the time of a step
            (in long streams noticeably); ``growing`` widens one.
        cascade: Whether a head also uses the logits of the previous exit, without their gradient.
        cascade_norm: Whether these logits pass a LayerNorm first.
        ensemble: Scores of an exit: its own logits (``single``), or a combination with those of earlier exits:
            ``geometric`` (weights fitted after each experience), ``product``, ``mean``, ``boosted``.
        fit_on: Data for fitting a geometric ensemble: held-out data of all experiences so far (``validation``), or
            the training data of the experience, as published.
        fit_epochs: Passes over these data, in batches of 128 by Adam with the rate 0.0005; null: as many as make 4,000
            steps.
        calibration: Calibration of each exit's scores, fitted on held-out data after each experience, those on which
            ``early_exit`` solves thresholds: ``none``, ``temperature``, ``vector`` (scaling), ``isotonic`` (on the
            largest probability).
        weights: Schedule of the exits' loss weights over the epochs of an experience: ``ramp`` from 0.01, ``linear``
            from 0, ``constant``.
        values: Final loss weights, one for each exit; if empty, those of the placement.
        gradient: Path of exit gradients to the backbone: ``through``, ``detached`` (linear probes), ``equilibrium``.
        regime: ``joint`` trains everything together; ``mixed`` the backbone first, then everything; ``disjoint`` the
            backbone first, then the exits on a frozen backbone, all with the weight ``scale``.
        trunk_share: Share of an experience's epochs for the backbone in ``mixed`` and ``disjoint``.
        distill: Weight of distillation from the last exit into the others.
        temperature: Temperature of that distillation.
        scale: Factor on all loss weights of exits; 0 removes the exits.
    """

    name: ClassVar[str] = "exits"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"exit_weights"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    weight: ClassVar[str] = "scale"
    renamed: ClassVar[Mapping[str, str]] = {"distil": "distill"}

    at: Literal["auto"] | tuple[str, ...] = "auto"
    count: int | None = None
    every: int | None = None
    at_cost: tuple[float, ...] = ()
    at_latency: tuple[float, ...] = ()
    control: Literal["none", "last"] = "none"
    head: Literal["auto", "pool", "conv", "conv_large", "token", "token_raw", "hidden", "linear"] = "auto"
    hidden: int = 128
    as_published: bool = False
    heads: Literal["per_experience", "growing"] = "per_experience"
    cascade: bool = False
    cascade_norm: bool = False
    ensemble: EnsembleKind = "single"
    fit_on: Literal["validation", "training"] = "validation"
    fit_epochs: int | None = None
    calibration: Calibration = "none"
    weights: Ramp = "ramp"
    values: tuple[float, ...] = ()
    gradient: Gradient = "through"
    regime: Literal["joint", "mixed", "disjoint"] = "joint"
    trunk_share: float = 0.5
    distill: float = 0.0
    temperature: float = 3.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse contradictory placements and numbers out of range."""
        ways = [way for way in ("every", "at_cost", "at_latency") if getattr(self, way)]
        ways += ["at"] if self.at != "auto" else []
        if len(ways) > 1:
            raise ConfigError(f"components.exits.{ways[0]}: found together with {ways[1]}; use one of them")
        if ways and self.count is not None:
            raise ConfigError(
                f"components.exits.count: found together with {ways[0]}, which says how many exits there are; use one "
                f"of them"
            )
        if self.control == "last" and self.cascade:
            raise ConfigError("components.exits.control: found last with a cascade; set cascade=false")
        if self.cascade_norm and not self.cascade:
            raise ConfigError("components.exits.cascade_norm: found true without a cascade; set cascade=true too")
        alone = "with regime=disjoint exits train apart from the backbone, all with the weight scale: leave it out"
        for key, ok, advice in (
            ("at", self.at != (), "name at least one tap, or leave the component out"),
            ("hidden", self.hidden >= 1, "give at least 1 unit"),
            ("fit_epochs", self.fit_epochs is None or self.fit_epochs >= 1, "give at least 1"),
            ("trunk_share", 0 < self.trunk_share < 1, "give a share between 0 and 1"),
            ("distill", self.distill >= 0, "give a number of at least 0"),
            ("temperature", self.temperature > 0, "give a number above 0"),
            ("scale", self.scale >= 0, "give a number of at least 0"),
            ("values", all(value >= 0 for value in self.values), "give numbers of at least 0"),
            ("values", self.regime != "disjoint" or {*self.values} <= {1}, alone),
            ("weights", self.regime != "disjoint" or self.weights != "linear", alone),
        ):
            if not ok:
                raise ConfigError(f"components.exits.{key}: found {getattr(self, key)}; {advice}")

    @property
    def unused_options(self) -> Mapping[str, str]:
        """Options of parts that the others leave out."""
        return options_without_effect(
            self,
            (self.distill > 0, ["temperature"], "distill is 0"),
            (self.regime != "joint", ["trunk_share"], "the regime is joint"),
            (self.ensemble == "geometric", ["fit_on", "fit_epochs"], "the ensemble is not geometric"),
            (self.head in ("auto", "hidden"), ["hidden"], f"the head is {self.head}"),
        )

    @property
    def needs_held_out(self) -> str:
        """The option that is fitted on held-out data: ``fit_on`` of a geometric ensemble, or ``calibration``."""
        if self.ensemble == "geometric" and self.fit_on == "validation":
            return "fit_on"
        return "calibration" if self.calibration != "none" else ""

    @property
    def named_taps(self) -> Mapping[str, Sequence[str]]:
        """Those of ``at``."""
        return {} if self.at == "auto" else {"at": self.at}

    def resolve(self, network: Network) -> Exits:
        """Replace ``at_latency`` by the taps it selects, since timings vary between machines and measurements."""
        if not self.at_latency:
            return self
        placement = self._placement(network)
        values = () if self.regime == "disjoint" else placement.weights
        return replace(self, at=placement.taps, values=values, at_latency=())

    def setup_network(self, network: Network) -> None:
        """Attach the heads to their taps.

        Raises:
            UnsupportedError: The network has been trained: new heads would lack the classes it has learned.
        """
        if network.classes and not network.vocabulary:
            raise UnsupportedError(
                f"components.exits: found a network that has learned {network.classes} classes; its exits would be "
                f"replaced by untrained ones: use a new network, or clframe.run(resume=...) to continue a run"
            )
        if network.vocabulary and self.control == "last":
            raise UnsupportedError(
                "components.exits.control: found last with a language model, whose taps all have one size; set none"
            )
        backbone, placement = network.backbone, self._placement(network)
        exits: list[tuple[str, Head]] = []
        for number, tap in enumerate(placement.taps):
            # All domains of a text have the same tokens: the head of the first experience is that of all.
            per_experience = self.heads == "per_experience" and not network.vocabulary
            head = make_head(
                self.head,
                backbone.tap_shapes[tap],
                per_experience=per_experience,
                cascade=self.cascade and bool(exits),
                cascade_norm=self.cascade_norm and bool(exits),
                hidden=self.hidden,
                pooling=placement.pooling[number] if self.as_published and placement.pooling else "2x2",
                as_published=self.as_published,
                per_token=bool(network.vocabulary),
            )
            if self.control == "last":
                tap = _last_tap_of_rank(len(backbone.tap_shapes[tap]), backbone)
                shape = backbone.tap_shapes[tap]
                head = make_matched_head(shape, features=head.features, per_experience=per_experience)
            exits.append((tap, head))
        network.attach(exits)
        network.gradient = self.gradient
        network.boosted = self.ensemble == "boosted"
        network.ensemble = make_ensemble(self.ensemble, exits=len(network.heads))
        if self.calibration != "none":
            network.ensemble = Calibrated(network.ensemble, self.calibration, exits=len(network.heads))

    def init_state(self, network: Network) -> State:
        """The exits' loss weights at the end of a ramp."""
        weights, exits = self._placement(network).weights, network.exit_taps[:-1]
        if len(weights) != len(exits):  # another component has added stages since the exits were placed
            weights = at_taps(network.backbone, exits).weights
        return {"weights": weights}

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze the exits or the backbone, depending on the phase of the experience."""
        if self.regime == "joint":
            return
        trunk_only = context.epoch < self._trunk_epochs(context)
        network.gradient = "detached" if trunk_only else self.gradient
        for head in network.heads[:-1]:
            head.requires_grad_(not trunk_only)
        if self.regime == "disjoint" and not trunk_only:
            network.freeze_trunk()
        else:
            network.unfreeze_trunk()

    def exit_loss_weights(self, context: StepContext, state: State) -> Sequence[float]:
        """w_k of this epoch, and 1 for the backbone's own classifier."""
        first, final_weights = self._trunk_epochs(context), state["weights"]
        if context.epoch < first:
            return (*(0.0 for _ in final_weights), 1.0)
        if self.regime == "disjoint":
            return (*(self.scale for _ in final_weights), 0.0)
        weights = exit_weights(self.weights, final_weights, epoch=context.epoch - first, epochs=context.epochs - first)
        return (*(self.scale * weight for weight in weights), 1.0)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Distillation from the last exit, if ``distill`` is above 0."""
        if self.distill == 0:
            return {}
        return {"distill": self.distill * self_distillation(step.output.logits, temperature=self.temperature)}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fit a geometric ensemble, then the calibration, on the exits' logits, corrected by the slot ``logits``."""
        if self.ensemble == "geometric":
            samples = context.experience.held_out if self.fit_on == "validation" else (context.experience.samples,)
            fit_on_samples(
                network, samples, epochs=self.fit_epochs, generator=context.generator, forward=context.corrected_output
            )
        if isinstance(network.ensemble, Calibrated):
            logits, y_N = exit_logits(network, context.experience.held_out, forward=context.corrected_output)
            network.ensemble.fit(logits, y_N)
        return state

    def _placement(self, network: Network) -> ExitPlacement:
        try:
            return place_exits(
                network,
                taps=() if self.at == "auto" else self.at,
                count=self.count,
                nth=self.every,
                cost_shares=self.at_cost,
                latency_shares=self.at_latency,
                values=self.values,
                head=self.head,
            )
        except ClframeError as error:
            raise reword(error, lambda message: f"components.{message}") from None

    @property
    def fewest_epochs(self) -> int:
        """Two where the backbone and the exits are trained in different epochs."""
        return 1 if self.regime == "joint" else 2

    def _trunk_epochs(self, context: StepContext) -> int:
        """Number of epochs that train the backbone only: ``trunk_share`` of them, at least one and not all."""
        if self.regime == "joint":
            return 0
        if context.epochs < 2:
            raise ConfigError(
                f"components.exits.regime: found {self.regime} with 1 epoch an experience; give at least 2, or "
                f"regime=joint"
            )
        return min(max(round(self.trunk_share * context.epochs), 1), context.epochs - 1)


def _last_tap_of_rank(dimensions: int, backbone: Backbone) -> str:
    """The last tap with this number of dimensions, such as the deepest map."""
    return [name for name in backbone.names if len(backbone.tap_shapes[name]) == dimensions][-1]
