"""Extension of a finished run by new experiences, in a new run folder.

The new folder begins with the last checkpoint of the parent, converted to the longer stream, and is then resumed like
any other run. Order, replay draws and initialization are functions of (seed, experience, epoch), and the index of an
experience continues, so a chain of extensions equals one run over the same stream, bit for bit on CPU.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from clframe.build import Setup, build
from clframe.config.load import change_config
from clframe.config.named import named_plugins
from clframe.config.schema import BenchmarkConfig, Config, EarlierConfig
from clframe.config.typed import to_yaml
from clframe.data.benchmark import Benchmark
from clframe.data.chain import Stored, count_classes, name_classes
from clframe.data.samples import concatenate
from clframe.data.source import SOURCES, Source
from clframe.errors import ClframeError, ConfigError, DataError, RunFolderError, UnsupportedError
from clframe.metrics import Tally
from clframe.results import Result
from clframe.run_folder import RunFolder, strategy_label
from clframe.stream import LOCATIONS, build_source, build_stream
from clframe.targets.loading import read_config
from clframe.targets.portable import is_portable
from clframe.training.checkpoint import checkpoint_files, save_checkpoint
from clframe.training.trained import CONVERTED, describe_data, load_newest

_log = logging.getLogger("clframe.data")

ALLOWED: Final = "trainer.*, optimizer.*, benchmark.*, name and output"
_INHERITED: Final = ("protocol", "validation", "evaluate", "augment", "workers", "online", "boundaries")
_FIXED: Final = ("protocol", "evaluate", "online", "boundaries", "blurry")
_ONE_EXPERIENCE: Final[Mapping[str, Any]] = {
    "classes": None, "experiences": 1, "first": None, "counts": [], "class_order": "sorted", "angles": [],
    "blurry": 0.0,
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Extension:
    """An extension that has been checked and not yet begun.

    Attributes:
        parent: Folder of the run.
        setup: Objects of the extended run, whose benchmark is the whole stream.
        checkpoint: Content of the parent's last checkpoint, converted to this stream.
        finished: Experiences of the parent.
        known: Known classes that the new data have more samples of.
        new: New classes, in learning order.
        missing: Earlier experiences without data, counted from 1.
    """

    parent: Path
    setup: Setup
    checkpoint: Mapping[str, Any]
    finished: int
    known: tuple[str, ...]
    new: tuple[str, ...]
    missing: tuple[int, ...]

    def create(self) -> RunFolder:
        """Create the run folder of the extension, ready to be resumed.

        Raises:
            RunFolderError: It cannot be written; nothing is left behind.
        """
        config = self.setup.config
        folder = RunFolder.create(
            Path(config.output), name=config.name, seed=config.seed, label=strategy_label(config.strategy)
        )
        try:
            folder.write_config(to_yaml(config))
            for name in ("metrics.csv", "log.txt"):
                if (self.parent / name).is_file():
                    shutil.copy2(self.parent / name, folder.path / name)
            if (self.parent / "tensorboard").is_dir():
                shutil.copytree(self.parent / "tensorboard", folder.path / "tensorboard")
            save_checkpoint(folder.path / "checkpoints", self.checkpoint, finished=self.finished)
        except OSError as error:
            folder.discard()
            raise RunFolderError(f"{folder.path}: cannot be written ({error.strerror}); check the free space") from None
        except BaseException:
            folder.discard()
            raise
        return folder


def plan_extension(
    run: str | Path, overrides: Sequence[str] = (), *, data: Source | Benchmark | None = None,
    earlier: Sequence[str] = (), output: str | Path | None = None,
) -> Extension:  # fmt: skip
    """Check an extension and build its objects; writes nothing.

    Args:
        run: Folder of the finished run.
        overrides: ``benchmark=NAME`` and its options, which describe the new data, and others of :data:`ALLOWED`.
        data: New data in memory, in the place of ``benchmark=NAME``. A later extension can evaluate on them only if
            the function that makes them is registered under their name.
        earlier: Other locations of earlier data that are not where the config says: ``benchmark.path=DIR``.
        output: Folder for run folders; None takes the config's.

    Raises:
        ClframeError: Anything a user can fix, in one line.
    """
    folder = RunFolder.open(Path(run), where="extend")
    config, result, content = _read_parent(folder)
    if result.nll_matrix:
        raise UnsupportedError(
            f"extend: {run} is the run of a language model, which cannot be extended; give all domains to one run"
        )
    data, split = _as_source(data)
    _check_overrides(overrides, data)
    changed = _new_config(config, content, [*overrides, *split], data=data, output=output)
    entry = _describe_parent(folder, config, result, content)
    changed = replace(changed, earlier=_relocate((*config.earlier, entry), earlier))
    setup = build(changed, source=data)
    benchmark, before = setup.benchmark, len(result.experiences)
    _check_samples(benchmark, content, config)
    _check_strategy(setup, before)
    if data is None:
        _warn_of_learned_data(changed)
    learned = {c for brought in benchmark.classes[:before] for c in brought}
    brought = dict.fromkeys(c for classes in benchmark.classes[before:] for c in classes)
    names = name_classes(benchmark.class_names, len(benchmark.class_order))
    named = {c: names[benchmark.class_order[c]] for c in brought}
    return Extension(
        parent=folder.path, setup=setup, finished=before,
        checkpoint=_convert(content, setup, before),
        known=tuple(name for c, name in named.items() if c in learned),
        new=tuple(name for c, name in named.items() if c not in learned),
        missing=tuple(i + 1 for i, part in enumerate(benchmark.evaluation[:before]) if not len(part)),
    )  # fmt: skip


def _read_parent(folder: RunFolder) -> tuple[Config, Result, Mapping[str, Any]]:
    """Config, result and last checkpoint of a finished run."""
    path = folder.path
    if is_portable(path):
        raise UnsupportedError(f"{path}: is a copy of a model without the state of its run; extend the run itself")
    if (path / CONVERTED).is_file():
        raise UnsupportedError(f"{path}: was converted by clframe moefy; extend the run and convert the result")
    config = read_config(folder)
    if config.benchmark.protocol not in ("class_incremental", "task_incremental"):
        raise UnsupportedError(
            f"{path}: learned transformed data (benchmark.protocol: {config.benchmark.protocol}), which new data "
            f"would not be; extend a run of another protocol"
        )
    plugins = ", ".join(name for name, _ in named_plugins(config.components))
    if plugins:
        raise UnsupportedError(
            f"{path}: has Avalanche plugins ({plugins}), whose state is not in checkpoints; extend a run without them"
        )
    content = load_newest(path, device=torch.device("cpu"))
    if not (path / "results.json").is_file():
        raise RunFolderError(f"{path}: is not finished; finish it first with clframe run --resume {path}")
    result = Result.from_json(path / "results.json")
    if len(result.accuracy_matrix) != len(result.experiences) or content["finished"] != len(result.experiences):
        raise RunFolderError(
            f"{path}: its newest checkpoint is of experience {content['finished']} of {len(result.experiences)}; "
            f"restore the last one, or run again"
        )
    learned = {c for classes in result.experiences for c in classes}
    if config.trainer.fast_dev_run and not config.earlier and len(learned) < len(result.class_order):
        raise RunFolderError(
            f"{path}: is a development run (trainer.fast_dev_run) of the first {len(result.experiences)} experiences; "
            f"extend a complete run"
        )
    return config, result, content


def _as_source(data: Source | Benchmark | None) -> tuple[Source | None, list[str]]:
    """New data as one source, with the overrides that split it as the benchmark was."""
    if not isinstance(data, Benchmark):
        return data, []
    benchmark, classes = data, len(data.class_order)
    plain = not (benchmark.validation or benchmark.domains or benchmark.online)
    if not plain or sum(map(len, benchmark.classes)) != classes:
        raise UnsupportedError(
            "extend: found a benchmark that is online, has domains, repeats classes or holds data out; give its Source"
        )
    ids = torch.tensor(benchmark.class_order)
    train, test = (replace(joined, y=ids[joined.y]) for joined in map(concatenate, (data.train, data.test)))
    source = Source(benchmark.name, train, test, classes, benchmark.class_names, benchmark.inputs)
    counts = ", ".join(str(len(brought)) for brought in benchmark.classes)
    order = ", ".join(map(str, benchmark.class_order))
    return source, [f"benchmark.counts=[{counts}]", f"benchmark.class_order=[{order}]"]


def _check_overrides(overrides: Sequence[str], data: Source | None) -> None:
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


def _new_config(
    config: Config, content: Mapping[str, Any], overrides: Sequence[str], *, data: Source | None,
    output: str | Path | None,
) -> Config:  # fmt: skip
    """The config of the extended run, without its earlier data."""
    before = config.benchmark
    filled = {**_ONE_EXPERIENCE, **{key: getattr(before, key) for key in _INHERITED}}
    if isinstance(filled["augment"], tuple):
        filled["augment"] = list(filled["augment"])
    base = replace(config, benchmark=BenchmarkConfig(name=data.name), earlier=()) if data is not None else config
    changed = change_config(replace(base, earlier=()), overrides, benchmark=filled)
    if output is not None:
        changed = replace(changed, output=str(output))
    block = changed.benchmark
    for key in _FIXED:
        found, wanted = getattr(block, key), filled[key]
        if found != wanted:
            raise ConfigError(f"benchmark.{key}: found {found}, but the stream of the run has {wanted}; leave it out")
    if data is None:
        changed = replace(changed, benchmark=_fit_images(block, content["data"]["input_shape"]))
    return changed


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


def _describe_parent(folder: RunFolder, config: Config, result: Result, content: Mapping[str, Any]) -> EarlierConfig:
    """The parent, its checkpoint and its newest data, as the config of the extended run names them."""
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


def _warn_of_learned_data(config: Config) -> None:
    """Warn if the new data are those of an earlier part of the run: more likely a slip than a wish."""
    new = _identify_data(config.benchmark)
    for entry in config.earlier:
        if _identify_data(entry.benchmark) == new:
            place = config.benchmark.options.get("path", config.benchmark.name)
            _log.warning("%s: are data that the run has already learned; they are learned again", place)
            return


def _identify_data(block: BenchmarkConfig) -> Any:
    """The path of a block's data; without one, the data set and its options."""
    options = _resolve_locations(block.options)
    if options.get("path") is not None:
        return options["path"]
    return block.name, {key: value for key, value in options.items() if key not in ("size", "channels")}


