"""``clframe report``."""

from __future__ import annotations

import argparse
from functools import partial

NAME = "report"
HELP = "write an HTML report with tables and figures of runs"
WORDS = "RUN [RUN ...]"
DESCRIPTION = """\
Writes report.html, a self-contained page, and its tables (CSV, Markdown, LaTeX) and figures (SVG, PNG) to RUN/report.

RUN is a run folder, or a parent folder, which selects all finished runs below it. Runs that differ only in their seed
form a group: mean and standard deviation. Groups are compared with the first one: paired differences over common
seeds with 95 % confidence intervals, accuracy within budgets, cost at equal accuracy, Pareto front. Groups that are not
comparable, because class orders or splits differ, are marked and not subtracted; other benchmarks are refused.

  clframe report runs/quickstart/20260101-120000-seed0       one run
  clframe report runs/quickstart                             all of an experiment
  clframe report runs/er runs/lwf --output comparison        two groups, er as the base
  clframe report runs/quickstart/20260101-120000-seed0 --watch
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--output", metavar="DIR", help="folder to write to (default: RUN/report)")
    parser.add_argument("--watch", action="store_true", help="rewrite the report until all runs are finished")


def act(options: argparse.Namespace) -> int:
    """Write the report."""
    from clframe.report import write_report

    try:
        write_report(options.words, output=options.output, watch=options.watch, on_written=partial(print, flush=True))
    except KeyboardInterrupt:  # the last page written is kept
        return 130
    return 0
