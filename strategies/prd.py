"""PRD: contrastive features, prototype classifiers, and distillation of prototype-sample relations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.exits.features import exit_branches
from clframe.exits.head_kinds import embedded_width, prototype_head
from clframe.functional.losses import distillation
from clframe.functional.representation import attraction, contrastive, relation
from clframe.nn.features import embed_tap
from clframe.nn.frozen import freeze
from clframe.nn.heads import CosineLinear
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class PRD(Component):
    """Prototype-sample relation distillation (PRD): contrastive features and prototype classifiers, no stored samples.

    At every exit, on its embedded tap f: the supervised contrastive loss of a projection of f replaces the
    cross-entropy; ``attract (1 - cos(p_y, f))`` moves the prototypes towards f, without a gradient to f; and
    ``distill`` times ``KL(softmax(cos(p_old, f) / T) of the old model || the same of this one)`` lets the prototypes of
    classes without data move with the features. Predictions are cosines to the prototypes. The distillation compares
    cosines; the authors' code does not normalize features, with which the term may grow without bound. Asadi et al.,
    "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning" (2023); Khosla et al., "Supervised
    Contrastive Learning" (2020).

    Use it if nothing may be stored, with large batches: each sample is shown in one view, so its positives are the
    other samples of its class. Cost: a forward pass of the old model per step, a copy of it, and a projection at each
    exit, which predictions do not use. Heads configured by ``exits`` are replaced by prototypes on the same taps.
    Prototypes have no separate learning rate, as they have in the paper: SGD of 0.05 serves both, Adam of 0.002 is too
    small for prototypes. Defaults are those of the authors' commands; of 14 other choices of ``attract``, ``distill``
    and temperatures none was clearly better on held-out digits and MNIST.

    Args:
        attract: Weight of the prototypes' attraction.
        distill: Weight of the distillation: a sum over old experiences, a mean over the classes of each.
        temperature: Of the contrastive loss; predictions are cosines divided by it.
        distill_temperature: Of the distillation.
        over: Axis of the softmax in the distillation: the ``classes`` of each old experience for each sample, as in the
            authors' code, or the ``samples`` of the batch for each old prototype.
        projection: Outputs of the projection, 0 for none.
        hidden: Units of its two hidden layers.
    """

    name: ClassVar[str] = "prd"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"classifier", "task_loss"})
    terms: ClassVar[tuple[str, ...]] = ("attract", "relation")
    renamed: ClassVar[Mapping[str, str]] = {"distil": "distill", "distil_temperature": "distill_temperature"}

    attract: float = 2.0
    distill: float = 4.0
    temperature: float = 0.1
    distill_temperature: float = 1.0
    over: Literal["classes", "samples"] = "classes"
    projection: int = 128
    hidden: int = 512

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("attract", self.attract >= 0, "give a number of at least 0"),
            ("distill", self.distill >= 0, "give a number of at least 0"),
            ("temperature", self.temperature > 0, "give a number above 0"),
            ("distill_temperature", self.distill_temperature > 0, "give a number above 0"),
            ("projection", self.projection >= 0, "give the number of outputs, 0 for no projection"),
            ("hidden", self.hidden >= 1, "give at least 1 unit"),
        ):
            if not ok:
                raise ConfigError(f"components.prd.{key}: found {getattr(self, key)}; {advice}")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the taps of all exits."""
        return network.exit_taps

    def setup_network(self, network: Network) -> None:
        """Replace the heads by prototypes and add a projection to each."""
        shapes = network.backbone.tap_shapes
        network.attach([(tap, prototype_head(shapes[tap])) for tap in network.exit_taps[:-1]])
        network.classify_with(partial(CosineLinear, scale=1 / self.temperature, learn_scale=False))
        if self.projection:
            widths = [embedded_width(shapes[tap]) for tap in network.exit_taps]
            network.extras[self.name] = nn.ModuleList(self._projection(width) for width in widths)

    def init_state(self, network: Network) -> State:
        """Return a state without teacher."""
        return {"teacher": None, "groups": (), "share": None}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the contrastive loss of every exit."""
        features = [embed_tap(tap) for tap in exit_branches(step.network, step.output)]
        if self.projection:
            layers = step.network.extras[self.name]
            assert isinstance(layers, nn.ModuleList)
            features = [layer(x_BF) for layer, x_BF in zip(layers, features, strict=True)]
        return contrastive(features, step.batch.y, temperature=self.temperature, weight_B=step.batch.weight_B)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the attraction and, from the second experience on, the distillation."""
        network, taps = step.network, exit_branches(step.network, step.output)
        cosines = _cosines(network, [tap.detach() for tap in taps])
        terms = {"attract": self.attract * attraction(cosines, step.batch.y)}
        if state["teacher"] is None:
            return terms
        old = step.run(state["teacher"], taps=network.exit_taps)
        with torch.no_grad():
            teacher = _cosines(state["teacher"], exit_branches(network, old))
        student, temperature = _cosines(network, taps), self.distill_temperature
        if self.over == "samples":
            loss_K = relation(student, teacher, share_C=state["share"], temperature=temperature)
        else:
            loss_K = distillation(student, teacher, groups=state["groups"], temperature=temperature)
            loss_K = loss_K / temperature**2
        return {**terms, "relation": self.distill * loss_K}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store a frozen copy as the next teacher; a class stays in the group of its first experience."""
        known = {c for group in state["groups"] for c in group}
        new = tuple(sorted(set(context.experience.classes) - known))
        groups = (*state["groups"], new) if new else state["groups"]
        share_C = torch.zeros(network.classes)
        for group in groups:
            share_C[list(group)] = 1 / len(group)
        return {"teacher": freeze(network), "groups": groups, "share": share_C.to(network.final.weight)}

    def _projection(self, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden), nn.ReLU(),
            nn.Linear(self.hidden, self.projection),
        )  # fmt: skip


def _cosines(network: Network, taps: Sequence[Tensor]) -> list[Tensor]:
    """Return K tensors cosine_BC between embedded taps and prototypes."""
    return [head(tap) / head.scale for head, tap in zip(network.heads, taps, strict=True)]
