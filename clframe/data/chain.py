"""Streams that go on after their last experience: new data joined to a benchmark, with classes matched by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clframe.data.benchmark import Benchmark
from clframe.data.inputs import InputFormat
from clframe.data.protocol import class_order, classes_per_experience, hold_out
from clframe.data.samples import TensorSamples
from clframe.data.source import Data, Source
from clframe.errors import ConfigError, DataError
from clframe.seeding import generator_for


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Inputs as a run stores and normalizes them; later data of the run have to agree.

    Attributes:
        shape: Shape of one input.
        dtype: Type of the stored inputs, such as ``uint8``; empty if unknown.
        mean: Per channel, as in :class:`~clframe.data.samples.TensorSamples`.
        std: As ``mean``.
        inputs: Conversion of files to inputs; None if unknown.
    """

    shape: tuple[int, ...]
    dtype: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    inputs: InputFormat | None = None

    @classmethod
    def of(cls, benchmark: Benchmark) -> Stored:
        """Describe the inputs of a benchmark, by its first training or test samples."""
        samples = next((part for part in (*benchmark.test, *benchmark.train) if len(part)), benchmark.test[0])
        return cls(
            shape=tuple(benchmark.input_shape), dtype=stored_dtype(samples), mean=tuple(samples.mean),
            std=tuple(samples.std), inputs=benchmark.inputs,
        )  # fmt: skip

    def check(self, source: Source) -> None:
        """Refuse data whose inputs mean something else.

        Raises:
            DataError: Another shape, type or range of values.
        """
        name, shape = source.name, tuple(source.input_shape)
        if shape != self.shape:
            raise DataError(
                f"{name}: found inputs of shape {_format_shape(shape)}, but the run was trained on "
                f"{_format_shape(self.shape)}; convert the data{_conversion(self.shape)}"
            )
        dtype = stored_dtype(source.train)
        if self.dtype and dtype != self.dtype:
            raise DataError(
                f"{name}: found inputs of type {dtype}, but the run was trained on {self.dtype}; convert the data, "
                f"whose values would be normalized wrongly"
            )
        new, old = source.inputs, self.inputs
        if old is None or "array" in (new.kind, old.kind):
            return
        if new.kind == old.kind == "language":
            if old.tokenizer and new.tokenizer != old.tokenizer:
                raise DataError(
                    f"{name}: its text was encoded by another tokenizer than that of the run, whose ids mean other "
                    f"text; restore the run's tokenizer.json or the text that it was trained on"
                )
            return
        for what, found, expected in (
            ("inputs made from", new.kind, old.kind),
            ("images with a largest value of", new.largest, old.largest),
            ("a number of features of", new.n_features, old.n_features),
            ("token ids of", new.tokenizer, old.tokenizer),
        ):
            if found != expected:
                raise DataError(
                    f"{name}: found {what} {found}, but the run was trained on {expected}; convert the data"
                )


def stored_dtype(samples: Data) -> str:
    """Type of the stored inputs, such as ``uint8``; empty without samples."""
    if not len(samples):
        return ""
    one = samples.x if isinstance(samples, TensorSamples) else samples.raw(torch.tensor([0]))
    return str(one.dtype).removeprefix("torch.")


def name_classes(names: Sequence[str], classes: int) -> tuple[str, ...]:
    """Names of ``classes`` classes; their numbers where none are given."""
    return tuple(names) or tuple(map(str, range(classes)))


