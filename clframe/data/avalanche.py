"""The bridge to Avalanche's benchmarks, in both directions."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clframe.core.types import Experience, Samples
from clframe.data.samples import TensorSamples

if TYPE_CHECKING:
    from clframe.data.benchmark import Benchmark


def import_avalanche() -> None:
    """Import Avalanche without what it and its dependencies print and warn about on import.

    GPUtil, qpsolvers and a few others warn about themselves; none of it concerns a user of clframe.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        import avalanche.training  # noqa: F401


class PreparedSamples(Dataset[tuple[Tensor, int]]):
    """In-memory samples as a map-style torch dataset with ``targets``, as Avalanche wants them."""

    def __init__(self, samples: TensorSamples) -> None:
        self.samples = samples
        self.targets = samples.y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.samples.prepare(self.samples.x[index : index + 1])[0], self.targets[index]


def as_avalanche(benchmark: Benchmark) -> Any:
    """The benchmark as Avalanche sees it: streams ``train`` and ``test`` with class timelines."""
    import_avalanche()
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
    from avalanche.benchmarks.utils import as_classification_dataset

    def convert(parts: tuple[TensorSamples, ...]) -> list[Any]:
        return [as_classification_dataset(PreparedSamples(part)) for part in parts]

    return with_classes_timeline(
        benchmark_from_datasets(train=convert(benchmark.train), test=convert(benchmark.test))
    )


def describe(experience: Any, *, count: int, past: tuple[int, ...], samples: Samples | None) -> Experience:
    """An Avalanche experience as components see it.

    Args:
        experience: Any Avalanche experience with a dataset and targets.
        count: Experiences in the stream.
        past: Classes of the experiences trained before.
        samples: Its training data where it is already in memory; None stacks the dataset's samples.
    """
    targets = experience.dataset.targets
    classes = tuple(sorted({int(c) for c in targets}))
    ahead = tuple(sorted(int(c) for c in getattr(experience, "future_classes", None) or ()))
    return Experience(
        index=int(experience.current_experience),
        count=count,
        classes=classes,
        past=past,
        ahead=tuple(c for c in ahead if c not in past and c not in classes),
        samples=samples or LazySamples(experience),
    )


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

    def prepare(self, raw: Tensor) -> Tensor:
        """The inputs unchanged: the dataset has already transformed them."""
        return raw
