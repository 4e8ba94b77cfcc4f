"""The bridge to Avalanche's benchmarks, in both directions."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from clframe.core.types import Experience
from clframe.nn.types import Samples

if TYPE_CHECKING:
    from clframe.data.source import Data


class Streams(Protocol):
    """The part of a :class:`~clframe.data.benchmark.Benchmark` that Avalanche's streams are made from."""

    @property
    def train(self) -> tuple[Data, ...]:
        """Training data of each experience, or of each small one of an online stream."""

    @property
    def original(self) -> tuple[Data, ...]:
        """Training data of each experience that an online stream is cut from."""

    @property
    def test(self) -> tuple[Data, ...]:
        """Test data of each experience."""

    @property
    def validation(self) -> tuple[Data, ...]:
        """Validation data of each experience; empty where none is held out."""

    @property
    def task_labels(self) -> bool:
        """Whether experiences carry their index as task label."""

    @property
    def online(self) -> Any:
        """Size and boundaries of an online stream; None where every experience is trained as a whole."""

    def parts_of(self, index: int) -> Any:
        """Indices of the small experiences that experience ``index`` is cut into."""


def import_avalanche() -> None:
    """Import Avalanche without what it and its dependencies print and warn about on import.

    GPUtil, qpsolvers and a few others warn about themselves; none of it concerns a user of clframe.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import avalanche.training  # noqa: F401


class PreparedSamples(Dataset[tuple[Tensor, int]]):
    """Samples as a map-style torch dataset with ``targets``, as Avalanche wants them."""

    def __init__(self, samples: Data) -> None:
        self.samples = samples
        self.targets = samples.y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples.prepare(self.samples.raw(torch.tensor([index])))[0], self.targets[index]


class _Stored(PreparedSamples):
    """The same with inputs as stored, for transforms that prepare them one by one."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples.raw(torch.tensor([index]))[0], self.targets[index]


class _Prepare:
    """A transform: one stored input as the model wants it, where it is trained on augmented first.

    What augmentation draws comes from torch's global generator, as it does in torchvision's transforms.
    """

    def __init__(self, samples: Data, *, training: bool) -> None:
        self._samples = samples
        self._training = training

    def __call__(self, raw: Tensor) -> Tensor:
        generator = torch.default_generator if self._training else None
        return self._samples.prepare(raw.unsqueeze(0), generator=generator)[0]


def as_avalanche(benchmark: Streams) -> Any:
    """The benchmark as Avalanche sees it, with class timelines, and task labels where it has them.

    Streams are ``train``, ``test`` and, where data is held out, ``valid``. An online benchmark's ``train``
    consists of ``OnlineCLExperience``; what they are cut from is ``original_train``.
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
            name: [_dataset(part, i if benchmark.task_labels else None) for i, part in enumerate(parts)]
            for name, parts in streams.items()
            if parts
        }
    )

    def decorate(stream: Any) -> Any:
        timed = with_classes_timeline(stream)
        return with_task_labels(timed) if benchmark.task_labels else timed

    decorated = {name: decorate(stream) for name, stream in found.streams.items()}
    if online:
        decorated["train"] = decorate(_cut(benchmark, decorated["original_train"]))
    return CLScenario(list(decorated.values()))


def _dataset(samples: Data, task_label: int | None) -> Any:
    """The samples with a task label each, 0 where tasks are not told apart: LwF, GSS and CoPE ask for one."""
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset

    if not samples.augment:
        return _make_taskaware_classification_dataset(PreparedSamples(samples), task_labels=task_label or 0)
    groups = {name: (_Prepare(samples, training=name == "train"), None) for name in ("train", "eval")}
    return _make_taskaware_classification_dataset(
        _Stored(samples), transform_groups=groups, targets=samples.y.tolist(), task_labels=task_label or 0
    )


def _cut(benchmark: Streams, stream: Any) -> Any:
    """The experiences of ``stream`` cut into the benchmark's small ones, by Avalanche's own splitter."""
    from avalanche.benchmarks import EagerCLStream, OnlineCLExperience, split_online_stream

    online = benchmark.online
    assert online is not None
    told = online.boundaries

    def cut(experience: Any, size: int) -> Iterator[Any]:
        index = int(experience.current_experience)
        own = benchmark.parts_of(index)
        for i in own:
            yield OnlineCLExperience(
                dataset=_dataset(benchmark.train[i], index if benchmark.task_labels else None),
                origin_experience=experience,
                is_first_subexp=i == own[0],
                is_last_subexp=i == own[-1],  # Avalanche's default misses it where the sizes divide
                sub_stream_length=len(own),
                access_task_boundaries=told,
            )

    cut_stream = split_online_stream(stream, online.size, experience_split_strategy=cut)
    return EagerCLStream("train", list(cut_stream))


def describe(
    experience: Any,
    *,
    count: int,
    past: tuple[int, ...],
    samples: Samples | None,
    held_out: tuple[Samples, ...] = (),
) -> Experience:
    """An Avalanche experience as components see it.

    Args:
        experience: Any Avalanche experience with a dataset and targets.
        count: Experiences in the stream.
        past: Classes of the experiences trained before.
        samples: Its training data where it is already in memory; None stacks the dataset's samples.
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
    """The classes among an Avalanche dataset's targets, without walking over them where it knows them."""
    return {int(c) for c in getattr(targets, "uniques", targets)}


class LazySamples:
    """Samples of any Avalanche experience, stacked when somebody first asks for inputs."""

    def __init__(self, experience: Any) -> None:
        self._dataset = experience.dataset.eval()
        self._stacked: Tensor | None = None

    @property
    def y(self) -> Tensor:
        """targets_N."""
        return torch.tensor([int(c) for c in self._dataset.targets])

    def __len__(self) -> int:
        return len(self._dataset)

    def raw(self, index: Tensor) -> Tensor:
        """The dataset's inputs at ``index``, with its evaluation transforms applied."""
        return torch.stack([self._dataset[i][0] for i in index.tolist()])

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """The inputs unchanged: the dataset has already transformed them."""
        return raw
