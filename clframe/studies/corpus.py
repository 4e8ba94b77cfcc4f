"""Texts to measure models on: those of a benchmark, or the lines of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from clframe.config.schema import Config
from clframe.core.options import check_options
from clframe.data.protocol import hold_out
from clframe.data.source import SOURCES
from clframe.data.sources.paths import text_of
from clframe.data.sources.text import CORPORA
from clframe.errors import ConfigError, DataError

Corpus = Mapping[str, tuple[Sequence[str], Tensor | None]]
"""Texts and their classes of each part: ``fit``, ``test`` and, where some are held out, ``validation``."""


def labeled_texts(config: Config) -> Corpus:
    """The texts of a benchmark, the validation share held out of the training texts as in a run.

    Raises:
        ConfigError: A benchmark without texts.
    """
    block = config.benchmark
    if block.name not in CORPORA:
        raise ConfigError(f"--data: found {block.name}, which holds no texts; give one of {', '.join(sorted(CORPORA))}")
    options = check_options(SOURCES.get(block.name), block.options, where="benchmark")
    places = {key: value for key, value in options.items() if key in ("data_dir", "download")}
    corpus = CORPORA[block.name](**places)
    classes = block.classes if block.classes is not None else len(corpus.class_names)
    found: dict[str, tuple[Sequence[str], Tensor]] = {}
    for part, pairs in (("fit", corpus.train), ("test", corpus.test)):
        y_N = corpus.ids(pairs)
        inside = (y_N < classes).nonzero().flatten()
        found[part] = [pairs[at][0] for at in inside.tolist()], y_N[inside]
    texts, y_N = found["fit"]
    train, held = hold_out(y_N, block.validation, seed=config.seed)
    if len(held):
        found["fit"] = [texts[at] for at in train.tolist()], y_N[train]
        found["validation"] = [texts[at] for at in held.tolist()], y_N[held]
    return found


def lines_of(file: Path) -> Corpus:
    """The texts of a file, one a line: the same to fit and to measure on, without labels.

    Raises:
        DataError: No file, or none in it.
    """
    if not file.is_file():
        raise DataError(f"--data: no file {file}; give a text file with one text a line, or a benchmark")
    texts = [line.strip() for line in text_of(file).splitlines() if line.strip()]
    if not texts:
        raise DataError(f"--data: {file} holds no text; give one a line")
    return {"fit": (texts, None), "test": (texts, None)}
