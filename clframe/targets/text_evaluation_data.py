"""Text that a language model is evaluated on: the test text of its domains, or other text.

Shape suffixes: N ids of a text, S ids of a window, W windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clframe.config.load import data_config
from clframe.config.schema import BenchmarkConfig, Config
from clframe.data.digests import refuse_other_data
from clframe.data.sources.language import domain_files, has_domain, read_domain, windows_of
from clframe.data.tokenizer import TextTokenizer
from clframe.errors import ConfigError, DataError, RunFolderError
from clframe.results import Result
from clframe.stream import build_stream, check_source
from clframe.targets.loading import RunModel
from clframe.targets.opening import relocate_data
from clframe.targets.run_tokenizer import TOKENIZER, run_tokenizer

_OPTIONS = ("path", "domains", "test_characters")
"""Options of other text; tokenizer and length of the windows are those of the run."""


class Part(NamedTuple):
    """Text of one domain."""

    name: str
    windows_WS: Tensor
    experience: int | None
    """Index of its experience where evaluations know it; None otherwise."""


def own_text(model: RunModel, overrides: Sequence[str]) -> list[Part]:
    """The test text of each experience that the run has learned, by its title."""
    config = _with_tokenizer(model, relocate_data(model.config, overrides))
    _check_domains(model, config)
    benchmark = build_stream(config)[1]
    recorded = "" if model.inputs is None else model.inputs.tokenizer
    differs = (
        benchmark.class_order != model.class_order
        or benchmark.class_names != model.class_names
        or benchmark.input_shape != model.network.input_shape
        or recorded not in ("", benchmark.inputs.tokenizer)
    )
    advice = f"restore the text, or add benchmark={config.benchmark.name} to measure it on other text"
    if differs:
        raise RunFolderError(f"{model.folder}: was trained on other text than its config gives now; {advice}")
    refuse_other_data(benchmark.digest, model.digest, where=str(model.folder), advice=advice)
    learned = [
        set(classes) <= set(model.learner.past) and len(samples) > 0
        for classes, samples in zip(benchmark.classes, benchmark.test, strict=True)
    ]
    found: list[Part] = []
    choice = model.network.choice
    known = choice is not None and choice.known
    for e, samples in compress(enumerate(benchmark.test), learned):
        name = benchmark.title(e)
        again = any(part.name == name for part in found)  # a domain that was learned a second time, with more text
        windows_WS = samples.prepare(samples.raw(torch.arange(len(samples))))
        found.append(Part(f"{name} (experience {e + 1})" if again else name, windows_WS, e if known else None))
    if not found:
        raise DataError(f"{model.folder}: has no test text; add benchmark={config.benchmark.name} to evaluate on other")
    _check_unchanged(model, config, learned, sum(part.windows_WS[:, 1:].numel() for part in found))
    return found


def _check_domains(model: RunModel, config: Config) -> None:
    """Refuse a folder without text of the run's domains."""
    path = Path(str(config.benchmark.options.get("path", ""))).expanduser()
    # Of an extended run, the path is that of the newest domains only.
    names = config.benchmark.options.get("domains") or (() if config.earlier else model.class_names)
    if not path.is_dir():
        return  # refused with the rest of the data
    missing = [name for name in names if not has_domain(path, name)]
    if missing:
        raise RunFolderError(
            f"benchmark.path: found {path} without text of the run's domains {', '.join(missing)} (NAME_train.txt and "
            f"NAME_test.txt); give their folder, or add benchmark={config.benchmark.name} to measure it on other text"
        )


def _with_tokenizer(model: RunModel, config: Config) -> Config:
    """The config with the tokenizer of the run folder, which need not be trained again or be where it once was."""
    file = model.folder / TOKENIZER
    if not file.is_file():
        return config
    run_tokenizer(model.folder, model.inputs)  # refuses one that has changed

    def encoded(block: BenchmarkConfig) -> BenchmarkConfig:
        if block.name != "language_model":
            return block
        return replace(block, options={**block.options, "tokenizer": str(file)})

    earlier = tuple(replace(entry, benchmark=encoded(entry.benchmark)) for entry in config.earlier)
    return replace(config, benchmark=encoded(config.benchmark), earlier=earlier)


def _check_unchanged(model: RunModel, config: Config, learned: Sequence[bool], found: int) -> None:
    """Refuse test text of another length than the run was evaluated on, in the domains that the model has learned."""
    file = model.folder / "results.json"
    if not file.is_file() or config.benchmark.evaluate != "test":
        return
    expected = sum(compress(Result.from_json(file).test_samples, learned))
    if expected != found:
        raise RunFolderError(
            f"{model.folder}: its text has {found:,} test tokens, the run was evaluated on {expected:,}; restore the "
            f"text, or add benchmark={config.benchmark.name} to measure it on other text"
        )


def other_text(model: RunModel, name: str, overrides: Sequence[str]) -> tuple[str, list[Part]]:
    """Title and windows of other text, by domain."""
    options = [text for text in overrides if text.partition("=")[0] != "benchmark"]
    block = data_config(name, options).benchmark
    if block.name != "language_model":
        raise ConfigError(f"benchmark: found {name} for a language model; give benchmark=language_model with a path")
    for text in options:
        if text.partition("=")[0] not in [f"benchmark.{key}" for key in _OPTIONS]:
            allowed = ", ".join(f"benchmark.{key}" for key in _OPTIONS)
            raise ConfigError(f"override '{text}': has no effect on an evaluation; give {allowed}")
    encoder = TextTokenizer(run_tokenizer(model.folder, model.inputs))
    typed, context = check_source(block)[1], model.network.input_shape[0] - 1
    path, found = str(typed.get("path", "")), list[Part]()
    for domain, file in _text_files(path, typed.get("domains", ())):
        ids_N = encoder.encode(read_domain(file, characters=typed.get("test_characters", 0)))
        found.append(Part(domain, windows_of(ids_N, context=context), None))
        if not len(found[-1].windows_WS):
            raise DataError(f"{file}: has {len(ids_N)} tokens, fewer than a window of {context + 1}; give more text")
    return path, found


def _text_files(given: str, domains: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Name and file of each domain: those of a folder, or the only one of a file."""
    path = Path(given).expanduser()
    if path.is_file():
        if domains:
            raise ConfigError(f"benchmark.domains: found {list(domains)} for the file {given}; leave it out")
        yield path.name.partition(".")[0], path
        return
    if not given or not path.is_dir():
        raise DataError(
            f"benchmark.path: found '{given}'; give a folder with NAME_test.txt of each domain, or a text file"
        )
    for name, files in domain_files(path, domains, parts=("test",)).items():
        yield name, files["test"]
