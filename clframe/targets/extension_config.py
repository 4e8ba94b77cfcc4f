"""Config of an extended run: what may be overridden, the new data, and how the parent is recorded in it."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from clframe.config.load import change_config, sets_key
from clframe.config.schema import BenchmarkConfig, Config, EarlierConfig
from clframe.data.benchmark import Benchmark
from clframe.data.chain import Stored
from clframe.data.source import SOURCES, Source
from clframe.errors import ClframeError, ConfigError, RunFolderError
from clframe.files import to_path
from clframe.results import Result
from clframe.run_folder import RunFolder
from clframe.stream import LOCATIONS, build_source, build_stream
from clframe.targets.extension_text import fit_text, reads_text, tokenizer_file, without_text_options
from clframe.training.checkpoint import checkpoint_files

_log = logging.getLogger("clframe.data")

ALLOWED: Final = "trainer.*, optimizer.*, benchmark.*, name and output"
_INHERITED: Final = ("protocol", "validation", "evaluate", "augment", "workers", "online", "boundaries")
_FIXED: Final = ("protocol", "evaluate", "online", "boundaries", "blurry")
_ONE_EXPERIENCE: Final[Mapping[str, Any]] = {
    "classes": None, "experiences": 1, "first": None, "counts": [], "class_order": "sorted", "angles": [],
    "blurry": 0.0,
}  # fmt: skip


def check_overrides(overrides: Sequence[str], data: Source | None) -> None:
    """Refuse overrides of what the run has learned with, and an extension without new data (ConfigError)."""
    for text in overrides:
        key = text.partition("=")[0].strip()
        if "=" in text and key not in ("name", "output", "benchmark"):
            block = key.partition(".")[0]
            if key == "seed" or block not in ("trainer", "optimizer", "benchmark") or key == block:
                raise ConfigError(
                    f"override '{text}': {key} is part of what the run has learned and stays; change only {ALLOWED}"
                )
    if data is None and not any(text.strip().startswith("benchmark") for text in overrides):
        raise ConfigError(
            "extend: found no new data; give them, such as benchmark=image_folder benchmark.path=new_photos"
        )


def check_split(overrides: Sequence[str], data: Source | Benchmark | None) -> None:
    """Refuse overrides that would split a benchmark in memory in another way than it is (ConfigError)."""
    if not isinstance(data, Benchmark):
        return
    for key in ("classes", "experiences", "first", "counts", "class_order"):
        if sets_key(overrides, f"benchmark.{key}"):
            raise ConfigError(
                f"benchmark.{key}: is set, but the benchmark in memory is split already; give its Source, or leave "
                f"it out"
            )


def new_config(
    config: Config, folder: Path, content: Mapping[str, Any], overrides: Sequence[str], *, data: Source | None,
    output: str | Path | None,
) -> Config:  # fmt: skip
    """Make the config of the extended run, without its earlier data.

    Args:
        config: Of the parent.
        folder: Of the parent.
        content: Its last checkpoint.
        overrides: Changes, see :func:`check_overrides`.
        data: New data in memory.
        output: Folder for run folders.

    Raises:
        ConfigError: An override that does not fit the stream of the parent.
    """
    before = config.benchmark
    filled = {**_ONE_EXPERIENCE, **{key: getattr(before, key) for key in _INHERITED}}
    if isinstance(filled["augment"], tuple):
        filled["augment"] = list(filled["augment"])
    text = reads_text(content["data"])
    base = replace(config, benchmark=BenchmarkConfig(name=data.name), earlier=()) if data is not None else config
    if text:
        base = replace(base, benchmark=without_text_options(base.benchmark))
    changed = change_config(replace(base, earlier=()), overrides, benchmark=filled)
    if output is not None:
        changed = replace(changed, output=str(to_path(output, where="output")))
    block = changed.benchmark
    for key in _FIXED:
        found, wanted = getattr(block, key), filled[key]
        if found != wanted:
            raise ConfigError(f"benchmark.{key}: found {found}, but the stream of the run has {wanted}; leave it out")
    if data is not None:
        _check_in_memory(block, data)
    else:
        described = content["data"]
        if text:
            block = fit_text(block, folder, described, overrides=overrides)
        else:
            block = _fit_images(block, described["input_shape"])
        changed = replace(changed, benchmark=block)
    return changed


def _check_in_memory(block: BenchmarkConfig, data: Source) -> None:
    """Refuse a data set and options of one next to data in memory."""
    if block.name != data.name:
        raise ConfigError(f"benchmark.name: found {block.name} and data in memory, {data.name}; give one of them")
    for key in block.options:
        raise ConfigError(f"benchmark.{key}: is an option of a data set, but the data are in memory; leave it out")


def _fit_images(block: BenchmarkConfig, shape: Sequence[int]) -> BenchmarkConfig:
    """The block with the size and channels of the run's images, where its data set converts images to any."""
    if len(shape) != 3 or block.name not in SOURCES:
        return block
    channels, height, width = shape
    takes = inspect.signature(SOURCES.get(block.name, where="benchmark.name")).parameters
    options = dict(block.options)
    if height == width and "size" in takes and options.get("size") is None:
        options["size"] = height
    if channels in (1, 3) and "channels" in takes and options.get("channels") is None:
        options["channels"] = channels
    return replace(block, options=options)


