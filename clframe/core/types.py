"""Values that pass between network, strategy and training loop.

Shape suffixes: B batch, C classes, K exits, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from clframe.functional.language import next_token_targets
from clframe.nn.network import Network
from clframe.nn.types import Output, Samples

State = Mapping[str, Any]
"""State of a component: nested mappings and sequences of tensors, numbers, strings and frozen networks."""


class Pool(Samples, Protocol):
    """Training data before a loader is created from it, which replayed samples may join."""

    def with_stored(self, raw: Tensor, y: Tensor) -> Pool:
        """Return these samples followed by others of a replay buffer, given as stored inputs and targets."""

    def subset(self, index: Tensor) -> Pool:
        """Return the samples at ``index``, in that order."""


@dataclass(frozen=True, slots=True)
class Experience:
    """One experience for components: its index, classes and samples."""

    index: int
    count: int
    classes: tuple[int, ...]
    """Classes of this experience."""
    past: tuple[int, ...]
    """Classes of the experiences before it."""
    ahead: tuple[int, ...]
    """Classes that neither this experience nor one before it has."""
    samples: Samples
    held_out: tuple[Samples, ...] = ()
    """Validation data of this experience and of all before it; empty if the benchmark has none."""

    @property
    def classes_so_far(self) -> tuple[int, ...]:
        """Classes of this experience and of all before it, in ascending order."""
        return tuple(sorted({*self.past, *self.classes}))


@dataclass(slots=True)
class Batch:
    """A training batch; the owner of the slot ``batch`` may extend it by replayed samples."""

    x: Tensor
    y: Tensor
    weight_B: Tensor | None = None
    """Weight of each sample in the task loss; None for 1 each."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Values of the slot's owner for its own losses, such as the logits stored with replayed samples."""
    parts: tuple[int, ...] = ()
    """Sizes of the parts that pass through the network one after the other, each with its own batch statistics; empty
    for one pass of all."""
    stored: Callable[[], Tensor] | None = None
    """Returns the inputs of the new samples as stored, before augmentation and normalization; None if the loader
    cannot provide them. The new samples come first in ``x``."""

    def by_token(self) -> Batch:
        """Return a batch of windows of ids with a target for each token, as the logits of a language model have rows.

        The weight of a window is that of each of its tokens, and extras [R, T, ...] become [R T, ...]. The batch itself
        has the domain of each window as target.
        """
        weight_B = self.weight_B
        weight_N = None if weight_B is None else weight_B.repeat_interleave(self.x.shape[1] - 1)
        extras = {name: values.flatten(0, 1) for name, values in self.extras.items()}
        return replace(self, y=next_token_targets(self.x), weight_B=weight_N, extras=extras)


@dataclass(frozen=True, slots=True)
class StepContext:
    """Position in a run, and the random generator of a component at this position."""

    experience: Experience
    epoch: int
    epochs: int
    generator: Generator
    """CPU generator of the component, seeded by (seed, experience, epoch, component)."""
    memory: State | None = None
    """State of the component with the replay buffer (``x`` inputs as stored, ``y`` targets, ...), read-only; None if
    there is none or it is empty. In ``after_experience`` it already has samples of the experience, except for a
    component that changes the network, which runs before the buffer is updated."""
    corrected_output: Callable[[Tensor], Output] | None = None
    """Maps prepared inputs to the present logits of every exit, as corrected by the owner of the slot ``logits``;
    ensembles and policies are fitted on these."""
    steps: int = 0
    """Batches of the epoch; 0 outside training."""


@dataclass(frozen=True, slots=True)
class Step:
    """One training step, as passed to the losses."""

    batch: Batch
    output: Output
    context: StepContext
    network: Network
    """The network in training, for terms on weights rather than outputs."""
    weight_K: Tensor | None = None
    """Weight of each exit's losses in this epoch, for losses that the learner does not weight; None for 1 each."""
    number: int = 0
    """Number of the batch in its epoch, from 0."""
    values: Mapping[str, float | Tensor] = field(default_factory=dict)
    """What the component's ``step_values`` has returned for this step: numbers, or tensors [] while a step is recorded
    as a CUDA graph."""
    shared_run: Callable[[Network, Tensor, Collection[str]], Output] | None = None
    """Runs a network on inputs that several devices share; None where there is one device."""

    def run(self, teacher: Network, *, taps: Collection[str] = ()) -> Output:
        """Return the output of a frozen network for the batch, without gradient.

        Several devices compute a share of the batch each.

        Args:
            teacher: The network, in evaluation mode.
            taps: Stages whose outputs are returned as well.
        """
        with torch.no_grad():
            if self.shared_run is not None:
                return self.shared_run(teacher, self.batch.x, taps)
            output: Output = teacher(self.batch.x, taps=taps) if taps else teacher(self.batch.x)
            return output
