"""Conversion between clframe's benchmarks and experiences and those of Avalanche."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from clframe.core.types import Experience
from clframe.data.slow_imports import import_avalanche as import_avalanche
from clframe.nn.types import Samples

if TYPE_CHECKING:
    from clframe.data.source import Data


class Streams(Protocol):
    """The attributes of a :class:`~clframe.data.benchmark.Benchmark` that Avalanche's streams are made from.

    A protocol, since benchmark.py imports this module.
    """

    @property
    def train(self) -> tuple[Data, ...]:
        """Training data of each experience, or of each small experience of an online stream."""

    @property
    def original(self) -> tuple[Data, ...]:
        """Training data of each original experience of an online stream."""

    @property
    def test(self) -> tuple[Data, ...]:
        """Test data of each experience."""

    @property
    def validation(self) -> tuple[Data, ...]:
        """Validation data of each experience; empty if there is none."""

    @property
    def task_labels(self) -> bool:
        """Whether experiences have their index as task label."""

    @property
    def online(self) -> Any:
        """Size and boundaries of an online stream; None if every experience is trained on as a whole."""

    def sub_experiences(self, index: int) -> Any:
        """Indices of the small experiences of experience ``index``."""


class PreparedSamples(Dataset[tuple[Tensor, int]]):
    """Samples as a map-style torch dataset with ``targets``, as Avalanche expects."""

    def __init__(self, samples: Data) -> None:
        self.samples = samples
        self.targets = samples.y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples.prepare(self.samples.raw(torch.tensor([index])))[0], self.targets[index]


class _Stored(PreparedSamples):
    """Like :class:`PreparedSamples`, with inputs as stored, for transforms that prepare them one by one."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples.raw(torch.tensor([index]))[0], self.targets[index]


class _Prepare:
    """Transform of one stored input to an input of the model, augmented in training.

    Augmentation draws from torch's global generator, as torchvision's transforms do.
    """

    def __init__(self, samples: Data, *, training: bool) -> None:
        self._samples = samples
        self._training = training

    def __call__(self, raw: Tensor) -> Tensor:
        generator = torch.default_generator if self._training else None
        return self._samples.prepare(raw.unsqueeze(0), generator=generator)[0]


def as_avalanche(benchmark: Streams) -> Any:
    """Convert a benchmark to an Avalanche benchmark with class timelines, and task labels if it has any.

    Streams are ``train``, ``test`` and, with validation data, ``valid``. The stream ``train`` of an online benchmark
    consists of ``OnlineCLExperience``, which are slices of the experiences of ``original_train``.
    """
    import_avalanche()
    from avalanche.benchmarks import (
        CLScenario,
        benchmark_from_datasets,
        with_classes_timeline,
        with_task_labels,
    )

    online = benchmark.online is not None
    whole = {"original_train": benchmark.original} if online else {"train": benchmark.train}
    streams = {**whole, "test": benchmark.test, "valid": benchmark.validation}
    found = benchmark_from_datasets(
        **{
            name: [_dataset(samples, i if benchmark.task_labels else None) for i, samples in enumerate(experiences)]
            for name, experiences in streams.items()
            if experiences
        }
    )

    def decorate(stream: Any) -> Any:
        timed = with_classes_timeline(stream)
        return with_task_labels(timed) if benchmark.task_labels else timed

    decorated = {name: decorate(stream) for name, stream in found.streams.items()}
    if online:
        decorated["train"] = decorate(_split_online(benchmark, decorated["original_train"]))
    return CLScenario(list(decorated.values()))


def _dataset(samples: Data, task_label: int | None) -> Any:
    """Samples with one task label each, 0 without tasks: Avalanche's LwF, GSS and CoPE require task labels."""
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset

    if not samples.augment:
        return _make_taskaware_classification_dataset(PreparedSamples(samples), task_labels=task_label or 0)
    groups = {name: (_Prepare(samples, training=name == "train"), None) for name in ("train", "eval")}
    return _make_taskaware_classification_dataset(
        _Stored(samples), transform_groups=groups, targets=samples.y.tolist(), task_labels=task_label or 0
    )


def _split_online(benchmark: Streams, stream: Any) -> Any:
    """Split the experiences of ``stream`` into the small ones of an online benchmark, by Avalanche's splitter."""
    from avalanche.benchmarks import EagerCLStream, OnlineCLExperience, split_online_stream

    online = benchmark.online
    assert online is not None

    def split(experience: Any, size: int) -> Iterator[Any]:
        index = int(experience.current_experience)
        own = benchmark.sub_experiences(index)
        for i in own:
            yield OnlineCLExperience(
                dataset=_dataset(benchmark.train[i], index if benchmark.task_labels else None),
                origin_experience=experience,
                is_first_subexp=i == own[0],
                is_last_subexp=i == own[-1],  # Avalanche's default is False for it if the sizes divide evenly
                sub_stream_length=len(own),
                access_task_boundaries=online.boundaries,
            )

    return EagerCLStream("train", list(split_online_stream(stream, online.size, experience_split_strategy=split)))


def describe(
    experience: Any,
    *,
    count: int,
    past: tuple[int, ...],
    samples: Samples | None,
    held_out: tuple[Samples, ...] = (),
) -> Experience:
    """Convert an Avalanche experience to the :class:`~clframe.core.types.Experience` that components receive.

    Args:
        experience: Any Avalanche experience whose dataset has targets.
        count: Number of experiences of the stream.
        past: Classes of the experiences trained before.
        samples: Its training data, if it is in memory; None: read from the dataset on first use.
        held_out: Validation data of this experience and of those before it.
    """
    classes = tuple(sorted(classes_in(experience.dataset.targets)))
    ahead = tuple(sorted(int(c) for c in getattr(experience, "future_classes", None) or ()))
    return Experience(
        index=int(experience.current_experience),
        count=count,
        classes=classes,
        past=past,
        ahead=tuple(c for c in ahead if c not in past and c not in classes),
        samples=samples or LazySamples(experience),
        held_out=held_out,
    )


def classes_in(targets: Any) -> set[int]:
    """Classes of the targets of an Avalanche dataset, read from its index if there is one."""
    return {int(c) for c in getattr(targets, "uniques", targets)}


class LazySamples:
    """Samples of any Avalanche experience, read from its dataset when needed."""

    def __init__(self, experience: Any) -> None:
        self._dataset = experience.dataset.eval()

    @property
    def y(self) -> Tensor:
        """targets_N."""
        return torch.tensor([int(c) for c in self._dataset.targets])

    def __len__(self) -> int:
        return len(self._dataset)

    def raw(self, index: Tensor) -> Tensor:
        """Inputs of the dataset at ``index``, with its evaluation transforms applied."""
        if not len(index):  # of an experience that a full buffer has no room for
            nothing: Tensor = self._dataset[0][0][None][:0]
            return nothing
        return torch.stack([self._dataset[i][0] for i in index.tolist()])

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Return the inputs unchanged: the dataset has already transformed them."""
        return raw
