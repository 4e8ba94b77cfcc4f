"""Extension of language models: new domains are encoded by the tokenizer of the run, in windows of its length."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from clframe.config.load import sets_key
from clframe.config.schema import BenchmarkConfig
from clframe.data.inputs import InputFormat
from clframe.data.source import SOURCES
from clframe.data.tokenizer import TextTokenizer, digest_of, read_tokenizer
from clframe.errors import ConfigError
from clframe.targets.run_tokenizer import TOKENIZER, run_tokenizer

_OF_OTHER_DATA: Final = ("domains", "tokenizer", "tokenizer_text", "vocabulary", "context")
"""Options of the parent's data that do not carry over: which domains, and what its tokenizer was made from."""


def reads_text(data: Mapping[str, Any]) -> bool:
    """Whether the data that a checkpoint describes are windows of text for a language model."""
    return dict(data.get("inputs", {})).get("kind") == "language"


def without_text_options(block: BenchmarkConfig) -> BenchmarkConfig:
    """The block of a language model's data, without options that new data have for themselves."""
    return replace(block, options={key: value for key, value in block.options.items() if key not in _OF_OTHER_DATA})


def fit_text(
    block: BenchmarkConfig, folder: Path, data: Mapping[str, Any], *, overrides: Sequence[str]
) -> BenchmarkConfig:
    """Return the block of new text with tokenizer, vocabulary and context of the run, as one experience.

    Args:
        block: New data.
        folder: Folder of the run.
        data: The data that its checkpoint describes.
        overrides: What the user has given; other values of the block are those of the config file of its data set.

    Raises:
        ConfigError: Another tokenizer, vocabulary or context in the block.
        RunFolderError: See :func:`~clframe.targets.run_tokenizer.run_tokenizer`.
    """
    if block.name not in SOURCES:
        return block
    takes = inspect.signature(SOURCES.get(block.name, where="benchmark.name")).parameters
    if "tokenizer" not in takes:
        return block
    content = run_tokenizer(folder, InputFormat.of(data["inputs"]))
    given = str(block.options.get("tokenizer") or "")
    if given and digest_of(read_tokenizer(given, where="benchmark.tokenizer")) != digest_of(content):
        raise ConfigError(f"benchmark.tokenizer: found {given}, but the run was trained with another one; leave it out")
    options = {**block.options, "tokenizer": str(tokenizer_file(folder))}
    for key, value in {"vocabulary": len(TextTokenizer(content)), "context": data["input_shape"][0] - 1}.items():
        if sets_key(overrides, f"benchmark.{key}") and options[key] != value:
            raise ConfigError(f"benchmark.{key}: found {options[key]}, but the run has {value}; leave it out")
        if key in takes:
            options[key] = value
    experiences = block.experiences if sets_key(overrides, "benchmark.experiences") else 1
    return replace(block, options=options, experiences=experiences)


def tokenizer_file(folder: Path) -> Path:
    """The tokenizer of a run, as later configs name it."""
    return (folder / TOKENIZER).resolve()
