"""Bias correction: scale and shift the logits of new classes, fitted on held-out samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from clframe.core.types import Experience, Pool, State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.class_incremental import among, columns, correct_bias, fit_bias
from clframe.functional.losses import cross_entropy, distillation, total
from clframe.nn.features import exit_logits, feature_reader
from clframe.nn.frozen import freeze
from clframe.nn.network import Network
from clframe.replay.buffers import BufferSamples, SplitMemory
from clframe.replay.joining import BufferComponent


@dataclass(frozen=True, kw_only=True)
class BiC(BufferComponent):
    """Bias correction (BiC): replay and distillation, followed by a linear correction of the logits of new classes.

    Trains on buffer and new data together with ``(1 - l) CE + l KD`` at every exit, KD the cross-entropy with the
    previous model over all old classes at temperature T, and l the share of old classes. After each experience every
    exit is given a pair (alpha, beta), and the logits of that experience's classes are ``alpha z + beta`` from then on:
    in predictions, in the teacher and in later training. The pair minimizes the cross-entropy on held-out samples, the
    same number per class: a part of the buffer, and new ones excluded from training. Wu et al., "Large Scale
    Incremental Learning" (2019).

    Use it for class-incremental streams with several stored samples per class. It has its own buffer. Cost: one forward
    pass of the teacher per step and a copy of the network. In an online stream with ``benchmark.boundaries: true``
    held-out samples are selected from each small experience separately, so some of them are trained on.

    Args:
        memory: Buffer size in samples, held-out ones included: total, or per class.
        budget: ``total`` divides ``memory`` among the classes seen so far, ``per_class`` gives it to each.
        selection: ``balanced``, random samples of each class, or ``herding``, those nearest to the class mean.
        held_out: Share of the buffer that is held out; a class with two samples or more has at least one.
        lamb: Weight of KD next to a cross-entropy of weight 1; null uses the l of the paper. 2 as tuned for auxiliary
            classifiers (2025).
        temperature: T.
        decay: Regularization of the pair towards (1, 0): half of it times the squared distance.
    """

    name: ClassVar[str] = "bic"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"batch", "task_loss", "loss_mix", "logits"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)

    memory: int = 2000
    selection: Literal["balanced", "herding"] = "balanced"
    held_out: float = 0.1
    lamb: float | None = None
    temperature: float = 2.0
    decay: float = 0.1

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        for key, ok, advice in (
            ("held_out", 0 < self.held_out < 1, "give a share above 0 and below 1"),
            ("lamb", self.lamb is None or self.lamb >= 0, "give a number of at least 0, or null"),
            ("temperature", self.temperature > 0, "give a number above 0"),
            ("decay", self.decay > 0, "give a number above 0"),
        ):
            if not ok:
                raise ConfigError(f"components.bic.{key}: found {getattr(self, key)}; {advice}")

    @property
    def split(self) -> SplitMemory:
        """Policy that fills the buffer and its held-out part."""
        return SplitMemory(self.memory, self.budget, self.selection, self.held_out)

    def init_state(self, network: Network) -> State:
        """Return an empty buffer, no teacher, and no corrections."""
        nothing = torch.empty(len(network.heads), 0)
        return {**self.split.empty(), "teacher": None, "alpha_KC": nothing, "beta_KC": nothing}

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Return buffer and new data without the held-out samples of either."""
        return self.split.training_pool(samples, state), size

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Extend the corrections by the identity for new classes."""
        new = (0, network.classes - state["alpha_KC"].shape[1])
        device = network.final.weight.device
        alpha_KC, beta_KC = pad(state["alpha_KC"], new, value=1.0), pad(state["beta_KC"], new)
        return {**state, "alpha_KC": alpha_KC.to(device), "beta_KC": beta_KC.to(device)}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the cross-entropy of corrected logits."""
        logits = correct_bias(step.output.logits, state["alpha_KC"], state["beta_KC"])
        return cross_entropy(logits, step.batch.y, weight_B=step.batch.weight_B)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the distillation of all old classes under one softmax, with both sides corrected."""
        if state["teacher"] is None:
            return {}
        teacher = step.run(state["teacher"])
        correct = partial(correct_bias, alpha_KC=state["alpha_KC"], beta_KC=state["beta_KC"])
        groups, temperature = [step.context.experience.past], self.temperature
        loss_K = distillation(
            correct(step.output.logits), correct(teacher.logits), groups=groups, temperature=temperature
        )
        return {"distill": loss_K / temperature**2}

    def combine_losses(self, terms: Mapping[str, Tensor], step: Step, state: State) -> Tensor:
        """Return ``(1 - l) CE + l KD``, or ``CE + lamb KD``, plus all other terms."""
        if "bic/distill" not in terms:
            return total(terms)
        task, distill = self._weights(step.context.experience)
        weights = {"task/ce": task, "bic/distill": distill}
        return total({name: weights.get(name, 1.0) * value for name, value in terms.items()})

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Update the buffer, fit the pairs on its held-out part, and store the model as a teacher."""
        experience = context.experience
        memory = self.split.update(
            state, experience, generator=context.generator, features=partial(feature_reader, network)
        )
        pairs = self._fit_pairs(network, experience, state, memory["held"])
        return {**memory, **pairs, "teacher": freeze(network)}

    def adjust_exit_logits(self, exit: int, logits_BC: Tensor, taps: Mapping[str, Tensor], state: State) -> Tensor:
        """Return ``alpha z + beta`` of the exit's logits z."""
        alpha_1C, beta_1C = state["alpha_KC"][exit : exit + 1], state["beta_KC"][exit : exit + 1]
        return correct_bias((logits_BC,), alpha_1C, beta_1C)[0]

    def _weights(self, experience: Experience) -> tuple[float, float]:
        if self.lamb is not None:
            return 1.0, self.lamb
        old = len(experience.past) / len(experience.classes_so_far)
        return 1 - old, old

    def _fit_pairs(self, network: Network, experience: Experience, state: State, held: State) -> State:
        """Return corrections with pairs fitted for this experience's classes, if old and new samples are held out."""
        alpha_KC, beta_KC = state["alpha_KC"].clone(), state["beta_KC"].clone()
        new_N = among(held["y"], experience.classes)
        if bool(new_N.any()) and not bool(new_N.all()):
            new = columns(experience.classes)
            alpha_KC[:, new], beta_KC[:, new] = 1.0, 0.0
            logits, targets_N = exit_logits(network, [BufferSamples(held, experience.samples)])
            for exit, logits_NC in enumerate(correct_bias(logits, alpha_KC, beta_KC)):
                pair = fit_bias(logits_NC, targets_N, new=experience.classes, decay=self.decay)
                alpha_KC[exit, new], beta_KC[exit, new] = pair
        return {"alpha_KC": alpha_KC, "beta_KC": beta_KC}