def describe_parent(folder: RunFolder, config: Config, result: Result, content: Mapping[str, Any]) -> EarlierConfig:
    """Describe the parent, its checkpoint and its newest data, as the config of the extended run names them."""
    checkpoint = checkpoint_files(folder.path / "checkpoints")[-1]
    data = content["data"]
    own = result.experiences[sum(len(entry.experiences) for entry in config.earlier) :]
    names, inputs = tuple(data.get("class_names", ())), dict(data.get("inputs", {}))
    dtype = data.get("dtype", "")
    if "class_names" not in data:
        try:
            benchmark = build_stream(config)[1]
        except ClframeError as error:
            raise RunFolderError(
                f"{folder.path}: was written by an earlier version, and its data, which have the names of its "
                f"classes, cannot be read ({error}); restore them"
            ) from None
        names, inputs, dtype = benchmark.class_names, benchmark.inputs.as_tree(), Stored.of(benchmark).dtype
    # A later extension may start in another folder.
    options = _resolve_locations(config.benchmark.options)
    if reads_text(data):  # not one that would be trained again, on text that may have changed
        options["tokenizer"] = str(tokenizer_file(folder.path))
    return EarlierConfig(
        run=str(folder.path.resolve()), checkpoint=checkpoint.name,
        sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        experiences=tuple(own), class_names=names, input_shape=tuple(data["input_shape"]), dtype=dtype,
        mean=tuple(data["mean"]), std=tuple(data["std"]), inputs=inputs,
        benchmark=replace(config.benchmark, options=options),
    )  # fmt: skip


def _resolve_locations(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a data set, with the locations that exist as absolute paths."""
    resolved = dict(options)
    for key in LOCATIONS:
        if isinstance(resolved.get(key), str) and (place := Path(resolved[key]).expanduser()).exists():
            resolved[key] = str(place.resolve())
    return resolved


def warn_of_learned_data(config: Config, *, known: Collection[str]) -> None:
    """Warn if the new data are those of an earlier part of the run: more likely a slip than a wish.

    Args:
        config: Of the extended run.
        known: Names of the classes among the new data that the run has learned.
    """
    new = _identify_data(config.benchmark)
    for entry in config.earlier:
        # A folder of text has several domains, of which an extension may learn further ones.
        other_domains = entry.inputs.get("kind") == "language" and not set(known) & set(entry.class_names)
        if _identify_data(entry.benchmark) == new and not other_domains:
            place = config.benchmark.options.get("path", config.benchmark.name)
            _log.warning("%s: are data that the run has already learned; they are learned again", place)
            return


def _identify_data(block: BenchmarkConfig) -> Any:
    """The path of a block's data; without one, the data set and its options."""
    options = _resolve_locations(block.options)
    if options.get("path") is not None:
        return options["path"]
    return block.name, {key: value for key, value in options.items() if key not in ("size", "channels")}


def relocate(entries: Sequence[EarlierConfig], overrides: Sequence[str]) -> tuple[EarlierConfig, ...]:
    """Return entries with other locations of the data that cannot be read where they were.

    Raises:
        ConfigError: Something else than a location, or one that no missing data have.
        ClframeError: Data that cannot be read there either.
    """
    places: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        name = key.strip().removeprefix("benchmark.")
        if not equals or name not in LOCATIONS:
            raise ConfigError(f"--earlier: found '{text}'; give a location such as benchmark.path=DIR")
        places[name] = str(Path(value.strip()).expanduser().resolve())
    if not places:
        return tuple(entries)
    used, moved = set[str](), []
    for entry in entries:
        block = entry.benchmark
        takes = inspect.signature(SOURCES.get(block.name, where="benchmark.name")).parameters
        fitting = {name: place for name, place in places.items() if name in takes}
        try:
            build_source(block)
        except ClframeError:
            used |= set(fitting)
            block = replace(block, options={**block.options, **fitting})
            build_source(block)  # a location that was given has to be right
        moved.append(replace(entry, benchmark=block))
    if unused := sorted(set(places) - used):
        raise ConfigError(
            f"--earlier: found benchmark.{unused[0]}, but no earlier data that are missing have it; leave it out"
        )
    return tuple(moved)
