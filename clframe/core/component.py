"""Components, the ingredients of a strategy, and their composition.

Start reading here. A run is the loop below; every call that is a method of :class:`Component` is a *hook* with a
neutral default, so a component overrides only what it changes::

    setup_network(network)                        once, before any optimizer exists    SLOT classifier: their kind
    state = init_state(network)                   once
    for experience in stream:
        training_experiences(index, count)        which experiences' data this one trains on
        training_set(samples, size, state)        the samples an epoch iterates over, and the batch size   SLOT batch
        add_classes(network, experience)          heads have grown; add further outputs
        state = before_experience(network, context, state)
        for epoch in epochs:
            before_epoch(network, context, state)           schedules, freezing
            weight_K = exit_loss_weights(context, state)                        SLOT exit_weights, default 1 each
            for batch in loader:
                batch = make_batch(batch, context, state, network)              SLOT batch: replay joins here
                output = network(batch.x)                                       logits of every exit
                terms = {"task/ce": task_loss(step, state)}                     SLOT task_loss, default cross-entropy
                terms |= losses(step, state)                                    named terms, one value per exit
                loss = combine_losses(weight_K * terms, step, state)            SLOT loss_mix, default the sum
                loss.backward()
                modify_gradients(network, step, state)                          SLOT gradient
                optimizer.step()
                state = after_step(network, step, state)
        state = after_experience(network, context, state)   consolidation: teachers, buffers, Fisher information
    output = adjust_logits(output, state)         SLOT logits      bias correction, nearest class means
      logits_BC = adjust_exit_logits(exit, logits_BC, taps, state)      the same, one exit at a time
    scores = predict(output, state)               SLOT prediction  default: the last exit
    extra_cost(network, state)                    costs for the ledger that cannot be counted from outside

A *slot* is a resource that only one component of a strategy may own; two owners are refused when composing.

A component holds options only. Everything that changes during a run is its *state*: returned by ``init_state``,
``before_experience``, ``after_step`` and ``after_experience``, passed to every other hook, and stored under the
component's name. So a checkpoint needs no code of the component, and two runs cannot share state by accident.

Laws (tests/core/test_laws.py): composing is associative; ``naive`` is the identity; terms commute, bit for bit,
because a composition sorts its components by name; a component of weight zero is dropped; two owners of one slot, or
one name twice, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

from torch import Tensor

from clframe.core.declarations import HOOKS, check_declaration, check_owners
from clframe.core.types import Batch, Experience, Pool, State, Step, StepContext
from clframe.errors import ComposeError
from clframe.functional.losses import cross_entropy, total
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.options import convert_fields


@dataclass(frozen=True, kw_only=True)
class Component:
    """One ingredient of a strategy: a frozen dataclass of options.

    Subclasses are final: to reuse one, store it in a field and call it.

    Class attributes:
        name: Name in expressions, configs, logs and checkpoints.
        slots: Resources that it owns; two owners of one slot cannot be composed.
        terms: Names of the loss terms that ``losses`` may return, for ``clframe explain``.
        weight: Option that scales everything the component does, or None. At zero the component is the identity:
            composing drops it, so the run is bit-identical to one without it.
        keeps_memory: Whether its state is a replay buffer (``x``, ``y``), which others read as ``context.memory``.
        needs_memory: Whether it needs a component with a replay buffer in the strategy.
        changes_activity: Whether it changes which hidden neurons or experts are active. Runs then record their
            activity after each experience; see ``trainer.record_activity``.
        changes_network: Whether ``after_experience`` changes what the network computes in evaluation. It then runs
            before all others, whose means, importances, teachers and thresholds are of the changed network. The replay
            buffer comes next, then all that reads either, each in the order of names.
        capturable: Whether ``task_loss``, ``losses`` and ``combine_losses`` may be recorded as part of a CUDA graph and
            replayed: they neither wait for the device (``item()``, masks as indices) nor draw random numbers in Python,
            every number that changes between the steps of an experience comes from ``step_values``, tensors of the
            state that they read are only written in place, and ``before_epoch`` changes nothing but ``requires_grad``,
            training modes and ``network.gradient``. Other hooks are not recorded.
        compilable: Whether the stages of the network may run as code compiled once (``trainer.compile``): what the
            component adds to them, such as modules and hooks, decides nothing by values on the host. Heads, losses and
            other hooks are not compiled.
        distributed: Whether it may train in several processes, one per device, each of which calls every hook: given
            equal batches, outputs and generators of contexts, it computes the same in all of them. Draws from other
            generators differ, and so may choices between samples inside a step, which a GPU rounds differently from
            call to call. Losses run a teacher by ``step.run``, which divides the batch among the processes.
        per_token: Whether it is defined for a language model, whose batches are windows of ids and whose logits and
            targets have one row per token: losses of logits and targets are; what reads classes of samples is not.
        remembers_weights: Whether its state has values for single weights, such as importances.
        phase: Phase of ``before_experience`` and ``after_experience`` in the ledger; ``router`` if they train one.
        renamed: Options by their former names, which configs and expressions may still use.
    """

    name: ClassVar[str]
    slots: ClassVar[frozenset[str]] = frozenset()
    terms: ClassVar[tuple[str, ...]] = ()
    weight: ClassVar[str | None] = None
    keeps_memory: ClassVar[bool] = False
    needs_memory: ClassVar[bool] = False
    changes_activity: ClassVar[bool] = False
    changes_network: ClassVar[bool] = False
    capturable: ClassVar[bool] = False
    compilable: ClassVar[bool] = True
    distributed: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    remembers_weights: ClassVar[bool] = False
    phase: ClassVar[str] = "auxiliary"
    renamed: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Have options checked before ``__post_init__`` of a subclass, which need not call this one's."""
        super().__init_subclass__(**arguments)
        own = cls.__dict__.get("__post_init__")
        if own is not None:

            @wraps(own)
            def checked(self: Component) -> None:
                if type(self).__post_init__ is checked:  # not again where that of a subclass calls this one
                    Component.__post_init__(self)
                own(self)

            cls.__post_init__ = checked  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        """Check the options as those of an expression are: a word of a given set, a number, text, a list.

        Raises:
            ConfigError: An option of another type or another word.
        """
        convert_fields(self, where=f"components.{getattr(self, 'name', type(self).__name__)}")

    def __add__(self, other: Component | Composition) -> Composition:
        """Compose; see :func:`clframe.core.component.compose`."""
        return compose(self, other)

    @property
    def renews_weights(self) -> bool:
        """Whether it trains other weights in every experience, for which values of earlier ones are void."""
        return False

    def conflict_with(self, other: Component) -> str:
        """Return why it has no meaning together with another component of the strategy; empty if it has."""
        return ""

    @property
    def fewest_epochs(self) -> int:
        """Epochs of an experience that it needs at least; a development run trains that many."""
        return 1

    @property
    def is_identity(self) -> bool:
        """Whether composing with this component changes nothing."""
        return self.weight is not None and getattr(self, self.weight) == 0

    def acts_at(self) -> tuple[str, ...]:
        """Return the hooks that this component overrides, in the order of a run."""
        return tuple(hook for hook in HOOKS if getattr(type(self), hook) is not getattr(Component, hook))

    def check(self, *, classes: int) -> None:
        """Raise ConfigError for options that cannot work on a benchmark of ``classes`` classes."""

    @property
    def needs_held_out(self) -> str:
        """Option that needs validation data of the benchmark; empty if none does."""
        return ""

    @property
    def needs_domain_labels(self) -> str:
        """Option that needs evaluations to know the experience of a sample; empty if none does."""
        return ""

    @property
    def unused_options(self) -> Mapping[str, str]:
        """Options that are set and have no effect next to the others, each with the reason."""
        return {}

    @property
    def named_taps(self) -> Mapping[str, Sequence[str]]:
        """Taps that options name, by option: a backbone that can be divided after any layer is divided after these."""
        return {}

    def taps(self, network: Network) -> Sequence[str]:
        """Return the stages whose outputs the component reads in ``output.taps``."""
        return ()

    def resolve(self, network: Network) -> Component:
        """Return the component with every choice that depends on this machine made, for the config of a run."""
        return self

    def setup_network(self, network: Network) -> None:
        """Change the network, once, before any optimizer exists."""

    def init_state(self, network: Network) -> State:
        """Return the state at the start of a run."""
        return {}

    def training_experiences(self, index: int, count: int) -> Sequence[int]:
        """Return the experiences whose data experience ``index`` of ``count`` trains on; none skips training."""
        return (index,)

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Return the samples that an epoch iterates over, shuffled, and the batch size. Slot ``batch``.

        Called when the loader of an experience is created, before heads grow.

        Args:
            samples: The training data of the experience.
            size: ``trainer.batch_size``.
            state: State of the component.
        """
        return samples, size

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Add outputs for new classes; the classifiers have already grown."""

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Return the state for an experience about to be trained; heads have grown and are on their device."""
        return state

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Apply what lasts for an epoch: schedules, freezing."""

    def exit_loss_weights(self, context: StepContext, state: State) -> Sequence[float]:
        """Return the weight of each exit's losses in this epoch. Slot ``exit_weights``; default: 1 each."""
        return (1.0,)

    def make_batch(self, batch: Batch, context: StepContext, state: State, network: Network) -> Batch:
        """Return the batch to train on, such as the new samples followed by replayed ones. Slot ``batch``.

        ``network`` is for choosing samples, as MIR does by a virtual step; its weights and gradients must be left
        as they were.
        """
        return batch

    def step_values(self, context: StepContext, number: int, state: State) -> Mapping[str, float]:
        """Return numbers by name that the losses read as ``step.values``, such as a weight that rises.

        Called before every step with its number in the epoch, from 0. A number that a loss computes by itself would be
        recorded as a constant where steps run as CUDA graphs.
        """
        return {}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return loss_K on the targets, logged as ``loss/task/ce``. Slot ``task_loss``; default: cross-entropy."""
        return cross_entropy(step.output.logits, step.batch.y, weight_B=step.batch.weight_B)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return named loss terms, each of shape [K] (one value per exit) or [] (not per exit)."""
        return {}

    def combine_losses(self, terms: Mapping[str, Tensor], step: Step, state: State) -> Tensor:
        """Combine all named terms into one scalar. Slot ``loss_mix``; default: the sum over terms and exits."""
        return total(terms)

    def modify_gradients(self, network: Network, step: Step, state: State) -> None:
        """Edit ``parameter.grad`` in place, after backward. Slot ``gradient``."""

    def after_step(self, network: Network, step: Step, state: State) -> State:
        """Return the state after an update of the weights, whose gradients are still present.

        Either the same state, whose tensors may be written in place, or a new one (a reservoir that grew, say).
        ``step.context`` is the component's own, so its generator may be drawn from.
        """
        return state

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Return the state after an experience has been trained."""
        return state

    def adjust_logits(self, output: Output, state: State) -> Output:
        """Return the output with other logits at every exit. Slot ``logits``; default: :meth:`adjust_exit_logits`.

        Override it only where the correction of an exit needs other exits: dynamic inference, which computes them one
        after the other, is then refused.
        """
        adjusted = [
            self.adjust_exit_logits(exit, logits_BC, output.taps, state) for exit, logits_BC in enumerate(output.logits)
        ]
        return output._replace(logits=tuple(adjusted))

    def adjust_exit_logits(self, exit: int, logits_BC: Tensor, taps: Mapping[str, Tensor], state: State) -> Tensor:
        """Return the logits of one exit, corrected. Slot ``logits``; default: unchanged.

        Args:
            exit: Its index, from 0.
            logits_BC: Its logits.
            taps: Outputs of stages by name: those that :meth:`taps` asks for, or only the exit's own.
            state: The component's own.
        """
        return logits_BC

    def predict(self, output: Output, state: State) -> Tensor:
        """Return scores_BC, whose arg-max is the prediction. Slot ``prediction``; default: those of the last exit.

        ``output.logits`` holds the scores of each exit: its corrected logits, or those of its ensemble.
        """
        return output.last

    def extra_cost(self, network: Network, state: State) -> Mapping[str, int]:
        """Return costs for the ledger that cannot be counted from outside; default: none.

        ``macs``, or the name of a phase, is a number of MACs per training step. ``replayed`` is a number of samples of
        the replay buffer that each step runs through the network in addition to its batch. Any other key is a figure
        that the ledger lists under the component's name.
        """
        return {}


@dataclass(frozen=True)
class Composition:
    """A strategy: components sorted by name. Build one with :func:`compose` or ``+``."""

    components: tuple[Component, ...] = ()

    def __add__(self, other: Component | Composition) -> Composition:
        """Compose with another component or composition."""
        return compose(self, other)

    def __iter__(self) -> Iterator[Component]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)

    def __str__(self) -> str:
        return " + ".join(component.name for component in self.components) or "naive"

    def owner(self, slot: str) -> Component | None:
        """Return the component that owns ``slot``, if any."""
        return next((component for component in self.components if slot in component.slots), None)

    def check_needs(self) -> None:
        """Raise ComposeError for a component without the buffer or lasting weights that it needs, and for conflicts."""
        renewing = next((component for component in self.components if component.renews_weights), None)
        remembering = next((component for component in self.components if component.remembers_weights), None)
        if renewing is not None and remembering is not None:
            raise ComposeError(
                f"strategy: '{remembering.name}' keeps values of single weights, and '{renewing.name}' trains new ones "
                f"in every experience; keep one of them"
            )
        for component in self.components:
            for other in self.components:
                reason = component.conflict_with(other) if other is not component else ""
                if reason:
                    raise ComposeError(f"strategy: {reason}")
        keeps = any(component.keeps_memory for component in self.components)
        for component in self.components:
            if component.needs_memory and not keeps:
                raise ComposeError(
                    f"strategy: '{component.name}' needs a memory; add one, as in '{component.name} + er'"
                )

    def acting_at(self, hook: str) -> tuple[Component, ...]:
        """Return the components that override ``hook``, the only ones that are called there."""
        return tuple(component for component in self.components if hook in component.acts_at())

    def replace(self, change: Callable[[Component], Component]) -> Composition:
        """Return the composition of ``change(component)`` for every component."""
        return compose(*(change(component) for component in self.components))


def compose(*parts: Component | Composition) -> Composition:
    """Compose components into a strategy.

    Raises:
        ComposeError: Two owners of one slot, one component twice, an unknown slot, or a hook overridden without
            owning its slot.

    >>> str(compose())
    'naive'
    """
    components: dict[str, Component] = {}
    for component in _flatten(parts):
        check_declaration(component)
        if component.is_identity:
            continue
        if component.name in components:
            raise ComposeError(f"strategy: component '{component.name}' appears twice; give its options once")
        components[component.name] = component
    ordered = tuple(components[name] for name in sorted(components))
    check_owners(ordered)
    return Composition(ordered)


def _flatten(parts: tuple[Any, ...]) -> Iterator[Component]:
    for part in parts:
        if isinstance(part, Composition):
            yield from part.components
        elif isinstance(part, Component):
            yield part
        else:
            raise ComposeError(
                f"strategy: cannot compose {part!r} of type {type(part).__name__}; "
                f"compose Component instances or parse an expression with clframe.parse"
            )
