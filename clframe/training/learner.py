"""The learner: a network, a composition, and the state of its components through a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clframe.core import Batch, Component, Composition, Experience, State, Step, StepContext, total
from clframe.core.declarations import consolidation_order
from clframe.exits.dynamic import AdjustLogits
from clframe.functional.losses import cross_entropy
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.seeding import derive_seed, generator_for, seed_global_generators
from clframe.training.averaging import WeightAverage
from clframe.training.logit_correction import LogitCorrection
from clframe.training.loss_sums import LossSums
from clframe.training.observer import StepObserver
from clframe.training.returned import (
    check_batch,
    check_exit_weights,
    check_scores,
    check_sources,
    check_state,
    check_step_values,
    check_term,
    check_terms,
    check_total,
)
from clframe.training.step_inputs import StepInputs, StepValues

_TASK = ""
"""Key of the context of the task's loss among those of the components."""


class Learner:
    """Calls the hooks of a composition in the order of :mod:`clframe.core.component`, without a loop or a device.

    Hooks that no component overrides cost nothing: their owners are looked up once, in the constructor. What hooks of a
    step return is checked in the first step of an epoch, terms of a loss also where they first appear; see
    :mod:`clframe.training.returned`, also for the ComposeError that is raised.

    Args:
        network: Edited in place by components that override ``setup_network``.
        composition: The strategy.
        seed: Seed of the components' generators. With None they derive from ``torch.initial_seed()`` and the global
            generators are left alone; otherwise these are seeded at the start of every experience and epoch.

    Attributes:
        observer: Notified of every section that runs; see :class:`StepObserver`.
        state: State of each component, by name.
        past: Classes of finished experiences.
        average: Average of the weights, which the network has between experiences; None: it keeps its weights.
        weight_K: Weight of each exit's losses in this epoch; None where all are 1.
        loss_sums: Sums of the loss terms since the last log entry.
        static_inputs: Read in the place of :meth:`inputs` while a step is recorded as a CUDA graph.
        shared_run: Runs a teacher on a batch that several devices share; None where there is one device.
    """

    def __init__(self, network: Network, composition: Composition, *, seed: int | None = None) -> None:
        composition.check_needs()
        self.network = network
        self.composition = composition
        self.seed = seed
        for component in composition.acting_at("setup_network"):
            component.setup_network(network)
        self.state: dict[str, State] = {
            c.name: check_state(c.name, "init_state", c.init_state(network)) for c in composition
        }
        self.observer = StepObserver()
        self.past: tuple[int, ...] = ()
        self.average: WeightAverage | None = None
        self.experience: Experience | None = None
        self.step: Step | None = None
        self.epochs = 1
        self.weight_K: Tensor | None = None
        self.loss_sums = LossSums()
        self.taps = tuple(dict.fromkeys(tap for component in composition for tap in component.taps(network)))
        self._batch_owner = self._owner("make_batch")
        self._mix_owner = self._owner("combine_losses")
        self._gradient_owner = self._owner("modify_gradients")
        self._prediction_owner = self._owner("predict")
        self._exit_weights_owner = self._owner("exit_loss_weights")
        self._task_owner = self._owner("task_loss")
        self._correction = LogitCorrection(composition)
        self._losses = composition.acting_at("losses")
        self._after_step = composition.acting_at("after_step")
        self._valued = composition.acting_at("step_values")
        self.static_inputs: StepInputs | None = None
        self.shared_run: Callable[[Network, Tensor, Collection[str]], Output] | None = None
        self._term_names: dict[tuple[str, str], str] = {}
        self._contexts: dict[str, StepContext] = {}
        self._steps = self._number = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        """Return the learner itself: a copy of the model, as a foreign plugin's teacher, must not fork the run."""
        return self

    def training_experiences(self, index: int, count: int) -> tuple[int, ...]:
        """Return the experiences whose data experience ``index`` of ``count`` trains on."""
        owner = self._owner("training_experiences")
        if owner is None:
            return (index,)
        return check_sources(owner.name, owner.training_experiences(index, count), count)

    def begin(self, experience: Experience, *, classes: tuple[int, ...], epochs: int) -> None:
        """Start an experience: seed, grow every head by ``classes``, call ``add_classes`` and ``before_experience``."""
        self.experience, self.epochs = experience, epochs
        if self.average is not None:
            self.average.prepare(self.network)
        self.seed_everything("experience", experience.index)
        self.network.grow(classes)
        for component in self.composition.acting_at("add_classes"):
            component.add_classes(self.network, experience)
        for component in self.composition.acting_at("before_experience"):
            # The kinds of contexts seed generators, so they keep the names that hooks once had.
            context = self._context(component.name, "prepare", 0)
            with self.observer.around("before_experience", component.name):
                state = component.before_experience(self.network, context, self.state[component.name])
            self.state[component.name] = check_state(component.name, "before_experience", state)
        if self.average is not None:
            self.average.start(self.network)

    def before_epoch(self, epoch: int, *, steps: int = 0) -> None:
        """Start an epoch of ``steps`` batches: from here on randomness is a function of (seed, experience, epoch)."""
        experience = self._current()
        self._steps, self._number = steps, 0
        self.seed_everything("epoch", experience.index, epoch)
        self._contexts = {c.name: self._context(c.name, "epoch", epoch) for c in self.composition}
        self._contexts[_TASK] = self._context("task", "epoch", epoch)
        for component in self.composition.acting_at("before_epoch"):
            component.before_epoch(self.network, self._contexts[component.name], self.state[component.name])
        self.weight_K = self._exit_weights()

    def make_batch(self, x: Tensor, y: Tensor, *, stored: Callable[[], Tensor] | None = None) -> Batch:
        """Return the batch to train on, which the owner of the slot ``batch`` may have extended by replayed samples."""
        batch = Batch(x, y, stored=stored)
        owner = self._batch_owner
        if owner is None:
            return batch
        with self.observer.around("make_batch", owner.name, len(y)):
            made = owner.make_batch(batch, self._contexts[owner.name], self.state[owner.name], self.network)
        if self._number == 0 or not isinstance(made, Batch):
            check_batch(owner.name, made)
        return made

    def loss(self, batch: Batch, output: Output) -> Tensor:
        """Return the scalar to minimize: the task loss and every component's terms, combined."""
        around, size = self.observer.around, len(batch.y)
        inputs = self.inputs() if self.static_inputs is None else self.static_inputs
        weight_K, values = inputs.weight_K, inputs.values
        self.step = step = Step(
            batch, output, self._contexts[_TASK], self.network, weight_K, self._number, shared_run=self.shared_run
        )
        first = self._number == 0
        self._number += 1
        if self.network.vocabulary:  # hooks after the losses see the windows again
            step = replace(step, batch=batch.by_token())
        if first:
            self._term_names.clear()
        terms = {"task/ce": self._task_loss(step, values, checked=first)}
        for component in self._losses:
            with around("losses", component.name, size):
                own = self._own_step(step, component, values)
                found = component.losses(own, self.state[component.name])
            if first:
                check_terms(component.name, found)
            for term, value in found.items():
                terms[self._term_name(component.name, term, value)] = value
        if weight_K is not None:
            terms = {name: value * weight_K if value.ndim else value for name, value in terms.items()}
        self.loss_sums.add(terms)
        owner = self._mix_owner
        if owner is None:
            return total(terms)
        with around("combine_losses", owner.name, size):
            combined = owner.combine_losses(terms, self._own_step(step, owner, values), self.state[owner.name])
        return check_total(owner.name, combined) if first else combined

    @property
    def changes_gradients(self) -> bool:
        """Whether a component owns the slot ``gradient``."""
        return self._gradient_owner is not None

    def modify_gradients(self) -> None:
        """Call the owner of the slot ``gradient``, after backward."""
        owner, step = self._gradient_owner, self.step
        if owner is not None:
            assert step is not None
            with self.observer.around("modify_gradients", owner.name, len(step.batch.y)):
                owner.modify_gradients(self.network, step, self.state[owner.name])

    def after_step(self) -> None:
        """Store the state that each component returns after an update of the weights, then add to the average."""
        for component in self._after_step:
            step = self.step
            assert step is not None
            with self.observer.around("after_step", component.name, len(step.batch.y)):
                own, former = self._own_step(step, component), self.state[component.name]
                state = component.after_step(self.network, own, former)
            if state is not former:
                self.state[component.name] = check_state(component.name, "after_step", state)
        if self.average is not None:
            self.average.update(self.network)

    def correct_logits(self, output: Output) -> Output:
        """Return the output as corrected by the owner of the slot ``logits``, exit by exit, without an ensemble."""
        name = self._correction.owner_name
        if not name:
            return output
        with self.observer.around("adjust_logits", name, output.last.shape[0]):
            return self._correction.apply(output, self.state[name])

    @property
    def simulated_exits(self) -> str:
        """Reason why dynamic inference cannot skip exits; empty where it can."""
        return self._correction.why_joint

    def exit_corrector(self) -> AdjustLogits | None:
        """Return ``(exit, logits_BC, taps) -> logits_BC``, the correction of one exit; None without a correction.

        Raises:
            UnsupportedError: The owner of the slot ``logits`` corrects all exits together.
        """
        name = self._correction.owner_name
        return self._correction.of_one_exit(self.state[name]) if name else None

    def corrected_output(self, x: Tensor) -> Output:
        """Return the network's output for prepared inputs, corrected; what ensembles and policies are fitted on."""
        return self.correct_logits(self.network(x, taps=self.taps))

    def adjust_logits(self, output: Output) -> Output:
        """Return the output with the scores of every exit as logits: corrected, then joined in the ensemble."""
        return output._replace(logits=self.network.ensemble(self.correct_logits(output).logits))

    def predict(self, output: Output) -> Tensor:
        """Return scores_BC, whose arg-max is the prediction, from the scores of every exit."""
        owner = self._prediction_owner
        if owner is None:
            return output.last
        with self.observer.around("predict", owner.name, output.last.shape[0]):
            scores_BC = owner.predict(output, self.state[owner.name])
        return check_scores(owner.name, "predict", scores_BC)

    def end(self) -> None:
        """Finish an experience: call ``after_experience`` of every component, those that others depend on first."""
        experience = self._current()
        self.step = None
        self.network.unfreeze_trunk()
        if self.average is not None:
            self.average.finish(self.network)
        for component in sorted(self.composition.acting_at("after_experience"), key=consolidation_order):
            context = self._context(component.name, "advance", self.epochs)
            with self.observer.around("after_experience", component.name):
                state = component.after_experience(self.network, context, self.state[component.name])
            self.state[component.name] = check_state(component.name, "after_experience", state)
        if self.average is not None:
            self.average.settle(self.network)
        self.past = tuple(sorted({*self.past, *experience.classes}))
        self.experience = None

    def flush_terms(self) -> dict[str, float]:
        """Return the mean of each loss term since the last call, by name.

        The only method that synchronizes with the device; steps themselves never do.
        """
        return self.loss_sums.flush()

    def inputs(self) -> StepInputs:
        """Return what changes between steps, for the next one."""
        values = {
            c.name: c.step_values(self._contexts[c.name], self._number, self.state[c.name]) for c in self._valued
        }
        if self._number == 0:
            for name, found in values.items():
                check_step_values(name, found)
        return StepInputs(self.weight_K, values)

    def step_counts(self) -> tuple[int, int]:
        """Return the number of the next step in its epoch, and the steps since :meth:`flush_terms`."""
        return self._number, self.loss_sums.steps

    def set_step_counts(self, counts: tuple[int, int]) -> None:
        """Restore :meth:`step_counts`."""
        self._number, self.loss_sums.steps = counts

    def count_replayed(self, step: Step) -> None:
        """Count a step that a CUDA graph has taken, whose results are those of the recorded ``step``."""
        self.step = replace(step, context=self._contexts[_TASK], number=self._number)
        self._number += 1
        self.loss_sums.steps += 1

    def generators(self) -> list[torch.Generator]:
        """Return the generators of the components in this epoch."""
        return [context.generator for context in self._contexts.values()]

    def state_dict(self) -> dict[str, Any]:
        """Return what changes within an experience; all but network, options and what its begin creates again.

        ``memory`` is the replay buffer that the contexts of this epoch show, where a hook has replaced it since.
        """
        memory = next((context.memory for context in self._contexts.values()), None)
        sums, summed_steps = self.loss_sums.snapshot()
        return {
            "components": dict(self.state),
            "past": self.past,
            "weight_K": self.weight_K,
            "term_sums": sums,
            "term_steps": summed_steps,
            "steps": self._steps,
            "number": self._number,
            "generators": {name: context.generator.get_state() for name, context in self._contexts.items()},
            "memory": None if memory is self._memory() else memory,
            "average": None if self.average is None else self.average.state_dict(self.network),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; generators of an epoch only where :meth:`before_epoch` has created them."""
        self.state = dict(state["components"])
        self.past = tuple(state["past"])
        self.weight_K = state["weight_K"]
        self.loss_sums.restore((state["term_sums"], state["term_steps"]))
        self._steps, self._number = state["steps"], state["number"]
        if self.average is not None:
            self.average.load_state_dict(state.get("average"), self.network)
        if not self._contexts:
            return
        memory = self._memory() if state["memory"] is None else state["memory"]
        self._contexts = {name: replace(context, memory=memory) for name, context in self._contexts.items()}
        for name, context in self._contexts.items():
            if name in state["generators"]:
                context.generator.set_state(state["generators"][name])

    def seed_everything(self, *position: int | str) -> None:
        """Seed torch, numpy and random for one position of the run, if the run has a seed."""
        if self.seed is not None:
            seed_global_generators(derive_seed(self.seed, *position))

    def _owner(self, hook: str) -> Component | None:
        return next(iter(self.composition.acting_at(hook)), None)

    def _own_step(self, step: Step, component: Component, values: StepValues | None = None) -> Step:
        """Return the step with the component's own context, so that components draw from separate generators."""
        found = {} if values is None else values.get(component.name, {})
        return replace(step, context=self._contexts[component.name], values=found)

    def _task_loss(self, step: Step, values: StepValues, *, checked: bool) -> Tensor:
        owner = self._task_owner
        with self.observer.around("task_loss", "" if owner is None else owner.name, len(step.batch.y)):
            if owner is None:
                return cross_entropy(step.output.logits, step.batch.y, weight_B=step.batch.weight_B)
            loss_K = owner.task_loss(self._own_step(step, owner, values), self.state[owner.name])
        if checked:
            check_term(owner.name, "task_loss", loss_K, len(step.output.logits))
        return loss_K

    def _exit_weights(self) -> Tensor | None:
        """weight_K of this epoch on the network's device; None where each is 1, which leaves every term alone."""
        owner = self._exit_weights_owner
        if owner is None:
            return None
        found = owner.exit_loss_weights(self._contexts[owner.name], self.state[owner.name])
        weights = check_exit_weights(owner.name, found, len(self.network.heads))
        if all(weight == 1 for weight in weights):
            return None
        return torch.tensor(weights, device=self.network.final.weight.device)

    def _term_name(self, component: str, term: str, value: Tensor) -> str:
        key = (component, term)
        name = self._term_names.get(key)
        if name is None:
            check_term(component, "losses", value, len(self.network.heads), term=term)
            name = self._term_names[key] = f"{component}/{term}"
        return name

    def _context(self, name: str, kind: str, epoch: int) -> StepContext:
        experience = self._current()
        base = torch.initial_seed() if self.seed is None else self.seed
        generator = generator_for(base, kind, experience.index, epoch, name)
        memory, steps = self._memory(), self._steps if kind == "epoch" else 0
        return StepContext(experience, epoch, self.epochs, generator, memory, self.corrected_output, steps)

    def _memory(self) -> State | None:
        """Return the state of the component with a replay buffer, if it holds samples."""
        for component in self.composition:
            if component.keeps_memory and self.state[component.name]["x"] is not None:
                return self.state[component.name]
        return None

    def _current(self) -> Experience:
        assert self.experience is not None, "begin() comes first"
        return self.experience