def match_classes(known: Sequence[str], found: Sequence[str], *, where: str) -> tuple[int, ...]:
    """Number of each class that was found: that of the known class with its name, else the next free one.

    Args:
        known: Names of the known classes, by number.
        found: Names of the classes of new data.
        where: Name of the new data, for messages.

    Raises:
        DataError: A name that differs from a known one only in case, spaces or leading zeros, or numbers where the
            known classes have names.

    >>> match_classes(["cat", "dog"], ["bird", "cat"], where="photos")
    (2, 0)
    """
    numbers = {name: i for i, name in enumerate(known)}
    similar = {_plain(name): name for name in known}
    unnamed = [name for name in found if _is_number(name) and name not in numbers]
    if unnamed and not any(map(_is_number, known)):
        raise DataError(
            f"{where}: found the class '{unnamed[0]}', a number, but the classes of the run have names "
            f"({_list(known)}); give the new classes names"
        )
    for name in found:
        twin = similar.get(_plain(name))
        if name not in numbers and twin is not None:
            raise DataError(
                f"{where}: found the class '{name}', but the run knows '{twin}'; name it '{twin}' if they are the "
                f"same, or give it a name that differs in more than case, spaces or zeros"
            )
        numbers.setdefault(name, len(numbers))
    return tuple(numbers[name] for name in found)


def extend_benchmark(
    benchmark: Benchmark, source: Source, *, experiences: int = 1, first: int | None = None,
    counts: Sequence[int] = (), order: str | Sequence[int] = "sorted", seed: int = 0, validation: float = 0.0,
    stored: Stored | None = None,
) -> Benchmark:  # fmt: skip
    """Append the classes of a source to a benchmark, as further experiences.

    Classes with the name of a known one are that class, with more samples; the others get the next numbers. Held-out
    samples are drawn by these numbers, so the result equals that of one source with all classes.

    Args:
        benchmark: The stream so far.
        source: The new data; inputs are normalized as those of ``benchmark``.
        experiences: Number of further experiences.
        first: As in :func:`~clframe.data.benchmark.class_incremental`, as are the following.
        counts: Classes of each further experience.
        order: Order of the source's classes.
        seed: Seed of the order and of the validation split.
        validation: Fraction of each class's training samples that is held out.
        stored: What the run has stored, where ``benchmark`` has no samples to tell.

    Raises:
        DataError: Inputs, tokenizers or class names that do not fit.
        ConfigError: Validation data on one side only, or another split of the classes than there are.
    """
    stored = stored or Stored.of(benchmark)
    stored.check(source)
    if bool(validation) != bool(benchmark.validation):
        found, wanted = (validation, "0") if validation else (0, "a fraction such as 0.1")
        raise ConfigError(f"benchmark.validation: found {found}, unlike the data before; give {wanted}")
    known = name_classes(benchmark.class_names, len(benchmark.class_order))
    names = name_classes(source.class_names, source.classes)
    ids = match_classes(known, names, where=source.name)
    ordered = class_order(source.classes, order=order, seed=seed)
    learned = (*benchmark.class_order, *(ids[c] for c in ordered if ids[c] >= len(known)))
    rank = torch.empty(len(learned), dtype=torch.long)
    rank[torch.tensor(learned)] = torch.arange(len(learned))
    sizes = classes_per_experience(source.classes, experiences, first=first, counts=counts)
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    classes = tuple(
        tuple(sorted(int(rank[ids[c]]) for c in ordered[end - n : end])) for end, n in zip(ends, sizes, strict=True)
    )

    def split(samples: Data) -> tuple[Data, ...]:
        ranked = replace(samples, y=rank[samples.y])
        return tuple(ranked.subset(torch.isin(ranked.y, torch.tensor(c)).nonzero().flatten()) for c in classes)

    numbered, test = (_renumber(part, ids, stored) for part in (source.train, source.test))
    kept_T, held_V = hold_out(numbered.y, validation, seed=seed)
    train, held_out = numbered, None
    if len(held_V):
        train, held_out = numbered.subset(kept_T), replace(numbered.subset(held_V), augment=())
    all_names = (*known, *(name for name, i in zip(names, ids, strict=True) if i >= len(known)))
    named = bool(benchmark.class_names or source.class_names)
    joined = replace(
        benchmark,
        name=benchmark.name if source.name == benchmark.name else f"{benchmark.name} + {source.name}",
        class_order=learned,
        classes=(*benchmark.classes, *classes),
        train=(*benchmark.train, *split(train)),
        test=(*benchmark.test, *split(test)),
        validation=(*benchmark.validation, *(() if held_out is None else split(held_out))),
        domains=(*benchmark.domains, *((source.name,) * len(classes) if benchmark.domains else ())),
        class_names=all_names if named else (),
        # A stream whose first text is gone has neither.
        vocabulary=benchmark.vocabulary or source.vocabulary,
        tokenizer=benchmark.tokenizer or source.tokenizer,
    )
    if benchmark.online is None:
        return joined
    start = len(benchmark)
    shuffled = [
        part.subset(torch.randperm(len(part), generator=generator_for(seed, "online", start + i)))
        for i, part in enumerate(split(train))
    ]
    return joined.slice_online([*benchmark.original, *shuffled], benchmark.online)


