"""Base classes of components with a replay buffer: their options, and how replayed samples join training.

Shape suffixes: B batch, M stored samples, R replayed samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.declarations import options_without_effect
from clframe.core.types import Batch, Pool, State, Step, StepContext
from clframe.errors import ConfigError, UnsupportedError
from clframe.nn.features import feature_reader
from clframe.nn.frozen import first_logits, logits_reader, top_logits_reader
from clframe.nn.network import Network
from clframe.nn.types import Samples
from clframe.replay.buffers import Budget, MemoryPolicy, Selection, add_to_reservoir, sample_indices

Joining = Literal["extra", "fixed", "half", "concatenate"]
"""How replayed samples join training, see :class:`ReplayComponent`."""


def check_memory(component: str, memory: int) -> None:
    """Raise ConfigError for a buffer without room for a sample."""
    if memory < 1:
        raise ConfigError(f"components.{component}.memory: found {memory}; give at least 1 sample")


def check_room(component: str, memory: int, classes: int) -> None:
    """Raise ConfigError for a buffer without room for one sample of each class."""
    if memory < classes:
        raise ConfigError(
            f"components.{component}.memory: found {memory} for {classes} classes; give at least "
            f"{classes}, one sample of each"
        )


def _logits_column(network: Network, samples: Samples) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return a function from index_N to the column ``logits`` of a buffer."""
    read = logits_reader(network, samples)
    return lambda index: {"logits": read(index)}


