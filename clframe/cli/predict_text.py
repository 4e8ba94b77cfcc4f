"""``clframe predict`` of a language model: continuations of prompts, or scores of texts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from clframe.cli.numbers import whole_number
from clframe.cli.output import write_found
from clframe.errors import ConfigError, DataError
from clframe.printable import printable

if TYPE_CHECKING:
    from clframe.targets.loading import RunModel

TEXT_OPTIONS = ("generate", "score", "stride", "draft", "draft_exit", "document", "domain")
"""Options that only a language model has."""
CLASS_OPTIONS = ("top", "no_graphs")
"""Options that only a classifier has."""
TOKENS = 32
"""Tokens of a continuation where none are given, or the context if that is shorter."""


def refuse_options(options: argparse.Namespace, names: Sequence[str], *, model: str) -> None:
    """Refuse options that have no effect on a model (ConfigError).

    Args:
        options: Those of the verb.
        names: Options that do not apply.
        model: The kind of the model.
    """
    for name in names:
        value = getattr(options, name)
        if value not in (None, False):
            found = "it" if value is True else value
            raise ConfigError(f"--{name.replace('_', '-')}: found {found} for {model}; leave it out")


def act(
    model: RunModel,
    inputs: Sequence[str],
    options: argparse.Namespace,
    *,
    size: int,
    threshold: float | None,
    budget: float | None,
) -> int:
    """Generate or score, print and write."""
    refuse_options(options, CLASS_OPTIONS, model="a language model, which predicts tokens")
    if options.score:
        refuse_options(options, ("generate", "draft", "draft_exit"), model="the scores of given texts")
        return _score(model, inputs, options, size, threshold, budget)
    refuse_options(options, ("stride", "batch_size"), model="generation, which continues one prompt at a time")
    return _generate(model, inputs, options, threshold, budget)


def _generate(
    model: RunModel, inputs: Sequence[str], options: argparse.Namespace, threshold: float | None, budget: float | None
) -> int:
    from clframe.progress import progress_bars
    from clframe.tables import to_csv
    from clframe.targets import text_generation

    context = model.network.input_shape[0] - 1
    tokens = min(TOKENS, context) if options.generate is None else whole_number("--generate", options.generate)
    draft = 0 if options.draft is None else whole_number("--draft", options.draft)
    read, skipped = _read(inputs, options)
    prompts = [text for _, text in read]
    with progress_bars(unit="prompt") as show:
        found = text_generation.continue_prompts(
            model, prompts, tokens=tokens, threshold=threshold, budget=budget, draft=draft,
            draft_exit=options.draft_exit, domain=options.domain, progress=partial(show, "generate"),
        )  # fmt: skip
    _name_skipped(skipped)
    write_found(
        options, as_json=lambda: text_generation.to_json(found, run=str(model.folder)),
        as_csv=lambda: to_csv(text_generation.table(found)), shown=lambda: text_generation.describe(found),
    )  # fmt: skip
    return 3 if skipped else 0


def _score(
    model: RunModel, inputs: Sequence[str], options: argparse.Namespace, size: int, threshold: float | None,
    budget: float | None,
) -> int:  # fmt: skip
    from clframe.progress import progress_bars
    from clframe.tables import to_csv, to_text
    from clframe.targets import text_scoring

    stride = None if options.stride is None else whole_number("--stride", options.stride)
    found_texts, skipped = _read(inputs, options)
    # Lines may be equal, and each is scored.
    texts = dict(found_texts) if options.document == "file" else [text for _, text in found_texts]
    with progress_bars(unit="text") as show:
        found = text_scoring.score_texts(
            model, texts, threshold=threshold, budget=budget, stride=stride, batch_size=size,
            domain=options.domain, progress=partial(show, "score"),
        )  # fmt: skip
    found = replace(found, skipped={**skipped, **found.skipped})
    _name_skipped(found.skipped)
    write_found(
        options, as_json=lambda: text_scoring.to_json(found, run=str(model.folder)),
        as_csv=lambda: to_csv(text_scoring.table(found)),
        shown=lambda: "\n".join([to_text(text_scoring.table(found)), *found.notes]),
    )  # fmt: skip
    return 3 if found.skipped else 0


def _read(inputs: Sequence[str], options: argparse.Namespace) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Names and texts of the arguments, lines or whole files, and the reason for each that cannot be read."""
    from clframe.targets.reading import find_lines

    document = options.document or "line"
    if document not in ("line", "file"):
        raise ConfigError(f"--document: found '{document}'; choose from line, file")
    found: list[tuple[str, str]] = []
    skipped: dict[str, str] = {}
    for given in inputs:
        try:
            if document == "file":
                found.append(_read_file(given))
            else:
                found += [(text, text) for text in find_lines(given, strip=False)]
        except DataError as error:
            skipped[given] = str(error)
    if not found:
        nothing = "predict: found no text; give prompts, or files with one a line"
        raise DataError(next(iter(skipped.values()), nothing))
    return found, skipped


def _read_file(given: str) -> tuple[str, str]:
    from pathlib import Path

    from clframe.data.sources.paths import read_text

    file = os.path.expanduser(given)
    if not os.path.isfile(file):
        raise DataError(f"{file}: no such file; give text files, or leave --document file out")
    return file, read_text(Path(file))


def _name_skipped(reasons: Mapping[str, str]) -> None:
    for reason in reasons.values():
        print(printable(f"clframe: skipped {reason}"), file=sys.stderr)