def append_missing(
    benchmark: Benchmark | None, name: str, *, experiences: Sequence[Sequence[int]], class_names: Sequence[str],
    stored: Stored, validation: bool = False, task_labels: bool = False,
) -> Benchmark:  # fmt: skip
    """Append experiences whose data are gone: they have no samples, and are not evaluated.

    Args:
        benchmark: The stream so far; None if it begins with them.
        name: Name of the data.
        experiences: Classes of each experience by number, in learning order.
        class_names: Names of all classes so far; empty if unknown.
        stored: What the run has stored.
        validation: Whether samples were held out, of the first data of a stream.
        task_labels: Whether experiences have task labels, of the first data of a stream.
    """
    before = () if benchmark is None else benchmark.class_order
    learned = tuple(dict.fromkeys([*before, *(c for brought in experiences for c in brought)]))
    rank = {c: i for i, c in enumerate(learned)}
    classes = tuple(tuple(sorted(rank[c] for c in brought)) for brought in experiences)
    nothing: tuple[Data, ...] = (missing_samples(stored),) * len(experiences)
    if benchmark is None:
        benchmark = Benchmark(
            name, (), (), (), (), input_shape=stored.shape, task_labels=task_labels,
            inputs=stored.inputs or InputFormat(),
        )  # fmt: skip
    else:
        validation, name = bool(benchmark.validation), f"{benchmark.name} + {name}"
    return replace(
        benchmark,
        name=name,
        class_order=learned,
        classes=(*benchmark.classes, *classes),
        train=(*benchmark.train, *nothing),
        test=(*benchmark.test, *nothing),
        validation=(*benchmark.validation, *nothing) if validation else (),
        class_names=tuple(class_names),
    )


def missing_samples(stored: Stored) -> TensorSamples:
    """No samples, with the shape, type and normalization of those that are gone."""
    dtype = getattr(torch, stored.dtype) if stored.dtype else torch.float32
    nothing = torch.empty((0, *stored.shape), dtype=dtype)
    return TensorSamples(nothing, torch.empty(0, dtype=torch.long), stored.mean, stored.std)


def count_classes(samples: Data, classes: int) -> tuple[int, ...]:
    """Number of samples of each class."""
    return tuple(torch.bincount(samples.y.cpu(), minlength=classes).tolist())


def _renumber(samples: Data, ids: Sequence[int], stored: Stored) -> Data:
    numbers: Tensor = torch.tensor(ids)
    return replace(samples, y=numbers[samples.y], mean=stored.mean, std=stored.std)


def _plain(name: str) -> str:
    """A name without differences that a reader overlooks: case, spaces, Unicode forms, leading zeros."""
    text = "".join(unicodedata.normalize("NFKC", name).casefold().split())
    return str(int(text)) if text.isdecimal() else text


def _is_number(name: str) -> bool:
    return name.strip().isdecimal()


def _list(names: Sequence[str], *, most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _format_shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _conversion(shape: Sequence[int]) -> str:
    if len(shape) != 3 or shape[1] != shape[2]:
        return ""
    return f", such as by benchmark.size={shape[1]} and benchmark.channels={shape[0]} for image files"
