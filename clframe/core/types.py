"""The few values that pass between model, strategy and engine.

Shape suffixes: B batch, C classes, K exits, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Generator, Tensor

from clframe.nn.network import Network
from clframe.nn.types import Output, Samples

State = Mapping[str, Any]
"""A component's state: nested mappings and sequences of tensors, numbers, strings and frozen networks."""


class Pool(Samples, Protocol):
    """Training data before a loader is made of it: a memory may still join."""

    def extended(self, raw: Tensor, y: Tensor) -> Pool:
        """These samples and others as a memory holds them: stored inputs and targets."""

    def subset(self, index: Tensor) -> Pool:
        """The samples at ``index``, in that order."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One experience as components see it: who it is, and which classes are now, past and ahead."""

    index: int
    count: int
    classes: tuple[int, ...]
    """Classes whose data this experience brings."""
    past: tuple[int, ...]
    """Classes of the experiences before it."""
    ahead: tuple[int, ...]
    """Classes not met before or in this experience."""
    samples: Samples
    held_out: tuple[Samples, ...] = ()
    """Validation data of this experience and of all before it; empty where a benchmark holds none out."""

    @property
    def classes_so_far(self) -> tuple[int, ...]:
        """Past classes and this experience's, in ascending order."""
        return tuple(sorted({*self.past, *self.classes}))


@dataclass(slots=True)
class Batch:
    """A training batch on its way to the model; the owner of the slot ``batch`` may extend it."""

    x: Tensor
    y: Tensor
    weight_B: Tensor | None = None
    """Weight of each sample in the task loss; None means one each."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """What the owner of the slot hands to its own losses, such as the logits stored with replayed samples."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """Where in a run a batch is trained, and the randomness that belongs to that place."""

    experience: Experience
    epoch: int
    epochs: int
    generator: Generator
    """CPU generator of one component, seeded by (seed, experience, epoch, component)."""
    memory: State | None = None
    """State of the component that replays (``x`` inputs as stored, ``y`` targets, ...), to be read only; None
    where there is none or it is empty. Components act in the order of their names, so ``er`` has already kept
    samples of an experience when a component behind it in the alphabet consolidates."""
    answer: Callable[[Tensor], Output] | None = None
    """From prepared inputs to what every exit answers with now, as the owner of the slot ``answers`` corrects it:
    what ensembles and policies are fitted on."""


@dataclass(frozen=True, slots=True)
class Step:
    """One training step as the losses see it."""

    batch: Batch
    output: Output
    context: StepContext
    network: Network
    """What learns; for terms on weights rather than outputs."""
    weight_K: Tensor | None = None
    """What each exit's terms weigh in this epoch, for losses that the engine does not weigh; None: one each."""
