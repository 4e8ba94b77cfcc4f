"""A-GEM: steps that do not raise the loss on the past."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.losses import cross_entropy, project_gradient
from clframe.nn.features import feature_reader
from clframe.nn.frozen import forward_aside
from clframe.nn.network import Network
from clframe.replay.buffers import Budget, Selection, drawn
from clframe.replay.joining import Replay


@dataclass(frozen=True, kw_only=True)
class AGEM(Component):
    """Averaged gradient episodic memory (A-GEM): a step may not raise the loss on samples of the past.

    Where the gradient g and that of a batch of memory r disagree, ``g . r < 0``, it becomes
    ``g - (g . r / r . r) r``. The reference loss is the cross-entropy at all exits with the weights they have in
    training. Meant for one pass over the data with task labels; where classes have to be told apart across
    experiences, replay is far stronger. Costs a forward and a backward pass of ``sample`` per step and a gradient
    in memory. Chaudhry et al., "Efficient Lifelong Learning with A-GEM" (2019).

    Statistics of batch normalization are left alone by the reference batch.

    Args:
        memory: Samples kept: in all, or of each class.
        budget: What ``memory`` counts; see ``er``.
        selection: Which samples are kept, see ``er``; ``random`` keeps as many of each experience, as published.
        sample: Samples of the reference batch, drawn anew in each step; published values go up to 1300.
    """

    name: ClassVar[str] = "agem"
    slots: ClassVar[frozenset[str]] = frozenset({"gradient"})
    keeps_memory: ClassVar[bool] = True

    memory: int = 200
    budget: Budget = "total"
    selection: Selection = "random"
    sample: int = 64

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        if self.sample < 1:
            raise ConfigError(f"components.{self.name}.sample: found {self.sample}; give at least 1 sample")
        _ = self._replay  # made now, it refuses sizes now

    @cached_property
    def _replay(self) -> Replay:
        return Replay(owner=self.name, memory=self.memory, budget=self.budget, selection=self.selection)

    def check(self, *, classes: int) -> None:
        """The memory must have room for one sample of each class."""
        self._replay.check(classes=classes)

    def init_state(self, network: Network) -> State:
        """An empty memory."""
        return self._replay.empty()

    def modify_gradients(self, network: Network, step: Step, state: State) -> None:
        """Project the gradient where it disagrees with that of a batch of memory."""
        if state["x"] is None:
            return
        index_R = drawn(state, self.sample, generator=step.context.generator)
        raw, like = state["x"].index_select(0, index_R), step.batch.x
        x = step.context.experience.samples.prepare(raw, generator=step.context.generator).to(like.device, like.dtype)
        y_R = state["y"].index_select(0, index_R).to(like.device)
        parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
        loss_K = cross_entropy(forward_aside(network, x).logits, y_R)
        if step.weight_K is not None:
            loss_K = loss_K * step.weight_K
        references = torch.autograd.grad(loss_K.sum(), parameters, allow_unused=True)
        project_gradient([p.grad for p in parameters if p.grad is not None], references)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Make room, then keep samples of this experience."""
        features = feature_reader(network, context.experience.samples)
        return self._replay.renewed(context, state, features=features)
