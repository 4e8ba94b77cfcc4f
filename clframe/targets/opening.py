"""Targets: trained models with the data they are analyzed on.

A target is a run of clframe, or a model of the Hugging Face hub or of timm, by name or folder. All have the same
interface, so that analysis and conversion are independent of the kind of model.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import compress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clframe.config.load import data_config, require_list
from clframe.config.schema import Config
from clframe.data.benchmark import Benchmark
from clframe.data.digests import refuse_other_data
from clframe.data.source import SOURCES, Data
from clframe.data.target import DataSplits, SampleSplit, Target
from clframe.device_names import usable_device
from clframe.errors import ConfigError, RunFolderError
from clframe.nn.backbones.from_transformers import TextEmbed, real_tokens
from clframe.nn.types import Inputs
from clframe.options import option_types
from clframe.process_state import own_process
from clframe.results import Result
from clframe.stream import build_stream
from clframe.targets.loading import load_model, refuse_language_model, run_config
from clframe.targets.text_files import Document, text_files
from clframe.training.trained import TrainedModel

_LOCATIONS = ("data_dir", "path", "tokens")
"""Options of data sets that name a file or folder."""


@own_process("open_target", trains=False)
def open_target(
    name: str,
    *,
    data: str | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    max_length: int | None = None,
    per_class: int = 20,
    generate: int = 0,
    stride: int | None = None,
    document: Document = "line",
    divide: bool = False,
) -> Target:
    """Open a run or a model by name.

    Args:
        name: A run folder; or the folder or hub name of a model of transformers (text encoders, causal language models)
            or timm. Weights are read from safetensors only, and code that comes with a model is not executed.
        data: Data for a model that is not a run: a benchmark config such as ``clinc150``, or for a language model also
            a text file with one text per line, or several such files (domains): ``news.txt,code.txt``.
        overrides: Changes of the benchmark block, such as ``benchmark.data_dir=DIR``.
        device: Device of the model.
        max_length: Maximum number of tokens of a text; of a language model, length of the windows of longer texts;
            None: 64, or what fits the model's context.
        per_class: Training samples per class for the mean embedding, for models without a classifier.
        generate: Number of tokens that a language model generates greedily after the start of each text, which are its
            first ``max_length`` tokens.
        stride: Distance of the windows of a language model, see
            :func:`~clframe.functional.language.strided_windows`; None: half of ``max_length``.
        document: Whether a ``line`` of a text file is a text, or the whole ``file``.
        divide: Whether text files are divided into training, validation and test data (60, 20 and 20 %, in order);
            otherwise all texts are both training and test data.

    Raises:
        RunFolderError: No such folder, or a run that does not match its data.
        ConfigError: No data for a model that is not a run, or data for a run.
        DataError: A model or data that cannot be loaded.
        UnsupportedError: Another kind of model, or a package that is not installed.
    """
    if not isinstance(name, (str, os.PathLike)) or not (name := os.fspath(name)).strip():
        raise ConfigError("target: found nothing; give a run folder, or a model's folder or name on the hub")
    folder = Path(name).expanduser()
    if (folder / "config.yaml").is_file():
        if data is not None:
            raise ConfigError(f"--data: found {data} for a run, which has its own data; leave it out")
        _refuse_reading(name, length=max_length, generate=generate, stride=stride, document=document)
        trained = load_model(folder, device=str(usable_device(device)))
        refuse_language_model(trained.network, where=str(folder))
        return run_target(name, trained, overrides)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise RunFolderError(f"{name}: found neither a run's config.yaml nor a model's config.json; give such a folder")
    # With an existing parent folder the name is a mistyped path, not a hub id.
    mistyped = folder.parent != Path() and folder.parent.is_dir()
    if not folder.is_dir() and (mistyped or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)):
        raise RunFolderError(f"{name}: no such folder, and not the name of a hub model; give one of them")
    if data is None:
        raise ConfigError(f"--data: found none for {name}; give the data to measure it on, such as --data clinc150")
    from clframe.targets.images import images_target, is_timm
    from clframe.targets.texts import text_target

    place = usable_device(device)
    if is_timm(name):
        _refuse_reading(name, length=max_length, generate=generate, stride=stride, document=document)
        config = data_config(data, overrides)
        target = images_target(name, config=config, device=place, per_class=per_class)
        options: dict[str, Any] = {"per_class": per_class}
    else:
        target = text_target(
            name, data, overrides, device=place, max_length=max_length, per_class=per_class, generate=generate,
            stride=stride, document=document, divide=divide,
        )  # fmt: skip
        options = {**target.origin["options"], "per_class": per_class, "generate": generate}
        if target.kind == "causal":
            options |= {"stride": stride, "document": document, "divide": divide}
    return replace(target, origin={**_origin(name, data, target.config), **target.origin, "options": options})


def _refuse_reading(name: str, *, length: int | None, generate: int, stride: int | None, document: str) -> None:
    """Refuse options of a language model's texts for another target."""
    given = {"length": length, "generate": generate or None, "stride": stride,
             "document": None if document == "line" else document}  # fmt: skip
    for option, value in given.items():
        if value is not None:
            raise ConfigError(f"--{option}: found {value} for {name}, which is not a language model; leave it out")


