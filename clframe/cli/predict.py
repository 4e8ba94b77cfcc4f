"""``clframe predict``."""

from __future__ import annotations

import argparse
import sys
from functools import partial

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

Without --threshold and --budget the strategy's own rule decides: early_exit where it is part of it, else the last exit.
A file that is missing or unreadable is named and skipped; the exit code is then 3, and 2 if nothing could be predicted.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    add("--threshold", metavar="T", help="largest probability from which an exit decides")
    add("--budget", metavar="SHARE", help="mean cost as a share of the backbone's MACs, for a run with validation data")
    add("--top", default="1", metavar="N", help="number of classes to show (default: 1)")
    add("--batch-size", default="64", metavar="N", help="inputs per batch (default: 64)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps or auto (default: cpu)")
    add("--no-graphs", action="store_true", help="early exit on CUDA without CUDA graphs, which are used where faster")
    add("--json", metavar="FILE", help="write JSON to a file, or to the standard output (-) instead of the table")
    add("--csv", metavar="FILE", help="write CSV to a file, or to the standard output (-) instead of the table")


def act(options: argparse.Namespace) -> int:
    """Predict, print and write."""
    run, *inputs = options.words or [""]
    if not run:
        raise ConfigError("predict: found no run; give a run folder, such as the one clframe run printed")
    if not inputs:
        raise ConfigError("predict: found no inputs; give image files, folders or patterns after the run")
    if options.json == "-" and options.csv == "-":
        raise ConfigError("--json: found -, and --csv too; write one of them to a file")
    top, size = whole_number("--top", options.top), whole_number("--batch-size", options.batch_size)
    threshold, budget = decimal("--threshold", options.threshold), decimal("--budget", options.budget)

    from clframe.files import write_atomically
    from clframe.progress import progress_bars
    from clframe.tables import to_text
    from clframe.targets import prediction
    from clframe.targets.loading import load_model
    from clframe.targets.opening import usable_device

    model = load_model(run, device=str(usable_device(options.device)), where=NAME)
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
    as_json = partial(prediction.to_json, run=run)
    for target, render in ((options.json, as_json), (options.csv, prediction.to_csv)):
        if target == "-":
            sys.stdout.write(render(found))
        elif target is not None:
            write_atomically(target, render(found))
    if "-" not in (options.json, options.csv):
        print(to_text(prediction.table(found)), *prediction.summary(found), sep="\n")
    return 3 if found.skipped else 0


def whole_number(option: str, given: str) -> int:
    """Parse a whole number of at least 1.

    >>> whole_number("--top", "5")
    5
    """
    if not given.isascii() or not given.isdigit() or not 1 <= int(given) < 2**31:
        raise ConfigError(f"{option}: found '{given}'; give a whole number of at least 1")
    return int(given)


def decimal(option: str, given: str | None) -> float | None:
    """Parse a number; None where the option is not given.

    >>> decimal("--threshold", "0.5")
    0.5
    """
    if given is None:
        return None
    try:
        return float(given)
    except ValueError:
        raise ConfigError(f"{option}: found '{given}'; give a number") from None
