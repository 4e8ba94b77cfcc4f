"""What one training step costs: the step that was just taken is taken once more, on copies, under the counter.

Nothing of the run changes: the network is a copy, so are the generators that components draw from and the states of
those that write into them; the global generators are put back.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Generator, Tensor

from clframe.accounting import PHASES, MacCounter
from clframe.core import Batch, Component, State, StepContext
from clframe.errors import ConfigError
from clframe.moe import counting
from clframe.nn.network import Network
from clframe.training.learner import Learner
from clframe.training.prediction_cost import every_expert

if TYPE_CHECKING:
    from clframe.training.strategy import LightningStrategy

Charges = dict[tuple[str, str], int]
"""MACs by phase and component."""


def step_charges(strategy: LightningStrategy) -> tuple[Charges, dict[str, int]]:
    """MACs of the step that ``strategy`` has just taken, and the operators that could not be counted."""
    learner, batch = strategy.learner, strategy.batch
    assert learner is not None
    charges: Charges = {}
    counter = MacCounter()
    shadow = _shadow(learner, counter, charges)
    with random_states_kept(batch.x.device), torch.enable_grad(), counter:
        if shadow._batch_owner is not None:
            fresh = min(strategy.train_mb_size, len(batch.y))
            shadow.make_batch(batch.x[:fresh], batch.y[:fresh])
        _take(strategy, shadow, Batch(batch.x, batch.y, batch.weight_B, batch.extras), counter, charges)
    for (component, key), macs in declared(learner).items():
        phase = "auxiliary" if key == "macs" else key
        if phase in PHASES:
            charges[phase, component] = charges.get((phase, component), 0) + macs
    return {place: macs for place, macs in charges.items() if macs}, counter.uncounted()


def answer_charges(learner: Learner, x: Tensor) -> tuple[Charges, dict[str, int]]:
    """MACs of answering ``x`` in evaluation: every exit, what components answer with, and who decides.

    But none of experts and their routers: which run depends on the sample.
    """
    charges: Charges = {}
    counter = MacCounter()
    shadow = copy.copy(learner)
    _meter_owners(shadow, counter, charges)
    everyone, counted = every_expert(learner.network), counting(learner.network)
    with random_states_kept(x.device), torch.no_grad(), everyone, counted as usage, counter:
        output = learner.network(x, taps=learner.taps)
        shadow.predict(shadow.adjust_logits(output))
    own = {("evaluation", component): macs for (_, component), macs in charges.items() if macs}
    experts = sum(layer.dense_macs for layer in usage().values())
    own["evaluation", ""] = counter.macs - experts - sum(own.values())
    return own, counter.uncounted()


@contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators of torch, numpy and Python back where they were."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def declared(learner: Learner) -> dict[tuple[str, str], int]:
    """What only components know, by component and key.

    ``macs``, or the name of a phase, stands for the MACs of a step; any other key for a figure of its own.

    Raises:
        ConfigError: A figure that is no count.
    """
    found = {}
    for component in learner.composition.acting_at("extra_cost"):
        for key, count in component.extra_cost(learner.network, learner.state[component.name]).items():
            if not isinstance(count, int) or count < 0:
                raise ConfigError(f"{component.name}: its cost() found {key}={count!r}; give whole numbers from 0")
            found[component.name, key] = count
    return found


def teacher_bytes(state: Any) -> int:
    """Bytes of the networks in a state."""
    return sum(t.nbytes for network in _networks(state) for t in network.state_dict().values())


def _take(strategy: LightningStrategy, shadow: Learner, batch: Batch, counter: MacCounter, charges: Charges) -> None:
    """The step itself; what owners of slots do is charged to them on the way."""

    def charge(place: tuple[str, str], since: int, others: int) -> None:
        charges[place] = charges.get(place, 0) + counter.macs - since - (sum(charges.values()) - others)

    before, others = counter.macs, sum(charges.values())
    output = strategy.predicted(shadow.network, batch.x)
    charge(("forward", ""), before, others)
    before, others = counter.macs, sum(charges.values())
    with strategy._engine.autocast():
        loss = shadow.loss(batch, output).sum()
    charge(("forward", "task"), before, others)
    before, others = counter.macs, sum(charges.values())
    if loss.requires_grad:
        loss.backward()
    charge(("backward", ""), before, others)
    shadow.modify_gradients()
    shadow.after_step()


def _shadow(learner: Learner, counter: MacCounter, charges: Charges) -> Learner:
    """A learner that does what ``learner`` would, and leaves no trace in it."""
    shadow = copy.copy(learner)
    shadow.network = copy.deepcopy(learner.network)
    writers = {component.name for component in learner.composition.acting_at("after_step")}
    shadow.state = {n: copy.deepcopy(s) if n in writers else s for n, s in learner.state.items()}
    shadow.term_sums = {}
    shadow._contexts = {name: _same_draws(context) for name, context in learner._contexts.items()}
    shadow._task_context = _same_draws(learner._task_context)
    _meter_owners(shadow, counter, charges)
    return shadow


def _same_draws(context: StepContext) -> StepContext:
    return dataclasses.replace(context, generator=Generator().set_state(context.generator.get_state()))


def _meter_owners(shadow: Learner, counter: MacCounter, charges: Charges) -> None:
    """Have every component that the learner calls charged for what it runs."""
    for name, value in list(vars(shadow).items()):
        if isinstance(value, Component):
            setattr(shadow, name, _Metered(value, counter, charges))
        elif isinstance(value, tuple) and value and all(isinstance(part, Component) for part in value):
            setattr(shadow, name, tuple(_Metered(part, counter, charges) for part in value))


class _Metered:
    """A component whose hooks are charged to it: replay where it serves batches, teachers where it keeps networks."""

    def __init__(self, component: Component, counter: MacCounter, charges: Charges) -> None:
        self._component, self._counter, self._charges = component, counter, charges

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._component, name)
        if not callable(value):
            return value

        def hook(*args: Any) -> Any:
            before = self._counter.macs
            try:
                return value(*args)
            finally:
                phase = "replay" if name == "batch" else "teachers" if _networks(args[-1]) else "auxiliary"
                place = (phase, self._component.name)
                self._charges[place] = self._charges.get(place, 0) + self._counter.macs - before

        return hook


def _networks(state: Any) -> list[Network]:
    if isinstance(state, Network):
        return [state]
    if isinstance(state, Mapping):
        return [network for part in state.values() for network in _networks(part)]
    if isinstance(state, (list, tuple)):
        return [network for part in state for network in _networks(part)]
    return []


def state_sizes(component: Component, state: State, total: int) -> dict[str, int]:
    """Bytes of a component's state by kind of the ledger."""
    teachers = teacher_bytes(state)
    rest = "memory" if component.keeps_memory else "components"
    return {kind: count for kind, count in (("teachers", teachers), (rest, total - teachers)) if count}
