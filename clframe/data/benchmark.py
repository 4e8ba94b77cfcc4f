"""Benchmarks: data split into experiences, for clframe's loader and for Avalanche."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from clframe.data.digests import StreamDigest, digest_stream
from clframe.data.inputs import InputFormat
from clframe.data.lazy import DatasetSamples
from clframe.data.protocol import class_order, classes_per_experience
from clframe.data.samples import TensorSamples
from clframe.data.source import Data, Source
from clframe.errors import ConfigError, DataError
from clframe.options import convert_argument, require_count

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Online:
    """Options of an online training stream: many small experiences, evaluated after each original experience."""

    size: int
    """Samples per small experience; the last one of an original experience may be smaller."""
    boundaries: bool
    """Whether the boundaries of the original experiences are visible to the learner."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Experiences over one source.

    Labels are in learning order: class 0 is learned first, and ``class_order[c]`` is the id of class c in the data
    set.
    """

    name: str
    class_order: tuple[int, ...]
    classes: tuple[tuple[int, ...], ...]
    """Classes of each experience, in learning order."""
    train: tuple[Data, ...]
    """Training data in order: one entry per experience, or one per small experience of an online stream."""
    test: tuple[Data, ...]
    input_shape: tuple[int, ...] = field(default=())
    validation: tuple[Data, ...] = ()
    """Training data held out of each experience; empty if there is none."""
    domains: tuple[str, ...] = ()
    """Name of each experience's domain; empty if all experiences use the data as stored."""
    task_labels: bool = False
    """Whether Avalanche's experiences have their index as task label, for models with one head per task."""
    evaluate: Literal["test", "validation"] = "test"
    """The data that a run is evaluated on."""
    online: Online | None = None
    """None if every experience is trained on as a whole."""
    original: tuple[Data, ...] = ()
    """For an online stream: the data of each original experience, in the order of the stream."""
    class_names: tuple[str, ...] = ()
    """Name of each class, by its id in the data set; empty if unknown."""
    inputs: InputFormat = field(default_factory=InputFormat)
    """Conversion of files to inputs."""
    vocabulary: int = 0
    """Token ids of text for a language model, whose classes are the domains; 0 for other data."""
    tokenizer: str = ""
    """Content of the ``tokenizer.json`` that encoded the text."""

    def __post_init__(self) -> None:
        """Raise an error for streams that do not fit the experiences, and for options that have no effect.

        Raises:
            DataError: Numbers of experiences, classes or names that differ, or labels of no class.
            ConfigError: Fields of another type, evaluation data that are not there, or task labels that reveal
                boundaries.
        """
        for name, kind in (("evaluate", Literal["test", "validation"]), ("task_labels", bool)):
            convert_argument(getattr(self, name), kind, where=f"benchmark.{name}")
        self._check_streams()
        if self.evaluate == "validation" and not self.validation:
            raise ConfigError(
                "benchmark.evaluate: found 'validation' without validation data; set benchmark.validation=0.1"
            )
        if self.task_labels and self.online is not None and not self.online.boundaries:
            raise ConfigError(
                "benchmark.protocol: found task labels on an online stream without boundaries; "
                "use 'class_incremental' or set benchmark.boundaries=true"
            )

    def _check_streams(self) -> None:
        """Refuse streams of other lengths than the experiences, and labels and names that no class has (DataError)."""
        where, count, classes = f"benchmark {self.name}", len(self), len(self.class_order)
        for name in ("train", "test", "validation", "domains"):
            given = getattr(self, name)
            sliced = name == "train" and self.online is not None
            if len(given) != count and not sliced and not (name in ("validation", "domains") and not len(given)):
                raise DataError(
                    f"{where}: found {len(given)} entries of {name} for {count} experiences; give one for each"
                )
        for part in (*self.train, *self.test, *self.validation):
            if not isinstance(part, (TensorSamples, DatasetSamples)):
                raise DataError(f"{where}: found a {type(part).__name__} as samples; give TensorSamples")
            on_host = part.y.device.type == "cpu"  # copies on a device were checked before
            if len(part) and on_host and not 0 <= int(part.y.min()) <= int(part.y.max()) < classes:
                raise DataError(
                    f"{where}: found labels from {int(part.y.min())} to {int(part.y.max())} for {classes} classes; "
                    f"give labels in learning order, 0..{classes - 1}"
                )
        if any(not 0 <= c < classes for brought in self.classes for c in brought):
            raise DataError(
                f"{where}: found an experience with a class outside 0..{classes - 1}; number them in learning order"
            )
        if self.class_names and len(self.class_names) <= max(self.class_order, default=-1):
            raise DataError(
                f"{where}: found {len(self.class_names)} class names for class ids up to {max(self.class_order)}; give "
                f"one for each id"
            )

    def __len__(self) -> int:
        return len(self.classes)

    def first_experiences(self, count: int) -> Benchmark:
        """Return the benchmark cut off after ``count`` experiences; its numbers and names of classes are unchanged.

        Raises:
            ConfigError: ``count`` is not a whole number, or below 1.
        """
        require_count(count, least=1, where="benchmark.first_experiences")
        if count >= len(self):
            return self
        parts = self.sub_experiences(count - 1).stop
        return replace(
            self, classes=self.classes[:count], train=self.train[:parts], test=self.test[:count],
            validation=self.validation[:count], domains=self.domains[:count], original=self.original[:count],
        )  # fmt: skip

    def sub_experiences(self, experience: int) -> range:
        """Indices into :attr:`train` of the parts of experience ``experience``; models are evaluated after the last."""
        if self.online is None:
            return range(experience, experience + 1)
        counts = [-(-len(samples) // self.online.size) for samples in self.original[: experience + 1]]
        return range(sum(counts[:-1]), sum(counts))

    def slice_online(self, wholes: Sequence[Data], online: Online) -> Benchmark:
        """Return an online benchmark that slices ``wholes`` in order, without copying tensors.

        Args:
            wholes: Samples of each original experience, in the order of the stream.
            online: Size of the slices and visibility of the boundaries.
        """
        train = tuple(
            _slice(samples, start, start + online.size)
            for samples in wholes
            for start in range(0, len(samples), online.size)
        )
        return replace(self, train=train, original=tuple(wholes), online=online)

    def title(self, experience: int) -> str:
        """Title of an experience: its domain, or its classes by their ids in the data set."""
        if self.domains:
            return self.domains[experience]
        if self.vocabulary:
            return ", ".join(self.class_names[self.class_order[c]] for c in self.classes[experience])
        return f"classes {' '.join(str(self.class_order[c]) for c in self.classes[experience])}"

    @property
    def evaluation(self) -> tuple[Data, ...]:
        """The samples of :attr:`evaluate`, one entry per experience."""
        return self.test if self.evaluate == "test" else self.validation

    @property
    def evaluation_stream(self) -> Any:
        """The Avalanche stream of :attr:`evaluation`."""
        return self.avalanche.streams["test" if self.evaluate == "test" else "valid"]

    @cached_property
    def avalanche(self) -> Any:
        """The benchmark as an Avalanche benchmark with class timelines.

        Streams: ``train``, ``test``; ``valid`` with validation data; ``original_train`` if online.
        """
        from clframe.data.avalanche import as_avalanche

        return as_avalanche(self)

    @cached_property
    def digest(self) -> StreamDigest:
        """Identity of the samples, with the training samples of the original experiences of an online stream."""
        return digest_stream(self.original or self.train, self.validation, self.test, inputs=self.inputs)

    def to(self, device: torch.device | str) -> Benchmark:
        """Return the benchmark with all samples on ``device``."""
        moved = replace(self, test=_move_all(self.test, device), validation=_move_all(self.validation, device))
        if self.online is not None:
            # Slices are views: moving the originals and slicing again keeps one copy of each sample.
            return moved.slice_online(_move_all(self.original, device), self.online)
        return replace(moved, train=_move_all(self.train, device))


def class_incremental(
    source: Source,
    *,
    experiences: int,
    first: int | None = None,
    counts: Sequence[int] = (),
    order: str | Sequence[int] = "seeded",
    seed: int = 0,
    validation: float = 0.0,
    task_labels: bool = False,
) -> Benchmark:
    """Split a source by class.

    Args:
        source: The data.
        experiences: Number of experiences; the first ones get the remainder of the division.
        first: Classes of the first experience, see :func:`~clframe.data.protocol.classes_per_experience`.
        counts: Classes of each experience; overrides ``experiences``.
        order: See :func:`~clframe.data.protocol.class_order`.
        seed: Seed of the class order and of the validation split.
        validation: Fraction of each class's training samples that is held out.
        task_labels: Task-incremental: the same data, with the index of the experience as task label.

    Raises:
        ConfigError: An argument of another type, or that does not fit the number of classes.
        DataError: Something else than a source, or test inputs of another shape than training inputs.
    """
    if not isinstance(source, Source):
        raise DataError(f"class_incremental: found a {type(source).__name__}; give a Source")
    seed = convert_argument(seed, int, where="class_incremental: seed")
    counts = convert_argument(counts, tuple[int, ...] | None, where="benchmark.counts") or ()
    source.check_test()
    ordered = class_order(source.classes, order=order, seed=seed)
    rank = torch.empty(source.classes, dtype=torch.long)
    rank[torch.tensor(ordered)] = torch.arange(source.classes)
    sizes = classes_per_experience(source.classes, experiences, first=first, counts=counts)
    if not counts and len(set(sizes[first is not None :])) > 1:
        total = " + ".join(map(str, sizes))
        _log.info("%s: %d classes in %d experiences = %s", source.name, source.classes, len(sizes), total)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    classes = tuple(tuple(range(end - n, end)) for end, n in zip(ends, sizes, strict=True))

    def split(samples: Data) -> tuple[Data, ...]:
        ranked = replace(samples, y=rank[samples.y])
        return tuple(ranked.subset(_indices_of(ranked.y, c)) for c in classes)

    train, held_out = source.hold_out(validation, seed=seed)
    return Benchmark(
        name=source.name,
        class_order=ordered,
        classes=classes,
        train=split(train),
        test=split(source.test),
        input_shape=source.input_shape,
        validation=() if held_out is None else split(held_out),
        task_labels=task_labels,
        class_names=source.class_names,
        inputs=source.inputs,
        vocabulary=source.vocabulary,
        tokenizer=source.tokenizer,
    )


def _slice(samples: Data, start: int, stop: int) -> Data:
    """Samples ``start`` to ``stop``: a view of samples in memory."""
    if isinstance(samples, TensorSamples):
        return replace(samples, x=samples.x[start:stop], y=samples.y[start:stop])
    return samples.subset(torch.arange(start, min(stop, len(samples))))


def _move_all(experiences: Sequence[Data], device: torch.device | str) -> tuple[Data, ...]:
    """Move the samples of all experiences to ``device``.

    The experiences of a domain-incremental stream are views of the same tensors, which are copied only once.
    """
    moved: list[Data] = []
    for samples in experiences:
        twin = next((new for old, new in zip(experiences, moved, strict=False) if _share_memory(old, samples)), None)
        moved.append(samples.to(device) if twin is None else replace(twin, view=samples.view))
    return tuple(moved)


def _share_memory(one: Data, other: Data) -> bool:
    if isinstance(one, TensorSamples) and isinstance(other, TensorSamples):
        return one.x is other.x and one.y is other.y
    return False


def _indices_of(y_N: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(y_N, torch.tensor(classes)).nonzero().flatten()
