"""Extension of a finished run by new experiences, in a new run folder.

The new folder begins with the last checkpoint of the parent, converted to the longer stream, and is then resumed like
any other run. Order, replay draws and initialization are functions of (seed, experience, epoch), and the index of an
experience continues, so a chain of extensions equals one run over the same stream, bit for bit on CPU.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clframe.build import Setup, build
from clframe.config.named import plugin_list
from clframe.config.schema import Config
from clframe.config.typed import to_yaml
from clframe.data.benchmark import Benchmark
from clframe.data.chain import name_classes
from clframe.data.digests import refuse_other_data
from clframe.data.samples import concatenate
from clframe.data.source import Source
from clframe.errors import DataError, RunFolderError, UnsupportedError
from clframe.files import to_path, write_atomically
from clframe.metrics import Tally
from clframe.results import Result
from clframe.run_folder import RunFolder, strategy_label
from clframe.targets.extension_checkpoint import convert_checkpoint
from clframe.targets.extension_config import (
    check_overrides,
    check_split,
    describe_parent,
    new_config,
    relocate,
    warn_of_learned_data,
)
from clframe.targets.loading import fit_model, read_config
from clframe.targets.portable import is_portable
from clframe.targets.run_tokenizer import TOKENIZER
from clframe.training.checkpoint import save_checkpoint
from clframe.training.trained import CONVERTED, load_newest, recorded_digest

_log = logging.getLogger("clframe.data")


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
            if self.setup.benchmark.tokenizer:
                write_atomically(folder.path / TOKENIZER, self.setup.benchmark.tokenizer)
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
        overrides: ``benchmark=NAME`` and its options, which describe the new data, and others of
            :data:`~clframe.targets.extension_config.ALLOWED`.
        data: New data in memory, in the place of ``benchmark=NAME``. A later extension can evaluate on them only if
            the function that makes them is registered under their name.
        earlier: Other locations of earlier data that are not where the config says: ``benchmark.path=DIR``.
        output: Folder for run folders; None takes the config's.

    Raises:
        ClframeError: Anything a user can fix, in one line.
    """
    folder = RunFolder.open(to_path(run, where="extend"), where="extend")
    config, result, content = _read_parent(folder)
    check_split(overrides, data)
    data, split = _as_source(data)
    check_overrides(overrides, data)
    changed = new_config(config, folder.path, content, [*overrides, *split], data=data, output=output)
    entry = describe_parent(folder, config, result, content)
    changed = replace(changed, earlier=relocate((*config.earlier, entry), earlier))
    setup = build(changed, source=data)
    benchmark, before = setup.benchmark, len(result.experiences)
    refuse_other_data(
        benchmark.digest, recorded_digest(content), where="earlier data",
        advice="restore them, and put new samples into a separate folder",
    )  # fmt: skip
    _check_samples(benchmark, content, config)
    _check_strategy(setup, before)
    learned = {c for brought in benchmark.classes[:before] for c in brought}
    brought = dict.fromkeys(c for classes in benchmark.classes[before:] for c in classes)
    names = name_classes(benchmark.class_names, len(benchmark.class_order))
    named = {c: names[benchmark.class_order[c]] for c in brought}
    known = tuple(name for c, name in named.items() if c in learned)
    if data is None:
        warn_of_learned_data(changed, known=known)
    return Extension(
        parent=folder.path, setup=setup, finished=before,
        checkpoint=convert_checkpoint(content, setup, before),
        known=known,
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
    plugins = plugin_list(config.components)
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
    fit_model(config, content, folder=path)  # before the extension has a folder, which its errors would name
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
    source = Source(
        benchmark.name, train, test, classes, benchmark.class_names, benchmark.inputs, benchmark.vocabulary,
        benchmark.tokenizer,
    )  # fmt: skip
    counts = ", ".join(str(len(brought)) for brought in benchmark.classes)
    order = ", ".join(map(str, benchmark.class_order))
    return source, [f"benchmark.counts=[{counts}]", f"benchmark.class_order=[{order}]"]


def _check_samples(benchmark: Benchmark, content: Mapping[str, Any], config: Config) -> None:
    """Refuse earlier test data with other samples than before: one row of a matrix would mix two test sets."""
    if config.trainer.fast_dev_run:
        return  # counted two batches only
    counted = Tally(**content["tallies"][-1]).samples_E
    tokens = benchmark.input_shape[0] - 1 if benchmark.vocabulary else 1  # of a sample, each of which is counted
    for i, (before, part) in enumerate(zip(counted, benchmark.evaluation, strict=False)):
        if before and len(part) and before != tokens * len(part):
            unit = "tokens" if benchmark.vocabulary else "samples"
            raise DataError(
                f"earlier data: experience {i + 1} has {tokens * len(part)} test {unit}, but had {before} when the run "
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
