"""A trained model with its data, and batches of these data.

Shape suffixes: B batch, C classes, T tokens, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
from torch import Tensor, nn

from clframe.data.source import Data
from clframe.data.sources.text import pad_ids
from clframe.errors import ConfigError
from clframe.nn.types import Inputs

IGNORED = -100
"""Target of a token without a label, as in torch's cross-entropy."""


def _identity(batch: Batch) -> Batch:
    return batch


class TextSplit:
    """Texts as token ids, batched in order of length so that there is little padding.

    Args:
        rows: Token ids of each text.
        y: One number of each text that ``make`` receives: its target, or the number of ids of a language model's window
            that only are context; None without.
        padding: Id of the padding token.
        device: Device of the batches.
        make: Function from ids_BT, mask_BT and y_B to a batch.
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
        """See :class:`~clframe.data.target.DataSplit`."""
        return self.batches_at(strided_indices(len(self), limit), size=size)

    def batches_at(self, index_N: Tensor, *, size: int = 64) -> Batches:
        """Batches of the texts at ``index_N``, shortest first.

        All batches are made immediately: those of a generating language model contain what the model generates now,
        independent of later changes of it.
        """
        order = sorted(index_N.tolist(), key=lambda at: len(self.rows[at]))
        made = [self._make_batch(order[at : at + size]) for at in range(0, len(order), size)]
        return Batches([partial(_identity, batch) for batch in made])

    def _make_batch(self, index: Sequence[int]) -> Batch:
        rows = [self.rows[at] for at in index]
        ids_BT = pad_ids(rows, padding=self.padding).long().to(self.device)
        length_B = torch.tensor([len(row) for row in rows], device=self.device)
        mask_BT = torch.arange(ids_BT.shape[1], device=self.device) < length_B[:, None]
        y_B = None if self.y is None else self.y[torch.tensor(index)].to(self.device)
        return self.make(ids_BT, mask_BT, y_B)


class Batch(NamedTuple):
    """Inputs, targets and token masks."""

    inputs: Inputs
    """One tensor, or tensors by the names of the model's arguments."""
    targets: Tensor | None
    """targets_B, or targets_BT of a language model with -100 for tokens without a label; None without labels."""
    tokens: Tensor | Mapping[str, Tensor] | None
    """mask_BT of the tokens to measure, or one mask per kind of token by name; None: all tokens."""


class Batches(Sequence[Batch]):
    """Sequence of batches that are made on access.

    Args:
        makers: One function per batch.
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
        """One batch, or a lazy subsequence."""
        return Batches(self._makers[at]) if isinstance(at, slice) else self._makers[at]()


class DataSplit(Protocol):
    """Training, validation or test data of a target."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """Batches of ``size`` samples over all samples, or over ``limit`` samples at equal distances."""


class SampleSplit:
    """Samples of the experiences of a benchmark.

    Args:
        samples: Samples of each experience, in order.
        place: Function that moves prepared inputs to the model's device and dtype.
        tokens: Function from inputs to the mask of the tokens to measure; None: all tokens.
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
        """See :class:`DataSplit`."""
        chosen, start, makers = strided_indices(len(self), limit), 0, list[Callable[[], Batch]]()
        for samples in self.samples:
            inside = chosen[(chosen >= start) & (chosen < start + len(samples))] - start
            makers += [partial(self._make_batch, samples, index) for index in inside.split(size) if len(index)]
            start += len(samples)
        return Batches(makers)

    def _make_batch(self, samples: Data, index: Tensor) -> Batch:
        inputs = self.place(samples.prepare(samples.raw(index)))
        targets = samples.y[index.to(samples.y.device)].to(inputs.device)
        return Batch(inputs, targets, None if self.tokens is None else self.tokens(inputs))


def strided_indices(count: int, limit: int | None) -> Tensor:
    """Indices of ``limit`` of ``count`` samples at equal distances; all indices if ``limit`` is None or larger.

    Raises:
        ConfigError: A limit below 1.

    >>> strided_indices(10, 4).tolist(), strided_indices(3, 4).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; give at least 1")
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.arange(limit) * count // limit


Kind = Literal["run", "encoder", "causal", "images"]
SplitName = Literal["fit", "validation", "test"]
ScoreFunction = Callable[[nn.Module, Inputs], Tensor]
LogitsFunction = Callable[[nn.Module, Inputs, Tensor], Tensor]
"""From a language model, inputs and a mask of positions where_BT to the logits_NV of these positions."""


@dataclass(frozen=True, eq=False)
class DataSplits:
    """Training, validation and test data of a target."""

    fit: DataSplit
    validation: DataSplit | None
    """None if nothing is held out."""
    test: DataSplit


@dataclass(frozen=True, eq=False, kw_only=True)
class Target:
    """A trained model and its data.

    Attributes:
        name: Folder or hub id given by the user.
        kind: A run; a text encoder or a causal language model of transformers; a model of timm.
        model: The model, in evaluation mode and without gradients.
        body_name: Name of the submodule that is searched for feed-forward networks; empty for the whole model.
        predict: Function from a model (this one or a modified copy) and the inputs of a batch to scores_BC of its last
            exit, or scores_BTC of the next token; classes of a run are in learning order.
        splits: The data.
        logits_at: Logits of chosen positions of a language model, without the others; None for other models.
        domains: Texts of each of several files by name, of a language model.
        run: Result of ``clframe.load`` for a run.
        config: Config of the run or of the data; None for data without one.
        accuracy_matrix: Accuracy on each experience after each experience, of a finished run.
        experiences: Test data of each experience that a run has learned, in order; empty for other targets.
        origin: Identity of the model and its data, for names and contents of result files: ``model`` (full path or hub
            id), ``revision`` and ``data``.
    """

    name: str
    kind: Kind
    model: nn.Module
    body_name: str
    predict: ScoreFunction
    splits: DataSplits
    logits_at: LogitsFunction | None = None
    domains: Mapping[str, DataSplit] = field(default_factory=dict)
    run: Any = None  # clframe.training.trained.TrainedModel | None: training is above data
    config: Any = None  # clframe.config.schema.Config | None
    accuracy_matrix: Sequence[Sequence[float]] | None = None
    experiences: tuple[DataSplit, ...] = ()
    origin: Mapping[str, Any] = field(default_factory=dict)

    @property
    def body(self) -> nn.Module:
        """The submodule that is searched for feed-forward networks."""
        return self.model.get_submodule(self.body_name)

    @property
    def folder(self) -> Path:
        """:attr:`name` as a folder."""
        return Path(self.name).expanduser()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device

    def batches(self, part: SplitName, *, size: int = 64, limit: int | None = None) -> Batches:
        """Batches of one split, see :meth:`~clframe.data.target.DataSplit.batches`.

        Raises:
            ConfigError: Validation data of a target without any.
        """
        found: DataSplit | None = getattr(self.splits, part)
        if found is None:
            raise ConfigError(f"{self.name}: found no validation data; set benchmark.validation=0.1")
        return found.batches(size=size, limit=limit)
