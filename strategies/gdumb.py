"""GDumb: keep a balanced memory, start over on it."""

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
from clframe.replay.joining import Replay
from clframe.seeding import generator_for


@dataclass(frozen=True, kw_only=True)
class GDumb(Component):
    """GDumb: the network starts over at every experience and trains on a class-balanced memory only.

    The memory takes in the experience at hand before training: ``memory / (classes so far)`` samples of each class,
    at random. Every weight and buffer, exits included, is then put back to what it was before the run, and heads
    are drawn anew. It asks what a memory alone is worth: a method that stays below it learns nothing from the stream.
    Use it as a baseline. Costs little where the memory is small; it needs as many epochs as training from scratch
    does, and keeps a copy of the first weights. Prabhu, Torr and Dokania, "GDumb: A Simple Approach that Questions
    Our Progress in Continual Learning" (2020).

    Where classes are not equally frequent, the published sampler lends what a rare class leaves free to others until
    somebody needs it; here it stays free.

    Args:
        memory: Samples kept in all; the paper takes 500 or 1000 for CIFAR-10, 2000 is usual for CIFAR-100.
        restart: ``never`` trains on from experience to experience, as the code of the paper on auxiliary classifiers
            (Szatkowski et al., 2025) does against its text.
    """

    name: ClassVar[str] = "gdumb"
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})
    keeps_memory: ClassVar[bool] = True

    memory: int = 500
    restart: Literal["every", "never"] = "every"

    def __post_init__(self) -> None:
        """Refuse an empty memory."""
        _ = self._replay

    @property
    def _replay(self) -> Replay:
        return Replay(owner=self.name, memory=self.memory)

    @property
    def policy(self) -> MemoryPolicy:
        """What the memory keeps."""
        return self._replay.policy

    def check(self, *, classes: int) -> None:
        """The memory must have room for one sample of each class."""
        self._replay.check(classes=classes)

    def init_state(self, network: Network) -> State:
        """An empty memory, and every weight and buffer as it is before the run.

        What the memory keeps is drawn before an experience has a moment, in ``pool``: so the seed is noted here,
        while torch's is that of the network's first weights.
        """
        weights = {} if self.restart == "never" else network.state_dict()
        blank = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return {**self.policy.empty(), "blank": blank, "grown": (), "seed": torch.initial_seed()}

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """The memory as it will be after this experience, and nothing else."""
        memory = self._renewed(samples, state)
        nothing = samples.subset(torch.empty(0, dtype=torch.long))
        return nothing.extended(memory["x"], memory["y"]), size

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Start over: first weights and buffers, then heads that grow as they did, experience by experience."""
        if self.restart == "never":
            return state
        network.load_state_dict(state["blank"])
        grown = (*state["grown"], context.experience.classes)
        for classes in grown:
            network.grow(classes)
        return {**state, "grown": grown}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Keep the memory that was trained on."""
        return {**state, **self._renewed(context.experience.samples, state)}

    def _renewed(self, samples: Samples, state: State) -> State:
        """The memory with ``samples`` in it: the same for the same state, whoever asks."""
        index = len(state["owner"])  # grows with every experience
        classes = tuple(sorted(set(samples.y.tolist())))
        experience = Experience(index, index + 1, classes, (), (), samples)
        generator = generator_for(state["seed"], self.name, index)
        return self.policy.renewed(state, experience, generator=generator, features=_no_features)


def _no_features(index_N: Tensor) -> Tensor:
    raise AssertionError("a balanced memory asks for no features")