def _relocate(entries: Sequence[EarlierConfig], overrides: Sequence[str]) -> tuple[EarlierConfig, ...]:
    """Entries with other locations of the data that cannot be read where they were."""
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


def _check_samples(benchmark: Benchmark, content: Mapping[str, Any], config: Config) -> None:
    """Refuse earlier test data with other samples than before: one row of a matrix would mix two test sets."""
    if config.trainer.fast_dev_run:
        return  # counted two batches only
    counted = Tally(**content["tallies"][-1]).samples_E
    for i, (before, part) in enumerate(zip(counted, benchmark.evaluation, strict=False)):
        if before and len(part) and before != len(part):
            raise DataError(
                f"earlier data: experience {i + 1} has {len(part)} test samples, but had {before} when the run "
                f"learned it; restore them, and put new samples into a separate folder"
            )


def _check_strategy(setup: Setup, before: int) -> None:
    """Refuse strategies that depend on the length of the stream, or on data that are gone."""
    count = len(setup.benchmark)
    for component in setup.composition.acting_at("training_experiences"):
        for i in range(before):
            if tuple(component.training_experiences(i, before)) != tuple(component.training_experiences(i, count)):
                raise UnsupportedError(
                    f"extend: '{component.name}' trains at the end of a stream, which is now later; start a new run, "
                    f"or use 'cumulative'"
                )
        for i in range(before, count):
            sources = tuple(component.training_experiences(i, count))
            gone = [j + 1 for j in sources if j < before and not len(setup.benchmark.train[j])]
            if gone:
                raise DataError(
                    f"extend: '{component.name}' trains on experience {gone[0]} again, whose data are gone; give "
                    f"them by --earlier benchmark.path=DIR"
                )
    held = setup.benchmark.validation[:before]
    if any(not len(part) for part in held):
        _log.warning(
            "earlier data: their held-out samples are gone; thresholds and calibration are chosen on those of the "
            "other experiences"
        )


