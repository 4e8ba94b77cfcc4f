"""Benchmarks: data split into experiences, for clframe's own loader and for Avalanche alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from clframe.data.protocol import class_order, deal
from clframe.data.samples import TensorSamples
from clframe.data.source import Data, Source
from clframe.errors import ConfigError

_log = logging.getLogger(__name__)

@dataclass(frozen=True)
class Online:
    """A training stream of many small experiences; evaluation comes after each of the original ones."""

    size: int
    """Samples of a small experience; the last one of an original experience may be smaller."""
    boundaries: bool
    """Whether the learner is told where an original experience begins and ends."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Experiences over one source, labels in learning order.

    Inside, class 0 is the class learnt first; ``class_order[c]`` is its id in the data set.
    """

    name: str
    class_order: tuple[int, ...]
    classes: tuple[tuple[int, ...], ...]
    """Classes of each experience, in learning order."""
    train: tuple[Data, ...]
    """What is trained on, one after the other: one for each experience, or many small ones where online."""
    test: tuple[Data, ...]
    input_shape: tuple[int, ...] = field(default=())
    validation: tuple[Data, ...] = ()
    """Training data held out of each experience; empty where none is."""
    domains: tuple[str, ...] = ()
    """How each experience sees the data, in words; empty where all see it as stored."""
    task_labels: bool = False
    """Whether Avalanche's experiences carry their number as task label, for models with a head for each."""
    evaluate: Literal["test", "validation"] = "test"
    """The data that a run is evaluated on."""
    online: Online | None = None
    """None where every experience is trained on as a whole."""
    original: tuple[Data, ...] = ()
    """What ``train`` is cut from where it is online: the data of each experience, in the order it comes."""

    def __post_init__(self) -> None:
        """Refuse what cannot be evaluated or labeled."""
        if self.evaluate == "validation" and not self.validation:
            raise ConfigError(
                "benchmark.evaluate: found 'validation', but nothing held out; set benchmark.validation=0.1"
            )
        if self.task_labels and self.online is not None and not self.online.boundaries:
            raise ConfigError(
                "benchmark.protocol: task labels tell the boundaries that this online stream hides; "
                "take 'class_incremental' or set benchmark.boundaries=true"
            )

    def __len__(self) -> int:
        return len(self.classes)

    def parts_of(self, experience: int) -> range:
        """Which entries of :attr:`train` belong to experience ``experience``, after which models are evaluated."""
        if self.online is None:
            return range(experience, experience + 1)
        counts = [-(-len(samples) // self.online.size) for samples in self.original[: experience + 1]]
        return range(sum(counts[:-1]), sum(counts))

    def cut(self, wholes: Sequence[Data], online: Online) -> Benchmark:
        """An online benchmark whose experiences are ``wholes``, cut in their order; they share their memory."""
        train = tuple(
            _slice(samples, start, start + online.size)
            for samples in wholes
            for start in range(0, len(samples), online.size)
        )
        return replace(self, train=train, original=tuple(wholes), online=online)

    def title(self, experience: int) -> str:
        """What experience ``experience`` brings: its domain, or its classes by their ids in the data set."""
        if self.domains:
            return self.domains[experience]
        return f"classes {' '.join(str(self.class_order[c]) for c in self.classes[experience])}"

    @property
    def evaluation(self) -> tuple[Data, ...]:
        """The samples that a run is evaluated on."""
        return self.test if self.evaluate == "test" else self.validation

    @property
    def evaluation_stream(self) -> Any:
        """Avalanche's stream of :attr:`evaluation`."""
        return self.avalanche.streams["test" if self.evaluate == "test" else "valid"]

    @cached_property
    def avalanche(self) -> Any:
        """The same as an Avalanche benchmark with class timelines.

        Its streams are ``train``, ``test`` and, where there are such data, ``valid`` and ``original_train``.
        """
        from clframe.data.avalanche import as_avalanche

        return as_avalanche(self)

    def to(self, device: torch.device | str) -> Benchmark:
        """The benchmark with all samples on ``device``."""
        held = replace(self, test=_moved(self.test, device), validation=_moved(self.validation, device))
        if self.online is not None:
            return held.cut(_moved(self.original, device), self.online)
        return replace(held, train=_moved(self.train, device))


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
    """Split a source by class, no class dropped.

    Args:
        source: The data.
        experiences: How many; leftover classes go to the earliest ones.
        first: Classes of the first experience, where it is larger; see :func:`~clframe.data.protocol.deal`.
        counts: Classes of each experience; takes the place of ``experiences``.
        order: See :func:`~clframe.data.protocol.class_order`.
        seed: Of the order and of the validation data.
        validation: Share of each class's training samples that is held out.
        task_labels: Task-incremental: the same data, every experience labeled with its number.
    """
    learnt = class_order(source.classes, order=order, seed=seed)
    rank = torch.empty(source.classes, dtype=torch.long)
    rank[torch.tensor(learnt)] = torch.arange(source.classes)
    dealt = deal(source.classes, experiences, first=first, counts=counts)
    if not counts and len(set(dealt[first is not None :])) > 1:
        shown = " + ".join(map(str, dealt))
        _log.info("%s: %d classes in %d experiences = %s", source.name, source.classes, len(dealt), shown)
    ends = [sum(dealt[: i + 1]) for i in range(len(dealt))]
    classes = tuple(tuple(range(end - n, end)) for end, n in zip(ends, dealt, strict=True))

    def split(samples: Data) -> tuple[Data, ...]:
        ranked = replace(samples, y=rank[samples.y])
        return tuple(ranked.subset(_members(ranked.y, c)) for c in classes)

    train, held = source.hold_out(validation, seed=seed)
    return Benchmark(
        name=source.name,
        class_order=learnt,
        classes=classes,
        train=split(train),
        test=split(source.test),
        input_shape=source.input_shape,
        validation=() if held is None else split(held),
        task_labels=task_labels,
    )


def _slice(samples: Data, start: int, stop: int) -> Data:
    """Samples ``start`` to ``stop``, which share the memory of all where it is a tensor."""
    if isinstance(samples, TensorSamples):
        return replace(samples, x=samples.x[start:stop], y=samples.y[start:stop])
    return samples.subset(torch.arange(start, min(stop, len(samples))))


def _moved(parts: Sequence[Data], device: torch.device | str) -> tuple[Data, ...]:
    """All parts on ``device``; domains that see the same tensors go on to share them there."""
    moved: list[Data] = []
    for part in parts:
        twin = next((new for old, new in zip(parts, moved, strict=False) if _share_memory(old, part)), None)
        moved.append(part.to(device) if twin is None else replace(twin, view=part.view))
    return tuple(moved)


def _share_memory(one: Data, other: Data) -> bool:
    if isinstance(one, TensorSamples) and isinstance(other, TensorSamples):
        return one.x is other.x and one.y is other.y
    return False


def _members(y_N: Tensor, classes: Sequence[int]) -> Tensor:
    return torch.isin(y_N, torch.tensor(classes)).nonzero().flatten()