def _origin(name: str, data: str | None, config: Config | None) -> dict[str, Any]:
    """Model and data, with absolute paths; a text file is identified by its content as well."""
    folder = Path(name).expanduser()
    found: dict[str, Any] = {"model": str(folder.resolve()) if folder.is_dir() else name, "revision": None}
    if config is None:
        assert data is not None
        files = [file.resolve() for file in text_files(data)]
        contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        named = {
            "name": "+".join(file.stem for file in files), "path": ",".join(map(str, files)),
            "sha256": ",".join(contents),
        }  # fmt: skip
        return {**found, "data": named}
    block = asdict(config.benchmark)
    for key in _LOCATIONS:
        if isinstance(block["options"].get(key), str):
            block["options"][key] = str(Path(block["options"][key]).expanduser().resolve())
    return {**found, "data": {**block, "seed": config.seed}}


def run_target(name: str, trained: TrainedModel, overrides: Sequence[str] = ()) -> Target:
    """Create the target of a run.

    Args:
        name: The run folder.
        trained: Its model, a classifier.
        overrides: Other locations of its data, such as ``benchmark.data_dir=DIR``.

    Raises:
        RunFolderError: The run does not match its data.
        ConfigError: Another override.
    """
    folder = Path(name).expanduser()
    config = relocate_data(run_config(folder), overrides)
    benchmark = build_stream(config)[1]
    named = bool(trained.class_names and benchmark.class_names)
    advice = (
        f"restore the data, undo the overrides, or add benchmark={config.benchmark.name} to clframe evaluate to "
        f"measure it on other data"
    )
    if (
        benchmark.class_order != trained.class_order
        or benchmark.input_shape != trained.network.input_shape
        or (named and benchmark.class_names != trained.class_names)
    ):
        raise RunFolderError(f"{folder}: was trained on other data than its config gives now; {advice}")
    refuse_other_data(benchmark.digest, trained.digest, where=str(folder), advice=advice)
    network, learner = trained.network, trained.learner
    tokens = real_tokens if isinstance(network.backbone.stages[0], TextEmbed) else None

    def predict(model: nn.Module, inputs: Inputs) -> Tensor:
        return learner.adjust_logits(model(inputs, taps=learner.taps)).last

    # An unfinished run is evaluated on the experiences it has learnt; its network has no outputs for other classes.
    # Experiences of an extended run have no samples where its earlier data are gone.
    learnt = [
        set(classes) <= set(learner.past) and len(samples) > 0
        for classes, samples in zip(benchmark.classes, benchmark.test, strict=True)
    ]

    def part(samples: Sequence[Data]) -> SampleSplit:
        return SampleSplit(list(compress(samples, learnt)), place=network.to_device, tokens=tokens)

    return Target(
        name=name, kind="run", model=network, accuracy_matrix=_accuracy_matrix(folder),
        body_name="backbone", predict=predict, run=trained, config=config, origin=_origin(name, None, config),
        splits=DataSplits(
            part(_training(benchmark)), part(benchmark.validation) if benchmark.validation else None,
            part(benchmark.test),
        ),
        experiences=tuple(
            SampleSplit([samples], place=network.to_device, tokens=tokens)
            for samples in compress(benchmark.test, learnt)
        ),
    )  # fmt: skip


def _accuracy_matrix(folder: Path) -> tuple[tuple[float, ...], ...] | None:
    """Accuracy matrix of a finished run."""
    file = folder / "results.json"
    return Result.from_json(file).accuracy_matrix if file.is_file() else None


def _training(benchmark: Benchmark) -> tuple[Data, ...]:
    """Training data without augmentation; for an online stream the experiences it was cut from."""
    return tuple(replace(samples, augment=()) for samples in benchmark.original or benchmark.train)


def relocate_data(config: Config, overrides: Sequence[str]) -> Config:
    """Return the config with other locations of the data; another override of a trained run is a ConfigError."""
    require_list(overrides)
    options = dict(config.benchmark.options)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key not in {f"benchmark.{option}" for option in _LOCATIONS}:
            raise ConfigError(f"override '{text}': a run uses its own config; {_other_data(config.benchmark.name)}")
        options[key.removeprefix("benchmark.")] = value
    return replace(config, benchmark=replace(config.benchmark, options=options))


def _other_data(source: str) -> str:
    """Advice on what of a run's data can be changed."""
    if source == "language_model":
        return "change only benchmark.path=FOLDER, or add benchmark=language_model to measure it on other text"
    places = [option for option in _LOCATIONS if option in option_types(SOURCES.get(source))]
    return f"change only {' and '.join(f'benchmark.{option}' for option in places)}" if places else "change nothing"
