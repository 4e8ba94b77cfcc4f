"""The learner: a network, a composition, and the state of its components through a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clframe.core import Batch, Component, Composition, Experience, State, Step, StepContext, total
from clframe.functional.losses import cross_entropy
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.seeding import derive_seed, generator_for


class Learner:
    """Walks a composition through the timetable; knows nothing of loops, devices or loggers.

    Hooks that no component overrides cost nothing: they are looked up once, here.

    Args:
        network: Edited in place by components that override ``edit``.
        composition: The strategy.
        seed: What components draw from; None follows ``torch.initial_seed()`` and leaves the global
            generators alone, otherwise they are seeded anew at every experience and epoch.

    Attributes:
        around: What a component's ``prepare`` and ``advance`` run in, made from the hook's and the component's name.
    """

    def __init__(self, network: Network, composition: Composition, *, seed: int | None = None) -> None:
        composition.check_needs()
        self.network = network
        self.composition = composition
        self.seed = seed
        for component in composition.acting_at("setup_network"):
            component.setup_network(network)
        self.state: dict[str, State] = {c.name: c.init_state(network) for c in composition}
        self.past: tuple[int, ...] = ()
        self.experience: Experience | None = None
        self.step: Step | None = None
        self.epochs = 1
        self.term_sums: dict[str, Tensor] = {}
        self.term_steps = 0
        self.around: Callable[[str, str], AbstractContextManager[object]] = _plainly
        self._batch_owner = next(iter(composition.acting_at("make_batch")), None)
        self._mix_owner = next(iter(composition.acting_at("combine_losses")), None)
        self._gradient_owner = next(iter(composition.acting_at("modify_gradients")), None)
        self._decision_owner = next(iter(composition.acting_at("predict")), None)
        self._heads_owner = next(iter(composition.acting_at("exit_loss_weights")), None)
        self._task_owner = next(iter(composition.acting_at("task_loss")), None)
        self._answers_owner = next(iter(composition.acting_at("adjust_logits")), None)
        self._followers = composition.acting_at("after_step")
        self.taps = tuple(dict.fromkeys(tap for component in composition for tap in component.taps(network)))
        self._losses = composition.acting_at("losses")
        self._term_names: dict[tuple[str, str], str] = {}
        self._contexts: dict[str, StepContext] = {}
        self._weight_K: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        """A copy of the model (a foreign plugin's teacher, say) shares the run; it never forks it."""
        return self

    def training_experiences(self, index: int, count: int) -> tuple[int, ...]:
        """The experiences whose data experience ``index`` trains on."""
        owner = next(iter(self.composition.acting_at("training_experiences")), None)
        return (index,) if owner is None else tuple(owner.training_experiences(index, count))

    def begin(self, experience: Experience, *, classes: tuple[int, ...], epochs: int) -> None:
        """Start an experience: seed, grow every head by ``classes``, then let components grow."""
        self.experience, self.epochs = experience, epochs
        self.seed_everything("experience", experience.index)
        self.network.grow(classes)
        for component in self.composition.acting_at("add_classes"):
            component.add_classes(self.network, experience)
        for component in self.composition.acting_at("before_experience"):
            context = self._context(component.name, "prepare", 0)
            with self.around("prepare", component.name):
                state = self.state[component.name]
                self.state[component.name] = component.before_experience(self.network, context, state)

    def before_epoch(self, epoch: int) -> None:
        """Start an epoch: from here on randomness is that of (seed, experience, epoch)."""
        experience = self._current()
        self.seed_everything("epoch", experience.index, epoch)
        self._contexts = {c.name: self._context(c.name, "epoch", epoch) for c in self.composition}
        self._task_context = self._context("task", "epoch", epoch)
        for component in self.composition.acting_at("before_epoch"):
            component.before_epoch(self.network, self._contexts[component.name], self.state[component.name])
        self._weight_K = self._weights()

    def make_batch(self, x: Tensor, y: Tensor) -> Batch:
        """The batch to train on: replay joins here."""
        batch = Batch(x, y)
        owner = self._batch_owner
        if owner is None:
            return batch
        return owner.make_batch(batch, self._contexts[owner.name], self.state[owner.name])

    def loss(self, batch: Batch, output: Output) -> Tensor:
        """One scalar: the task's cross-entropy and every component's terms, mixed."""
        self.step = step = Step(batch, output, self._task_context, self.network, self._weight_K)
        terms = {"task/ce": self._task(step)}
        for component in self._losses:
            own = Step(batch, output, self._contexts[component.name], self.network, self._weight_K)
            for term, value in component.losses(own, self.state[component.name]).items():
                terms[self._term_name(component.name, term)] = value
        if self._weight_K is not None:
            terms = {name: value * self._weight_K if value.ndim else value for name, value in terms.items()}
        self._count(terms)
        owner = self._mix_owner
        return total(terms) if owner is None else owner.combine_losses(terms, step, self.state[owner.name])

    def modify_gradients(self) -> None:
        """Let the owner of the gradient edit it."""
        owner = self._gradient_owner
        if owner is not None:
            assert self.step is not None
            owner.modify_gradients(self.network, self.step, self.state[owner.name])

    def after_step(self) -> None:
        """Let components look at the weights after an update."""
        for component in self._followers:
            assert self.step is not None
            component.after_step(self.network, self.step, self.state[component.name])

    def adjust_logits(self, output: Output) -> Output:
        """The output with what each exit answers in place of its logits: corrected, then joined in its ensemble."""
        return output._replace(logits=self.network.ensemble(self._correct(output).logits))

    def corrected(self, x: Tensor) -> Output:
        """The network's output for prepared inputs, corrected by the owner of the slot ``answers``; no ensemble."""
        return self._correct(self.network(x, taps=self.taps))

    def predict(self, answers: Output) -> Tensor:
        """scores_BC whose arg-max is the answer, from what each exit answers."""
        owner = self._decision_owner
        return answers.last if owner is None else owner.predict(answers, self.state[owner.name])

    def end(self) -> None:
        """Finish an experience: every component consolidates, those last that are fitted on what others answer."""
        experience = self._current()
        self.step = None
        self.network.freeze_trunk("free")
        for component in sorted(self.composition.acting_at("after_experience"), key=_fitted_late):
            context = self._context(component.name, "advance", self.epochs)
            with self.around("advance", component.name):
                state = self.state[component.name]
                self.state[component.name] = component.after_experience(self.network, context, state)
        self.past = tuple(sorted({*self.past, *experience.classes}))
        self.experience = None

    def flush_terms(self) -> dict[str, float]:
        """Mean of each loss term since the last flush, by name; the one moment that waits for the device."""
        steps, self.term_steps = self.term_steps, 0
        means = {f"loss/{name}": float(value.sum()) / steps for name, value in self.term_sums.items()}
        self.term_sums = {}
        return means

    def seed_everything(self, *place: int | str) -> None:
        """Seed torch, numpy and random for one place of the run, if the run has a seed."""
        if self.seed is None:
            return
        value = derive_seed(self.seed, *place)
        if torch.accelerator.is_available():
            torch.manual_seed(value)
        else:  # torch.manual_seed queues a call with its stack trace, a millisecond, for devices that are not there
            torch.default_generator.manual_seed(value)
        np.random.seed(value % 2**32)
        random.seed(value)

    def _count(self, terms: Mapping[str, Tensor]) -> None:
        for name, value in terms.items():
            known = self.term_sums.get(name)
            self.term_sums[name] = value.detach().clone() if known is None else known.add_(value.detach())
        self.term_steps += 1

    def _correct(self, output: Output) -> Output:
        owner = self._answers_owner
        return output if owner is None else owner.adjust_logits(output, self.state[owner.name])

    def _task(self, step: Step) -> Tensor:
        owner = self._task_owner
        if owner is None:
            return cross_entropy(step.output.logits, step.batch.y, weight_B=step.batch.weight_B)
        own = Step(step.batch, step.output, self._contexts[owner.name], self.network, self._weight_K)
        return owner.task_loss(own, self.state[owner.name])

    def _weights(self) -> Tensor | None:
        """weight_K of this epoch on the network's device; None where each is 1, which leaves every term alone."""
        owner = self._heads_owner
        if owner is None:
            return None
        weights = tuple(owner.exit_loss_weights(self._contexts[owner.name], self.state[owner.name]))
        if all(weight == 1 for weight in weights):
            return None
        return torch.tensor(weights, device=self.network.final.weight.device)

    def _term_name(self, component: str, term: str) -> str:
        key = (component, term)
        name = self._term_names.get(key)
        if name is None:
            name = self._term_names[key] = f"{component}/{term}"
        return name

    def _context(self, name: str, kind: str, epoch: int) -> StepContext:
        experience = self._current()
        base = torch.initial_seed() if self.seed is None else self.seed
        generator = generator_for(base, kind, experience.index, epoch, name)
        return StepContext(experience, epoch, self.epochs, generator, self._memory(), self.corrected)

    def _memory(self) -> State | None:
        """The memory of the component that keeps one, if there is anything in it."""
        for component in self.composition:
            if component.keeps_memory and self.state[component.name]["x"] is not None:
                return self.state[component.name]
        return None

    def _current(self) -> Experience:
        assert self.experience is not None, "begin() comes first"
        return self.experience


def _plainly(hook: str, component: str) -> AbstractContextManager[object]:
    """Nobody looks on."""
    return nullcontext()


def _fitted_late(component: Component) -> int:
    """Order of consolidation: who remakes the network, who learns or keeps something, exits' ensemble, the decision."""
    if component.remakes:
        return -1
    return 2 if "prediction" in component.slots else 1 if "exit_weights" in component.slots else 0
