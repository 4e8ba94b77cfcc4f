"""Data of a config: loaded, and split into the stream of experiences that a run learns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, Final

from clframe.config.schema import BenchmarkConfig, Config, EarlierConfig
from clframe.config.typed import block_keys
from clframe.data import SOURCES, Benchmark, Source, class_incremental
from clframe.data.augmentation import AUGMENTATIONS, Augmentation
from clframe.data.chain import Stored, append_missing, extend_benchmark, name_classes
from clframe.data.inputs import InputFormat
from clframe.data.samples import TensorSamples
from clframe.data.streams import blurry_stream, online_stream, permuted_stream, rotated_stream
from clframe.errors import ClframeError, ConfigError, DataError
from clframe.options import check_options, format_value, option_types

_log = logging.getLogger("clframe.data")

LOCATIONS: Final = ("path", "data_dir", "tokens")
"""Options of data sets that name a file or folder."""


def development_experiences(config: Config) -> int:
    """Number of experiences after which ``trainer.fast_dev_run`` cuts the stream off; 0: it does not.

    An extension learns all of its new experiences.
    """
    wanted = config.trainer.fast_dev_run
    if config.earlier or not wanted:
        return 0
    return int(wanted)


def build_stream(
    config: Config, *, source: Source | None = None, needs_earlier: bool = False
) -> tuple[Source, Benchmark]:
    """Load the data of a config and split them into experiences; those of an extended run follow the earlier ones.

    Earlier data that cannot be read are named in a warning; their experiences then have no samples.

    Args:
        config: The config.
        source: Data in memory, in the place of those that an extended run's block ``benchmark`` names.
        needs_earlier: Refuse earlier data that cannot be read, as a run from scratch trains on them.

    Returns:
        The newest data, and the whole stream.

    Raises:
        DataError: Earlier data have changed or are needed and cannot be read, or new data do not fit them.
    """
    if not config.earlier:
        newest, benchmark = build_data(config.benchmark, seed=config.seed)
        return newest, benchmark.first_experiences(development_experiences(config) or len(benchmark))
    source = build_source(config.benchmark) if source is None else _fit_source(source, config.benchmark)
    stream: Benchmark | None = None
    for entry in config.earlier:
        stream = _add_earlier(stream, entry, seed=config.seed, needed=needs_earlier)
    assert stream is not None
    joined = _extend(stream, source, config.benchmark, stored_of(config.earlier[0]), seed=config.seed)
    return source, replace(joined, evaluate=config.benchmark.evaluate)


def check_trained_data(config: Config, benchmark: Benchmark, trained: Collection[int]) -> None:
    """Refuse training on earlier experiences whose data are gone.

    Args:
        config: The config of the stream.
        benchmark: The stream.
        trained: Indices of the experiences whose data will be trained on.

    Raises:
        DataError: One of them has no training samples.
    """
    index = 0
    for entry in config.earlier:
        for _ in entry.experiences:
            if index in trained and not len(benchmark.train[index]):
                block = entry.benchmark
                places = [str(block.options[key]) for key in LOCATIONS if block.options.get(key)]
                raise _missing_training_data(index, f"{', '.join(places) or block.name}: cannot be read")
            index += 1


def _missing_training_data(index: int, reason: str) -> DataError:
    return DataError(
        f"experience {index + 1}: cannot be trained, its earlier data are gone ({reason}); restore the data there, or "
        f"edit 'earlier' in the config"
    )


def _add_earlier(stream: Benchmark | None, entry: EarlierConfig, *, seed: int, needed: bool) -> Benchmark:
    block, stored = entry.benchmark, stored_of(entry)
    try:
        source = build_source(block)
    except ClframeError as error:
        if needed:
            raise _missing_training_data(0 if stream is None else len(stream), str(error)) from None
        if block.online is not None:
            raise DataError(f"earlier data: {error}; an online stream cannot be extended without them") from None
        count = len(entry.experiences)
        gone = "its experience is" if count == 1 else f"its {count} experiences are"
        _log.warning("earlier data: %s; %s not evaluated", error, gone)
        return append_missing(
            stream, block.name, experiences=entry.experiences, class_names=entry.class_names, stored=stored,
            validation=block.validation > 0, task_labels=block.protocol == "task_incremental",
        )  # fmt: skip
    try:
        if stream is None:
            if source.vocabulary:
                stored.check(source)
            train, test = (replace(part, mean=stored.mean, std=stored.std) for part in (source.train, source.test))
            found = build_benchmark(replace(source, train=train, test=test), block, seed=seed)
        else:
            found = _extend(stream, source, block, stored, seed=seed)
    except ClframeError as error:  # of the options with which the run learned other data than these
        raise DataError(
            f"earlier data: {source.name} cannot be split as when the run learned it ({error}); restore it, or give "
            f"the location of the same data"
        ) from None
    found = replace(found, evaluate="test")
    _check_learned(found, entry, source.name)
    return found


def _check_learned(found: Benchmark, entry: EarlierConfig, name: str) -> None:
    """Refuse earlier data that now give other classes or experiences than the run has learned."""
    named = name_classes(found.class_names, len(found.class_order))
    known = name_classes(entry.class_names, len(named))
    learned = tuple(tuple(found.class_order[c] for c in brought) for brought in found.classes)
    if named == known and learned[-len(entry.experiences) :] == entry.experiences:
        return
    more, fewer = (", ".join(sorted({*one} - {*other})) for one, other in ((named, known), (known, named)))
    what = f"has the classes {more}" if more else f"lacks the classes {fewer}" if fewer else "has other experiences"
    raise DataError(
        f"earlier data: {name} {what}, unlike when the run learned it; restore it, and put new classes into a "
        f"separate folder"
    )


def _extend(stream: Benchmark, source: Source, block: BenchmarkConfig, stored: Stored, *, seed: int) -> Benchmark:
    return extend_benchmark(
        stream, source, experiences=block.experiences, first=block.first, counts=block.counts,
        order=block.class_order, seed=seed, validation=block.validation, stored=stored,
    )  # fmt: skip


def stored_of(entry: EarlierConfig) -> Stored:
    """Properties of its inputs that a run has stored."""
    return Stored(
        shape=entry.input_shape, dtype=entry.dtype, mean=entry.mean, std=entry.std,
        inputs=InputFormat.of(entry.inputs) if entry.inputs else None,
    )  # fmt: skip


def build_data(config: BenchmarkConfig, *, seed: int) -> tuple[Source, Benchmark]:
    """Load the data of a benchmark block and split it into experiences."""
    source = build_source(config)
    return source, build_benchmark(source, config, seed=seed)


def check_source(config: BenchmarkConfig) -> tuple[Callable[..., Source], dict[str, Any]]:
    """The data set of a benchmark block with its options, checked without reading data."""
    source_of = SOURCES.get(config.name, where="benchmark.name")
    options = check_options(
        source_of, config.options, where="benchmark", block_keys=block_keys("benchmark"), elsewhere=_sources_with
    )
    return source_of, options


def _sources_with(option: str) -> list[str]:
    """Names of the data sets that have an option."""
    return [name for name in SOURCES.names() if option in option_types(SOURCES.get(name))]


def build_source(config: BenchmarkConfig) -> Source:
    """Load the data of a benchmark block."""
    augment = build_augmentations(config.augment)
    source_of, options = check_source(config)
    source = source_of(**options)
    if not isinstance(source, Source):
        raise ConfigError(f"benchmark.name: found {config.name}, which returns {format_value(source)}; return a Source")
    return _fit_source(source, config, augment=augment)


def _fit_source(source: Source, config: BenchmarkConfig, *, augment: tuple[Augmentation, ...] | None = None) -> Source:
    """The source with the classes, augmentations and workers of a benchmark block; its own augmentations remain."""
    if augment is None:
        augment = () if source.train.augment else build_augmentations(config.augment)
    if config.workers and isinstance(source.train, TensorSamples) and isinstance(source.test, TensorSamples):
        _log.warning("benchmark.workers: found %d, but %s is in memory and needs none", config.workers, source.name)
    return source.first_classes(config.classes).with_augmentations(augment).with_workers(config.workers)


def build_augmentations(names: str | Sequence[str] | None) -> tuple[Augmentation, ...]:
    """The augmentations that a config names, in order.

    >>> build_augmentations("cifar") == build_augmentations(["crop", "flip"])
    True
    """
    listed = [names] if isinstance(names, str) else names or ()
    return tuple(part for name in listed for part in AUGMENTATIONS.get(name, where="benchmark.augment"))


def build_benchmark(source: Source, config: BenchmarkConfig, *, seed: int) -> Benchmark:
    """Split ``source`` into experiences by the protocol of ``config``."""
    if config.protocol == "permuted":
        found = permuted_stream(source, experiences=config.experiences, seed=seed, validation=config.validation)
    elif config.protocol == "rotated":
        found = rotated_stream(
            source,
            experiences=config.experiences,
            angles=config.angles,
            seed=seed,
            validation=config.validation,
        )
    else:
        found = class_incremental(
            source,
            experiences=config.experiences,
            first=config.first,
            counts=config.counts,
            order=config.class_order,
            seed=seed,
            validation=config.validation,
            task_labels=config.protocol == "task_incremental",
        )
    if config.online is not None and config.blurry:
        found = blurry_stream(found, size=config.online, blur=config.blurry, seed=seed)
    elif config.online is not None:
        found = online_stream(found, size=config.online, seed=seed, boundaries=config.boundaries)
    return replace(found, evaluate=config.evaluate)
