"""``clframe predict``."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from clframe.cli import predict_text
from clframe.cli.numbers import decimal, whole_number
from clframe.cli.output import check_files, write_found
from clframe.errors import ConfigError, DataError
from clframe.printable import printable

NAME = "predict"
HELP = "predict files, folders or texts with a run"
WORDS = "RUN INPUT [INPUT ...]"
DESCRIPTION = """\
Predicts the class of every input with the trained model of a run and prints a table: class, probability, the exit that
decided, MACs spent. Images are read, converted and resized as in training.

  clframe predict RUN photo.jpg holiday/                    files; folders are searched for images at any depth
  clframe predict RUN 'photos/**/*.png' --top 5             the five most probable classes
  clframe predict RUN images.npz --csv out.csv              array x; a CSV file of paths (column path) works too
  clframe predict RUN photos --budget 0.5                   half the backbone's MACs on average
  clframe predict RUN photos --json -                       JSON on the standard output, without the table
  clframe predict RUN 'where is my card' texts.txt          models of texts: texts, one a line, or a CSV column text

Of a language model it continues prompts, or scores texts (nats per token, perplexity):

  clframe predict RUN 'def area' --generate 40              the most likely tokens, one after the other
  clframe predict RUN prompts.txt --threshold 0.9           a token stops at the first exit that is sure enough
  clframe predict RUN 'def area' --draft 4                  drafts of an exit, confirmed by the last: the same tokens
  clframe predict RUN a.txt b.txt --score --document file   whole files; otherwise a line is a text

Without --threshold and --budget the strategy's own rule decides: early_exit where it is part of it, else the last exit.
A file that is missing or unreadable is named and skipped; the exit code is then 3, and 2 if nothing could be predicted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    add("--threshold", metavar="T", help="largest probability from which an exit decides")
    add("--budget", metavar="SHARE", help="mean cost as a share of the backbone's MACs, for a run with validation data")
    add("--top", metavar="N", help="number of classes to show (default: 1)")
    add("--batch-size", metavar="N", help="inputs per batch (default: 64)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps or auto (default: cpu)")
    add("--no-graphs", action="store_true", help="early exit on CUDA without CUDA graphs, which are used where faster")
    add("--generate", metavar="N", help="language model: tokens to generate after each prompt (default: 32)")
    add("--draft", metavar="N", help="language model: drafts of up to N tokens at an exit, confirmed by the last")
    add("--draft-exit", metavar="NAME", help="language model: the exit that drafts (default: the first)")
    add("--score", action="store_true", help="language model: score the texts instead of continuing them")
    add("--stride", metavar="N", help="with --score: distance of the windows of long texts (default: the context)")
    add("--document", metavar="NAME", help="language model: a text is a line (default) or a whole file")
    add("--domain", metavar="NAME", help="language model with adapters for each domain: that of the texts")
    add("--json", metavar="FILE", help="write JSON to a file, or to the standard output (-) instead of the table")
    add("--csv", metavar="FILE", help="write CSV to a file, or to the standard output (-) instead of the table")


def act(options: argparse.Namespace) -> int:
    """Predict, print and write."""
    run, *inputs = options.words or [""]
    if not run:
        raise ConfigError("predict: found no run; give a run folder, such as the one clframe run printed")
    if not inputs:
        raise ConfigError("predict: found no inputs; give image files, folders or patterns after the run")
    check_files(options, "json", "csv")
    top = 1 if options.top is None else whole_number("--top", options.top)
    size = 64 if options.batch_size is None else whole_number("--batch-size", options.batch_size)
    threshold, budget = decimal("--threshold", options.threshold), decimal("--budget", options.budget)

    from clframe.device_names import usable_device
    from clframe.progress import progress_bars
    from clframe.tables import to_text
    from clframe.targets import prediction
    from clframe.targets.loading import RunModel, load_run

    model = load_run(run, kind=RunModel, device=str(usable_device(options.device)), where=NAME)
    if model.network.vocabulary:
        return predict_text.act(model, inputs, options, size=size, threshold=threshold, budget=budget)
    predict_text.refuse_options(options, predict_text.TEXT_OPTIONS, model="a classifier")
    with progress_bars(unit="input") as show:
        found = prediction.predict(
            model, inputs, threshold=threshold, budget=budget, top=top, batch_size=size,
            graphs=not options.no_graphs, progress=partial(show, "predict"),
        )  # fmt: skip
    for reason in found.skipped.values():
        print(printable(f"clframe: skipped {reason}"), file=sys.stderr)
    if not found:
        count = len(found.skipped)
        raise DataError(f"predict: none of {count} inputs could be read; give other files")
    write_found(
        options, as_json=lambda: prediction.to_json(found, run=run), as_csv=lambda: prediction.to_csv(found),
        shown=lambda: "\n".join([to_text(prediction.table(found)), *prediction.summary(found)]),
    )  # fmt: skip
    return 3 if found.skipped else 0
