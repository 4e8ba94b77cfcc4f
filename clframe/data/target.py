"""A trained model with the data it is measured on, and batches of those data.

Shape suffixes: B batch, C classes, T tokens, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn

from clframe.data.source import Data
from clframe.data.sources.text import padded
from clframe.errors import ConfigError
from clframe.nn.types import Inputs

IGNORED = -100
"""The target of a token that is not asked for, as in torch's cross-entropy."""


def _itself(batch: Batch) -> Batch:
    return batch


class TextPart:
    """A part of texts as token ids, shortest first so that little is padding.

    Args:
        rows: Token ids of each text.
        y: targets_N; None without labels, as of a language model.
        padding: Its id.
        device: Of batches.
        make: From ids_BT, mask_BT and targets_B to a batch.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        y: Tensor | None,
        *,
        padding: int,
        device: torch.device,
        make: Callable[[Tensor, Tensor, Tensor | None], Batch],
    ) -> None:
        self.rows, self.y, self.padding, self.device, self.make = rows, y, padding, device, make

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """See :class:`~clframe.data.target.Part`."""
        return self.some(spread(len(self), limit), size=size)

    def some(self, index_N: Tensor, *, size: int = 64) -> Batches:
        """The texts at ``index_N``, shortest first.

        They are small and made at once: a language model writes on as it is now, whatever is done to it later.
        """
        order = sorted(index_N.tolist(), key=lambda at: len(self.rows[at]))
        made = [self._made(order[at : at + size]) for at in range(0, len(order), size)]
        return Batches([partial(_itself, batch) for batch in made])

    def _made(self, places: Sequence[int]) -> Batch:
        rows = [self.rows[at] for at in places]
        ids_BT = padded(rows, padding=self.padding).long().to(self.device)
        length_B = torch.tensor([len(row) for row in rows], device=self.device)
        mask_BT = torch.arange(ids_BT.shape[1], device=self.device) < length_B[:, None]
        y_B = None if self.y is None else self.y[torch.tensor(places)].to(self.device)
        return self.make(ids_BT, mask_BT, y_B)


class Batch(NamedTuple):
    """What a model is called with, and what is known of it."""

    inputs: Inputs
    """One tensor, or tensors by the names of the model's arguments."""
    targets: Tensor | None
    """targets_B, or targets_BT of a language model with -100 where nothing is asked; None without labels."""
    tokens: Tensor | Mapping[str, Tensor] | None
    """mask_BT of tokens that count, or one for each kind of tokens by its name; None where all do."""


class Batches(Sequence[Batch]):
    """Batches made one at a time, anew whenever they are asked for.

    Args:
        makers: One for each batch.
    """

    def __init__(self, makers: Sequence[Callable[[], Batch]]) -> None:
        self._makers = tuple(makers)

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, at: int) -> Batch: ...
    @overload
    def __getitem__(self, at: slice) -> Batches: ...
    def __getitem__(self, at: int | slice) -> Batch | Batches:
        """One batch, or some that are made later."""
        return Batches(self._makers[at]) if isinstance(at, slice) else self._makers[at]()


class Part(Protocol):
    """Training, validation or test data of a target."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """All samples, or ``limit`` spread evenly over them, ``size`` at a time."""


class SamplePart:
    """A part over samples of a benchmark.

    Args:
        samples: One after the other.
        place: From prepared inputs to inputs on the model's device, in its type.
        tokens: From inputs to the mask of tokens that count; None where all do.
    """

    def __init__(
        self,
        samples: Sequence[Data],
        *,
        place: Callable[[Tensor], Tensor],
        tokens: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.samples, self.place, self.tokens = tuple(samples), place, tokens

    def __len__(self) -> int:
        return sum(map(len, self.samples))

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """See :class:`Part`."""
        chosen, start, makers = spread(len(self), limit), 0, list[Callable[[], Batch]]()
        for samples in self.samples:
            inside = chosen[(chosen >= start) & (chosen < start + len(samples))] - start
            makers += [partial(self._made, samples, index) for index in inside.split(size) if len(index)]
            start += len(samples)
        return Batches(makers)

    def _made(self, samples: Data, index: Tensor) -> Batch:
        inputs = self.place(samples.prepare(samples.raw(index)))
        targets = samples.y[index.to(samples.y.device)].to(inputs.device)
        return Batch(inputs, targets, None if self.tokens is None else self.tokens(inputs))


def spread(count: int, limit: int | None) -> Tensor:
    """index_N of ``limit`` of ``count`` samples at even distances, of all where there are no more.

    Raises:
        ConfigError: A limit below 1.

    >>> spread(10, 4).tolist(), spread(3, 4).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; give at least 1")
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.arange(limit) * count // limit


Kind = Literal["run", "encoder", "causal", "images"]
PartName = Literal["fit", "validation", "test"]
Answer = Callable[[nn.Module, Inputs], Tensor]


@dataclass(frozen=True, eq=False)
class Parts:
    """Data of a target: to fit on, to choose by, to measure on."""

    fit: Part
    validation: Part | None
    """None where nothing is held out."""
    test: Part


@dataclass(frozen=True, eq=False, kw_only=True)
class Target:
    """A trained model and its data.

    Attributes:
        name: As it was asked for.
        kind: A run; a text encoder or a causal language model of transformers; a model of timm.
        model: In evaluation mode, without gradients.
        body_name: Name of the part inside ``model`` in which feed-forward networks are looked for; empty for all.
        answer: From a model (this one, or one made of it) and the inputs of a batch to scores_BC of its last exit, or
            scores_BTC of the next token; classes of a run in learning order.
        parts: Data.
        run: What ``clframe.load`` gives, for a run.
        config: The run's config, or the one that names the data; None for data without one.
        accuracy_matrix: Of a finished run: accuracy on each experience after each experience.
        experiences: Test data of each experience that a run has learnt, in order; empty for other targets.
    """

    name: str
    kind: Kind
    model: nn.Module
    body_name: str
    answer: Answer
    parts: Parts
    run: Any = None  # clframe.training.trained.TrainedModel | None: training is above data
    config: Any = None  # clframe.config.schema.Config | None
    accuracy_matrix: Sequence[Sequence[float]] | None = None
    experiences: tuple[Part, ...] = ()

    @property
    def body(self) -> nn.Module:
        """The part of the model in which feed-forward networks are looked for."""
        return self.model.get_submodule(self.body_name)

    @property
    def folder(self) -> Path:
        """The folder that :attr:`name` means, where it is one."""
        return Path(self.name).expanduser()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def batches(self, part: PartName, *, size: int = 64, limit: int | None = None) -> Batches:
        """Batches of one part, see :meth:`~clframe.data.target.Part.batches`.

        Raises:
            ConfigError: Validation data where nothing is held out.
        """
        found: Part | None = getattr(self.parts, part)
        if found is None:
            raise ConfigError(f"{self.name}: holds no validation data out; set benchmark.validation=0.1")
        return found.batches(size=size, limit=limit)
