"""Auxiliary network continual learning: an old and a new teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.losses import distillation
from clframe.nn.frozen import fine_tuned, freeze
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class ANCL(Component):
    """Auxiliary network continual learning (ANCL): distill from the old model and from one that learns only the new.

    Before each experience but the first a copy of the network is fine-tuned on its data alone: it shows what the new
    classes look like to a network free to forget. Then every exit learns from the same exit of two teachers:
    ``lamb * KL(old || student)`` over the old classes plus ``lamb_a * KL(auxiliary || student)`` over the
    experience's own, both at temperature T (not multiplied by T^2, as published). For when LwF holds back new classes
    too much. Kim et al., "Achieving a Better Stability-Plasticity Trade-off via Auxiliary Networks in Continual
    Learning" (2023).

    Costs two frozen networks in memory, two forward passes more a step, and the training of the auxiliary network,
    whose steps the state counts: with ``epochs`` 0 as much again as the run itself.

    Args:
        lamb: Weight of the old model; 1 in the paper on auxiliary classifiers.
        lamb_a: Weight of the auxiliary network; 2 there, 1 with exits.
        temperature: T; higher values listen more to the small probabilities.
        softmax: ``joint``: one softmax over all old classes, as published; ``per_experience``: one for each old
            experience's, as in LwF.
        epochs: Epochs of the auxiliary network; 0 takes as many as the experience is trained for.
        lr: Its learning rate, constant.
        momentum: Of its SGD.
        weight_decay: Of its SGD.
        batch_size: Samples in its batches.
    """

    name: ClassVar[str] = "ancl"
    terms: ClassVar[tuple[str, ...]] = ("distill", "auxiliary")

    lamb: float = 1.0
    lamb_a: float = 1.0
    temperature: float = 2.0
    softmax: Literal["joint", "per_experience"] = "joint"
    epochs: int = 0
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        for key, ok, advice in (
            ("lamb", self.lamb >= 0, "give a number of at least 0"),
            ("lamb_a", self.lamb_a >= 0, "give a number of at least 0"),
            ("temperature", self.temperature > 0, "give a number above 0"),
            ("epochs", self.epochs >= 0, "give a number of epochs, or 0 for as many as training takes"),
            ("lr", self.lr > 0, "give a number above 0"),
            ("momentum", 0 <= self.momentum < 1, "give a number of at least 0 and below 1"),
            ("weight_decay", self.weight_decay >= 0, "give a number of at least 0"),
            ("batch_size", self.batch_size >= 1, "give at least 1"),
        ):
            if not ok:
                raise ConfigError(f"components.ancl.{key}: found {getattr(self, key)}; {advice}")

    def init_state(self, network: Network) -> State:
        """No teachers before the first experience ends."""
        return {"teacher": None, "auxiliary": None, "groups": (), "auxiliary_steps": 0}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Fine-tune the auxiliary network, from the second experience on."""
        if state["teacher"] is None or self.lamb_a == 0:
            return state
        learnt, steps = fine_tuned(
            network,
            context.experience.samples,
            classes=context.experience.classes,
            epochs=self.epochs or context.epochs,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            generator=context.generator,
        )
        return {**state, "auxiliary": freeze(learnt), "auxiliary_steps": state["auxiliary_steps"] + steps}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Both distillation terms, from the second experience on."""
        teachers = {
            "distill": (self.lamb, state["teacher"], state["groups"]),
            "auxiliary": (self.lamb_a, state["auxiliary"], (step.context.experience.classes,)),
        }
        found = {}
        for term, (weight, teacher, groups) in teachers.items():
            if teacher is None or weight == 0:
                continue
            with torch.no_grad():
                logits = teacher(step.batch.x).logits
            loss_K = distillation(step.output.logits, logits, groups=groups, temperature=self.temperature)
            found[term] = weight / self.temperature**2 * loss_K
        return found

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """The model as it is now teaches the next experience; the auxiliary network has done its part."""
        known = {c for group in state["groups"] for c in group}
        new = tuple(sorted(set(context.experience.classes) - known))
        groups = (*state["groups"], new) if new else state["groups"]
        if self.softmax == "joint":
            groups = (tuple(sorted(known.union(new))),)
        return {**state, "teacher": freeze(network), "auxiliary": None, "groups": groups}

    def extra_cost(self, network: Network, state: State) -> Mapping[str, int]:
        """Training steps of auxiliary networks so far."""
        return {"auxiliary_steps": int(state["auxiliary_steps"])}
