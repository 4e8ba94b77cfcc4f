"""``clframe evaluate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from clframe.cli.context import parse_run
from clframe.cli.numbers import decimal, whole_number
from clframe.cli.output import check_files
from clframe.printable import printable

NAME = "evaluate"
HELP = "measure a run on its own test data or on other data"
WORDS = "RUN [benchmark=NAME] [benchmark.KEY=VALUE ...]"
DESCRIPTION = """\
Measures the trained model of a run on labeled data: accuracy with 95 % confidence intervals, by exit and by class, the
confusion matrix, calibration and failure prediction of every exit, and the mean MACs of a prediction.

  clframe evaluate RUN                                            the run's own test data, as in results.json
  clframe evaluate RUN benchmark=image_folder benchmark.path=new  other images, in one folder per class
  clframe evaluate RUN benchmark=csv benchmark.path=new.csv       a list of images; npz works too
  clframe evaluate RUN benchmark=svhn --json -                    the test part of another data set

Classes are matched by name; a subset of the run's classes is enough. Images are converted and resized as in training.
All samples count, unless the data has a test part (test/ next to train/, a column split, x_test): then only that.

Of a language model: perplexity, nats per token and next-token accuracy of each domain and exit.

  clframe evaluate RUN                                            the test text of its domains, as in results.json
  clframe evaluate RUN benchmark=language_model benchmark.path=FOLDER      NAME_test.txt of other domains; or one file
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    add("--threshold", metavar="T", help="largest probability from which an exit decides")
    add("--budget", metavar="SHARE", help="mean cost as a share of the backbone's MACs, for a run with validation data")
    add("--batch-size", default="64", metavar="N", help="samples per batch (default: 64)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, cuda:1, mps or auto (default: cpu)")
    add("--json", metavar="FILE", help="write JSON to a file, or to the standard output (-) instead of the tables")
    add("--output", metavar="DIR", help="folder for evaluation.json, tables (CSV) and the confusion matrix (SVG, PNG)")


def act(options: argparse.Namespace) -> int:
    """Evaluate, print and write."""
    run, overrides = parse_run(options, then="benchmark=NAME and benchmark.KEY=VALUE")
    check_files(options, "json")
    size = whole_number("--batch-size", options.batch_size)
    threshold, budget = decimal("--threshold", options.threshold), decimal("--budget", options.budget)

    from clframe.cli.context import notices
    from clframe.files import write_atomically
    from clframe.progress import progress_bars
    from clframe.tables import to_text
    from clframe.targets import evaluation, evaluation_output, text_evaluation, text_evaluation_output

    if options.output is not None:
        from clframe.files import require_writable

        require_writable(Path(options.output).expanduser())
    with notices(quiet=True), progress_bars(unit="sample") as show:
        found = evaluation.evaluate(
            run, overrides, threshold=threshold, budget=budget, batch_size=size, device=options.device, progress=show
        )
    skipped: Mapping[str, str] = {}
    write: Callable[[Path], Path]
    if isinstance(found, text_evaluation.TextEvaluation):
        summary, tables = text_evaluation_output.describe(found), text_evaluation_output.tables(found)
        content, write = text_evaluation.to_json(found), partial(text_evaluation_output.write_folder, found)
    else:
        summary, tables = evaluation_output.describe(found), evaluation_output.shown_tables(found)
        content, write = evaluation.to_json(found), partial(evaluation_output.write_folder, found)
        skipped = found.skipped
    for reason in skipped.values():
        print(printable(f"clframe: skipped {reason}"), file=sys.stderr)
    if options.json == "-":
        sys.stdout.write(content)
    elif options.json is not None:
        write_atomically(options.json, content)
    if options.json != "-":
        print(summary, end="\n\n")
        print("\n\n".join(to_text(table) for table in tables))
    if options.output is not None:
        written = write(Path(options.output).expanduser())
        print(f"\n{written}", file=sys.stderr if options.json == "-" else sys.stdout)
    return 3 if skipped else 0
