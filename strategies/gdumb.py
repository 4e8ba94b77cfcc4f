"""GDumb: train from scratch on a class-balanced buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import Experience, Pool, State, StepContext
from clframe.nn.network import Network
from clframe.nn.types import Samples
from clframe.replay.buffers import MemoryPolicy
from clframe.replay.joining import check_memory, check_room
from clframe.seeding import generator_for


@dataclass(frozen=True, kw_only=True)
class GDumb(Component):
    """GDumb: restart the network at every experience and train it on a class-balanced buffer only.

    The buffer admits the current experience before training: ``memory / (classes so far)`` samples of each class, at
    random. Every weight and buffer, exits included, is then reset to its value before the run, and heads are
    initialized again. It measures what a buffer alone is worth: a method below it learns nothing from the stream.
    Prabhu, Torr and Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning" (2020).

    Use it as a baseline. Cost: small with a small buffer, but it needs as many epochs as training from scratch, and a
    copy of the initial weights. If classes are not equally frequent, the published sampler lends the unused share of a
    rare class to others until it is needed; here it stays free.

    Args:
        memory: Buffer size in samples; the paper uses 500 or 1000 for CIFAR-10, 2000 is usual for CIFAR-100.
        restart: ``never`` continues training from experience to experience, as the code of the paper on auxiliary
            classifiers (Szatkowski et al., 2025) does, against its text.
    """

    name: ClassVar[str] = "gdumb"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})
    keeps_memory: ClassVar[bool] = True

    memory: int = 500
    restart: Literal["every", "never"] = "every"

    def __post_init__(self) -> None:
        """Validate the size."""
        check_memory(self.name, self.memory)

    @property
    def policy(self) -> MemoryPolicy:
        """Policy that fills the buffer."""
        return MemoryPolicy(self.memory)

    def check(self, *, classes: int) -> None:
        """Raise ConfigError if the buffer has no room for one sample of each class."""
        check_room(self.name, self.memory, classes)

    def init_state(self, network: Network) -> State:
        """Return an empty buffer, and a copy of every weight and buffer before the run.

        The buffer is sampled in ``training_set``, which has no context and no generator. The seed is therefore stored
        here, while torch's global seed is still that of the initial weights.
        """
        weights = {} if self.restart == "never" else network.state_dict()
        blank = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return {**self.policy.empty(), "blank": blank, "grown": (), "seed": torch.initial_seed()}

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Return the buffer as it will be after this experience, and nothing else."""
        memory = self._update_buffer(samples, state)
        nothing = samples.subset(torch.empty(0, dtype=torch.long))
        return nothing.with_stored(memory["x"], memory["y"]), size

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Restore the initial weights and buffers, then grow the heads experience by experience."""
        if self.restart == "never":
            return state
        network.load_state_dict(state["blank"])
        grown = (*state["grown"], context.experience.classes)
        for classes in grown:
            network.grow(classes)
        return {**state, "grown": grown}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store the buffer that was trained on."""
        return {**state, **self._update_buffer(context.experience.samples, state)}

    def _update_buffer(self, samples: Samples, state: State) -> State:
        """Return the buffer including ``samples``: the same result for the same state, in both hooks."""
        index = len(state["owner"])  # grows with every experience
        classes = tuple(sorted(set(samples.y.tolist())))
        experience = Experience(index, index + 1, classes, (), (), samples)
        generator = generator_for(state["seed"], self.name, index)
        return self.policy.update(state, experience, generator=generator, features=_no_features)


def _no_features(index_N: Tensor) -> Tensor:
    raise AssertionError("a balanced memory asks for no features")
