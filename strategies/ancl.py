"""Auxiliary network continual learning: distill from an old and a new teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.losses import distillation
from clframe.nn.frozen import fine_tune, freeze
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class ANCL(Component):
    """Auxiliary network continual learning (ANCL): distill from the old model and one trained on new data.

    Before each experience but the first a copy of the network is fine-tuned on its data alone: it represents the new
    classes as a network free to forget learns them. Then every exit learns from the same exit of two teachers: ``lamb *
    KL(old || student)`` over the old classes plus ``lamb_a * KL(auxiliary || student)`` over the experience's own, both
    at temperature T and not multiplied by T^2. Kim et al., "Achieving a Better Stability-Plasticity Trade-off via
    Auxiliary Networks in Continual Learning" (2023).

    Use it if LwF restricts new classes too much; without a replay buffer add ``current_classes``. Cost: two frozen
    networks in memory, two more forward passes per step, and the training of the auxiliary network, whose steps the
    state counts: with ``epochs`` 0 the same number again as the run itself.

    The code of the paper on auxiliary classifiers (Szatkowski et al., 2025) distills each old experience under its own
    softmax, times T^2 (``softmax: per_experience`` with ``lamb`` 4 at T = 2), reduces the auxiliary network's learning
    rate in steps of 0.1, and clips its gradients at 1; the preset ``ancl_paper`` sets all of these.

    Args:
        lamb: Weight of the old model.
        lamb_a: Weight of the auxiliary network; 2 in the paper on auxiliary classifiers, 1 with exits.
        temperature: T; higher values give more weight to small probabilities.
        softmax: ``joint``: one softmax over all old classes, as in the paper's text; ``per_experience``: a separate one
            for each old experience, as in the authors' scripts and in LwF.
        epochs: Epochs of the auxiliary network; 0 uses those of the experience.
        lr: Its learning rate.
        milestones: Shares of its epochs after which its learning rate is multiplied by 0.1; none keeps it constant.
        momentum: Of its SGD.
        weight_decay: Of its SGD.
        clip: Largest norm of its gradient.
        batch_size: Samples in its batches.
    """

    name: ClassVar[str] = "ancl"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("distill", "auxiliary")

    lamb: float = 1.0
    lamb_a: float = 1.0
    temperature: float = 2.0
    softmax: Literal["joint", "per_experience"] = "joint"
    epochs: int = 0
    lr: float = 0.05
    milestones: tuple[float, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 100.0
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Validate the options."""
        for key, ok, advice in (
            ("lamb", self.lamb >= 0, "give a number of at least 0"),
            ("lamb_a", self.lamb_a >= 0, "give a number of at least 0"),
            ("temperature", self.temperature > 0, "give a number above 0"),
            ("epochs", self.epochs >= 0, "give a number of epochs, or 0 for as many as training takes"),
            ("lr", self.lr > 0, "give a number above 0"),
            ("milestones", all(0 < share < 1 for share in self.milestones), "give shares between 0 and 1"),
            ("momentum", 0 <= self.momentum < 1, "give a number of at least 0 and below 1"),
            ("weight_decay", self.weight_decay >= 0, "give a number of at least 0"),
            ("clip", self.clip > 0, "give a number above 0"),
            ("batch_size", self.batch_size >= 1, "give at least 1"),
        ):
            if not ok:
                raise ConfigError(f"components.ancl.{key}: found {getattr(self, key)}; {advice}")

    def init_state(self, network: Network) -> State:
        """Return a state without teachers."""
        return {"teacher": None, "auxiliary": None, "groups": (), "auxiliary_steps": 0}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fine-tune the auxiliary network, from the second experience on."""
        if state["teacher"] is None or self.lamb_a == 0:
            return state
        learnt, steps = fine_tune(
            network,
            context.experience.samples,
            classes=context.experience.classes,
            epochs=self.epochs or context.epochs,
            lr=self.lr,
            milestones=self.milestones,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            clip=self.clip,
            batch_size=self.batch_size,
            generator=context.generator,
        )
        return {**state, "auxiliary": freeze(learnt), "auxiliary_steps": state["auxiliary_steps"] + steps}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return both distillation terms, from the second experience on."""
        teachers = {
            "distill": (self.lamb, state["teacher"], state["groups"]),
            "auxiliary": (self.lamb_a, state["auxiliary"], (step.context.experience.classes,)),
        }
        found = {}
        for term, (weight, teacher, groups) in teachers.items():
            if teacher is None or weight == 0:
                continue
            logits = step.run(teacher).logits
            loss_K = distillation(step.output.logits, logits, groups=groups, temperature=self.temperature)
            found[term] = weight / self.temperature**2 * loss_K
        return found

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store a frozen copy as the next teacher and drop the auxiliary network."""
        known = {c for group in state["groups"] for c in group}
        new = tuple(sorted(set(context.experience.classes) - known))
        groups = (*state["groups"], new) if new else state["groups"]
        if self.softmax == "joint":
            groups = (tuple(sorted(known.union(new))),)
        return {**state, "teacher": freeze(network), "auxiliary": None, "groups": groups}

    def extra_cost(self, network: Network, state: State) -> Mapping[str, int]:
        """Return the number of training steps of auxiliary networks so far."""
        return {"auxiliary_steps": int(state["auxiliary_steps"])}
