"""Exits: classifiers on taps of the backbone, trained beside its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ClframeError, ConfigError
from clframe.exits import EnsembleKind, Placement, fit_on_samples, make_ensemble, make_head, matched_head, place
from clframe.exits.losses import Ramp, exit_weights, self_distillation
from clframe.nn.backbones import Backbone
from clframe.nn.heads import Head
from clframe.nn.network import Gradient, Network


@dataclass(frozen=True, kw_only=True)
class Exits(Component):
    """Auxiliary classifiers (exits) on taps of the backbone: every loss of the strategy applies at each of them.

    Representations in the middle of a network forget less than its output; exits trained there raise the
    accuracy of all together and let inference stop early. The loss is ``sum_k w_k(e) L(exit k) + L(final)``.
    Szatkowski et al., "Improving Continual Learning Performance and Efficiency with Auxiliary Classifiers"
    (2025); Wojcik et al., "Zero Time Waste in Pre-trained Early Exit Neural Networks" (2023).

    Use it with any strategy whose predictions should cost less, or be more accurate at the same cost. Costs the
    heads: their weights, and their MACs in each step and in each prediction that gets that far, which
    ``clframe explain`` counts.

    Args:
        at: Taps by name, or ``auto``: the paper's where it has some for the backbone, else all but the last.
        count: How many exits of the paper's tables; ResNet32 has 3, 6 and 12.
        every: Instead, an exit on every n-th tap.
        at_cost: Instead, exits on the taps nearest to these shares of the backbone's MACs.
        at_latency: Instead, exits on the taps nearest to these shares of its measured time on this machine.
        control: ``last`` puts heads of the same size on the last tap: as many parameters, no depth to gain from.
        head: ``pool``: SDN pooling and a linear layer; ``conv``: a convolution before it; ``conv_large``: one
            that halves the map; ``token``: LayerNorm on the first token; ``token_raw``: without; ``hidden``: a
            hidden layer; ``linear``; ``auto`` takes ``pool``, ``token`` or ``linear`` by the tap's shape.
        hidden: Units of the hidden layer of ``hidden``.
        heads: ``per_experience`` makes a fresh head for each experience's classes, ``growing`` widens one.
        cascade: Whether a head also sees the logits of the exit before it, without their gradient.
        cascade_norm: Whether these logits pass a LayerNorm first.
        ensemble: What an exit answers: its own logits (``single``), or theirs and those of all exits before:
            ``geometric`` (weights fitted after each experience), ``product``, ``mean``, ``boosted``.
        fit_on: Data that a geometric ensemble is fitted on: held out of all experiences so far
            (``validation``), or this experience's training data, as published.
        fit_epochs: Passes over these data.
        weights: How the weights of the exits' losses go over the epochs of an experience: ``ramp`` from 0.01,
            ``linear`` from 0, ``constant``.
        values: Their values in the end, one for each exit; none takes the paper's, or those of the placement.
        gradient: How exits' losses reach the backbone: ``through``, ``detached`` (linear probes), ``equilibrium``.
        regime: ``joint`` trains everything together; ``mixed`` the backbone first, then everything;
            ``disjoint`` the backbone first, then the exits on a frozen trunk.
        trunk_share: Share of an experience's epochs for the backbone alone, in the last two.
        distill: Weight of distillation from the last exit into the others.
        temperature: Of that distillation.
        scale: Factor on all weights of exits; 0 leaves the exits out.
    """

    name: ClassVar[str] = "exits"
    slots: ClassVar[frozenset[str]] = frozenset({"exit_weights"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    weight: ClassVar[str] = "scale"

    at: Literal["auto"] | tuple[str, ...] = "auto"
    count: int | None = None
    every: int | None = None
    at_cost: tuple[float, ...] = ()
    at_latency: tuple[float, ...] = ()
    control: Literal["none", "last"] = "none"
    head: Literal["auto", "pool", "conv", "conv_large", "token", "token_raw", "hidden", "linear"] = "auto"
    hidden: int = 128
    heads: Literal["per_experience", "growing"] = "per_experience"
    cascade: bool = False
    cascade_norm: bool = False
    ensemble: EnsembleKind = "single"
    fit_on: Literal["validation", "training"] = "validation"
    fit_epochs: int = 50
    weights: Ramp = "ramp"
    values: tuple[float, ...] = ()
    gradient: Gradient = "through"
    regime: Literal["joint", "mixed", "disjoint"] = "joint"
    trunk_share: float = 0.5
    distill: float = 0.0
    temperature: float = 3.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse places named in two ways and numbers that mean nothing."""
        ways = [way for way in ("every", "at_cost", "at_latency") if getattr(self, way)]
        ways += ["at"] if self.at != "auto" else []
        if len(ways) > 1:
            raise ConfigError(f"components.exits.{ways[0]}: found beside {ways[1]}; place the exits in one way")
        if self.control == "last" and self.cascade:
            raise ConfigError("components.exits.control: found last with a cascade, which goes from depth to depth")
        if self.cascade_norm and not self.cascade:
            raise ConfigError("components.exits.cascade_norm: found true without a cascade; set cascade=true too")
        for key, ok, advice in (
            ("at", self.at != (), "name at least one tap, or leave the component out"),
            ("hidden", self.hidden >= 1, "give at least 1 unit"),
            ("fit_epochs", self.fit_epochs >= 1, "give at least 1"),
            ("trunk_share", 0 < self.trunk_share < 1, "give a share between 0 and 1"),
            ("distill", self.distill >= 0, "give a number of at least 0"),
            ("temperature", self.temperature > 0, "give a number above 0"),
            ("scale", self.scale >= 0, "give a number of at least 0"),
            ("values", all(value >= 0 for value in self.values), "give numbers of at least 0"),
        ):
            if not ok:
                raise ConfigError(f"components.exits.{key}: found {getattr(self, key)}; {advice}")

    @property
    def needs_held_out(self) -> str:
        """A geometric ensemble is fitted on held-out data, unless told otherwise."""
        return "fit_on" if self.ensemble == "geometric" and self.fit_on == "validation" else ""

    def resolve(self, network: Network) -> Exits:
        """Places measured in time, which differ from one measurement to the next, become names."""
        if not self.at_latency:
            return self
        where = self._placement(network)
        return replace(self, at=where.taps, values=where.weights, at_latency=())

    def setup_network(self, network: Network) -> None:
        """Put the heads on their taps."""
        backbone = network.backbone
        exits: list[tuple[str, Head]] = []
        for tap in self._placement(network).taps:
            per_experience = self.heads == "per_experience"
            head = make_head(
                "token" if self.head == "token_raw" else self.head,
                backbone.tap_shapes[tap],
                per_experience=per_experience,
                cascade=self.cascade and bool(exits),
                cascade_norm=self.cascade_norm and bool(exits),
                hidden=self.hidden,
                token_norm=self.head != "token_raw",
            )
            if self.control == "last":
                tap = _last_like(tap, backbone)
                head = matched_head(backbone.tap_shapes[tap], features=head.features, per_experience=per_experience)
            exits.append((tap, head))
        network.attach(exits)
        network.gradient = self.gradient
        network.boosted = self.ensemble == "boosted"
        network.ensemble = make_ensemble(self.ensemble, exits=len(network.heads))

    def init_state(self, network: Network) -> State:
        """What the exits' losses weigh at the end of a ramp."""
        found, exits = self._placement(network).weights, network.exit_taps[:-1]
        if len(found) != len(exits):  # another component has added stages since the exits were placed
            found = place(network, taps=exits).weights
        return {"weights": found}

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze what does not learn in this phase of the experience."""
        if self.regime == "joint":
            return
        alone = context.epoch < self._trunk_epochs(context)
        network.gradient = "detached" if alone else self.gradient
        for head in network.heads[:-1]:
            head.requires_grad_(not alone)
        network.freeze_trunk("frozen" if self.regime == "disjoint" and not alone else "free")

    def exit_loss_weights(self, context: StepContext, state: State) -> Sequence[float]:
        """w_k of this epoch, and 1 for the backbone's own classifier."""
        own, values = self._trunk_epochs(context), state["weights"]
        if context.epoch < own:
            return (*(0.0 for _ in values), 1.0)
        if self.regime == "disjoint":
            return (*(self.scale for _ in values), 0.0)
        found = exit_weights(self.weights, values, epoch=context.epoch - own, epochs=context.epochs - own)
        return (*(self.scale * weight for weight in found), 1.0)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Distillation from the last exit, if wanted."""
        if self.distill == 0:
            return {}
        return {"distill": self.distill * self_distillation(step.output.logits, temperature=self.temperature)}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fit the ensemble, on what the exits answer with."""
        if self.ensemble == "geometric":
            samples = context.experience.held_out if self.fit_on == "validation" else (context.experience.samples,)
            fit_on_samples(
                network, samples, epochs=self.fit_epochs, generator=context.generator, answer=context.answer
            )
        return state

    def _placement(self, network: Network) -> Placement:
        try:
            return place(
                network,
                taps=() if self.at == "auto" else self.at,
                count=self.count,
                nth=self.every,
                cost_shares=self.at_cost,
                latency_shares=self.at_latency,
                values=self.values,
            )
        except ClframeError as error:
            raise type(error)(f"components.{error}") from None

    def _trunk_epochs(self, context: StepContext) -> int:
        """Epochs of the experience for the backbone alone: a share of them, at least one, never all."""
        if self.regime == "joint":
            return 0
        if context.epochs < 2:
            raise ConfigError(
                f"components.exits.regime: found {self.regime} with 1 epoch an experience; give at least 2, or "
                f"regime=joint"
            )
        return min(max(round(self.trunk_share * context.epochs), 1), context.epochs - 1)


def _last_like(tap: str, backbone: Backbone) -> str:
    """The last tap with as many dimensions as ``tap``: the deepest map for a map."""
    shapes = backbone.tap_shapes
    return [name for name in backbone.names if len(shapes[name]) == len(shapes[tap])][-1]
