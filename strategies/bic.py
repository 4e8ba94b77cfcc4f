"""Bias correction: scale and shift the logits of new classes, as fitted on a few held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from clframe.core.component import Component, total
from clframe.core.types import Experience, Pool, State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.class_incremental import among, bias_corrected, columns, fit_bias
from clframe.functional.losses import cross_entropy, distillation
from clframe.nn.features import exit_logits, feature_reader
from clframe.nn.frozen import freeze
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.replay.buffers import Budget, Kept, SplitMemory
from clframe.replay.joining import Replay


@dataclass(frozen=True, kw_only=True)
class BiC(Component):
    """Bias correction (BiC): replay and distillation, then new classes' logits are scaled and shifted to match.

    Trains on memory and new data in one pool with ``(1 - l) CE + l KD`` at every exit, KD the cross-entropy with
    the previous model over all old classes at temperature T, and l the share of old classes. After each experience
    every exit is given a pair (alpha, beta), and the logits of that experience's classes are ``alpha z + beta`` from
    then on, in answers, in the teacher and in later training. The pair minimizes the cross-entropy on held-out
    samples, equally many of each class: a part of the memory, and as many new ones that were not trained on. For
    class-incremental streams with some samples per class in memory. Keeps its own memory; costs one forward pass of
    the teacher a step and a copy of the network. In an online stream that is told its boundaries, held-out samples
    are chosen anew from each small experience, so some are trained on. Wu et al., "Large Scale Incremental
    Learning" (2019).

    Args:
        memory: Samples kept, held-out ones included: in all, or of each class.
        budget: ``total`` shares ``memory`` among the classes so far, ``per_class`` keeps it of each.
        selection: ``balanced``, random ones of each class, or ``herding``, those nearest to the class mean.
        held_out: Share of the memory that is held out; a class with two samples or more has one.
        lamb: Weight of KD beside a cross-entropy of weight 1; null takes the l of the paper. 2 as tuned for
            auxiliary classifiers (2025).
        temperature: T.
        decay: Pull of the pair towards (1, 0), half of it times the squared distance.
    """

    name: ClassVar[str] = "bic"
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "task_loss", "loss_mix", "logits"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    keeps_memory: ClassVar[bool] = True

    memory: int = 2000
    budget: Budget = "total"
    selection: Literal["balanced", "herding"] = "balanced"
    held_out: float = 0.1
    lamb: float | None = None
    temperature: float = 2.0
    decay: float = 0.1

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        Replay(owner=self.name, memory=self.memory, budget=self.budget)  # refuses a memory without room
        for key, ok, advice in (
            ("held_out", 0 < self.held_out < 1, "give a share above 0 and below 1"),
            ("lamb", self.lamb is None or self.lamb >= 0, "give a number of at least 0, or null"),
            ("temperature", self.temperature > 0, "give a number above 0"),
            ("decay", self.decay > 0, "give a number above 0"),
        ):
            if not ok:
                raise ConfigError(f"components.bic.{key}: found {getattr(self, key)}; {advice}")

    def check(self, *, classes: int) -> None:
        """A memory that is shared by classes must have room for one sample of each."""
        Replay(owner=self.name, memory=self.memory, budget=self.budget).check(classes=classes)

    @property
    def split(self) -> SplitMemory:
        """What the memory keeps and holds out."""
        return SplitMemory(self.memory, self.budget, self.selection, self.held_out)

    def init_state(self, network: Network) -> State:
        """An empty memory, no teacher, and no class to correct."""
        nothing = torch.empty(len(network.heads), 0)
        return {**self.split.empty(), "teacher": None, "alpha_KC": nothing, "beta_KC": nothing}

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Memory and new data, without what is held out of either."""
        return self.split.pool(samples, state), size

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """New classes are not corrected yet."""
        new = (0, network.classes - state["alpha_KC"].shape[1])
        device = network.final.weight.device
        alpha_KC, beta_KC = pad(state["alpha_KC"], new, value=1.0), pad(state["beta_KC"], new)
        return {**state, "alpha_KC": alpha_KC.to(device), "beta_KC": beta_KC.to(device)}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Cross-entropy of corrected logits."""
        logits = bias_corrected(step.output.logits, state["alpha_KC"], state["beta_KC"])
        return cross_entropy(logits, step.batch.y, weight_B=step.batch.weight_B)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Distillation of all old classes under one softmax, both sides corrected."""
        if state["teacher"] is None:
            return {}
        with torch.no_grad():
            teacher = state["teacher"](step.batch.x)
        correct = partial(bias_corrected, alpha_KC=state["alpha_KC"], beta_KC=state["beta_KC"])
        groups, temperature = [step.context.experience.past], self.temperature
        loss_K = distillation(
            correct(step.output.logits), correct(teacher.logits), groups=groups, temperature=temperature
        )
        return {"distill": loss_K / temperature**2}

    def combine_losses(self, terms: Mapping[str, Tensor], step: Step, state: State) -> Tensor:
        """``(1 - l) CE + l KD``, or ``CE + lamb KD``, plus all other terms."""
        if "bic/distill" not in terms:
            return total(terms)
        task, distill = self._weights(step.context.experience)
        weights = {"task/ce": task, "bic/distill": distill}
        return total({name: weights.get(name, 1.0) * value for name, value in terms.items()})

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Renew the memory, fit the pairs on what is held out, and keep the model as a teacher."""
        experience = context.experience
        memory = self.split.renewed(
            state, experience, generator=context.generator, features=partial(feature_reader, network)
        )
        pairs = self._fitted(network, experience, state, memory["held"])
        return {**memory, **pairs, "teacher": freeze(network)}

    def adjust_logits(self, output: Output, state: State) -> Output:
        """Corrected logits at every exit."""
        return output._replace(logits=bias_corrected(output.logits, state["alpha_KC"], state["beta_KC"]))

    def _weights(self, experience: Experience) -> tuple[float, float]:
        if self.lamb is not None:
            return 1.0, self.lamb
        old = len(experience.past) / len(experience.classes_so_far)
        return 1 - old, old

    def _fitted(self, network: Network, experience: Experience, state: State, held: State) -> State:
        """Corrections with the pairs of this experience's classes; as they were, where there is nothing to compare."""
        alpha_KC, beta_KC = state["alpha_KC"].clone(), state["beta_KC"].clone()
        new_N = among(held["y"], experience.classes)
        if bool(new_N.any()) and not bool(new_N.all()):
            new = columns(experience.classes)
            alpha_KC[:, new], beta_KC[:, new] = 1.0, 0.0
            logits, targets_N = exit_logits(network, [Kept(held, experience.samples)])
            for exit, logits_NC in enumerate(bias_corrected(logits, alpha_KC, beta_KC)):
                pair = fit_bias(logits_NC, targets_N, new=experience.classes, decay=self.decay)
                alpha_KC[exit, new], beta_KC[exit, new] = pair
        return {"alpha_KC": alpha_KC, "beta_KC": beta_KC}