@dataclass(frozen=True, kw_only=True)
class BufferComponent(Component):
    """Base of components with a replay buffer, whose state is the buffer.

    Args:
        memory: Buffer size in samples: total, or per class.
        budget: ``total`` divides ``memory`` among the classes seen so far, ``per_class`` gives it to each.
        selection: Which samples are stored, see :class:`~clframe.replay.buffers.MemoryPolicy`.

    Raises:
        ConfigError: A size below 1, or a selection without a budget per class.
    """

    keeps_memory: ClassVar[bool] = True
    stores_logits: ClassVar[bool] = False
    """Whether the buffer stores the logits of every exit with each sample, as ``logits``."""

    memory: int = 200
    budget: Budget = "total"
    selection: Selection = "balanced"

    def __post_init__(self) -> None:
        """Validate the options."""
        check_memory(self.name, self.memory)
        if self.budget == "per_class" and self.selection in ("random", "reservoir"):
            raise ConfigError(
                f"components.{self.name}.budget: found per_class with selection {self.selection}, which ignores "
                f"classes; use total, or select balanced or herding"
            )

    @cached_property
    def policy(self) -> MemoryPolicy:
        """Policy that fills the buffer."""
        return MemoryPolicy(self.memory, self.budget, self.selection)

    def check(self, *, classes: int) -> None:
        """Raise ConfigError if a total budget has no room for one sample of each class."""
        if self.budget == "total":
            check_room(self.name, self.memory, classes)

    def init_state(self, network: Network) -> State:
        """Return an empty buffer."""
        return self.policy.empty()

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Trim the buffer, then add samples of this experience."""
        samples = context.experience.samples
        read = top_logits_reader(network, samples) if network.vocabulary else _logits_column(network, samples)
        return self.policy.update(
            state,
            context.experience,
            generator=context.generator,
            features=feature_reader(network, samples),
            targets=read if self.stores_logits else None,
        )


@dataclass(frozen=True, kw_only=True)
class ReplayComponent(BufferComponent):
    """Base of components that train on replayed samples together with new ones.

    Args:
        memory: See :class:`BufferComponent`, as for ``budget`` and ``selection``.
        replay: How replayed samples join training. ``extra``: ``ceil(ratio * B)`` with each batch of B new samples;
            ``fixed``: always ``replayed``; ``half``: batches of half the size, and as many replayed; ``concatenate``:
            epochs over buffer and new data in one shuffled order.
        ratio: With ``extra``, replayed samples per new one.
        replayed: With ``fixed``, replayed samples per batch.
        update: When the buffer admits samples: at the end of an ``experience``, or after every ``step``.
        batches: Whether new samples and every draw pass through the network ``joint``, or ``apart``, each with its own
            batch normalization statistics.

    Raises:
        ConfigError: Invalid sizes, or options that exclude each other.
    """

    slots: ClassVar[frozenset[str]] = frozenset({"batch"})

    replay: Joining = "extra"
    ratio: float = 1.0
    replayed: int = 32
    update: Literal["experience", "step"] = "experience"
    batches: Literal["joint", "apart"] = "joint"

    def __post_init__(self) -> None:
        """Validate the options."""
        super().__post_init__()
        where = f"components.{self.name}"
        if not 0 < self.ratio <= 1000:
            raise ConfigError(f"{where}.ratio: found {self.ratio}; give a number above 0, at most 1000")
        if self.replayed < 1:
            raise ConfigError(f"{where}.replayed: found {self.replayed}; give at least 1 sample")
        if self.update == "step" and self.selection != "reservoir":
            raise ConfigError(
                f"{where}.update: found step with selection {self.selection}, which needs all samples of an "
                f"experience; use selection reservoir, or update experience"
            )
        for option, excluded in (("update", "step"), ("batches", "apart")):
            if self.replay == "concatenate" and getattr(self, option) == excluded:
                raise ConfigError(
                    f"{where}.{option}: found {excluded} with replay concatenate, which mixes buffer and new data "
                    f"before training; use replay extra, fixed or half"
                )

    @property
    def unused_options(self) -> Mapping[str, str]:
        """The number of replayed samples in another form than ``replay`` takes."""
        reason = f"replay is {self.replay}"
        return options_without_effect(
            self, (self.replay == "extra", ["ratio"], reason), (self.replay == "fixed", ["replayed"], reason)
        )

    @property
    def replay_weight(self) -> float:
        """Weight of a replayed sample in the task loss; a new one has weight 1."""
        return 0.0

    @property
    def draws_per_batch(self) -> int:
        """Number of independent draws that join a batch."""
        return 1

    def acts_at(self) -> tuple[str, ...]:
        """Return the hooks that the options need."""
        unused = {"after_experience" if self.update == "step" else "after_step"}
        if self.replay == "concatenate":
            unused.add("make_batch")
        elif self.replay != "half":
            unused.add("training_set")
        return tuple(hook for hook in super().acts_at() if hook not in unused)

    def replay_count(self, size: int) -> int:
        """Number of samples of a draw for ``size`` new ones."""
        if self.replay == "fixed":
            return self.replayed
        ratio = self.ratio if self.replay == "extra" else 1
        return -int(-ratio * size // 1)

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Return buffer and new data, or new data in half batches; the new data alone while the buffer is empty."""
        if self.replay == "half" and (self.update == "step" or state["x"] is not None):
            return samples, -(-size // 2)
        if state["x"] is None or self.replay != "concatenate":
            return samples, size
        return samples.with_stored(state["x"], state["y"]), size

    def make_batch(self, batch: Batch, context: StepContext, state: State, network: Network) -> Batch:
        """Return new samples, then replayed ones, drawn with replacement; the batch itself while the buffer is empty.

        With ``stores_logits``, ``batch.extras`` has the stored logits of the first draw, of a language model with the
        ``tokens`` that they belong to.
        """
        if state["x"] is None:
            return batch
        draws = [self.draw(batch, context, state) for _ in range(self.draws_per_batch)]
        joined = self.join(batch, torch.cat(draws), context, state)
        extras = {}
        for column in ("logits", "tokens") if self.stores_logits else ():
            if column in state:
                extras[column] = state[column].index_select(0, draws[0]).to(batch.x.device)
        parts = (len(batch.x), *map(len, draws)) if self.batches == "apart" else ()
        return replace(joined, extras=extras, parts=parts)

    def at_stored(self, logits: Sequence[Tensor], extras: Mapping[str, Tensor]) -> list[Tensor]:
        """Return, of each exit's logits of replayed samples, those that were stored.

        All of a classifier; of a language model, whose samples are tokens here, the largest ones at the time.
        """
        tokens_RKW = extras.get("tokens")
        if tokens_RKW is None:
            return list(logits)
        return [logits_RV.gather(1, tokens_RKW[:, k].long()) for k, logits_RV in enumerate(logits)]

    def init_state(self, network: Network) -> State:
        """Return an empty buffer.

        Raises:
            UnsupportedError: A language model whose logits were to be stored after every step.
        """
        if self.stores_logits and self.update == "step" and network.vocabulary:
            raise UnsupportedError(
                f"components.{self.name}.update: found step for a language model, whose largest logits are read at the "
                f"end of a domain; use update experience"
            )
        return super().init_state(network)

    def draw(self, batch: Batch, context: StepContext, state: State) -> Tensor:
        """index_R of the stored samples of one draw."""
        return sample_indices(state, self.replay_count(batch.y.shape[0]), generator=context.generator)

    def join(self, batch: Batch, index_R: Tensor, context: StepContext, state: State) -> Batch:
        """Append the stored samples at ``index_R`` to a batch, augmented like new ones."""
        device, size = batch.x.device, batch.y.shape[0]
        raw = state["x"].index_select(0, index_R)
        x = context.experience.samples.prepare(raw, generator=context.generator).to(batch.x)
        y = state["y"].index_select(0, index_R).to(device)
        weight_B = None  # if all weights are 1, the task loss is the plain mean, bit for bit
        if self.replay_weight != 1:
            weight_B = torch.ones(size + y.shape[0], device=device)
            weight_B[size:] = self.replay_weight
        return replace(batch, x=torch.cat([batch.x, x]), y=torch.cat([batch.y, y]), weight_B=weight_B)

    def after_step(self, network: Network, step: Step, state: State) -> State:
        """Offer the new samples of a step to the reservoir, with the logits that the step computed if it stores any.

        Tensors of ``state`` may be written in place.
        """
        raw, y_N = self.new_samples(step.batch)
        columns = first_logits(step.output, len(y_N)) if self.stores_logits else {}
        return add_to_reservoir(
            state, {"x": raw, "y": y_N, **columns}, self.memory, generator=step.context.generator
        )

    def new_samples(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the inputs of a batch's new samples as stored, and their targets.

        Raises:
            UnsupportedError: The loader does not provide inputs as stored.
        """
        if batch.stored is None:
            raise UnsupportedError(
                f"components.{self.name}.update: found step, but the loader in use gives no stored inputs; serve the "
                f"data through benchmark=, without plugins that change it, or use update experience"
            )
        raw = batch.stored()
        return raw, batch.y[: len(raw)]