def _convert(content: Mapping[str, Any], setup: Setup, before: int) -> dict[str, Any]:
    """The parent's checkpoint as one of the extended stream.

    Accuracies on new experiences before they were learned are 0 where all of their classes were unknown: no class has
    a column before it is learned. They are undefined otherwise.
    """
    benchmark = setup.benchmark
    classes = len(benchmark.class_order)
    totals = [count_classes(part, classes) for part in benchmark.evaluation[before:]]
    brought = [set(c) for c in benchmark.classes[before:]]
    seen: list[set[int]] = []
    for own in benchmark.classes[:before]:
        seen.append({*own, *(seen[-1] if seen else ())})

    def extended(tally: Mapping[str, Any], known: set[int]) -> dict[str, Any]:
        nothing = [0] * classes
        counted = [nothing if own & known else list(total) for own, total in zip(brought, totals, strict=True)]
        rows = {"total_EC": counted, "correct_EC": [nothing] * len(brought)}
        rows["correct_aware_EC"] = rows["correct_EC"]
        old = Tally(**tally)
        wider: dict[str, Any] = {
            name: [*([*row, *[0] * (classes - len(row))] for row in getattr(old, name)), *more]
            for name, more in rows.items()
        }
        return Tally(**wider).as_tree()

    exits = []
    for record, known in zip(content["exits"], seen, strict=True):
        unlearned = [math.nan if own & known or not sum(total) else 0.0
                     for own, total in zip(brought, totals, strict=True)]  # fmt: skip
        exits.append({**record, "accuracy_KE": [[*row, *unlearned] for row in record["accuracy_KE"]]})
    baseline = content["baseline"]
    converted = {
        **content,
        "config": to_yaml(setup.config),
        "baseline": None if baseline is None else extended(baseline, seen[0]),
        "tallies": [extended(tally, known) for tally, known in zip(content["tallies"], seen, strict=True)],
        "exits": exits,
        "data": describe_data(benchmark),
    }
    for key in ("format", "finished", "file_bytes", "confusion"):
        converted.pop(key, None)
    return converted
