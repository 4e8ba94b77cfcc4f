"""Components: the ingredients of a strategy, and the timetable they act on.

This file teaches the system. A run is this loop; every name that is a method of :class:`Component`
has a neutral default, so a component overrides only what it changes::

    edit(network)                          once, before any optimizer exists; SLOT classifier: of what kind they are
    state = init(network)
    for experience in stream:
        sources(index, count)              which experiences' data this one trains on
        pool(samples, size, state)         SLOT batch      what epochs run over, how much at a time: memory joins here
        grow(network, experience)          heads have grown; add outputs of your own
        state = prepare(network, moment, state)      start over, train helpers
        for epoch in epochs:
            begin_epoch(network, moment, state)      freeze and thaw, schedules
            weight_K = weigh(moment, state)          SLOT heads      what each exit's terms weigh
            for batch in loader:
                batch = batch(batch, moment, state)  SLOT batch      replay joins here
                output = network(batch.x)                            every exit's logits
                terms = {"task/ce": task(step, state)}     SLOT task the loss on the targets
                terms |= losses(step, state)                         named terms, one value per exit
                loss = mix(weight_K * terms, step, state)  SLOT mix  default: the sum
                loss.backward()
                project(network, step, state)        SLOT gradient   edit gradients in place
                optimizer.step()
                after_step(network, step, state)     follow the path of the weights
        state = advance(network, moment, state)      consolidate: teachers, memory, Fisher
    output = answers(output, state)        SLOT answers    what each exit answers; default: its logits
    scores = decide(output, state)         SLOT decision   who answers; default: the last exit
    cost(network, state)                   what the component adds to the ledger

A component holds options only. Whatever changes during a run is *state*: returned by ``init`` and
``advance``, handed back to every other method, kept under the component's name. So a checkpoint needs
no help from the component, and two runs never share anything by accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from torch import Tensor

from clframe.core.types import Batch, Experience, Moment, Output, Pool, State, Step
from clframe.functional.losses import cross_entropy

if TYPE_CHECKING:
    from clframe.core.compose import Composition
    from clframe.nn.network import Network

SLOTS: Final = ("batch", "heads", "classifier", "task", "mix", "gradient", "optimizer", "answers", "decision")
"""What only one component of a strategy may own."""

HOOKS: Final = (
    "edit", "init", "sources", "pool", "grow", "prepare", "begin_epoch", "weigh", "batch", "task", "losses", "mix",
    "project", "after_step", "advance", "answers", "decide", "cost",
)  # fmt: skip
"""The methods of the timetable, in the order in which a run reaches them."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One ingredient of a strategy: a frozen dataclass of options.

    Subclasses are final: to reuse one, hold it as a field and call it.

    Class attributes:
        name: How expressions, configs, logs and checkpoints call it.
        slots: What it owns alone; two owners of one slot cannot be composed.
        terms: Names of the loss terms that ``losses`` may return, for ``clframe explain``.
        weight: The option that scales everything the component does. At zero the component is the
            identity: composing drops it, so the run is bit-identical to one without it. None where
            nothing scales it.
        keeps_memory: Whether its state is a memory (``x``, ``y``), which others read as ``moment.memory``.
        needs_memory: Whether another component of the strategy must keep one.
        remakes: Whether ``advance`` changes what the network computes in evaluation: it then comes before all others',
            so that what they keep (means, importances, teachers, thresholds) is of the network that answers.
        phase: Phase of the ledger that ``prepare`` and ``advance`` are booked under; ``router`` where they train one.
    """

    name: ClassVar[str]
    slots: ClassVar[frozenset[str]] = frozenset()
    terms: ClassVar[tuple[str, ...]] = ()
    weight: ClassVar[str | None] = None
    keeps_memory: ClassVar[bool] = False
    needs_memory: ClassVar[bool] = False
    remakes: ClassVar[bool] = False
    phase: ClassVar[str] = "auxiliary"

    def __add__(self, other: Component | Composition) -> Composition:
        """Compose; see :func:`clframe.core.compose.compose`."""
        from clframe.core.compose import compose

        return compose(self, other)

    @property
    def is_identity(self) -> bool:
        """Whether composing with this component changes nothing."""
        return self.weight is not None and getattr(self, self.weight) == 0

    def acts_at(self) -> tuple[str, ...]:
        """The hooks this component overrides, in timetable order."""
        return tuple(hook for hook in HOOKS if getattr(type(self), hook) is not getattr(Component, hook))

    def check(self, *, classes: int) -> None:
        """Refuse options that cannot work on a benchmark of ``classes`` classes (ConfigError)."""

    @property
    def needs_held_out(self) -> str:
        """The option for which a benchmark must hold validation data out; empty where none does."""
        return ""

    def taps(self, network: Network) -> Sequence[str]:
        """Stages whose outputs ``step.output.taps`` and ``answers`` are to hold."""
        return ()

    def settle(self, network: Network) -> Component:
        """The component with every choice that depends on this machine made; a run's config records it."""
        return self

    def edit(self, network: Network) -> None:
        """Change the network once, before any optimizer exists."""

    def init(self, network: Network) -> State:
        """The state at the start of a run."""
        return {}

    def sources(self, index: int, count: int) -> Sequence[int]:
        """Experiences whose training data experience ``index`` of ``count`` trains on; none skips it."""
        return (index,)

    def pool(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """What an epoch runs over, once and in one shuffled order, and how many of it make a batch. Slot ``batch``.

        Called when the loader of an experience is made, before anything has grown.

        Args:
            samples: The training data of the experience.
            size: ``trainer.batch_size``.
            state: The component's own.
        """
        return samples, size

    def grow(self, network: Network, experience: Experience) -> None:
        """Add what a new experience needs; the classifiers have already grown."""

    def prepare(self, network: Network, moment: Moment, state: State) -> State:
        """The state for an experience about to be trained; heads have grown and are on their device."""
        return state

    def begin_epoch(self, network: Network, moment: Moment, state: State) -> None:
        """Set what lasts for an epoch, such as which parts of the network learn."""

    def weigh(self, moment: Moment, state: State) -> Sequence[float]:
        """What each exit's terms weigh in this epoch, one number per exit. Slot ``heads``; default: 1 each."""
        return (1.0,)

    def batch(self, batch: Batch, moment: Moment, state: State) -> Batch:
        """The batch to train on instead. Slot ``batch``."""
        return batch

    def task(self, step: Step, state: State) -> Tensor:
        """loss_K on the targets, logged as ``loss/task/ce``. Slot ``task``; default: cross-entropy at every exit."""
        return cross_entropy(step.output.logits, step.batch.y, weight_B=step.batch.weight_B)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Named loss terms, each of shape [K] (one value per exit) or [] (exits have no part in it)."""
        return {}

    def mix(self, terms: Mapping[str, Tensor], step: Step, state: State) -> Tensor:
        """One scalar out of all named terms. Slot ``mix``; default: the sum over terms and exits."""
        return total(terms)

    def project(self, network: Network, step: Step, state: State) -> None:
        """Edit ``parameter.grad`` in place, after backward. Slot ``gradient``."""

    def after_step(self, network: Network, step: Step, state: State) -> None:
        """Look at weights just updated, whose gradients are still there; may write into tensors of the state."""

    def advance(self, network: Network, moment: Moment, state: State) -> State:
        """The state after an experience has been learnt."""
        return state

    def answers(self, output: Output, state: State) -> Output:
        """The output with other logits at every exit, such as corrected ones. Slot ``answers``."""
        return output

    def decide(self, output: Output, state: State) -> Tensor:
        """scores_BC whose arg-max is the answer. Slot ``decision``; default: the last exit's.

        Here ``output.logits`` holds what each exit answers: its logits, or the scores of its ensemble.
        """
        return output.last

    def cost(self, network: Network, state: State) -> Mapping[str, int]:
        """Costs only the component knows, such as ``{"macs": ...}`` per training step; default: none."""
        return {}


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of all terms over exits, in the order given: the default of the slot ``mix``.

    One value, of shape [] or, where there is one exit, [1]: summing a single number would only add to the graph.
    """
    parts = [term if term.numel() == 1 else term.sum() for term in terms.values()]
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result
